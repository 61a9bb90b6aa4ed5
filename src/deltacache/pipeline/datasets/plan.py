"""``plan.parquet``: which videos form which shard. Written before any shard, and only ever appended to.

A plan may have ten million rows. What the offline jobs need goes over them in batches (``Plan``, ``grow_plan``);
a few bytes per video are held, as arrays of numbers.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count, groupby, islice
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from deltacache.pipeline.inputs.sources import VideoSource
from deltacache.pipeline.storage.files import open_parquet, readable_errors, seal_of, sealed_table
from deltacache.pipeline.storage.storage import AnyPath
from deltacache.schemas.datasets import fingerprint_of
from deltacache.schemas.errors import DatasetError
from deltacache.schemas.tables import PLAN_SCHEMA

PLAN_FILE = "plan.parquet"
_ROWS_AT_ONCE = 1 << 14
_TASKS_AT_ONCE = 256
SHARD_ID = re.compile(r"[0-9]{5,}-[0-9a-f]{8}")


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
    if not SHARD_ID.fullmatch(shard_id):
        raise DatasetError(
            f"shard {shard_id!r} is not a shard id (such as 00012-5e8a01bc): the plan is damaged"
        )
    return shard_id


class Plan:
    """The plan of a dataset, open for reading in batches; what is read stays that of the file it was opened as."""

    def __init__(self, root: AnyPath, file: pq.ParquetFile | None) -> None:
        """Use ``open_plan``; ``file`` None: there is no plan yet."""
        self._root, self._file = root, file
        self.seal = "" if file is None else seal_of(file)
        self.videos = 0 if file is None else file.metadata.num_rows

    def batches(self, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Its rows, or these columns of them, some at a time."""
        if self._file is not None:
            yield from self._file.iter_batches(_ROWS_AT_ONCE, columns=columns)

    @cached_property
    def _runs(self) -> tuple[list[str], np.ndarray]:
        shards, starts = runs_of(batch.column(0) for batch in self.batches(["shard"]))
        if len(set(shards)) != len(shards):
            raise _in_two_places()
        for shard in shards:
            check_shard_id(shard)
        return shards, starts

    @property
    def shard_ids(self) -> list[str]:
        """In order.

        Raises:
            DatasetError: rows of a shard are not together, or its id is not one.
        """
        return self._runs[0]

    def only(self, shard_ids: Collection[str]) -> "PlannedShards":
        """Those of its shards that are among ``shard_ids``."""
        among = frozenset(shard_ids)
        wanted = np.fromiter((shard in among for shard in self.shard_ids), bool, len(self.shard_ids))
        return PlannedShards(self, wanted)

    def table(self) -> pa.Table:
        """All of it in memory."""
        return pa.Table.from_batches(list(self.batches()), PLAN_SCHEMA).combine_chunks()


class PlannedShards:
    """Some shards of a plan: read from its file whenever somebody goes over them, so that few exist at once."""

    def __init__(self, plan: Plan, wanted: np.ndarray) -> None:
        self._plan, self._wanted = plan, wanted

    def __len__(self) -> int:
        return int(self._wanted.sum())

    def __contains__(self, task: object) -> bool:
        return any(task == each for each in self)

    def __iter__(self) -> Iterator[ShardTask]:
        return iter_tasks(self._rows())

    def clips(self) -> dict[str, int]:
        """How many clips are planned in each."""
        views = [batch.column(0).to_numpy() for batch in self._plan.batches(["views"])]
        if not views:
            return {}
        clips = np.add.reduceat(np.concatenate(views).astype(np.int64), self._plan._runs[1][:-1])
        return {
            shard: int(clips[place])
            for place, shard in enumerate(self._plan.shard_ids)
            if self._wanted[place]
        }

    def _rows(self) -> Iterator[pa.RecordBatch]:
        first, starts = 0, self._plan._runs[1]
        for batch in self._plan.batches() if self._wanted.any() else ():
            rows = np.arange(first, first + batch.num_rows)
            mask = self._wanted[np.searchsorted(starts, rows, side="right") - 1]
            first += batch.num_rows
            if mask.any():
                yield batch.filter(pa.array(mask))


def runs_of(columns: Iterable[pa.Array]) -> tuple[list[str], np.ndarray]:
    """The values of a column of text that comes in parts, each run of equal ones once, and where the runs begin.

    Returns:
        R values, and (R + 1,) int64 positions, the last being the number of rows.
    """
    values: list[str] = []
    starts: list[np.ndarray] = []
    rows = 0
    for column in columns:
        if len(column):
            changes = pc.call_function("not_equal", [column.slice(1), column.slice(0, len(column) - 1)])
            places = np.flatnonzero(
                np.append(True, pc.fill_null(changes, True).to_numpy(zero_copy_only=False))
            )
            begun = column.take(pa.array(places)).to_pylist()
            if values and begun[0] == values[-1]:
                places, begun = places[1:], begun[1:]
            values.extend(begun)
            starts.append(places + rows)
            rows += len(column)
    return values, np.append(np.concatenate([*starts, np.empty(0, np.int64)]), rows).astype(np.int64)


def open_plan(root: AnyPath) -> Plan:
    """The plan of the dataset at ``root``; an empty one when none was written yet.

    Raises:
        DatasetError: the file is damaged.
    """
    path = root / PLAN_FILE
    try:
        return Plan(root, open_parquet(path, PLAN_SCHEMA))
    except FileNotFoundError:
        return Plan(root, None)
    except (ValueError, OSError) as error:
        raise DatasetError(
            f"{path} is damaged ({error}): `deltacache verify {root} --repair` removes it and makes it again "
            "from the receipts"
        ) from error


def read_plan(root: AnyPath) -> pa.Table:
    """The plan of the dataset at ``root`` in memory; empty when none was written yet.

    Raises:
        DatasetError: the file is damaged.
    """
    return open_plan(root).table()


def extend_plan(
    existing: pa.Table | None, videos: Iterable[VideoSource], views: int, videos_per_shard: int
) -> pa.Table:
    """The plan with shards appended for what it lacks of ``videos`` under ``views`` views; what is planned stays.

    New videos form new shards, and so do the added views of known ones. Videos that are gone stay planned.
    Of a plan that was rebuilt without the shards that were not finished, what is missing gets the ordinals
    that are free: with the same videos these are the same shards again.

    Raises:
        DatasetError: two sources have one id.
    """
    plan = PLAN_SCHEMA.empty_table() if existing is None else existing
    ids = [task.shard_id for task in shard_tasks(plan)]
    added = list(
        _added(lambda columns: plan.select(columns).to_batches(), ids, videos, views, videos_per_shard)
    )
    return pa.concat_tables(_joined(plan.to_batches(), ids, added)).combine_chunks() if added else plan


def grow_plan(
    root: AnyPath, plan: Plan, videos: Iterable[VideoSource], views: int, videos_per_shard: int
) -> Plan:
    """``extend_plan`` of the plan on disk, written whole or not at all; ``plan`` itself when nothing is missing.

    Raises:
        DatasetError: two sources have one id, or the plan is damaged.
    """
    added = _added(plan.batches, plan.shard_ids, videos, views, videos_per_shard)
    first = next(added, None)
    if first is None and plan.seal:
        return plan
    tasks = () if first is None else (task for part in ((first,), added) for task in part)
    _write(root, _joined(plan.batches(), plan.shard_ids, tasks))
    return open_plan(root)


def missing_views(plan: Plan, videos: Iterable[VideoSource], views: int) -> Iterator[PlannedVideo]:
    """What ``grow_plan`` would add: new videos, and further views of known ones."""
    return _missing(plan.batches, videos, views)


def _joined(
    planned: Iterable[pa.RecordBatch], ids: list[str], added: Iterable[ShardTask]
) -> Iterator[pa.Table]:
    """A plan with more shards, in the order of their ordinals."""
    last, rest = ordinal_of(ids[-1]) if ids else -1, iter(added)
    fillers, behind = [], None  # in gaps of the plan, and the first behind its end
    for task in rest:
        if ordinal_of(task.shard_id) > last:
            behind = task
            break
        fillers.append(task)
    if fillers:
        tasks = sorted([*iter_tasks(planned), *fillers], key=lambda task: ordinal_of(task.shard_id))
        yield _table(tasks)
    else:
        yield from (pa.Table.from_batches([batch], PLAN_SCHEMA) for batch in planned)
    some = [] if behind is None else [behind]
    for task in rest:
        some.append(task)
        if len(some) >= _TASKS_AT_ONCE:
            yield _table(some)
            some = []
    yield _table(some)


def _write(root: AnyPath, tables: Iterable[pa.Table]) -> None:
    with (
        readable_errors(root / PLAN_FILE),
        sealed_table(root / PLAN_FILE, PLAN_SCHEMA, page_checksums=False) as written,
    ):
        for table in tables:
            written.add(table)


def ordinal_of(shard_id: str) -> int:
    """The place of a shard in its plan, which its id begins with."""
    return int(shard_id.partition("-")[0])


def shard_tasks(plan: pa.Table) -> list[ShardTask]:
    """The shards of a plan, in its order.

    Raises:
        DatasetError: rows of a shard are not together, or its id is not one.
    """
    tasks = list(iter_tasks(plan))
    if len({task.shard_id for task in tasks}) != len(tasks):
        raise _in_two_places()
    return tasks


def _in_two_places() -> DatasetError:
    return DatasetError(
        "the plan holds a shard in two places: it is damaged, `verify --repair` makes it again"
    )


def iter_tasks(plan: pa.Table | Iterable[pa.RecordBatch]) -> Iterator[ShardTask]:
    """The runs of rows of one shard, one after the other, so that no more than a few exist at once.

    Raises:
        DatasetError: a shard's id is not one.
    """
    held = (
        cast(pa.Table, plan).to_batches(max_chunksize=_ROWS_AT_ONCE) if isinstance(plan, pa.Table) else plan
    )
    rows = (
        row for batch in held for row in zip(*(column.to_pylist() for column in batch.columns), strict=True)
    )
    for shard, group in groupby(rows, key=lambda row: row[0]):
        yield ShardTask(check_shard_id(shard), tuple(PlannedVideo(*about) for _, *about in group))


def plan_of(tasks: Iterable[ShardTask]) -> pa.Table:
    """The plan of these shards."""
    return _table(list(tasks))


Columns = Callable[[list[str]], Iterable[pa.RecordBatch]]


def _added(
    planned: Columns, ids: list[str], videos: Iterable[VideoSource], views: int, videos_per_shard: int
) -> Iterator[ShardTask]:
    """The shards to append. ``planned`` gives columns of the plan's rows, ``ids`` are those of its shards."""
    if views < 1 or videos_per_shard < 1:
        raise ValueError(f"views {views} and videos_per_shard {videos_per_shard} must be at least 1")
    taken = {ordinal_of(shard_id) for shard_id in ids}
    ordinals = (ordinal for ordinal in count() if ordinal not in taken)
    for shard in _groups(_missing(planned, videos, views), videos_per_shard):
        ordinal = next(ordinals)
        yield ShardTask(shard_id_of(ordinal, shard), shard)


def _missing(planned: Columns, videos: Iterable[VideoSource], views: int) -> Iterator[PlannedVideo]:
    """What the plan lacks of these videos, by first view and number of views, then in the order of uris.

    A video is looked up by 64 bits of a hash of its id: 24 bytes per video are held, not the plan.
    """
    videos = _in_order(videos)
    keys = hashes(video.video_id for video in videos)
    order = np.argsort(keys, kind="stable")
    places = keys[order]
    if (places[1:] == places[:-1]).any():
        _refuse_doubles(videos)
    covered, stop = np.zeros(
        (2, len(keys)), dtype=np.int32
    )  # planned views below ``views``, the end of the last
    for batch in planned(["video_id", "first_view", "views"]) if len(keys) else ():
        at, known = _found(places, hashes(batch.column(0).to_pylist()))
        first, end = batch.column(1).to_numpy()[known], batch.column(2).to_numpy()[known]
        first, end = np.minimum(first, views), np.minimum(first + end, views)
        np.add.at(covered, at, end - first)
        np.maximum.at(stop, at, end)
    holed = np.flatnonzero(covered < stop)  # views are missing between planned ones
    ranges: dict[int, list[tuple[int, int]]] = {int(place): [] for place in holed}
    for batch in planned(["video_id", "first_view", "views"]) if ranges else ():
        at, known = _found(places, hashes(batch.column(0).to_pylist()))
        rows = (batch.column(each).to_numpy()[known].tolist() for each in (1, 2))
        for place, *about in zip(at.tolist(), *rows, strict=True):
            if place in ranges:
                ranges[place].append((about[0], about[1]))
    place_of = np.empty(len(keys), dtype=np.int64)
    place_of[order] = np.arange(len(keys))
    ends = {int(end) for end in np.unique(stop) if end < views}
    wanted = {(end, views - end) for end in ends}
    wanted |= {(first, end - first) for held in ranges.values() for first, end in _gaps(held, views)}
    for first, number in sorted(wanted):
        for video, place in zip(videos, place_of.tolist(), strict=True):
            if place in ranges:
                missing = (first, first + number) in set(_gaps(ranges[place], views))
            else:
                missing = stop[place] == first and first + number == views
            if missing:
                yield PlannedVideo(video.video_id, video.video_uri, video.size_bytes, first, number)


def hashes(values: Iterable[object]) -> np.ndarray:
    """64 bits of a hash of each, of use within this process only."""
    return np.fromiter(map(hash, values), dtype=np.int64)


def is_among(places: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Which of ``keys`` are among the sorted ``places``: (len(keys),) bool."""
    if not len(places):
        return np.zeros(len(keys), bool)
    return places[np.minimum(np.searchsorted(places, keys), len(places) - 1)] == keys


def _found(places: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where in the sorted ``places`` each of ``keys`` is that is there, and which are."""
    known = is_among(places, keys)
    return np.searchsorted(places, keys[known]), known


def _in_order(videos: Iterable[VideoSource]) -> Collection[VideoSource]:
    """By uri; what is in order already, as ``find_videos`` gives it, is not copied."""
    held = videos if isinstance(videos, Collection) else list(videos)
    last = ""
    for video in held:
        if video.video_uri < last:
            return sorted(held, key=lambda video: video.video_uri)
        last = video.video_uri
    return held


def _refuse_doubles(videos: Iterable[VideoSource]) -> None:
    seen = set()
    for video in videos:
        if video.video_id in seen:
            raise DatasetError(
                f"two videos have the id {video.video_id} ({video.video_uri}): rename one of them"
            )
        seen.add(video.video_id)


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


def _groups(missing: Iterable[PlannedVideo], videos_per_shard: int) -> Iterator[tuple[PlannedVideo, ...]]:
    for _, group in groupby(missing, key=lambda video: (video.first_view, video.views)):
        while videos := tuple(islice(group, videos_per_shard)):
            yield videos


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
    return pa.concat_tables([PLAN_SCHEMA.empty_table(), *_resized(plan.to_batches(), sizes)]).combine_chunks()


def resize_plan(root: AnyPath, sizes: Mapping[str, int]) -> None:
    """Write ``resized`` of the plan on disk. The shards that get other ids must have been dropped before."""
    _write(root, _resized(open_plan(root).batches(), sizes))


def _resized(planned: Iterable[pa.RecordBatch], sizes: Mapping[str, int]) -> Iterator[pa.Table]:
    tasks = iter_tasks(planned)
    while some := list(islice(tasks, _TASKS_AT_ONCE)):
        for place, task in enumerate(some):
            if any(video.video_uri in sizes for video in task.videos):
                videos = tuple(
                    replace(v, size_bytes=sizes.get(v.video_uri, v.size_bytes)) for v in task.videos
                )
                some[place] = ShardTask(shard_id_of(ordinal_of(task.shard_id), videos), videos)
        yield _table(some)


def copy_plan(source: Plan, root: AnyPath) -> None:
    """Give ``root`` the plan of another dataset. What its own alone had must have been dropped before."""
    _write(root, (pa.Table.from_batches([batch], PLAN_SCHEMA) for batch in source.batches()))


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
        _write(root, [plan])


def _holds(plan: pa.Table, written: pa.Table) -> bool:
    """Whether ``plan`` begins with ``written``, or has all its shards and others between them."""
    if plan.slice(0, written.num_rows).equals(written):
        return True
    known = set(written["shard"].to_pylist())
    kept = plan.filter(pa.array([shard in known for shard in plan["shard"].to_pylist()], pa.bool_()))
    return kept.combine_chunks().equals(written.combine_chunks())
