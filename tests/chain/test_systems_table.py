"""The table of compare-systems: of the right features, backbone and evaluation, and readable by itself."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from trained_systems import TrainedSystems
from typer.testing import CliRunner

from deltacache.cli import app
from deltacache.demo.demo import demo_config
from deltacache.evaluate.output import read_metrics
from deltacache.evaluate.settings import CLIPS, evaluation
from deltacache.models.backbone import tiny_encoder
from deltacache.models.checkpoints import load_world
from deltacache.pipeline.datasets.dataset import open_dataset
from deltacache.pipeline.jobs.offline import extract_features
from deltacache.schemas.datasets import BackboneCard
from deltacache.schemas.errors import CheckpointError, DeltacacheError, MismatchError
from deltacache.schemas.progress import SilentReporter
from deltacache.systems.table import (
    CostPlan,
    SystemsComparison,
    backbone_of,
    check_trained_on,
    compare_systems,
    load_systems,
    shown_table,
)
from deltacache.systems.training import SystemPaths
from reporters import Lines

CONTEXT, HORIZONS, SAMPLES, SEED = 4, (1, 3), 3, 7
COSTS = ("futures_gflops", "step_gflops", "step_seconds", "step_gib")


def _compare(
    systems: TrainedSystems, features: Path, reporter: SilentReporter | None = None, **changes: Any
) -> Path:
    """``systems.md`` of a small comparison; ``changes`` of the evaluation's settings and of the plan."""
    plan = CostPlan(
        context=CONTEXT,
        horizon=HORIZONS[-1],
        samples=SAMPLES,
        crops=1,
        measure="batch_size" in changes,
        batch_size=changes.pop("batch_size", 1),
        device="cpu",
        backbone=changes.pop("backbone", None),
    )
    flags = {
        "out": systems.paths.evaluation,
        **systems.paths.models(systems.config),
        "context": CONTEXT,
        "horizons": HORIZONS,
        "samples": SAMPLES,
        "seed": SEED,
        "futures": systems.futures,
        "device": "cpu",
    }
    settings = evaluation({CLIPS: str(systems.test)}, {}, **flags | changes)
    return compare_systems(systems.paths.out, str(features), settings, plan, reporter or SilentReporter())


@pytest.fixture(scope="module")
def text(systems: TrainedSystems) -> str:
    """The table of all systems, where it belongs."""
    return _compare(systems, systems.train, batch_size=2).read_text()


@pytest.fixture(scope="module")
def rows(systems: TrainedSystems, text: str) -> list[dict]:
    return pq.read_table(systems.paths.out / "systems.parquet").to_pylist()


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in encoder as a directory, named as a person might."""
    folder = tmp_path_factory.mktemp("backbones") / "ours"
    tiny_encoder().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def from_folder(systems: TrainedSystems, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same features, made with that directory: the card knows its name only."""
    return _extracted(systems, tmp_path_factory.mktemp("from_folder") / "features", backbone=str(tiny_folder))


def _extracted(systems: TrainedSystems, out: Path, **changes: Any) -> Path:
    root = systems.futures.parent
    videos = demo_config(root / "videos/train", root / "videos/test", systems.futures, seed=1).train_videos
    extract_features(videos.model_copy(update=changes), out, SilentReporter())
    return out


def _heading(text: str) -> list[str]:
    return [cell.strip() for cell in text.splitlines()[0].strip("|").split("|")]


def _lines(text: str) -> dict[str, list[str]]:
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")][2:]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_the_table_has_the_bound_and_a_line_a_system(
    systems: TrainedSystems, text: str, rows: list[dict]
) -> None:
    lines = _lines(text)
    assert list(lines) == ["Copy of the last frame", *systems.config.systems]
    assert lines["Copy of the last frame"][-4:] == ["–"] * 4
    first = [row for row in rows if row["system"] == "dino-world" and row["relative"] is not None]
    assert {row["quantity"]: row["relative"] for row in first} == dict.fromkeys(COSTS, 1.0)
    gflops = {row["system"]: row["value"] for row in rows if row["quantity"] == "step_gflops"}
    assert gflops["best-of-many"] > gflops["dino-world"] > gflops["delta-tokens"] > gflops["discriminative"]


def test_headings_have_units_and_seconds(text: str) -> None:
    assert _heading(text) == [
        *("system", "loss, 1 step (0.20 s)", "loss, 3 steps (0.60 s)"),
        *("coverage, 1 step (0.20 s)", "coverage, 3 steps (0.60 s)"),
        *("odds error, 1 step (0.20 s)", "odds error, 3 steps (0.60 s)"),
        *("futures (GFLOP)", "step (GFLOP)", "step (s)", "step (GiB)"),
    ]
    assert "backbone and tokenizer included" in text


def test_scores_are_those_of_the_evaluation_with_intervals_and_counts(
    systems: TrainedSystems, text: str, rows: list[dict]
) -> None:
    scored = {
        (row["world"], row["metric"], row["aggregation"], row["horizon"]): row
        for row in read_metrics(systems.paths.evaluation).to_pylist()
        if row["world"] or row["method"] == "copy_last"
    }
    quality = [row for row in rows if row["quantity"] not in COSTS]
    assert {row["system"] for row in quality} == {"copy_last", *systems.config.systems}
    for row in quality:
        expected = scored[row["world"], row["quantity"], row["aggregation"], row["horizon"]]
        for column in ("value", "ci_low", "ci_high", "n_sequences", "horizon_s"):
            assert row[column] == expected[column]
    counts = {row["quantity"]: row["n_sequences"] for row in quality}
    assert (
        f"Over {counts['smooth_l1']} sequences of clips (loss at 1, 3 steps) and {counts['mode_coverage']} scenes of "
        "clips (coverage at 1, 3 steps; odds error at 1, 3 steps)."
    ) in text


def test_every_system_is_named_with_its_fingerprint(
    systems: TrainedSystems, text: str, rows: list[dict]
) -> None:
    """Several of them are called DeltaWorld in the evaluation's own tables."""
    for name in systems.config.systems:
        fingerprint = load_world(systems.paths.world(name)).fingerprint
        assert {row["world"] for row in rows if row["system"] == name} == {fingerprint}
        (line,) = [line for line in text.splitlines() if line.startswith(f"- {name}: ")]
        assert fingerprint in line


def _score(method: str, metric: str, value: float, horizon: int = 1, dataset: str = "vspw") -> dict[str, Any]:
    return {
        "system": method,
        "method": method,
        "world": None,
        "quantity": metric,
        "dataset": dataset,
        "aggregation": "single",
        "horizon": horizon,
        "horizon_s": 0.2 * horizon,
        "n_sequences": 5,
        "value": value,
        "includes_backbone": None,
    }


def test_shares_are_per_cent_and_depth_is_metres() -> None:
    shown = shown_table(
        [
            *(_score("copy_last", "miou", 0.4567), _score("copy_last", "rmse", 3.25, dataset="kitti")),
            *(_score("present", "miou", 0.6), _score("present", "rmse", 2.5, dataset="kitti")),
            *(_score("copy_last", "delta1", 0.9, dataset="kitti"),),
        ]
    )
    step = "1 step (0.20 s)"
    assert shown.heading == [
        *("system", f"kitti RMSE (m), {step}", f"kitti δ1 (%), {step}", f"vspw mIoU (%), {step}")
    ]
    assert shown.body == [
        ["Copy of the last frame", "3.25", "90.0", "45.7"],
        ["True future (bound)", "2.5", "–", "60.0"],
    ]


@pytest.mark.parametrize(
    ("of_backbone", "of_card", "words"),
    [
        ({"weights_sha256": "f" * 64}, {}, ("features of backbone", "ffffffff")),
        ({}, {"hidden_size": 128}, ("128-wide tokens", "expects 64")),
        ({"layers": (0,)}, {}, ("the last hidden state without PCA", "layers 0 without PCA")),
        ({"layers": (1,), "pca_fingerprint": "0123"}, {}, ("the last hidden state", "reduced by PCA 0123")),
        ({}, {"dtype": "int8"}, ("trained on features", "int8")),
    ],
)
def test_features_of_another_kind(
    systems: TrainedSystems, of_backbone: dict[str, Any], of_card: dict[str, Any], words: tuple[str, ...]
) -> None:
    card = open_dataset(systems.train, "features").card
    loaded = load_systems(systems.paths.out)
    check_trained_on(systems.paths.out, loaded, card, "these")
    changes = {"backbone": card.backbone.model_copy(update=of_backbone), **of_card}
    with pytest.raises(MismatchError) as refused:
        check_trained_on(systems.paths.out, loaded, card.model_copy(update=changes), "these")
    for word in (*words, "system dino-world", "the FEATURES that train-systems was given"):
        assert word in str(refused.value)


def test_features_of_another_size_leave_the_table_alone(
    systems: TrainedSystems, text: str, tmp_path: Path
) -> None:
    features = _extracted(systems, tmp_path / "features", image_size=32)
    with pytest.raises(MismatchError, match=r"4 x 4 patches per frame, but .* has 2 x 2"):
        _compare(systems, features, out=tmp_path / "evaluation")
    assert not (tmp_path / "evaluation").exists()
    assert (systems.paths.out / "systems.md").read_text() == text


def _other_backbone(folder: Path) -> None:
    """A larger encoder of the same width and patches under that name."""
    folder.mkdir(parents=True)
    config = tiny_encoder().config
    config.num_hidden_layers = 5
    config.save_pretrained(folder)


def test_the_backbone_does_not_depend_on_the_current_directory(
    systems: TrainedSystems, from_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card of features says the name of a directory; another one of this name lies here by chance."""
    _other_backbone(tmp_path / "ours")
    card = open_dataset(from_folder, "features").card.backbone
    assert card.id == "ours"
    reporter = Lines()
    assert backbone_of(card, None, reporter) is None
    monkeypatch.chdir(tmp_path)
    assert backbone_of(card, None, reporter) is None
    assert all("'ours' is left out" in line and "--backbone" in line for line in reporter.said)


def test_an_unknown_backbone_is_said_to_be_left_out(
    systems: TrainedSystems, text: str, from_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(systems.paths.evaluation, tmp_path / "evaluation")  # what is scored is the same
    text = _compare(systems, from_folder, out=tmp_path / "evaluation").read_text()
    assert _heading(text)[-2:] == ["futures without backbone (GFLOP)", "step (GFLOP)"]
    assert "backbone left out" in text
    assert "backbone and tokenizer included" not in text
    assert all("x)" not in cells[-2] and "x)" in cells[-1] for cells in list(_lines(text).values())[1:])
    rows = pq.read_table(tmp_path / "evaluation/systems.parquet").to_pylist()
    futures = [row for row in rows if row["quantity"] == "futures_gflops"]
    assert {(row["relative"], row["includes_backbone"]) for row in futures} == {(None, False)}


def test_the_backbone_that_is_given_is_counted(
    systems: TrainedSystems, rows: list[dict], from_folder: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(systems.paths.evaluation, tmp_path / "evaluation")
    _compare(systems, from_folder, out=tmp_path / "evaluation", backbone=str(tiny_folder))

    def futures(table: list[dict]) -> list[tuple]:
        wanted = ("system", "value", "relative", "includes_backbone")
        return [tuple(row[key] for key in wanted) for row in table if row["quantity"] == "futures_gflops"]

    assert futures(pq.read_table(tmp_path / "evaluation/systems.parquet").to_pylist()) == futures(rows)
    assert all(row[-1] for row in futures(rows))


def test_another_backbone_is_refused(systems: TrainedSystems, tiny_folder: Path, tmp_path: Path) -> None:
    card = open_dataset(systems.train, "features").card.backbone
    with pytest.raises(
        MismatchError, match="768 wide with 16-px patches, but the features were made with tiny"
    ):
        backbone_of(card, "vitb16", SilentReporter())
    changed = tiny_encoder()
    changed.norm.weight.data.add_(1.0)
    changed.save_pretrained(tmp_path / "changed")
    with pytest.raises(MismatchError, match=r"has the weights .* give the backbone of the features"):
        backbone_of(card, str(tmp_path / "changed"), SilentReporter())
    shutil.copytree(tiny_folder, tmp_path / "config")
    (tmp_path / "config/model.safetensors").unlink()
    assert backbone_of(card, str(tmp_path / "config"), SilentReporter()) is not None
    (tmp_path / "config/config.json").write_text(json.dumps({"model_type": "no backbone"}))
    with pytest.raises(CheckpointError, match="no backbone"):
        backbone_of(card, str(tmp_path / "config"), SilentReporter())


@pytest.mark.parametrize("changes", [{"id": "vitb16"}, {"weights_sha256": "f" * 64}])
def test_a_name_that_belongs_to_another_backbone_is_unknown(
    systems: TrainedSystems, changes: dict[str, str]
) -> None:
    """A directory may be called as the built-in encoder or as one of DINOv3's sizes is."""
    card = open_dataset(systems.train, "features").card.backbone
    other = BackboneCard.model_validate(card.model_dump() | changes)
    reporter = Lines()
    assert backbone_of(card, None, reporter) is not None
    assert not reporter.said
    assert backbone_of(other, None, reporter) is None
    assert reporter.said


def test_another_evaluation_has_its_own_folder_and_table(
    systems: TrainedSystems, text: str, tmp_path: Path
) -> None:
    with pytest.raises(DeltacacheError, match=r"holds another evaluation .* with --evaluation DIR"):
        _compare(systems, systems.train, seed=8)
    other = tmp_path / "seed-8"
    written = _compare(systems, systems.train, out=other, seed=8)
    assert written == other / "systems.md"
    assert (other / "systems.parquet").is_file()
    assert (systems.paths.out / "systems.md").read_text() == text
    assert _compare(systems, systems.train, out=other, seed=8) == written  # our own files are no strangers


def test_the_command_passes_on_what_evaluate_takes(
    systems: TrainedSystems, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(
        "deltacache.systems.table.compare_systems",
        lambda out, features, settings, plan, _: seen.update(out=out, settings=settings, plan=plan),
    )
    lists = ("--kitti-split", tmp_path / "list.txt", "--cache", tmp_path / "cache")
    cluster = ("--workers", 2, "--ray-address", "auto", "--precision", "float32")
    arguments = (
        *("compare-systems", systems.paths.out, systems.train, "--data", f"kitti={tmp_path}", "--no-measure"),
        *("--evaluation", tmp_path / "evaluation", "--backbone", "tiny", *lists, *cluster),
    )
    done = CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    settings, plan = seen["settings"], seen["plan"]
    assert (settings.out, settings.cache) == (tmp_path / "evaluation", tmp_path / "cache")
    assert (settings.kitti_split, settings.precision) == (tmp_path / "list.txt", "float32")
    assert (settings.workers, settings.ray_address) == (2, "auto")
    assert (plan.backbone, plan.crops, plan.measure) == ("tiny", 2, False)
    assert SystemPaths(seen["out"]) == systems.paths
    seen.clear()
    shown = CliRunner().invoke(app, ["show-config", *map(str, arguments)], catch_exceptions=False)
    comparison = SystemsComparison.model_validate(yaml.safe_load(shown.output))
    assert (comparison.evaluation, comparison.costs, seen) == (settings, plan, {})
