"""Systems side by side: trained from the same features, evaluated into the same table."""

from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import smooth_l1_loss
from trained_systems import TrainedSystems

from deltacache.evaluate.clips.run import evaluate_clips
from deltacache.evaluate.output import read_metrics
from deltacache.evaluate.report.panels import panels
from deltacache.evaluate.settings import clip_evaluation
from deltacache.models.checkpoints import load_tokenizer, load_world, save_model
from deltacache.models.futures import decode_future, sequence_generator
from deltacache.pipeline.datasets.dataset import open_dataset
from deltacache.schemas.errors import CheckpointError, DeltacacheError, MismatchError
from deltacache.schemas.progress import SilentReporter
from deltacache.systems.training import (
    SystemPaths,
    SystemsConfig,
    open_systems,
    systems_preset,
    train_systems,
)
from deltacache.train.workers.trainable import Workers

CONTEXT, HORIZONS, SAMPLES, SEED = 4, (1, 3), 3, 7


@pytest.fixture(scope="module")
def results(systems: TrainedSystems, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation with every tokenizer and world model of the fixture."""
    out = tmp_path_factory.mktemp("results") / "evaluation"
    paths, config = systems.paths, systems.config
    first, *others = (paths.tokenizer(name) for name in config.tokenizers)
    settings = clip_evaluation(
        out=out,
        features=systems.test,
        tokenizer=first,
        more_tokenizers=tuple(others),
        worlds=tuple(paths.world(name) for name in config.systems),
        context=CONTEXT,
        horizons=HORIZONS,
        samples=SAMPLES,
        seed=SEED,
        futures=systems.futures,
        device="cpu",
    )
    evaluate_clips(settings, SilentReporter())
    return out


def _rows(results: Path, table: str, world: Path) -> list[dict]:
    content = pq.read_table(results / table)
    return content.filter(pc.equal(content["world"], load_world(world).fingerprint)).to_pylist()


def _sampled(systems: TrainedSystems, name: str, clip_id: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The true frames (T, N, D) of a clip and a system's futures (S, H, N, D) of it, alone and all at once."""
    dataset = open_dataset(systems.test, "features")
    row = dataset.clip_ids.index(clip_id)
    frames = torch.from_numpy(dataset.read_frames(row, 0, CONTEXT + HORIZONS[-1]).astype("float32"))
    seconds = torch.from_numpy(dataset.timestamps_s[row, : CONTEXT + HORIZONS[-1]].copy())[None]
    world, grid = load_world(systems.paths.world(name)).model, dataset.card.patch_grid
    noise = None
    if world.stochastic:
        noise = world.draw_noise(
            (SAMPLES, HORIZONS[-1], world.noise_size), sequence_generator(SEED, clip_id)
        )[None]
    tokenizer = systems.config.systems[name].tokenizer
    if tokenizer is None:
        return frames, world.rollout(frames[None, :CONTEXT], seconds, noise, grid=grid)[0]
    model = load_tokenizer(systems.paths.tokenizer(tokenizer)).model
    black = torch.from_numpy(dataset.black_patch_tokens.astype("float32"))
    deltas = model.encode_clip(frames[None], black, grid)[:, :CONTEXT]
    futures = world.rollout(deltas, seconds, noise, grid=grid)
    return frames, decode_future(model, frames[None, CONTEXT - 1], futures, grid)[0]


@pytest.mark.parametrize(
    "name", ["dino-world", "best-of-many", "frame-tokens", "delta-tokens", "discriminative", "two-tokens"]
)
def test_scores_are_those_of_a_rollout_by_hand(systems: TrainedSystems, results: Path, name: str) -> None:
    rows = [
        row
        for row in _rows(results, "sequences.parquet", systems.paths.world(name))
        if row["metric"] == "smooth_l1"
    ]
    single = systems.config.systems[name].world.model.query == "learned"
    assert {row["aggregation"] for row in rows} == ({"single"} if single else {"best", "mean"})
    for clip_id in {row["sequence_id"] for row in rows}:
        frames, futures = _sampled(systems, name, clip_id)
        for horizon in HORIZONS:
            truth, predicted = frames[CONTEXT + horizon - 1], futures[:, horizon - 1]
            each = [smooth_l1_loss(one, truth, beta=0.1).item() for one in predicted]
            expected = {
                "single": each[0],
                "best": min(each),
                "mean": smooth_l1_loss(predicted.mean(0), truth, beta=0.1).item(),
            }
            for row in rows:
                if (row["sequence_id"], row["horizon"]) == (clip_id, horizon):
                    assert row["value"] == pytest.approx(expected[row["aggregation"]], rel=1e-4, abs=1e-6)


def test_every_system_has_a_name_in_the_table_and_its_tokenizers_too(
    systems: TrainedSystems, results: Path
) -> None:
    table = pq.read_table(results / "metrics.parquet").to_pylist()
    found = {row["world"]: row for row in table if row["world"]}
    labels = {
        name: found[load_world(systems.paths.world(name)).fingerprint]["method"]
        for name in systems.config.systems
    }
    assert labels == {
        "dino-world": "dino_world",
        "best-of-many": "dino_world_best_of_many",
        "frame-tokens": "deltaworld",
        "delta-tokens": "deltaworld",
        "discriminative": "deltaworld_discriminative",
        "two-tokens": "deltaworld",
    }
    tokenizers = {
        load_tokenizer(systems.paths.tokenizer(name)).fingerprint for name in systems.config.tokenizers
    }
    assert {row["tokenizer"] for row in table if row["method"] == "deltatok"} == tokenizers
    assert {row["metric"] for row in table if row["method"] == "dino_world_best_of_many"} >= {"mode_coverage"}


def test_a_second_call_finds_all_of_it_finished(systems: TrainedSystems) -> None:
    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in systems.paths.out.rglob("model.safetensors")}

    before = files()
    train_systems(systems.config, systems.train, systems.paths.out, Workers(), "cpu", SilentReporter())
    assert files() == before
    assert open_systems(systems.paths.out) == (systems.config, SystemPaths(systems.paths.out))


def test_other_systems_in_the_same_folder_are_refused(systems: TrainedSystems) -> None:
    with pytest.raises(MismatchError, match="holds other systems"):
        train_systems(
            systems.config.changed(5, None),
            systems.train,
            systems.paths.out,
            Workers(),
            "cpu",
            SilentReporter(),
        )


def test_a_world_model_whose_tokenizer_is_missing(systems: TrainedSystems, tmp_path: Path) -> None:
    settings = {"out": tmp_path / "out", "features": systems.test, "context": CONTEXT, "device": "cpu"}
    world = systems.paths.world("delta-tokens")
    with pytest.raises(MismatchError, match="give the tokenizer they were made with"):
        evaluate_clips(clip_evaluation(**settings, worlds=(world,)), SilentReporter())
    other = systems.paths.tokenizer("frame")
    with pytest.raises(MismatchError, match="load the tokenizer it was trained with"):
        evaluate_clips(clip_evaluation(**settings, worlds=(world,), tokenizer=other), SilentReporter())


@pytest.mark.parametrize(
    ("system", "message"),
    [
        ({"tokenizer": "delta", "world": {"preset": "dino-world"}}, "leave its tokenizer out"),
        ({"world": {"preset": "tiny"}}, "tokenizer None is not one of delta"),
        ({"tokenizer": "frame", "world": {"preset": "tiny"}}, "tokenizer 'frame' is not one of delta"),
        (
            {"world": {"preset": "tiny", "model": {"architecture": "magic"}}},
            "'magic' is not a world model: give one of",
        ),
    ],
)
def test_systems_that_cannot_be(system: dict, message: str) -> None:
    with pytest.raises((ValidationError, DeltacacheError), match=message):
        SystemsConfig.model_validate({"tokenizers": {"delta": {"preset": "tiny"}}, "systems": {"a": system}})


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(DeltacacheError, match=r"give one of table2, tiny-table2, tiny-tokens"):
        systems_preset("table3")


def test_the_same_tokenizer_named_twice_is_refused(systems: TrainedSystems, tmp_path: Path) -> None:
    place = systems.paths.tokenizer("delta")
    (again,) = (place / "checkpoints").glob("step-*12")
    settings = {"out": tmp_path / "out", "features": systems.test, "context": CONTEXT, "device": "cpu"}
    with pytest.raises(DeltacacheError, match="are the same tokenizer"):
        evaluate_clips(
            clip_evaluation(**settings, tokenizer=place, more_tokenizers=(again,)), SilentReporter()
        )


def test_a_released_file_taken_for_another_architecture_is_another_run(
    systems: TrainedSystems, tmp_path: Path
) -> None:
    """Nothing in the file tells DINO-world from a learned query of DeltaWorld."""
    released = tmp_path / "released.safetensors"
    (folder,) = (systems.paths.world("dino-world") / "checkpoints").glob("step-*12")
    released.write_bytes((folder / "model.safetensors").read_bytes())
    settings = {"out": tmp_path / "out", "features": systems.test, "context": CONTEXT, "device": "cpu"}
    models = {"worlds": (released,), "tokenizer": systems.paths.tokenizer("delta"), "examples": 0}
    first = clip_evaluation(**settings, **models)
    evaluate_clips(first, SilentReporter())
    second = clip_evaluation(**settings, **models, architectures={str(released): "dino_world"})
    with pytest.raises(DeltacacheError, match="another evaluation"):
        evaluate_clips(second, SilentReporter())


def test_a_folder_says_what_it_is(systems: TrainedSystems) -> None:
    with pytest.raises(CheckpointError, match="is a deltaworld, not a dino_world"):
        load_world(systems.paths.world("delta-tokens"), architecture="dino_world")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"patch_grid": [2, 8]}, "trained on 2 x 8 patches per frame"),
        ({"pca_fingerprint": "0123", "layers": [1]}, "reduced by PCA 0123"),
        ({"backbone_sha256": "f" * 64}, "trained on features of backbone ffff"),
    ],
)
def test_a_world_model_of_other_patch_tokens_is_refused(
    systems: TrainedSystems, tmp_path: Path, metadata: dict, message: str
) -> None:
    loaded = load_world(systems.paths.world("dino-world"))
    made_from = {key: loaded.metadata[key] for key in ("backbone_sha256", "patch_grid")} | metadata
    save_model(tmp_path / "world", loaded.model, "world", made_from)
    settings = {"out": tmp_path / "out", "features": systems.test, "context": CONTEXT, "device": "cpu"}
    with pytest.raises(MismatchError, match=message):
        evaluate_clips(clip_evaluation(**settings, worlds=(tmp_path / "world",)), SilentReporter())


def test_a_system_that_does_not_fit_is_refused_before_anything_is_trained(
    systems: TrainedSystems, tmp_path: Path
) -> None:
    content = systems.config.model_dump(mode="json")
    content["systems"]["discriminative"]["world"]["model"]["num_heads"] = 7
    config = SystemsConfig.model_validate(content)
    with pytest.raises(MismatchError, match="7 heads"):
        train_systems(config, systems.train, tmp_path / "out", Workers(), "cpu", SilentReporter())
    assert not (tmp_path / "out").exists()


def test_passes_share_the_batch_of_every_training(systems: TrainedSystems) -> None:
    config = systems_preset("table2").changed(3, 64)
    for each in (*config.tokenizers.values(), *(one.world for one in config.systems.values())):
        assert (each.training.batch_size, each.training.accumulation, each.training.seed) == (16, 64, 3)


def test_no_two_models_share_a_line(systems: TrainedSystems, results: Path) -> None:
    """Every tokenizer and world model has a line of its own, also under one method."""
    (panel,) = [each for each in panels(read_metrics(results)) if each.metric == "smooth_l1"]
    labels = [line.label for line in panel.own]
    assert sum(label.startswith("DeltaTok, closed loop") for label in labels) == len(
        systems.config.tokenizers
    )
    assert sum(label.startswith("DeltaWorld, best of") for label in labels) == 3
    assert all(cell is not None for line in panel.own for cell in line.cells)
