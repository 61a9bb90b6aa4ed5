"""Training in stages within a chain: the recipe files, what is refused, and a small chain to its end."""

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml
from typer.testing import CliRunner

from deltacache.chain import ChainConfig, ChainPaths, run_chain
from deltacache.cli import app
from deltacache.demo.demo import demo_config
from deltacache.demo.world import draw_world
from deltacache.descriptions import describe_output
from deltacache.schemas.configs import (
    PRESETS,
    load_config,
    save_config,
    tokenizer_preset,
    world_preset,
)
from deltacache.schemas.errors import DeltacacheError, MismatchError
from deltacache.schemas.progress import SilentReporter


@pytest.mark.parametrize(
    ("preset", "stages"),
    [("released", ["256px", "512px", "cooldown1", "cooldown2"]), ("paper", ["256px", "512px"])],
)
def test_the_chain_of_a_recipe_is_its_stages(preset: str, stages: list[str], tmp_path: Path) -> None:
    config = load_config(PRESETS / preset / "chain.yaml", ChainConfig)
    assert [stage.name for stage in config.tokenizer_stages] == stages
    assert [stage.image_size for stage in config.tokenizer_stages] == [256] + [None] * (len(stages) - 1)
    assert [stage.config for stage in config.tokenizer_stages] == [
        tokenizer_preset(preset, s) for s in stages
    ]
    worlds = config.world_stages("deltaworld")
    assert [stage.config for stage in worlds] == [
        world_preset(preset, stage) for stage in ("main", "cooldown")
    ]
    sampling = config.train_videos.sampling
    assert (sampling.frames, sampling.spacing_min_s, sampling.spacing_max_s) == (8, 1 / 25, 1 / 3)
    assert (sampling.crop_scale, sampling.crop_ratio) == ((0.6, 1.0), (3 / 4, 4 / 3))
    assert sampling.flip_probability == (0.5 if preset == "released" else 0)
    assert config.train_videos.image_size == 512
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml", ChainConfig) == config


def chain_of(tokenizer: Any, tmp_path: Path, worlds: Any = None) -> ChainConfig:
    content = yaml.safe_load((PRESETS / "released" / "chain.yaml").read_text())
    content["tokenizer"] = tokenizer
    content["worlds"] = worlds or content["worlds"]
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump(content))
    return load_config(tmp_path / "chain.yaml", ChainConfig)


def test_a_preset_may_be_changed_where_it_is_named(tmp_path: Path) -> None:
    chain = chain_of({"preset": "tiny", "training": {"batch_size": 8, "accumulation": 4}}, tmp_path)
    (stage,) = chain.tokenizer_stages
    expected = tokenizer_preset("tiny").training.model_copy(update={"batch_size": 8, "accumulation": 4})
    assert stage.config.training == expected


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([("a", "512px")], "stage a has training.start weights: the first stage is random"),
        ([("a", "256px"), ("b", "256px")], "stage b has training.start random"),
        ([("a", "256px"), ("a", "512px")], "give each its own name"),
        ([("a", "1024px")], "stage '1024px' is not one of"),
        ([("a/b", "256px")], "stage name"),
    ],
)
def test_stages_that_make_no_sense(stages: list[tuple[str, str]], message: str, tmp_path: Path) -> None:
    listed = [{"name": name, "config": {"preset": "released", "stage": stage}} for name, stage in stages]
    with pytest.raises(DeltacacheError, match=message):
        chain_of({"stages": listed}, tmp_path)


def test_the_last_stage_has_the_size_of_the_videos(tmp_path: Path) -> None:
    stage = {"name": "a", "image_size": 256, "config": {"preset": "released"}}
    with pytest.raises(DeltacacheError, match="leave its image_size out"):
        chain_of({"stages": [stage]}, tmp_path)


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A finished chain of four tokenizer stages of two sizes and two world stages: its YAML and its output folder."""
    root = tmp_path_factory.mktemp("staged")
    demo = demo_config(root / "videos/train", root / "videos/test", root / "futures.csv", seed=3)
    draw_world(root, seed=3, train_videos=6, test_scenes=2, image_size=64, reporter=SilentReporter())
    content = demo.model_dump(mode="json")

    def stages(rates: list[tuple[str, str, int, float]], **changes: Any) -> dict[str, Any]:
        listed = []
        for name, start, steps, rate in rates:
            training = {
                "start": start,
                "steps": steps,
                "learning_rate": rate,
                "batch_size": 4,
                "warmup_steps": 2,
            }
            listed.append({"name": name, "config": {"preset": "tiny", "training": training, **changes}})
        return {"stages": listed}

    content["tokenizer"] = stages(
        [
            *(("32px", "random", 6, 1e-3), ("64px", "weights", 5, 1e-3)),
            *(("cooldown1", "everything", 7, 1e-4), ("cooldown2", "everything", 9, 1e-5)),
        ]
    )
    content["tokenizer"]["stages"][0]["image_size"] = 32
    cooled = stages([("main", "random", 6, 1e-3), ("cooldown", "everything", 8, 1e-4)], candidates=4)
    content["worlds"] = {"deltaworld": cooled}
    content["evaluation"]["samples"] = 2
    paths = run_chain(ChainConfig.model_validate(content), root / "out", SilentReporter())
    assert paths == ChainPaths(root / "out")
    return content, root / "out"


def changed_chain(content: dict[str, Any], kind: str, **training: Any) -> ChainConfig:
    """The chain with other settings of the last stage of its tokenizer or its world model."""
    changed = json.loads(json.dumps(content))
    model = changed["tokenizer"] if kind == "tokenizer" else changed["worlds"]["deltaworld"]
    model["stages"][-1]["config"]["training"] |= training
    return ChainConfig.model_validate(changed)


def times_below(folder: Path) -> dict[Path, int]:
    """When each file was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def stale_parts(out: Path) -> list[str]:
    """Names of the parts that ``inspect`` shows as stale."""
    return [line.split()[0] for line in describe_output(out).splitlines() if "STALE" in line]


def test_a_chain_in_stages_to_its_end(staged: tuple[dict[str, Any], Path]) -> None:
    """Each stage begins with the one before it; the second call finds all of it finished."""
    content, out = staged
    names = {path.name for path in (out / "stages/tokenizer").iterdir()}
    assert names == {"32px", "64px", "cooldown1"}
    before = None
    for folder, step in (
        *(("stages/tokenizer/32px", 6), ("stages/tokenizer/64px", 5), ("stages/tokenizer/cooldown1", 7)),
        *(("tokenizer", 9), ("stages/worlds/deltaworld/main", 6), ("worlds/deltaworld", 8)),
    ):
        metadata = json.loads((out / folder / f"checkpoints/step-{step:08d}/config.json").read_text())
        begun = metadata["started_from"]
        assert (begun and begun["fingerprint"]) == (None if folder.endswith("main") else before)
        assert metadata["image_size"] == (32 if folder.endswith("32px") else 64)
        before = metadata["fingerprint"]
    files = times_below(out / "stages")
    run_chain(ChainConfig.model_validate(content), out, SilentReporter())
    assert files == times_below(out / "stages")
    assert not stale_parts(out)


@pytest.mark.parametrize(
    ("kind", "training", "message"),
    [
        ("tokenizer", {"steps": 10}, r"tokenizer has 9 of 10 steps, but .*deltas.*--from-stage deltas"),
        ("tokenizer", {"steps": 8}, r"was trained for 9 steps, but .*steps is 8.*--from-stage tokenizer"),
        ("tokenizer", {"learning_rate": 0.1}, r"learning_rate was 1e-05, now 0.1.*--from-stage tokenizer"),
        ("worlds", {"steps": 9}, r"deltaworld has 8 of 9 steps, but .*evaluation.*--from-stage evaluation"),
        ("worlds", {"learning_rate": 0.1}, r"learning_rate was 0.0001, now 0.1.*--from-stage worlds"),
        ("worlds", {"batch_size": 8}, r"effective batch of 4, now it is 8.*--from-stage worlds"),
    ],
)
def test_changed_trainings_are_refused_before_anything_starts(
    staged: tuple[dict[str, Any], Path], kind: str, training: dict[str, Any], message: str
) -> None:
    """Also where stages before them would have been removed."""
    content, out = staged
    files = times_below(out)
    config = changed_chain(content, kind, **training)
    with pytest.raises(MismatchError, match=message):
        run_chain(config, out, SilentReporter())
    if "steps" not in training:
        with pytest.raises(MismatchError, match=message):
            run_chain(config, out, SilentReporter(), "deltas" if kind == "tokenizer" else "evaluation")
    assert files == times_below(out)


@pytest.mark.parametrize(("videos", "stage"), [("train", "tokenizer"), ("test", "evaluation")])
def test_added_videos_are_refused_before_their_features_are_extracted(
    staged: tuple[dict[str, Any], Path], videos: str, stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New ones, and more views of known ones; the stage that the message names takes them."""
    content, out = staged
    files = times_below(out)
    source = Path(content[f"{videos}_videos"]["source"])
    more_views = json.loads(json.dumps(content))
    more_views[f"{videos}_videos"]["views"] = 2
    refused = rf"features/{videos} would gain clips of \d+ videos?, such as .* --from-stage {stage}"
    with pytest.raises(MismatchError, match=refused):
        run_chain(ChainConfig.model_validate(more_views), out, SilentReporter())
    config = ChainConfig.model_validate(content)
    added = source / "added.mp4"
    shutil.copyfile(next(source.rglob("*.mp4")), added)
    try:
        with pytest.raises(MismatchError, match=rf"{refused}") as error:
            run_chain(config, out, SilentReporter())
        assert "1 video, such as added.mp4" in str(error.value)
        monkeypatch.setattr("deltacache.chain.extract_features", Mock(side_effect=InterruptedError))
        with pytest.raises(InterruptedError):
            run_chain(config, out, SilentReporter(), stage)
    finally:
        added.unlink()
    assert files == times_below(out)


def test_inspect_shows_what_is_stale(staged: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    _, out = staged
    for folder, other, found in (
        ("tokenizer", "stages/tokenizer/cooldown1", ["deltas", "evaluation"]),
        ("stages/tokenizer/64px", "stages/tokenizer/32px", ["stages/tokenizer/cooldown1"]),
        (
            "stages/worlds/deltaworld/main",
            "worlds/deltaworld",
            ["stages/worlds/deltaworld/main", "worlds/deltaworld"],
        ),
    ):
        (out / folder).rename(tmp_path / "kept")
        shutil.copytree(out / other, out / folder)
        assert stale_parts(out) == found
        shutil.rmtree(out / folder)
        (tmp_path / "kept").rename(out / folder)
    assert not stale_parts(out)


def test_from_stage_makes_again_what_follows(staged: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    """Other ``steps`` in the middle: the command refuses, and makes again from the stage that it is given."""
    content, out = staged
    earlier, later = times_below(out / "stages/tokenizer"), times_below(out / "stages/worlds")
    save_config(changed_chain(content, "tokenizer", steps=10), tmp_path / "chain.yaml")
    command = ["run", str(tmp_path / "chain.yaml"), str(out)]
    refused = CliRunner().invoke(app, command)
    assert isinstance(refused.exception, MismatchError)
    longer = out / "tokenizer/checkpoints/step-00000010"
    assert not longer.exists()
    done = CliRunner().invoke(app, [*command, "--from-stage", "deltas"])
    assert done.exit_code == 0, done.output
    assert longer.is_dir()
    assert not stale_parts(out)
    assert earlier == times_below(out / "stages/tokenizer")
    again = times_below(out / "stages/worlds")
    weights = [path for path in later if path.name == "model.safetensors"]
    assert weights
    assert all(again[path] > later[path] for path in weights)
