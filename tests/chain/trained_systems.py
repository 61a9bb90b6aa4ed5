"""What the fixture ``systems`` gives."""

from dataclasses import dataclass
from pathlib import Path

from deltacache.systems.training import SystemPaths, SystemsConfig


@dataclass(frozen=True)
class TrainedSystems:
    """``train`` and ``test`` are feature datasets; ``futures`` says which test videos share a past."""

    train: Path
    test: Path
    futures: Path
    config: SystemsConfig
    paths: SystemPaths
