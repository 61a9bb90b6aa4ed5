"""The whole chain on real clips, command by command: what is learned, what belongs together, what is refused."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from deltacache.pipeline.datasets.dataset import load_deltas, open_dataset
from deltacache.schemas.tables import METRICS_SCHEMA, SEQUENCES_SCHEMA

SIZE = ("--backbone", "tiny", "--image-size", "64", "--spacing", "0.2", "0.3333")
VIEWS = 20
TOKENIZER = ("--preset", "tiny", "--steps", 200)
WORLD = ("--preset", "tiny", "--steps", 40, "--batch-size", 32)


@dataclass(frozen=True)
class Chain:
    """Folders of a chain trained on clips of real videos; ``held_out`` are features of other clips of them."""

    videos: Path
    features: Path
    held_out: Path
    tokenizer: Path
    deltas: Path
    world: Path
    results: Path


@pytest.fixture(scope="module")
def chain(deltacache, real_videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """Every command once, on the CPU, with few steps. Another seed draws other times and crops: other clips."""
    root = tmp_path_factory.mktemp("chain")
    names = ("features", "held-out", "tokenizer", "deltas", "world", "results")
    chain = Chain(real_videos / "fixture", *(root / name for name in names))
    deltacache("extract-features", chain.videos, chain.features, *SIZE, "--views", VIEWS).done()
    deltacache("extract-features", chain.videos, chain.held_out, *SIZE, "--views", 2, "--seed", 1).done()
    deltacache("train-tokenizer", chain.features, chain.tokenizer, *TOKENIZER).done()
    deltacache("tokenize", chain.features, chain.deltas, "--tokenizer", chain.tokenizer).done()
    deltacache("train-world", chain.deltas, chain.world, *WORLD).done()
    evaluate(deltacache, chain, chain.results)
    return chain


def evaluate(deltacache, chain: Chain, out: Path, *flags: object) -> str:
    """Evaluate the chain on the held-out clips; returns what was printed."""
    command = ("evaluate", out, "--data", f"clips={chain.held_out}", "--tokenizer", chain.tokenizer)
    return deltacache(*command, "--world", chain.world, *flags).done().stdout


def value(results: Path, method: str, aggregation: str = "single", horizon: int = 1) -> float:
    """Smooth-L1 feature loss of a row of the table."""
    rows = pq.read_table(results / "metrics.parquet").to_pylist()
    (row,) = [
        row
        for row in rows
        if (row["method"], row["aggregation"], row["horizon"], row["metric"])
        == (method, aggregation, horizon, "smooth_l1")
    ]
    return row["value"]


def test_the_tokenizer_beats_copying_on_clips_it_never_saw(chain: Chain) -> None:
    copied, reconstructed = value(chain.results, "copy_last"), value(chain.results, "deltatok_parallel")
    assert reconstructed < copied
    assert value(chain.results, "deltatok") < copied
    assert value(chain.results, "deltatok_swapped") > 1.1 * reconstructed, "the decoder ignores its token"


def test_the_best_of_twenty_futures_beats_their_mean(chain: Chain) -> None:
    for horizon in (1, 3):
        best = value(chain.results, "deltaworld", "best", horizon)
        assert best < value(chain.results, "deltaworld", "mean", horizon)


def test_tables_have_their_schemas_and_the_report_its_pictures(chain: Chain) -> None:
    assert pq.read_schema(chain.results / "metrics.parquet").equals(METRICS_SCHEMA)
    assert pq.read_schema(chain.results / "sequences.parquet").equals(SEQUENCES_SCHEMA)
    report = (chain.results / "report.html").read_text()
    assert report.count("data:image/") >= 10
    assert "http://" not in report.replace("http://www.w3.org", "")
    assert value(chain.results, "present") == 0


def test_the_same_seed_gives_the_same_table(deltacache, chain: Chain, tmp_path: Path) -> None:
    evaluate(deltacache, chain, tmp_path / "again")
    tables = [pq.read_table(out / "metrics.parquet") for out in (chain.results, tmp_path / "again")]
    first, second = (table.drop_columns(["created_at"]) for table in tables)
    assert first.equals(second)


def test_tokenizing_videos_equals_tokenizing_their_features(
    deltacache_on_ray, chain: Chain, tmp_path: Path
) -> None:
    """Backbone, size and spacing are those of the tokenizer: none of them is given. On Ray, and without it."""
    out = tmp_path / "deltas"
    deltacache_on_ray("tokenize", chain.videos, out, "--tokenizer", chain.tokenizer, "--views", VIEWS).done()
    assert open_dataset(out).card.fingerprint == open_dataset(chain.deltas).card.fingerprint
    direct, stored = load_deltas(out), load_deltas(chain.deltas)
    assert direct.clip_ids == stored.clip_ids
    np.testing.assert_array_equal(direct.delta_tokens, stored.delta_tokens)
    np.testing.assert_array_equal(direct.timestamps_s, stored.timestamps_s)
    shards = [sorted((root / "shards").iterdir()) for root in (out, chain.deltas)]
    for one, other in zip(*shards, strict=True):
        assert one.name == other.name
        assert one.read_bytes() == other.read_bytes()


def test_another_size_than_the_tokenizers_is_said_by_who_makes_and_who_uses_it(
    deltacache, chain: Chain, tmp_path: Path
) -> None:
    made = ("tokenize", chain.videos, tmp_path / "deltas", "--tokenizer", chain.tokenizer, "--image-size", 96)
    said = "was trained on features of 64 px, but these are of 96 px"
    assert said in deltacache(*made).done().stdout
    small = ("--preset", "tiny", "--steps", 2, "--batch-size", 2)
    trained = deltacache("train-world", tmp_path / "deltas", tmp_path / "world", *small).done()
    assert f"the tokenizer of these tokens {said}" in trained.stdout
    out = tmp_path / "results"
    data = (
        "--data",
        f"clips={chain.held_out}",
        "--tokenizer",
        chain.tokenizer,
        "--world",
        tmp_path / "world",
    )
    scored = deltacache("evaluate", out, *data, "--horizons", "1", "--samples", 1).done()
    wrong_way = "world was trained on features of 96 px, but these are of 64 px"
    assert wrong_way in " ".join(scored.stdout.split())
    assert wrong_way in (out / "notes.json").read_text()
    assert "trained at 96 px" in scored.stdout
    sizes = {
        (row["method"], row["trained_image_size"])
        for row in pq.read_table(out / "metrics.parquet").to_pylist()
    }
    assert {("deltaworld", "96"), ("deltatok", None), ("copy_last", None)} <= sizes


def test_a_finished_command_has_nothing_to_do(deltacache, chain: Chain) -> None:
    again = deltacache("tokenize", chain.features, chain.deltas, "--tokenizer", chain.tokenizer).done()
    assert "nothing to do" in again.stdout
    deltacache("train-world", chain.deltas, chain.world, *WORLD).refused("--resume")
    deltacache("train-world", chain.deltas, chain.world, *WORLD, "--resume").done()


def test_inspect_and_verify(deltacache, chain: Chain) -> None:
    for path, word in (
        (chain.features, "features"),
        (chain.deltas, "deltas"),
        (chain.tokenizer, "DeltaTok"),
        (chain.world, "DeltaWorld"),
        (chain.results, "evaluation"),
    ):
        assert word in deltacache("inspect", path).done().stdout
    deltacache("verify", chain.deltas).done()


def test_a_tokenizer_of_another_width_is_refused(
    deltacache, chain: Chain, golden: Path, tmp_path: Path
) -> None:
    state = load_file(golden / "tiny" / "deltatok_released.safetensors")
    narrow = {name: tensor[..., : tensor.shape[-1] // 2] for name, tensor in state.items()}
    save_file({name: tensor.contiguous() for name, tensor in narrow.items()}, tmp_path / "half.safetensors")
    outcome = deltacache(
        "tokenize", chain.features, tmp_path / "out", "--tokenizer", tmp_path / "half.safetensors"
    )
    outcome.refused("half.safetensors")
    assert not (tmp_path / "out").exists()


def test_deltas_of_another_tokenizer_are_refused(deltacache, chain: Chain, tmp_path: Path) -> None:
    other = tmp_path / "tokenizer"
    deltacache("train-tokenizer", chain.features, other, "--preset", "tiny", "--steps", 2, "--seed", 5).done()
    # into the delta dataset of the first tokenizer
    before = (chain.deltas / "dataset.json").read_bytes()
    deltacache("tokenize", chain.features, chain.deltas, "--tokenizer", other).refused(
        "tokenizer_fingerprint"
    )
    assert (chain.deltas / "dataset.json").read_bytes() == before
    # a world model of the first tokenizer, decoded by the second
    outcome = deltacache(
        "evaluate", tmp_path / "out", "--data", f"clips={chain.held_out}", "--tokenizer", other,
        "--world", chain.world,
    )  # fmt: skip
    outcome.refused("tokenizer")
    assert not (tmp_path / "out" / "metrics.parquet").exists()


def test_features_where_deltas_are_wanted(deltacache, chain: Chain, tmp_path: Path) -> None:
    deltacache("train-world", chain.features, tmp_path / "out", "--preset", "tiny").refused("tokenize")
    deltacache("train-tokenizer", chain.deltas, tmp_path / "out", "--preset", "tiny").refused("features")


def test_a_damaged_checkpoint_is_refused(deltacache, chain: Chain, tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(chain.tokenizer, tokenizer)
    weights = sorted(tokenizer.glob("checkpoints/step-*/model.safetensors"))[-1]
    damaged = bytearray(weights.read_bytes())
    damaged[-5] ^= 1
    weights.write_bytes(damaged)
    deltacache("tokenize", chain.features, tmp_path / "out", "--tokenizer", tokenizer).refused(
        "model.safetensors"
    )
    weights.write_bytes(damaged[: len(damaged) // 2])
    deltacache("tokenize", chain.features, tmp_path / "out", "--tokenizer", tokenizer).refused(
        "model.safetensors"
    )
    assert not (tmp_path / "out").exists()


def test_a_damaged_shard_is_refused(deltacache, chain: Chain, tmp_path: Path) -> None:
    features = tmp_path / "features"
    shutil.copytree(chain.features, features)
    shard = next((features / "shards").glob("*.tar"))
    damaged = bytearray(shard.read_bytes())
    damaged[damaged.find(b"\x93NUMPY") + 1000] ^= 1  # within the first clip's tokens
    shard.write_bytes(damaged)
    deltacache("train-tokenizer", features, tmp_path / "out", "--preset", "tiny", "--steps", 2).refused(
        shard.stem.removeprefix("shard-"), "verify"
    )
    deltacache("tokenize", features, tmp_path / "deltas", "--tokenizer", chain.tokenizer).refused(
        shard.stem.removeprefix("shard-"), "verify"
    )
    deltacache("verify", features).refused("listed above")


def test_unfinished_features_are_not_tokenized(deltacache, chain: Chain, tmp_path: Path) -> None:
    features = tmp_path / "features"
    shutil.copytree(chain.features, features)
    next((features / "receipts").glob("*.json")).unlink()
    deltacache("tokenize", features, tmp_path / "out", "--tokenizer", chain.tokenizer).refused(
        "not finished", "extract-features"
    )
    assert not (tmp_path / "out").exists()


def test_flags_about_videos_are_refused_for_features(deltacache, chain: Chain, tmp_path: Path) -> None:
    outcome = deltacache(
        "tokenize", chain.features, tmp_path / "out", "--tokenizer", chain.tokenizer, "--views", 8
    )
    assert outcome.code == 2
    outcome.refused("--views", "already sampled")
