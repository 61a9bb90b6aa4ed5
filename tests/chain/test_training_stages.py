"""Training in stages within a chain: the recipe files, what is refused, and a small chain to its end."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from deltacache.chain import ChainConfig, ChainPaths, run_chain
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
        ([("a", "256px"), ("a", "512px")], "give each a name of its own"),
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


def test_a_chain_in_stages_to_its_end(tmp_path: Path) -> None:
    """Four tokenizer stages of two sizes and two world stages; the second call finds all of it finished."""
    demo = demo_config(tmp_path / "videos/train", tmp_path / "videos/test", tmp_path / "futures.csv", seed=3)
    draw_world(tmp_path, seed=3, train_videos=6, test_scenes=2, image_size=64, reporter=SilentReporter())
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
    config, out = ChainConfig.model_validate(content), tmp_path / "out"
    paths = run_chain(config, out, SilentReporter())
    assert paths == ChainPaths(out)
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
    files = {path: path.stat().st_mtime_ns for path in (out / "stages").rglob("*") if path.is_file()}
    run_chain(config, out, SilentReporter())
    assert "STALE" not in describe_output(out)
    content["tokenizer"]["stages"][-1]["config"]["training"]["steps"] = 10
    longer = ChainConfig.model_validate(content)
    with pytest.raises(
        MismatchError, match=r"tokenizer has 9 of 10 steps, but .*deltas.*--from-stage deltas"
    ):
        run_chain(longer, out, SilentReporter())
    assert not (out / "tokenizer/checkpoints/step-00000010").exists()
    (out / "tokenizer").rename(tmp_path / "kept")
    shutil.copytree(out / "stages/tokenizer/cooldown1", out / "tokenizer")
    stale = [line for line in describe_output(out).splitlines() if "STALE" in line]
    assert len(stale) == 2  # the delta tokens and the evaluation
    shutil.rmtree(out / "tokenizer")
    (tmp_path / "kept").rename(out / "tokenizer")
    assert "STALE" not in describe_output(out)
    assert files == {path: path.stat().st_mtime_ns for path in files}
