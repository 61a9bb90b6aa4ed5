"""Datasets that several tests only read, and how they run."""

from pathlib import Path

import pytest
from cases import Case
from drawn import drawn_deltas, drawn_features, tokenizer_config, world_config, write_dataset

from deltacache.models.checkpoints import load_tokenizer, load_world
from trainers import train_tokenizer, train_world


@pytest.fixture(scope="session")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve clips of six frames."""
    return write_dataset(tmp_path_factory.mktemp("features") / "data", "features", drawn_features(12, 6))


@pytest.fixture(scope="session")
def deltas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve clips of six delta tokens."""
    return write_dataset(tmp_path_factory.mktemp("deltas") / "data", "deltas", drawn_deltas(12, 6))


@pytest.fixture(params=["tokenizer", "world"])
def case(request: pytest.FixtureRequest, features: Path, deltas: Path) -> Case:
    """Each trainer in turn."""
    if request.param == "tokenizer":
        return Case("tokenizer", train_tokenizer, tokenizer_config, load_tokenizer, features)
    return Case("world", train_world, world_config, load_world, deltas)
