"""Which shards a dataset is to have: from its plan, or where that is damaged from the receipts."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from deltacache.pipeline.datasets.plan import (
    PLAN_FILE,
    SHARD_ID,
    ShardTask,
    iter_tasks,
    ordinal_of,
    plan_of,
    read_plan,
    shard_id_of,
)
from deltacache.pipeline.datasets.problems import Problem, Remedy
from deltacache.pipeline.datasets.receipts import finished_shards, read_receipt
from deltacache.pipeline.storage.storage import AnyPath
from deltacache.schemas.clips import clip_id_of
from deltacache.schemas.errors import DatasetError, DeltacacheError, StorageError


@dataclass(frozen=True, slots=True)
class KnownShards:
    """The shards of a dataset.

    Attributes:
        plan: as it is, or as the receipts say if it is damaged.
        planned: ids of its shards.
        finished: ids of the shards that have a receipt, whether planned or not.
        damaged: whether the plan is.
        problems: of the plan.
    """

    plan: pa.Table
    planned: frozenset[str]
    finished: frozenset[str]
    damaged: bool
    problems: list[Problem]

    @staticmethod
    def is_id(text: str) -> bool:
        """Whether ``text`` has the form of a shard's id."""
        return SHARD_ID.fullmatch(text) is not None


def known_shards(root: AnyPath) -> KnownShards:
    """Read and check the plan."""
    finished = frozenset(filter(KnownShards.is_id, finished_shards(root)))
    try:
        if finished and not (root / PLAN_FILE).exists():
            raise DatasetError(
                f"{root / PLAN_FILE} is missing: the receipts say what the finished shards hold"
            )
        plan = read_plan(root)
        planned = frozenset(task.shard_id for task in iter_tasks(plan))
        problems = [_problem(message, clip_id) for message, clip_id in _wrong(plan)]
    except StorageError:
        raise
    except (DatasetError, ValueError) as error:
        plan = plan_of_receipts(root)
        planned = frozenset(task.shard_id for task in iter_tasks(plan))
        return KnownShards(plan, planned, finished, True, [_problem(str(error), None)])
    damaged = bool(problems)
    problems.extend(_unfinished(plan, planned, finished))
    return KnownShards(plan, planned, finished, damaged, problems)


def plan_of_receipts(root: AnyPath) -> pa.Table:
    """The plan of the finished shards, exactly as it was, from what their receipts say about their videos.

    Shards whose receipts cannot be read, or whose id is not that of these videos, are left out.
    """
    return plan_of(_tasks_of_receipts(root))


def _tasks_of_receipts(root: AnyPath) -> Iterator[ShardTask]:
    ids = filter(KnownShards.is_id, finished_shards(root))
    for shard_id in sorted(ids, key=lambda shard_id: (ordinal_of(shard_id), shard_id)):
        try:
            receipt = read_receipt(root, shard_id)
        except StorageError:
            raise
        except DeltacacheError:
            continue
        videos = tuple(source.planned() for source in receipt.sources)
        if videos and shard_id_of(ordinal_of(shard_id), videos) == shard_id:
            yield ShardTask(shard_id, videos)


def _problem(message: str, clip_id: str | None) -> Problem:
    return Problem(PLAN_FILE, clip_id, message, Remedy.REBUILD_PLAN)


def _wrong(plan: pa.Table) -> Iterator[tuple[str, str | None]]:
    """What is wrong with a plan that can be read, as message and clip."""
    seen: set[str] = set()
    for task in iter_tasks(plan):
        ordinal = ordinal_of(task.shard_id)
        if task.shard_id in seen:
            yield f"holds shard {task.shard_id} twice", None
        seen.add(task.shard_id)
        if shard_id_of(ordinal, task.videos) != task.shard_id:
            yield f"shard {task.shard_id} has other videos than its id says", None
    ordinals = [ordinal_of(task.shard_id) for task in iter_tasks(plan)]
    if ordinals != sorted(set(ordinals)):
        yield "its shards are not in the order of their ids, or two have one number", None
    for row, view in _planned_twice(plan):
        video_id = plan["video_id"][row].as_py()
        yield f"plans view {view} of {video_id} twice", clip_id_of(video_id, view)


def _planned_twice(plan: pa.Table) -> Iterator[tuple[int, int]]:
    """Row and view of what an earlier row has planned already; compares 8 bytes of a hash of each id."""
    ids = (value for batch in plan["video_id"].chunks for value in batch.to_pylist())
    digests = (hashlib.blake2b(str(value).encode(), digest_size=8).digest() for value in ids)
    keys = np.frombuffer(b"".join(digests), "<u8")
    first, views = (plan[name].to_numpy() for name in ("first_view", "views"))
    order = np.lexsort((first, keys))
    keys, first, stop = keys[order], first[order], (first + views)[order]
    for place in np.flatnonzero((keys[1:] == keys[:-1]) & (first[1:] < stop[:-1])):
        yield int(order[place + 1]), int(first[place + 1])


def _unfinished(plan: pa.Table, planned: frozenset[str], finished: frozenset[str]) -> Iterator[Problem]:
    missing = [task.shard_id for task in iter_tasks(plan) if task.shard_id not in finished]
    if missing:
        what = f"{len(missing)} of {len(planned)} shards have no receipt, the first is {missing[0]}"
        yield Problem(PLAN_FILE, None, f"{what}: not finished, run the command again", Remedy.RERUN)
    ordinals = {ordinal_of(shard_id) for shard_id in planned}
    gaps = sorted(set(range(max(ordinals, default=-1) + 1)) - ordinals)
    if gaps:
        what = f"lacks {len(gaps)} shards, the first is number {gaps[0]}"
        yield Problem(PLAN_FILE, None, f"{what}: run the command again, which plans them", Remedy.RERUN)
    if not planned and not finished:
        yield Problem(PLAN_FILE, None, "has no shards: not finished, run the command again", Remedy.RERUN)
