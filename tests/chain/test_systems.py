"""Systems side by side: trained from the same features, evaluated into the same table."""

from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import smooth_l1_loss
from trained_systems import TrainedSystems

from deltacache.chain.systems import SystemPaths, SystemsConfig, open_systems, systems_preset, train_systems
from deltacache.evaluate.clips import evaluate_clips
from deltacache.evaluate.rollouts import sequence_generator
from deltacache.evaluate.settings import clip_evaluation
from deltacache.models.checkpoints import load_tokenizer, load_world
from deltacache.models.futures import decode_future
from deltacache.pipeline.dataset import open_dataset
from deltacache.schemas.errors import DeltacacheError, MismatchError
from deltacache.schemas.progress import SilentReporter
from deltacache.train.launch import Workers

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
            systems.config.seeded(5), systems.train, systems.paths.out, Workers(), "cpu", SilentReporter()
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
        ({"world": {"preset": "tiny"}}, "tokenizer None is none of delta"),
        ({"tokenizer": "frame", "world": {"preset": "tiny"}}, "tokenizer 'frame' is none of delta"),
        (
            {"world": {"preset": "tiny", "model": {"architecture": "magic"}}},
            "'magic' is no world model: give one of",
        ),
    ],
)
def test_systems_that_cannot_be(system: dict, message: str) -> None:
    with pytest.raises((ValidationError, DeltacacheError), match=message):
        SystemsConfig.model_validate({"tokenizers": {"delta": {"preset": "tiny"}}, "systems": {"a": system}})


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(DeltacacheError, match=r"give one of table2, tiny-table2, tiny-tokens"):
        systems_preset("table3")
