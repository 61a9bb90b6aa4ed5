"""Fifty steps of each trainer on drawn data: a change that moves these numbers says why in the changelog."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from drawn import tokenizer_config, world_config

from deltacache.schemas.progress import SilentReporter
from trainers import train_tokenizer, train_world

# Means over ten steps each. Weights that differ by 1e-6 change them by 1e-4 at most.
TOLERANCE = 1e-3
TOKENIZER = [0.448213, 0.471903, 0.468943, 0.367807, 0.310761]
WORLD = [0.570214, 0.279707, 0.111881, 0.0652228, 0.0359941]
WORLD_LEARNED_QUERY = [0.660728, 0.657842, 0.641261, 0.609321, 0.555535]
FIFTY_STEPS = {"steps": 50, "save_every": 50, "log_every": 10, "batch_size": 8}


def losses(out: Path) -> list[float]:
    return pq.read_table(out / "curves.parquet")["loss"].to_pylist()


def test_tokenizer(features: Path, tmp_path: Path) -> None:
    config = tokenizer_config(**FIFTY_STEPS)
    train_tokenizer(features, tmp_path / "out", config, resume=False, device="cpu", reporter=SilentReporter())
    assert losses(tmp_path / "out") == pytest.approx(TOKENIZER, rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(("query", "expected"), [("noise", WORLD), ("learned", WORLD_LEARNED_QUERY)])
def test_world_model(deltas: Path, tmp_path: Path, query: str, expected: list[float]) -> None:
    config = world_config(query, **FIFTY_STEPS)
    train_world(deltas, tmp_path / "out", config, resume=False, device="cpu", reporter=SilentReporter())
    assert losses(tmp_path / "out") == pytest.approx(expected, rel=TOLERANCE)
