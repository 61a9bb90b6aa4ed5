"""``plan.parquet``: which videos form which shard. Written before any shard, and only ever appended to."""

import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from deltacache.pipeline.atomic import readable_errors, write_if_changed
from deltacache.pipeline.sources import VideoSource
from deltacache.schemas.errors import DatasetError
from deltacache.schemas.fingerprints import fingerprint_of
from deltacache.schemas.tables import PLAN_SCHEMA

PLAN_FILE = "plan.parquet"
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

    Raises:
        DatasetError: a planned video has another size now, or two sources have one id.
    """
    if views < 1 or videos_per_shard < 1:
        raise ValueError(f"views {views} and videos_per_shard {videos_per_shard} must be at least 1")
    plan = PLAN_SCHEMA.empty_table() if existing is None else existing
    tasks = shard_tasks(plan)
    missing = _missing(tasks, videos, views)
    shards = list(_groups(missing, videos_per_shard))
    added = [
        ShardTask(shard_id_of(ordinal, shard), shard)
        for ordinal, shard in enumerate(shards, start=len(tasks))
    ]
    return pa.concat_tables([plan, _table(added)]).combine_chunks() if added else plan


def shard_tasks(plan: pa.Table) -> list[ShardTask]:
    """The shards of a plan, in its order.

    Raises:
        DatasetError: rows of a shard are not together, or its id is not one.
    """
    columns = [plan.column(name).to_pylist() for name in PLAN_SCHEMA.names]
    rows = [(shard, PlannedVideo(*values)) for shard, *values in zip(*columns, strict=True)]
    tasks = [
        ShardTask(check_shard_id(shard), tuple(video for _, video in group))
        for shard, group in groupby(rows, key=lambda row: row[0])
    ]
    if len({task.shard_id for task in tasks}) != len(tasks):
        raise DatasetError("the plan holds a shard in two places: it is damaged, restore it from a copy")
    return tasks


def _missing(tasks: list[ShardTask], videos: Iterable[VideoSource], views: int) -> list[PlannedVideo]:
    sizes: dict[str, int] = {}
    covered: dict[str, int] = {}
    for task in tasks:
        for video in task.videos:
            sizes[video.video_id] = video.size_bytes
            covered[video.video_id] = max(covered.get(video.video_id, 0), video.first_view + video.views)
    missing, seen = [], set()
    for video in sorted(videos, key=lambda video: video.video_uri):
        if video.video_id in seen:
            raise DatasetError(
                f"two videos have the id {video.video_id} ({video.video_uri}): rename one of them"
            )
        seen.add(video.video_id)
        _check_size(video, sizes.get(video.video_id))
        first = covered.get(video.video_id, 0)
        if first < views:
            uri, size = video.video_uri, video.size_bytes
            missing.append(PlannedVideo(video.video_id, uri, size, first, views - first))
    return missing


def _check_size(video: VideoSource, planned: int | None) -> None:
    if planned is not None and planned != video.size_bytes:
        raise DatasetError(
            f"{video.video_uri} has {video.size_bytes} bytes, but {planned} when it was planned: a video must "
            "not change behind its name. Put the old file back, or give the new one another name"
        )


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
    columns = [list(column) for column in zip(*rows, strict=True)]
    return pa.table(dict(zip(PLAN_SCHEMA.names, columns, strict=True)), schema=PLAN_SCHEMA)


def read_plan(root: Path) -> pa.Table:
    """The plan of the dataset at ``root``; empty when none was written yet.

    Raises:
        DatasetError: the file is damaged.
    """
    path = root / PLAN_FILE
    if not path.exists():
        return PLAN_SCHEMA.empty_table()
    try:
        with pq.ParquetFile(path) as file:  # read_table would take folders named a=b for columns
            plan = file.read()
        if not plan.schema.equals(PLAN_SCHEMA):
            raise pa.ArrowInvalid(f"its columns are {plan.schema.names}, must be {PLAN_SCHEMA.names}")
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{path} is damaged ({error}): restore it from a copy") from error
    return plan


def write_plan(root: Path, plan: pa.Table) -> None:
    """Write the plan whole or not at all; does nothing when it is there already.

    Raises:
        DatasetError: the dataset's plan is not the beginning of this one.
    """
    written = read_plan(root)
    if not plan.slice(0, written.num_rows).equals(written):
        raise DatasetError(
            f"{root / PLAN_FILE} holds shards that the new plan lacks: a plan is only appended to. "
            "Use the videos it was made from, or another output folder"
        )
    if plan.num_rows > written.num_rows or not (root / PLAN_FILE).exists():
        stream = io.BytesIO()
        pq.write_table(plan, stream)
        with readable_errors(root / PLAN_FILE):
            write_if_changed(root / PLAN_FILE, stream.getvalue())
