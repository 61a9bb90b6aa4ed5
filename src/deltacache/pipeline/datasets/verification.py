"""``verify``: every byte of every shard is read; plan, receipts and tables must agree. ``--repair`` removes damage."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from deltacache.pipeline.datasets.dataset import altered_array, clip_arrays
from deltacache.pipeline.datasets.plan import (
    PLAN_FILE,
    SHARD_ID,
    ShardTask,
    iter_tasks,
    ordinal_of,
    plan_of,
    read_plan,
    shard_id_of,
    write_plan,
)
from deltacache.pipeline.datasets.receipts import (
    RECEIPTS,
    SHARDS,
    FileRecord,
    Receipt,
    finished_shards,
    read_receipt,
)
from deltacache.pipeline.datasets.stores import SCALES, TIMESTAMPS, ByteRange, shard_store, token_array
from deltacache.pipeline.datasets.writing import (
    BLACK_FILE,
    CARD_FILE,
    DATASET_FILES,
    FAILURES_FILE,
    INDEX_FILE,
    PARTS,
    SOURCES_FILE,
    STAGING,
    TABLE_FILES,
    TABLES_FILE,
    checked_receipt,
    commits_under_way,
    drop_shards,
    drop_under_way,
    failure_rows,
    ids_sha256,
    is_dataset,
    is_part,
    part_name,
    part_row,
    read_black,
    read_card,
    read_tables_summary,
    settle,
    shard_names,
    source_rows,
)
from deltacache.pipeline.storage.errors import read_file
from deltacache.pipeline.storage.files import (
    crc32c_of_array,
    crc32c_of_file,
    is_temporary,
    open_parquet,
    readable_errors,
    remove,
    remove_leftovers,
    seal_of,
)
from deltacache.pipeline.storage.locking import dataset_lock
from deltacache.pipeline.storage.mapped import MappedFiles
from deltacache.pipeline.storage.storage import (
    AnyPath,
    dataset_root,
    in_threads,
    is_local,
    names_in,
    objects_below,
)
from deltacache.schemas.clips import clip_id_of
from deltacache.schemas.datasets import DatasetCard
from deltacache.schemas.errors import DatasetError, DeltacacheError, StorageError
from deltacache.schemas.progress import Reporter, SilentReporter
from deltacache.schemas.tables import FAILURES_SCHEMA, INDEX_SCHEMA, PART_SCHEMA, SOURCES_SCHEMA
from deltacache.schemas.texts import counted

# ----------------------------------------------------------------------------------------------------
# What verification finds, and what repairing does about it.
# ----------------------------------------------------------------------------------------------------


class Remedy(StrEnum):
    """What ``verify --repair`` does about a problem."""

    DROP_SHARD = "the shard is dropped"
    REMOVE = "the file is removed"
    REBUILD_PLAN = "the plan is made again from the receipts"
    MERGE = "the tables are merged again"
    REWRITE_GROUP = "the group's metadata are written again"
    SWEEP = "what dead commands left is removed"
    RERUN = "nothing: the command that made the dataset finishes it"
    LEAVE = "nothing: it may be yours"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: in which file (relative to the dataset), and of which clip if it is one's.

    Attributes:
        shard_id: of the shard that the file belongs to, if it does.
    """

    file: str
    clip_id: str | None
    message: str
    remedy: Remedy = Remedy.LEAVE
    shard_id: str | None = None

    def __str__(self) -> str:
        clip = "" if self.clip_id is None else f" (clip {self.clip_id})"
        return f"{self.file}{clip}: {self.message}"


# ----------------------------------------------------------------------------------------------------
# Which shards a dataset is to have: from its plan, or where that is damaged from the receipts.
# ----------------------------------------------------------------------------------------------------


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
        problems = [_plan_problem(message, clip_id) for message, clip_id in _wrong(plan)]
    except StorageError:
        raise
    except (DatasetError, ValueError) as error:
        plan = plan_of_receipts(root)
        planned = frozenset(task.shard_id for task in iter_tasks(plan))
        return KnownShards(plan, planned, finished, True, [_plan_problem(str(error), None)])
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


def _plan_problem(message: str, clip_id: str | None) -> Problem:
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
        what = f"lacks {counted(len(gaps), 'shard')}, the first is number {gaps[0]}"
        yield Problem(PLAN_FILE, None, f"{what}: run the command again, which plans them", Remedy.RERUN)
    if not planned and not finished:
        yield Problem(PLAN_FILE, None, "has no shards: not finished, run the command again", Remedy.RERUN)


# ----------------------------------------------------------------------------------------------------
# Whether one shard is what its receipt says, and its receipt what the plan says.
# ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CheckedShard:
    """One shard with all that is wrong with it; ``receipt`` is None when it cannot be read."""

    shard_id: str
    receipt: Receipt | None
    problems: list[Problem]


def check_shard(root: AnyPath, card: DatasetCard, held: frozenset[str], task: ShardTask) -> CheckedShard:
    """Read one finished shard whole.

    Args:
        held: names in the folder of the shards.

    Raises:
        StorageError: the place of the dataset refuses or does not answer, so that nothing can be judged.
    """
    try:
        receipt = checked_receipt(root, task.shard_id, card)
    except StorageError:
        raise
    except DeltacacheError as error:
        file = f"{RECEIPTS}/{task.shard_id}.json"
        return CheckedShard(
            task.shard_id, None, [Problem(file, None, str(error), Remedy.DROP_SHARD, task.shard_id)]
        )
    try:
        problems = [*_receipt(card, task, receipt), *_files(root, card, receipt)]
    except (ValueError, TypeError, KeyError) as error:  # fields of other types, under a checksum that fits
        file = f"{RECEIPTS}/{task.shard_id}.json"
        problems = [_shard_problem(receipt, file, None, f"its content makes no sense ({error!r})")]
    return CheckedShard(task.shard_id, receipt, [*problems, *_unlisted(root, receipt, held)])


def _receipt(card: DatasetCard, task: ShardTask, receipt: Receipt) -> Iterator[Problem]:
    """Whether a receipt agrees with itself, and holds all that was planned and nothing else."""
    problem = partial(_shard_problem, receipt, f"{RECEIPTS}/{receipt.shard_id}.json")
    if tuple(source.planned() for source in receipt.sources) != task.videos:
        yield problem(None, "its sources are not the videos that the plan has in this shard")
    windows = Counter(about["video_uri"] for about in receipt.clips) if card.sampling.windows else {}
    planned = {
        clip_id_of(video.video_id, view): (video.video_uri, view)
        for video in task.videos
        for view in range(
            video.first_view, video.first_view + max(video.views, windows.get(video.video_uri, 0))
        )
    }
    place = {clip_id: index for index, clip_id in enumerate(planned)}
    last = -1
    for row, about in enumerate(receipt.clips):
        clip_id, crcs = about["clip_id"], receipt.arrays[about["clip_id"]]
        times = crc32c_of_array(np.asarray(about[TIMESTAMPS], np.float32))
        if (crcs.get(token_array(card)), crcs.get(TIMESTAMPS)) != (about["crc32c"], times):
            yield problem(clip_id, "the checksums of its arrays are not those of its index row")
        where = (about["shard"], about["row"])
        if planned.get(clip_id) != (about["video_uri"], about["view"]) or where != (receipt.shard_id, row):
            yield problem(clip_id, "is not a clip that the plan has in this shard, or is in another place")
        elif place[clip_id] < last:
            yield problem(clip_id, "is not where the plan's order puts it")
        last = max(last, place.get(clip_id, -1))
    refused = {(failure.video_uri, failure.view) for failure in receipt.failures}
    for clip_id, (uri, view) in planned.items():
        if clip_id not in receipt.arrays and not refused & {(uri, None), (uri, view)}:
            yield problem(clip_id, f"view {view} of {uri} is neither a clip nor a failure")


def _shard_problem(receipt: Receipt, file: str, clip_id: str | None, message: str) -> Problem:
    return Problem(file, clip_id, message, Remedy.DROP_SHARD, receipt.shard_id)


def _files(root: AnyPath, card: DatasetCard, receipt: Receipt) -> Iterator[Problem]:
    """Missing and altered files, and what of them belongs to a clip."""
    whole = True
    for name, record in receipt.files.items():
        path = root / name
        if not path.is_file():
            whole = False
            yield _shard_problem(receipt, name, None, f"is missing; its receipt says {record.bytes} bytes")
            continue
        try:
            held = FileRecord(path.stat().st_size, crc32c_of_file(path))
        except OSError as error:
            yield _shard_problem(receipt, name, None, f"cannot be read ({error})")
            continue
        if held != record:
            message = f"{_record(held)}, but its receipt says {_record(record)}"
            yield _shard_problem(receipt, name, None, message)
    if receipt.clips and (root / receipt.token_file).is_file():
        yield from _clips(root, card, receipt)
    if receipt.clips and card.store == "zarr" and whole:
        yield from _group_ids(root, receipt)


def _record(record: FileRecord) -> str:
    return f"{record.bytes} bytes of crc32c {record.crc32c:08x}"


def _clips(root: AnyPath, card: DatasetCard, receipt: Receipt) -> Iterator[Problem]:
    """Which clips of a shard are altered, or are others than the receipt says."""
    store, files, file = shard_store(card), MappedFiles(), receipt.token_file
    for row, about in enumerate(receipt.clips):
        clip_id = about["clip_id"]
        try:
            arrays = clip_arrays(files, root, card, receipt, row)
        except (OSError, ValueError):
            message = "its tokens are not there: the file ends before them"
            if receipt.scale_file:
                message = "its tokens or their scales are not there: a file is missing or ends before them"
            yield _shard_problem(receipt, file, clip_id, message)
            continue
        crcs = {**receipt.arrays[clip_id], token_array(card): about["crc32c"]}
        named = set[str]()
        altered = altered_array(card, arrays, crcs)
        if altered is not None:
            where = receipt.scale_file if altered.array == SCALES else file
            named.add(where)
            yield _shard_problem(receipt, where, clip_id, altered.message)
        for stretch in store.bytes_around(receipt, row, arrays):
            if stretch.file not in named and not _is_there(files, root, stretch):
                named.add(stretch.file)
                message = "the bytes around its tokens, or its times, are altered or of another clip"
                yield _shard_problem(receipt, stretch.file, clip_id, message)


def _is_there(files: MappedFiles, root: AnyPath, stretch: ByteRange) -> bool:
    size = len(stretch.content)
    try:
        held = files.array(root / stretch.file, np.uint8, stretch.offset, (size,), 1)
    except FileNotFoundError:  # listed as missing already
        return True
    except (OSError, ValueError):
        return False
    return held.tobytes() == stretch.content


def _group_ids(root: AnyPath, receipt: Receipt) -> Iterator[Problem]:
    """Which clips the group of a Zarr shard names otherwise than the receipt."""
    file = "/".join([*PurePosixPath(receipt.token_file).parts[:2], "zarr.json"])
    ids = [row["clip_id"] for row in receipt.clips]
    try:
        held = list(json.loads((root / file).read_bytes())["attributes"]["clip_ids"])
    except (OSError, ValueError, KeyError, TypeError):  # altered: listed already
        return
    for clip_id, named in zip(ids, held + [None] * len(ids), strict=False):
        if named != clip_id:
            yield _shard_problem(receipt, file, clip_id, f"the group's clip_ids have {named!r} in its place")


def _unlisted(root: AnyPath, receipt: Receipt, held: frozenset[str]) -> Iterator[Problem]:
    """Files under the shard's names that its receipt does not list."""
    for name in held.intersection(shard_names(receipt.shard_id)):
        for file in _below(root, f"{SHARDS}/{name}"):
            if file not in receipt.files:
                message = "is not listed in the shard's receipt"
                yield Problem(file, None, message, Remedy.LEAVE, receipt.shard_id)


def _below(root: AnyPath, name: str) -> list[str]:
    """Files below a folder of the dataset, or the file of this name."""
    top = root / name
    if is_local(top):
        paths = sorted(path for path in top.rglob("*") if not path.is_dir()) if top.is_dir() else [top]
    else:
        paths = objects_below(top)
    start = len(root.as_posix().rstrip("/")) + 1
    return [path.as_posix()[start:] for path in paths]


# ----------------------------------------------------------------------------------------------------
# Whether the tables of a dataset hold what its receipts say: row by row, in the order of both.
# ----------------------------------------------------------------------------------------------------


_ROWS_AT_ONCE = 4096
_SCHEMAS = {INDEX_FILE: INDEX_SCHEMA, FAILURES_FILE: FAILURES_SCHEMA, SOURCES_FILE: SOURCES_SCHEMA}
_MAKE_AGAIN = "remove it and run the command that made the dataset again"


class TableCheck:
    """Takes the receipts in the plan's order and compares the tables with them, some rows at a time."""

    def __init__(self, root: AnyPath) -> None:
        self._root = root
        self.problems: list[Problem] = []
        self._read: list[str] = []
        self._counted = Counter[str]()  # what tables.json must say
        self._part: tuple[str, dict[str, int], pa.Table | None] = ("", {}, None)
        self._unknown: set[str] = set()
        self._index = self._rows(INDEX_FILE)
        self._others = {
            FAILURES_FILE: self._rows(FAILURES_FILE),
            SOURCES_FILE: self._rows(SOURCES_FILE),
        }
        self._differing = {name: rows is None for name, rows in self._others.items()}
        self._must: dict[str, dict[str, Any]] = {}  # clips whose rows did not come when they should
        self._held: dict[str, dict[str, Any]] = {}  # rows that came when others should
        self._doubled: set[str] = set()
        self._disordered = False

    def add(self, receipt: Receipt) -> None:
        """The receipt of the next finished shard."""
        self._read.append(receipt.shard_id)
        self._counted.update(clips=len(receipt.clips), shard_bytes=receipt.total_bytes)
        self._check_part(receipt)
        for name, must in ((FAILURES_FILE, failure_rows(receipt)), (SOURCES_FILE, source_rows(receipt))):
            rows = self._others[name]
            for row in must:
                if not self._differing[name] and next(rows or iter(()), None) != row:
                    self._differing[name] = True
        if self._index is None:
            return
        for row in receipt.index_rows:
            self._pair(next(self._index, None), row)

    def _check_part(self, receipt: Receipt) -> None:
        """Whether the part that knows this shard, if there is one, says what its receipt does."""
        name = part_name(receipt.shard_id)
        path = self._root / PARTS / name
        if name != self._part[0]:
            self._part = (name, {}, None)
            try:
                if path.exists():
                    with open_parquet(path, PART_SCHEMA) as file:
                        part = file.read()
                    rows = {shard: row for row, shard in enumerate(part["shard"].to_pylist())}
                    self._part = (name, rows, part)
            except (ValueError, OSError) as error:
                self._say_of_part(name, f"is damaged ({error}): {_MAKE_AGAIN}")
        _, rows, part = self._part
        row = rows.get(receipt.shard_id)
        if part is not None and row is not None and part.slice(row, 1).to_pylist() != [part_row(receipt)]:
            self._say_of_part(name, f"says of shard {receipt.shard_id} something else than its receipt")
            self._part = (name, {}, None)  # said once

    def _say_of_part(self, name: str, message: str) -> None:
        self.problems.append(Problem(f"{PARTS}/{name}", None, message, Remedy.MERGE))

    def add_unreadable(self, shard_id: str) -> None:
        """A shard whose receipt is damaged: nothing can be said about its rows. Said before they come."""
        self._unknown.add(shard_id)

    def finish(self, is_lost: Callable[[str], bool], *, some_lost: bool) -> list[Problem]:
        """All that is wrong with the tables.

        Args:
            is_lost: Whether the shard of this id has no receipt, though it may have had one: nothing is said
                about its rows.
            some_lost: Whether there may be such shards.
        """
        self._summary()
        for name, rows in self._others.items():
            if rows is None or self._unknown or some_lost:
                continue
            if self._differing[name] or next(rows, None) is not None:
                self._say(name, None, "does not hold what the receipts say")
        if self._index is not None:
            for row in self._index:
                self._pair(row, None)
            # Say what is left when all rows have been paired.
            before = len(self.problems)
            left = {clip_id: row["shard"] for clip_id, row in self._held.items()}
            strange = {i for i, shard in left.items() if not is_lost(shard) and shard not in self._unknown}
            strange |= self._doubled
            counts = self._counts(strange)
            for clip_id in sorted(strange):
                known = counts[clip_id] > 1
                self._say(INDEX_FILE, clip_id, f"has {counts[clip_id]} rows" if known else "is in no receipt")
            for clip_id in self._must:
                self._say(INDEX_FILE, clip_id, "is in a receipt but has no row")
            if self._disordered and len(self.problems) == before and not self._held:
                self._say(INDEX_FILE, None, "has its rows in another order than the plan's")
        return self.problems

    def _rows(self, name: str) -> Iterator[dict[str, Any]] | None:
        """The rows of a table one by one; None if it cannot be read, which is noted."""
        path = self._root / name
        if not path.exists():
            self._say(
                name, None, "does not exist: run the command that made the dataset again, which writes it"
            )
            return None
        try:
            file = open_parquet(path, _SCHEMAS[name])
        except (ValueError, OSError) as error:
            self._say(name, None, f"is damaged ({error}): {_MAKE_AGAIN}")
            return None
        return _rows_of(file)

    def _say(self, name: str, clip_id: str | None, message: str) -> None:
        self.problems.append(Problem(name, clip_id, message, Remedy.MERGE))

    def _pair(self, held: dict[str, Any] | None, must: dict[str, Any] | None) -> None:
        """Compare what is the next row of the index with what must be."""
        if held is not None and self._unknown and held["shard"] in self._unknown and self._index is not None:
            while held is not None and held["shard"] in self._unknown:
                held = next(self._index, None)
        if held == must:
            return
        if held is not None:
            self._came(str(held["clip_id"]), held)
        if must is not None:
            clip_id = must["clip_id"]
            if clip_id in self._held:
                self._compare(self._held.pop(clip_id), must)
            else:
                self._must[clip_id] = must

    def _came(self, clip_id: str, held: dict[str, Any]) -> None:
        if clip_id in self._must:
            self._compare(held, self._must.pop(clip_id))
        elif clip_id in self._held:
            self._doubled.add(clip_id)
        else:
            self._held[clip_id] = held

    def _compare(self, held: dict[str, Any], must: dict[str, Any]) -> None:
        differing = ", ".join(name for name in must if held[name] != must[name])
        if differing:
            self._say(INDEX_FILE, must["clip_id"], f"its row differs from the receipt in {differing}")
        else:
            self._disordered = True

    def _counts(self, clip_ids: set[str]) -> Counter[str]:
        counts: Counter[str] = Counter()
        if clip_ids:
            for row in _rows_of(open_parquet(self._root / INDEX_FILE, INDEX_SCHEMA), ["clip_id"]):
                counts.update([row["clip_id"]] if row["clip_id"] in clip_ids else [])
        return counts

    def _summary(self) -> None:
        try:
            summary = read_tables_summary(self._root)
        except DatasetError as error:
            self._say(TABLES_FILE, None, str(error))
            return
        counted = {"clips": summary.clips, "shard_bytes": summary.shard_bytes}
        if not self._unknown and (
            summary.shards_sha256 != ids_sha256(self._read) or self._counted != Counter(counted)
        ):
            self._say(TABLES_FILE, None, f"is of other {RECEIPTS} than are there: run the command again")
        wrong = {problem.file for problem in self.problems}
        for name in TABLE_FILES:
            path = self._root / name
            if name in wrong or not path.is_file():
                continue
            with open_parquet(path, _SCHEMAS[name]) as file:
                record = FileRecord(path.stat().st_size, int(seal_of(file), 16))
            if record != summary.files.get(name):
                self._say(name, None, f"is not the file that {TABLES_FILE} says: {_MAKE_AGAIN}")


def _rows_of(file: pq.ParquetFile, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    with file:
        for batch in file.iter_batches(_ROWS_AT_ONCE, columns=columns):
            yield from batch.to_pylist()


# ----------------------------------------------------------------------------------------------------
# Looking for damage: every byte of every shard, and whether plan, receipts and tables say the same.
#
# Shards are read in threads, one after the other is let go: memory holds the plan and what is wrong, nothing
# else that grows with the dataset.
# ----------------------------------------------------------------------------------------------------


__all__ = ["Problem", "verify_dataset"]

_GROUP_FILE = "zarr.json"
_THREADS = max(2, min(8, os.cpu_count() or 2))
"""Checksums and reading leave the interpreter, so that threads use all cores and keep a disk busy."""
_REMOTE_THREADS = 16


def verify_dataset(root: AnyPath | str, reporter: Reporter | None = None) -> list[Problem]:
    """Read a dataset whole and list all that is wrong with it.

    Raises:
        DatasetError: there is no dataset.
        StorageError: its place refuses or does not answer, so that nothing can be judged.
    """
    root = dataset_root(root)
    try:
        card = read_card(root)
    except StorageError:
        raise
    except DatasetError as error:
        if not (root / CARD_FILE).exists() and not finished_shards(root):
            raise
        return [Problem(CARD_FILE, None, f"{error}. Nothing else was checked", Remedy.REMOVE)]
    problems = list(_black(root, card))
    shards = known_shards(root)
    problems.extend(shards.problems)
    problems.extend(_shards(root, card, shards, reporter or SilentReporter()))
    problems.extend(_strays(root, card, shards))
    return problems


def _black(root: AnyPath, card: DatasetCard) -> Iterator[Problem]:
    try:
        read_black(root, card)
    except StorageError:
        raise
    except DatasetError as error:
        yield Problem(BLACK_FILE, None, str(error), Remedy.REMOVE)


def _shards(root: AnyPath, card: DatasetCard, shards: KnownShards, reporter: Reporter) -> Iterator[Problem]:
    """What is wrong with the finished shards, in the plan's order, and then with the tables."""
    held, tables = frozenset(names_in(root / SHARDS)), TableCheck(root)
    for shard_id in shards.finished - shards.planned:
        tables.add_unreadable(shard_id)
    finished = (task for task in iter_tasks(shards.plan) if task.shard_id in shards.finished)
    found = 0
    with reporter.stage("verify", len(shards.finished & shards.planned)) as stage:
        check, threads = (
            partial(check_shard, root, card, held),
            _THREADS if is_local(root) else _REMOTE_THREADS,
        )
        for checked in in_threads(check, _once(finished), threads=threads):
            yield from checked.problems
            found += len(checked.problems)
            stage.advance(1, problems=found)
            receipt_file = f"{RECEIPTS}/{checked.shard_id}.json"
            if checked.receipt is None or any(p.file == receipt_file for p in checked.problems):
                tables.add_unreadable(checked.shard_id)
            else:
                tables.add(checked.receipt)
    lost = shards.planned - shards.finished
    yield from tables.finish(
        lambda shard_id: shard_id in lost or (shards.damaged and shard_id not in shards.finished),
        some_lost=bool(lost) or shards.damaged,
    )


def _once(tasks: Iterator[ShardTask]) -> Iterator[ShardTask]:
    """Each shard once: that a plan holds one twice was said."""
    seen: set[str] = set()
    for task in tasks:
        if task.shard_id not in seen:
            seen.add(task.shard_id)
            yield task


def _strays(root: AnyPath, card: DatasetCard, shards: KnownShards) -> Iterator[Problem]:
    """What lies in the folders of a dataset and belongs to no shard."""
    for shard_id in commits_under_way(root):
        message = f"the commit of shard {shard_id} was begun and not ended"
        yield Problem(STAGING, None, message, Remedy.SWEEP)
    if drop_under_way(root):
        yield Problem(STAGING, None, "dropping shards was begun and not ended", Remedy.SWEEP)
    for folder in ("", f"{RECEIPTS}/", f"{SHARDS}/", f"{PARTS}/", f"{STAGING}/"):
        for name in filter(is_temporary, names_in(root / folder) if folder else names_in(root)):
            message = "was left by a command that died, or is being written now"
            yield Problem(f"{folder}{name}", None, message, Remedy.SWEEP)
    parts = {part_name(shard_id) for shard_id in shards.finished}
    for name in names_in(root / PARTS):
        if not is_temporary(name) and not (is_part(name) and name in parts):
            message, remedy = "is nothing of the dataset's", Remedy.LEAVE
            if is_part(name):
                message, remedy = "is of shards that are not there", Remedy.REMOVE
            yield Problem(f"{PARTS}/{name}", None, message, remedy)
    for name in names_in(root / RECEIPTS):
        shard_id = name.removesuffix(".json")
        if is_temporary(name) or (shard_id in shards.planned and name != shard_id):
            continue
        yield _stray_receipt(root, name, shards)
    for name in names_in(root / SHARDS):
        shard_id = name.removeprefix("shard-").removesuffix(".tar")
        if (
            is_temporary(name)
            or (name == _GROUP_FILE and card.store == "zarr")
            or shard_id in shards.finished
        ):
            continue
        ours = shards.is_id(shard_id) and name.startswith("shard-")
        message = "has no receipt, so that it does not count" if ours else "is nothing of the dataset's"
        remedy = Remedy.DROP_SHARD if ours else Remedy.LEAVE
        yield Problem(f"{SHARDS}/{name}", None, message, remedy, shard_id if ours else None)
    if card.store == "zarr" and any(name.startswith("shard-") for name in names_in(root / SHARDS)):
        yield from _group(root)


def _stray_receipt(root: AnyPath, name: str, shards: KnownShards) -> Problem:
    file, shard_id = f"{RECEIPTS}/{name}", name.removesuffix(".json")
    if shard_id not in shards.finished or name == shard_id:
        return Problem(file, None, "is not the receipt of a shard", Remedy.LEAVE)
    message = f"is of a shard that {PLAN_FILE} does not have"
    if shards.damaged:
        message = "its sources are not the videos that its id says"
        try:
            read_receipt(root, shard_id)
        except StorageError:
            raise
        except DeltacacheError as error:
            message = str(error)
    return Problem(file, None, message, Remedy.DROP_SHARD, shard_id)


def _group(root: AnyPath) -> Iterator[Problem]:
    """The group that holds all Zarr shards is in no receipt, for they share it."""
    name = f"{SHARDS}/{_GROUP_FILE}"
    try:
        node = json.loads(read_file(root / name))
        if node != {"attributes": {}, "zarr_format": 3, "node_type": "group"}:
            raise ValueError("it is not that of a plain Zarr v3 group")
    except StorageError:
        raise
    except (OSError, ValueError) as error:
        yield Problem(name, None, f"cannot be read ({error})", Remedy.REWRITE_GROUP)


# ----------------------------------------------------------------------------------------------------
# Taking out of a dataset exactly what is damaged, so that the command that made it makes just that again.
# ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RepairAction:
    """One thing that was done: to a file, a shard's id or a folder, relative to the dataset."""

    target: str
    what: str

    def __str__(self) -> str:
        return f"{self.target}: {self.what}"


@dataclass(frozen=True, slots=True)
class Repair:
    """What was wrong, what was done, and what was left alone because it may be the user's.

    Attributes:
        left: files that the dataset's commands did not make.
    """

    root: AnyPath
    problems: list[Problem]
    actions: list[RepairAction] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    @property
    def unfinished(self) -> bool:
        """Whether the command that made the dataset has something to do."""
        return any(problem.remedy is not Remedy.LEAVE for problem in self.problems)

    def __str__(self) -> str:
        lines = [*map(str, self.problems), *(f"repaired: {action}" for action in self.actions)]
        lines += [f"left alone, not made by deltacache: {name}" for name in self.left]
        if self.unfinished:
            lines.append(f"{self.root}: run the command that made it again, which makes what is missing")
        else:
            lines.append(f"{self.root}: nothing to repair")
        return "\n".join(lines)


def repair_dataset(root: AnyPath | str, reporter: Reporter | None = None) -> Repair:
    """Verify a dataset and remove what is damaged; all else stays untouched.

    The plan is the one thing that is not removed but made again, from the receipts: with the ids, a rerun
    finds the finished shards. Nothing outside the dataset's folder is ever removed, nor a file in it that
    the commands did not make.

    Raises:
        DatasetError: there is no dataset, or a command is writing to it.
        StorageError: its place refuses or does not answer.
    """
    root = dataset_root(root)
    if not set(names_in(root)) & DATASET_FILES:
        read_card(root)  # refuses what is not a dataset, before a lock is put there
    with dataset_lock(root, "verify --repair"):
        if is_dataset(root) or finished_shards(root):
            settle(root)
        repair = Repair(
            root,
            verify_dataset(root, reporter),
            left=[
                name for name in names_in(root) if name not in DATASET_FILES and not name.startswith(".tmp-")
            ],
        )
        with readable_errors(root):
            repair.actions.extend(_repair(root, repair.problems))
        strange = [problem.file for problem in repair.problems if problem.remedy is Remedy.LEAVE]
        repair.left.extend(name for name in strange if (root / name).exists())
    return repair


def _repair(root: AnyPath, problems: list[Problem]) -> Iterable[RepairAction]:
    by_remedy = {remedy: [p for p in problems if p.remedy is remedy] for remedy in Remedy}
    if by_remedy[Remedy.REBUILD_PLAN]:  # first: the receipts of damaged shards still say their videos
        plan = plan_of_receipts(root)
        remove(root / PLAN_FILE)
        if plan.num_rows:
            write_plan(root, plan)
        shards = counted(len(plan["shard"].unique()), "shard")
        yield RepairAction(PLAN_FILE, f"made again from the receipts of {shards}")
    dropped = sorted({problem.shard_id for problem in by_remedy[Remedy.DROP_SHARD] if problem.shard_id})
    drop_shards(root, dropped)
    for shard_id in dropped:
        yield RepairAction(f"shard {shard_id}", "dropped with its receipt")
    removed = {problem.file for remedy in (Remedy.REMOVE, Remedy.MERGE) for problem in by_remedy[remedy]}
    if by_remedy[Remedy.MERGE] or by_remedy[Remedy.REBUILD_PLAN] or dropped:
        remove(root / TABLES_FILE)
        removed.discard(TABLES_FILE)
        yield RepairAction(TABLES_FILE, "removed, so that the tables are merged again")
    for name in sorted(removed):
        if (root / name).exists():
            remove(root / name)
            yield RepairAction(name, "removed")
    if by_remedy[Remedy.REWRITE_GROUP]:
        from deltacache.pipeline.datasets.zarr_store import (
            ensure_root,  # zarr is imported only where it is used
        )

        remove(root / SHARDS / _GROUP_FILE)
        ensure_root(root / SHARDS)
        yield RepairAction(f"{SHARDS}/{_GROUP_FILE}", "written again")
    if by_remedy[Remedy.SWEEP]:
        for folder in (root, root / RECEIPTS, root / SHARDS, root / PARTS):
            if folder == root or folder.exists():
                remove_leftovers(folder)
        yield RepairAction(".", "what dead commands left was removed")
