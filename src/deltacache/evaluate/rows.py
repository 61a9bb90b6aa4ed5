"""What rows of ``metrics.parquet`` and ``sequences.parquet`` say beside their numbers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from deltacache.pipeline.storage.atomic import replacing
from deltacache.schemas.benchmarks import BENCHMARKS
from deltacache.schemas.foresight import DATASET as WHOLE_FRAMES

Aggregation = Literal["best", "mean", "single"]
TABLES_VERSION = 2
"""Part of every ``run_id``: tables whose numbers mean something else are another evaluation's."""
_UNIT_KINDS = {"vspw": "video", "cityscapes": "city", "kitti": "drive", WHOLE_FRAMES: "city"}
UNIT_PLURALS = {"video": "videos", "city": "cities", "drive": "drives", "scene": "scenes"}


@dataclass(frozen=True, slots=True)
class Method:
    """Who predicted. ``tokenizer`` and ``world`` are fingerprints of what took part, else ``None``."""

    name: str
    tokenizer: str | None = None
    world: str | None = None


def method_now(name: str) -> str:
    """Today's name of a method of the first version of the tables: its ``deltatok_parallel`` was one step."""
    return "deltatok_one_step" if name == "deltatok_parallel" else name


@dataclass(frozen=True, slots=True)
class RunStamp:
    """Columns that every row of a run shares.

    Attributes:
        image_size: height and width in pixels.
        trained_sizes: see ``inputs.Models``.
    """

    run_id: str
    dataset: str
    context: int
    image_size: tuple[int, int]
    seed: int
    backbone: str
    code_version: str
    created_at: datetime
    trained_sizes: Mapping[str, str] = field(default_factory=dict)


def unit_kind(dataset: str, task: str) -> str:
    """What the sequences of a data set are grouped by, since those of one group are not independent."""
    return "scene" if task == "modes" else _UNIT_KINDS.get(dataset, "video")


def units_text(count: int, kind: str) -> str:
    """Such as ``3 cities``."""
    return f"{count} {kind if count == 1 else UNIT_PLURALS[kind]}"


def is_clips(dataset: str) -> bool:
    """Whether a data set of the tables is a feature dataset, not a benchmark."""
    return dataset not in (*BENCHMARKS, WHOLE_FRAMES)


def write_table(table: pa.Table, path: Path) -> None:
    """Write a Parquet file that is either whole or not there."""
    with replacing(path) as temporary:
        pq.write_table(table, temporary)
