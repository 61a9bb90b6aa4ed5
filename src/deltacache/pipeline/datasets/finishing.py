"""Merging what the finished shards hold into the tables of a dataset: ``index.parquet``, ``failures.parquet``,
``sources.parquet``.

``tables.json`` is written after them. It says of which plan they are, whether all its shards are in them, and what
they hold together, so that a finished dataset is known as such from a few files, however many shards it has.
Whatever takes a shard out of a dataset, or replaces it, removes ``tables.json`` first.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from deltacache.pipeline.datasets.commits import TABLES_FILE, checked_receipts, settle_commits
from deltacache.pipeline.datasets.folding import (
    PARTS,
    by_part,
    clips_in,
    failures_in,
    fold,
    is_part,
    sources_in,
)
from deltacache.pipeline.datasets.plan import Plan, hashes, open_plan
from deltacache.pipeline.datasets.preparation import read_card
from deltacache.pipeline.datasets.receipts import RECEIPTS, SHARDS, FileRecord, Receipt, finished_shards
from deltacache.pipeline.storage.atomic import readable_errors, remove, remove_leftovers, write_if_changed
from deltacache.pipeline.storage.errors import read_file
from deltacache.pipeline.storage.sealing import (
    open_parquet,
    read_columns,
    seal_json,
    seal_of,
    sealed_table,
    unseal_json,
)
from deltacache.pipeline.storage.storage import AnyPath, dataset_root, is_local, names_in, sizes_in
from deltacache.schemas.errors import DatasetError
from deltacache.schemas.fingerprints import canonical_json
from deltacache.schemas.tables import FAILURES_SCHEMA, INDEX_SCHEMA, SOURCES_SCHEMA

INDEX_FILE = "index.parquet"
FAILURES_FILE = "failures.parquet"
SOURCES_FILE = "sources.parquet"
TABLE_FILES = (INDEX_FILE, FAILURES_FILE, SOURCES_FILE)
_SCHEMAS = {INDEX_FILE: INDEX_SCHEMA, FAILURES_FILE: FAILURES_SCHEMA, SOURCES_FILE: SOURCES_SCHEMA}
_SEAL = "tables_crc32c"


@dataclass(frozen=True, slots=True)
class TablesSummary:
    """The content of ``tables.json``.

    Attributes:
        plan: checksum of the plan that the tables follow.
        planned_shards, planned_videos: what that plan has.
        shards: how many of its shards are in the tables.
        shards_sha256: of their ids in order.
        contents_sha256: of the checksums of their videos' contents and of the ids of their clips: what deltas
            have in common with the features they were made from.
        files: the tables, each with the checksum that its footer has.
        clips: in the index; ``videos`` of which at least one clip is there.
        failures: refused videos and clips by reason; ``failed_videos`` are those that are named.
        shard_bytes: size of all shards together.
    """

    plan: str
    planned_shards: int
    planned_videos: int
    shards: int
    shards_sha256: str
    contents_sha256: str
    files: dict[str, FileRecord]
    clips: int
    videos: int
    failures: dict[str, int]
    failed_videos: int
    shard_bytes: int

    @property
    def complete(self) -> bool:
        """Whether all shards of the plan are in the tables."""
        return self.shards == self.planned_shards > 0


def finish_dataset(root: AnyPath | str, plan: Plan | None = None) -> TablesSummary:
    """Merge what the finished shards hold, in the plan's order, into the tables; what they hold together.

    Each table is replaced whole, and only if its content changed: a finished dataset stays as it is. Receipts
    are read only of shards that no part knows. ``plan`` is the dataset's own, if it is open already.

    Raises:
        DatasetError: a receipt is damaged or of a shard that the plan does not have.
        MismatchError: a receipt belongs to another dataset.
    """
    root = dataset_root(root)
    settle_commits(root, alone=False)
    with readable_errors(root / INDEX_FILE):
        plan = plan or open_plan(root)
        summary = finished_summary(root, plan) or _merged(root, plan)
        for folder in (root, root / SHARDS, root / RECEIPTS, root / PARTS):
            if folder == root or not is_local(folder) or folder.is_dir():
                remove_leftovers(folder)
    return summary


def finished_summary(
    root: AnyPath, plan: Plan, sizes: Mapping[str, int] | None = None
) -> TablesSummary | None:
    """What a dataset holds, if all shards of its plan are finished and in the tables; else None.

    Of an object store ``tables.json`` is believed, which goes before any shard does; a local folder of receipts
    is looked at too, since people remove some by hand. No receipt is read. ``sizes`` are those of what is in the
    dataset's folder, if they are known.
    """
    summary = _summary_of(root, plan, sizes)
    if summary is None or not summary.complete:
        return None
    return summary if not is_local(root) or finished_shards(root) == {*plan.shard_ids} else None


def _summary_of(root: AnyPath, plan: Plan, sizes: Mapping[str, int] | None = None) -> TablesSummary | None:
    """``tables.json`` if it is of this plan and of the tables that are there."""
    try:
        summary = read_tables_summary(root)
    except DatasetError:
        return None
    if sizes is None:
        sizes = sizes_in(root)
    as_written = all(sizes.get(name) == summary.files[name].bytes for name in TABLE_FILES)
    return summary if summary.plan == plan.seal and as_written else None


def _merged(root: AnyPath, plan: Plan) -> TablesSummary:
    card, finished = read_card(root), finished_shards(root)
    done = [shard for shard in plan.shard_ids if shard in finished]
    strangers = finished.difference(done)
    if strangers:
        raise DatasetError(
            f"{root / RECEIPTS / min(strangers)}.json is of a shard that plan.parquet does not have: "
            f"`deltacache verify {root} --repair` removes that receipt and its shard"
        )
    digest, held = ids_sha256(done), _summary_of(root, plan)
    if held is not None and held.shards_sha256 == digest:
        return held

    def receipts(shard_ids: Iterable[str]) -> Iterator[Receipt]:
        return checked_receipts(root, shard_ids, card)

    parts = dict(by_part(plan.shard_ids))
    for name in names_in(root / PARTS):
        if is_part(name) and not (name in parts and finished.issuperset(parts[name])):
            remove(root / PARTS / name)  # of an older plan
    remove(root / TABLES_FILE)
    totals = _Totals()
    with ExitStack() as files:
        tables = [files.enter_context(sealed_table(root / name, schema)) for name, schema in _SCHEMAS.items()]
        for part in fold(root, plan.shard_ids, finished, receipts, write=True):
            rows = (clips_in(part), failures_in(part), sources_in(part))
            totals.add(part, *rows)
            for table, added in zip(tables, rows, strict=True):
                table.add(added)
    summary = TablesSummary(
        plan=plan.seal,
        planned_shards=len(plan.shard_ids),
        planned_videos=distinct(batch.column(0) for batch in plan.batches(["video_uri"])),
        shards=len(done),
        shards_sha256=digest,
        contents_sha256=totals.contents_sha256(),
        files={
            name: FileRecord(table.bytes, int(table.seal, 16))
            for name, table in zip(_SCHEMAS, tables, strict=True)
        },
        clips=totals.clips,
        videos=len(np.unique(np.concatenate(totals.videos))) if totals.videos else 0,
        failures=dict(totals.failures),
        failed_videos=len(totals.failed),
        shard_bytes=totals.bytes,
    )
    write_if_changed(root / TABLES_FILE, seal_json(canonical_json(asdict(summary)).encode(), _SEAL))
    return summary


def ids_sha256(shard_ids: Iterable[str]) -> str:
    """SHA-256 of ids in this order."""
    return hashlib.sha256("\n".join(shard_ids).encode()).hexdigest()


def distinct(columns: Iterable[pa.Array]) -> int:
    """How many different values a column of text has that comes in parts, by 64 bits of a hash of each."""
    keys = [hashes(column.unique().to_pylist()) for column in columns]
    return len(np.unique(np.concatenate(keys))) if keys else 0


class _Totals:
    """What the parts hold together, added up as they pass."""

    def __init__(self) -> None:
        self.bytes = self.clips = 0
        self.videos: list[np.ndarray] = []  # hashes of uris
        self.failed: set[str] = set()
        self.failures: Counter[str] = Counter()
        self._digests = [hashlib.sha256() for _ in range(3)]

    def add(self, part: pa.Table, clips: pa.Table, failures: pa.Table, sources: pa.Table) -> None:
        self.bytes += int(part["bytes"].to_numpy().sum())
        self.clips += clips.num_rows
        self.videos.append(hashes(clips["video_uri"].unique().to_pylist()))
        self.failed.update(failures["video_uri"].unique().to_pylist())
        self.failures.update(failures["reason"].to_pylist())
        lengths = (
            pc.call_function("list_value_length", [part[name]]).to_pylist() for name in ("clips", "sources")
        )
        shards = (f"{shard} {c} {s}" for shard, c, s in zip(part["shard"].to_pylist(), *lengths, strict=True))
        for digest, values in zip(
            self._digests, (shards, clips["clip_id"].to_pylist(), sources["sha256"].to_pylist()), strict=True
        ):
            digest.update("".join(f"{value}\n" for value in values).encode())

    def contents_sha256(self) -> str:
        """See ``TablesSummary``; it does not depend on how the shards are parted."""
        return hashlib.sha256(b"".join(digest.digest() for digest in self._digests)).hexdigest()


def read_table(path: AnyPath, schema: pa.Schema) -> pa.Table:
    """Read one of the dataset's tables into memory.

    Raises:
        DatasetError: it is missing, unreadable, or has other columns.
    """
    with open_table(path, schema) as file:
        try:
            return read_columns(file, schema)
        except ValueError as error:
            raise _damaged(path, error) from error


def open_table(path: AnyPath, schema: pa.Schema, summary: TablesSummary | None = None) -> pq.ParquetFile:
    """Open one of the dataset's tables for reading in batches.

    Raises:
        DatasetError: it is missing, unreadable, has other columns, or is another than ``summary`` says.
    """
    try:
        file = open_parquet(path, schema)
        if summary is not None and int(seal_of(file), 16) != summary.files[path.name].crc32c:
            raise ValueError(f"it is another than {TABLES_FILE} says")
        return file
    except FileNotFoundError:
        raise DatasetError(
            f"{path} does not exist: the dataset is not finished, run the command that makes it again"
        ) from None
    except (ValueError, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: AnyPath, error: Exception) -> DatasetError:
    return DatasetError(
        f"{path} is damaged ({error}): remove it and run the command that made the dataset again"
    )


def read_tables_summary(root: AnyPath) -> TablesSummary:
    """``tables.json``: of which plan the tables are, and what they hold.

    Raises:
        DatasetError: it is missing, damaged, or of an older version.
    """
    path = root / TABLES_FILE
    try:
        body = json.loads(unseal_json(read_file(path), _SEAL))
        body["files"] = {name: FileRecord(**record) for name, record in body["files"].items()}
        return TablesSummary(**{field.name: body[field.name] for field in fields(TablesSummary)})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(
            f"{path} cannot be read ({error!r}): run the command that made the dataset again, which writes it"
        ) from error
