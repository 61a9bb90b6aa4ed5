"""``plan.parquet``: which videos form which shard. Written before any shard, and only ever appended to."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count, groupby

import pyarrow as pa

from deltacache.pipeline.inputs.sources import VideoSource
from deltacache.pipeline.storage.atomic import readable_errors, write_if_changed
from deltacache.pipeline.storage.errors import read_file
from deltacache.pipeline.storage.sealing import parquet_of, read_parquet
from deltacache.pipeline.storage.storage import AnyPath
from deltacache.schemas.errors import DatasetError
from deltacache.schemas.fingerprints import fingerprint_of
from deltacache.schemas.tables import PLAN_SCHEMA

PLAN_FILE = "plan.parquet"
_ROWS_AT_ONCE = 4096
_SHARD_ID = re.compile(r"[0-9]{5,}-[0-9a-f]{8}")


@dataclass(frozen=True, slots=True)
class PlannedVideo:
    """One video with the views ``first_view .. first_view + views - 1``."""

    video_id: str
    video_uri: str
    size_bytes: int
    first_view: int
    views: int

    def __post_init__(self) -> None:
        if self.first_view < 0 or self.views < 1 or self.size_bytes < 0:
            raise ValueError(f"{self} must have first_view >= 0, views >= 1 and size_bytes >= 0")


@dataclass(frozen=True, slots=True)
class ShardTask:
    """The videos of one shard, in the order in which they are written."""

    shard_id: str
    videos: tuple[PlannedVideo, ...]


def shard_id_of(ordinal: int, videos: Iterable[PlannedVideo]) -> str:
    """The ordinal and eight hex digits of what is in the shard, so that other content has another id."""
    content = [[v.video_id, v.video_uri, v.size_bytes, v.first_view, v.views] for v in videos]
    return f"{ordinal:05d}-{fingerprint_of({'ordinal': ordinal, 'videos': content})[:8]}"


def check_shard_id(shard_id: str) -> str:
    """Return ``shard_id`` if it has the form of one, so that no file name can leave the dataset."""
    if not _SHARD_ID.fullmatch(shard_id):
        raise DatasetError(
            f"shard {shard_id!r} is not a shard id (such as 00012-5e8a01bc): the plan is damaged"
        )
    return shard_id


def extend_plan(
    existing: pa.Table | None, videos: Iterable[VideoSource], views: int, videos_per_shard: int
) -> pa.Table:
    """Append shards for what the plan lacks of ``videos`` under ``views`` views; what is planned stays.

    New videos form new shards, and so do the added views of known ones. Videos that are gone stay planned.
    Of a plan that was rebuilt without the shards that were not finished, what is missing gets the ordinals
    that are free: with the same videos these are the same shards again.

    Raises:
        DatasetError: two sources have one id.
    """
    if views < 1 or videos_per_shard < 1:
        raise ValueError(f"views {views} and videos_per_shard {videos_per_shard} must be at least 1")
    plan = PLAN_SCHEMA.empty_table() if existing is None else existing
    tasks = shard_tasks(plan)
    missing = _missing(tasks, videos, views)
    shards = list(_groups(missing, videos_per_shard))
    added = [
        ShardTask(shard_id_of(ordinal, shard), shard)
        for ordinal, shard in zip(_free_ordinals(tasks), shards, strict=False)
    ]
    if not added:
        return plan
    if tasks and ordinal_of(added[0].shard_id) < ordinal_of(tasks[-1].shard_id):
        return _table(sorted([*tasks, *added], key=lambda task: ordinal_of(task.shard_id)))
    return pa.concat_tables([plan, _table(added)]).combine_chunks()


def ordinal_of(shard_id: str) -> int:
    """The place of a shard in its plan, which its id begins with."""
    return int(shard_id.partition("-")[0])


def _free_ordinals(tasks: list[ShardTask]) -> Iterator[int]:
    taken = {ordinal_of(task.shard_id) for task in tasks}
    return (ordinal for ordinal in count() if ordinal not in taken)


def shard_tasks(plan: pa.Table) -> list[ShardTask]:
    """The shards of a plan, in its order.

    Raises:
        DatasetError: rows of a shard are not together, or its id is not one.
    """
    tasks = list(iter_tasks(plan))
    if len({task.shard_id for task in tasks}) != len(tasks):
        raise DatasetError(
            "the plan holds a shard in two places: it is damaged, `verify --repair` makes it again"
        )
    return tasks


def iter_tasks(plan: pa.Table) -> Iterator[ShardTask]:
    """The runs of rows of one shard, one after the other, so that no more than a few exist at once.

    Raises:
        DatasetError: a shard's id is not one.
    """
    batches = (batch.to_pylist() for batch in plan.to_batches(max_chunksize=_ROWS_AT_ONCE))
    rows = ((row.pop("shard"), PlannedVideo(**row)) for batch in batches for row in batch)
    for shard, group in groupby(rows, key=lambda row: row[0]):
        yield ShardTask(check_shard_id(shard), tuple(video for _, video in group))


def plan_of(tasks: Iterable[ShardTask]) -> pa.Table:
    """The plan of these shards."""
    return _table(list(tasks))


def _missing(tasks: list[ShardTask], videos: Iterable[VideoSource], views: int) -> list[PlannedVideo]:
    planned: dict[str, list[tuple[int, int]]] = {}
    for task in tasks:
        for video in task.videos:
            planned.setdefault(video.video_id, []).append((video.first_view, video.views))
    missing, seen = [], set()
    for video in sorted(videos, key=lambda video: video.video_uri):
        if video.video_id in seen:
            raise DatasetError(
                f"two videos have the id {video.video_id} ({video.video_uri}): rename one of them"
            )
        seen.add(video.video_id)
        for first, stop in _gaps(planned.get(video.video_id, []), views):
            uri, size = video.video_uri, video.size_bytes
            missing.append(PlannedVideo(video.video_id, uri, size, first, stop - first))
    return missing


def _gaps(planned: list[tuple[int, int]], views: int) -> Iterator[tuple[int, int]]:
    """First view and end of each run of the views below ``views`` that is not planned."""
    start = 0
    for first, count_ in sorted(planned):
        if start < first:
            yield start, min(first, views)
        start = max(start, first + count_)
        if start >= views:
            return
    yield start, views


def _groups(missing: list[PlannedVideo], videos_per_shard: int) -> Iterable[tuple[PlannedVideo, ...]]:
    by_views = sorted(missing, key=lambda video: (video.first_view, video.views))
    for _, group in groupby(by_views, key=lambda video: (video.first_view, video.views)):
        videos = tuple(group)
        for start in range(0, len(videos), videos_per_shard):
            yield videos[start : start + videos_per_shard]


def _table(tasks: list[ShardTask]) -> pa.Table:
    rows = [
        (task.shard_id, v.video_id, v.video_uri, v.size_bytes, v.first_view, v.views)
        for task in tasks
        for v in task.videos
    ]
    columns = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in PLAN_SCHEMA.names]
    return pa.table(dict(zip(PLAN_SCHEMA.names, columns, strict=True)), schema=PLAN_SCHEMA)


def resized(plan: pa.Table, sizes: Mapping[str, int]) -> pa.Table:
    """The plan with other sizes of these videos (by uri); their shards, and no others, get other ids."""
    tasks = shard_tasks(plan)
    changed = []
    for task in tasks:
        videos = tuple(replace(v, size_bytes=sizes.get(v.video_uri, v.size_bytes)) for v in task.videos)
        changed.append(ShardTask(shard_id_of(ordinal_of(task.shard_id), videos), videos))
    return _table(changed)


def read_plan(root: AnyPath) -> pa.Table:
    """The plan of the dataset at ``root``; empty when none was written yet.

    Raises:
        DatasetError: the file is damaged.
    """
    path = root / PLAN_FILE
    try:
        return read_parquet(read_file(path), PLAN_SCHEMA)
    except FileNotFoundError:
        return PLAN_SCHEMA.empty_table()
    except (ValueError, OSError) as error:
        raise DatasetError(
            f"{path} is damaged ({error}): `deltacache verify {root} --repair` removes it and makes it again "
            "from the receipts"
        ) from error


def replace_plan(root: AnyPath, plan: pa.Table) -> None:
    """Write another plan. What the old one alone had must have been dropped before."""
    with readable_errors(root / PLAN_FILE):
        write_if_changed(root / PLAN_FILE, parquet_of(plan))


def write_plan(root: AnyPath, plan: pa.Table) -> None:
    """Write the plan whole or not at all; does nothing when it is there already.

    Raises:
        DatasetError: the dataset's plan is not the beginning of this one.
    """
    written = read_plan(root)
    if not _holds(plan, written):
        raise DatasetError(
            f"{root / PLAN_FILE} holds shards that the new plan lacks: a plan is only appended to. "
            "Use the videos it was made from, or another output folder"
        )
    if plan.num_rows > written.num_rows or not (root / PLAN_FILE).exists():
        with readable_errors(root / PLAN_FILE):
            write_if_changed(root / PLAN_FILE, parquet_of(plan))


def _holds(plan: pa.Table, written: pa.Table) -> bool:
    """Whether ``plan`` begins with ``written``, or has all its shards and others between them."""
    if plan.slice(0, written.num_rows).equals(written):
        return True
    known = set(written["shard"].to_pylist())
    kept = plan.filter(pa.array([shard in known for shard in plan["shard"].to_pylist()], pa.bool_()))
    return kept.combine_chunks().equals(written.combine_chunks())
