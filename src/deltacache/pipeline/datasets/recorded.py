"""What the finished shards hold, from the tables where they are of all shards, else from parts and receipts.

A command that runs commits shards that the tables do not know yet, and folds them into parts: receipts are read
of the others alone.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa

from deltacache.pipeline.datasets.finishing import (
    SOURCES_FILE,
    TablesSummary,
    distinct,
    finished_summary,
    open_table,
)
from deltacache.pipeline.datasets.folding import clips_in, failures_in, fold, sources_in
from deltacache.pipeline.datasets.plan import Plan, hashes, open_plan
from deltacache.pipeline.datasets.receipts import finished_shards, read_receipts
from deltacache.pipeline.storage.storage import AnyPath
from deltacache.schemas.errors import DatasetError, StorageError
from deltacache.schemas.tables import SOURCES_SCHEMA


@dataclass(frozen=True, slots=True)
class Holdings:
    """What a dataset holds; ``videos`` are those of which at least one clip is there."""

    clips: int
    videos: int
    planned_videos: int
    shards: int
    planned_shards: int
    failures: dict[str, int]
    bytes: int


def held_parts(root: AnyPath, plan: Plan) -> Iterator[pa.Table]:
    """What the finished shards of a plan hold, some at a time, as ``fold`` gives it.

    Raises:
        DatasetError: a receipt is damaged.
    """
    return fold(root, plan.shard_ids, finished_shards(root), partial(read_receipts, root))


def recorded_sources(root: AnyPath, plan: Plan, held: TablesSummary | None) -> Iterator[pa.Table]:
    """The videos of all finished shards as they were then, with the columns of ``SOURCES_SCHEMA``, some at a time.

    Compare ``version``, and where that differs ``sha256``, to notice replaced videos. ``held`` is
    ``finished_summary`` of this plan.

    Raises:
        DatasetError: a receipt is damaged.
    """
    if held is not None:
        try:
            file = open_table(root / SOURCES_FILE, SOURCES_SCHEMA, held)
        except StorageError:
            raise
        except DatasetError:
            pass  # damaged: the receipts say the same
        else:
            with file:
                for batch in file.iter_batches():
                    yield pa.Table.from_batches([batch], SOURCES_SCHEMA)
            return
    yield from map(sources_in, held_parts(root, plan))


def holdings(root: AnyPath) -> Holdings:
    """Add up what the finished shards of a dataset hold, also while a command writes to it.

    Raises:
        DatasetError: a receipt is damaged.
    """
    plan = open_plan(root)
    summary = finished_summary(root, plan)
    if summary is not None:
        return Holdings(
            summary.clips,
            summary.videos,
            summary.planned_videos,
            summary.shards,
            summary.planned_shards,
            summary.failures,
            summary.shard_bytes,
        )
    clips = size = shards = 0
    videos, failures = [np.empty(0, np.int64)], Counter[str]()
    for part in held_parts(root, plan):
        rows = clips_in(part)
        clips += rows.num_rows
        shards += part.num_rows
        size += int(part["bytes"].to_numpy().sum())
        videos.append(np.unique(hashes(rows["video_uri"].unique().to_pylist())))
        failures.update(failures_in(part)["reason"].to_pylist())
    return Holdings(
        clips=clips,
        videos=len(np.unique(np.concatenate(videos))),
        planned_videos=distinct(batch.column(0) for batch in plan.batches(["video_uri"])),
        shards=shards,
        planned_shards=len(plan.shard_ids),
        failures=dict(failures),
        bytes=size,
    )
