"""Fifty steps of each trainer on drawn data: a change that moves these numbers says why in the changelog."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from drawn import tokenizer_config, world_config

from deltacache.schemas.progress import SilentReporter
from deltacache.train import train_tokenizer, train_world

# Means over ten steps each. Weights that differ by 1e-6 change them by 1e-4 at most.
TOLERANCE = 1e-3
TOKENIZER = [0.420842, 0.452951, 0.430804, 0.346639, 0.335334]
WORLD = [0.566666, 0.269248, 0.113008, 0.0652016, 0.0319687]
WORLD_LEARNED_QUERY = [0.660927, 0.656022, 0.642212, 0.606532, 0.568285]
FIFTY_STEPS = {"steps": 50, "save_every": 50, "log_every": 10, "batch_size": 8}


def losses(out: Path) -> list[float]:
    return pq.read_table(out / "curves.parquet")["loss"].to_pylist()


def test_tokenizer(features: Path, tmp_path: Path) -> None:
    config = tokenizer_config(**FIFTY_STEPS)
    train_tokenizer(features, tmp_path / "out", config, resume=False, device="cpu", reporter=SilentReporter())
    assert losses(tmp_path / "out") == pytest.approx(TOKENIZER, rel=TOLERANCE)


@pytest.mark.parametrize(("query", "expected"), [("noise", WORLD), ("learned", WORLD_LEARNED_QUERY)])
def test_world_model(deltas: Path, tmp_path: Path, query: str, expected: list[float]) -> None:
    config = world_config(query, **FIFTY_STEPS)
    train_world(deltas, tmp_path / "out", config, resume=False, device="cpu", reporter=SilentReporter())
    assert losses(tmp_path / "out") == pytest.approx(expected, rel=TOLERANCE)
