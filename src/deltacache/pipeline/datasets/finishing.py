"""Merging receipts into the tables of a dataset: ``index.parquet``, ``failures.parquet``, ``sources.parquet``.

``tables.json`` is written after them. It says from which receipts they were merged, so that a finished dataset
is known as such without parsing anything, and what their checksums are.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from crc32c import crc32c

from deltacache.pipeline.datasets.commits import checked_receipts
from deltacache.pipeline.datasets.plan import read_plan, shard_tasks
from deltacache.pipeline.datasets.preparation import read_card
from deltacache.pipeline.datasets.receipts import (
    RECEIPTS,
    SHARDS,
    FileRecord,
    Receipt,
    finished_shards,
    receipt_path,
)
from deltacache.pipeline.storage.atomic import readable_errors, remove_leftovers, write_if_changed
from deltacache.pipeline.storage.errors import read_file
from deltacache.pipeline.storage.sealing import read_parquet, seal_json, sealed_parquet, unseal_json
from deltacache.pipeline.storage.storage import AnyPath, dataset_root, read_many
from deltacache.schemas.errors import DatasetError
from deltacache.schemas.fingerprints import canonical_json
from deltacache.schemas.tables import FAILURES_SCHEMA, INDEX_SCHEMA, SOURCES_SCHEMA

INDEX_FILE = "index.parquet"
FAILURES_FILE = "failures.parquet"
SOURCES_FILE = "sources.parquet"
TABLES_FILE = "tables.json"
TABLE_FILES = (INDEX_FILE, FAILURES_FILE, SOURCES_FILE)
_SEAL = "tables_crc32c"
_ROWS_AT_ONCE = 1 << 16


@dataclass(frozen=True, slots=True)
class MergedTables:
    """The tables as Parquet files."""

    index: bytes
    failures: bytes
    sources: bytes
    shard_bytes: int


@dataclass(frozen=True, slots=True)
class TablesSummary:
    """The content of ``tables.json``; ``shard_bytes`` is the size of all shards together."""

    receipts_sha256: str
    files: dict[str, FileRecord]
    shard_bytes: int


def finish_dataset(root: AnyPath | str) -> None:
    """Merge the receipts, in the plan's order, into the tables.

    Each table is replaced whole, and only if its content changed: a finished dataset stays as it is.

    Raises:
        DatasetError: a receipt is damaged or of a shard that the plan does not have.
        MismatchError: a receipt belongs to another dataset.
    """
    root = dataset_root(root)
    card = read_card(root)
    shard_ids = _in_plan_order(root)
    digest = receipts_sha256(root, shard_ids)
    with readable_errors(root / INDEX_FILE):
        if not _is_merged(root, digest):
            tables = merge(checked_receipts(root, shard_ids, card))
            _write_tables(root, tables, digest)
        for folder in (root, root / SHARDS, root / RECEIPTS):
            remove_leftovers(folder)


def _write_tables(root: AnyPath, tables: MergedTables, digest: str) -> None:
    files = {INDEX_FILE: tables.index, FAILURES_FILE: tables.failures, SOURCES_FILE: tables.sources}
    for name, content in files.items():
        write_if_changed(root / name, content)
    records = {name: asdict(FileRecord(len(content), crc32c(content))) for name, content in files.items()}
    summary = canonical_json({"receipts_sha256": digest, "files": records, "shard_bytes": tables.shard_bytes})
    write_if_changed(root / TABLES_FILE, seal_json(summary.encode(), _SEAL))


def merge(receipts: Iterable[Receipt]) -> MergedTables:
    """The tables of these receipts: equal receipts give equal bytes."""
    index, failures, sources = map(_ParquetBuffer, (INDEX_SCHEMA, FAILURES_SCHEMA, SOURCES_SCHEMA))
    shard_bytes = 0
    for receipt in receipts:
        shard_bytes += receipt.total_bytes
        index.add(receipt.clips)
        failures.add(failure_rows(receipt))
        sources.add(source_rows(receipt))
    return MergedTables(index.finish(), failures.finish(), sources.finish(), shard_bytes)


def failure_rows(receipt: Receipt) -> Iterator[dict[str, Any]]:
    """Its rows of ``failures.parquet``."""
    return (asdict(failure) for failure in receipt.failures)


def source_rows(receipt: Receipt) -> Iterator[dict[str, Any]]:
    """Its rows of ``sources.parquet``."""
    names = SOURCES_SCHEMA.names[1:]
    return (
        {"shard": receipt.shard_id} | {name: getattr(source, name) for name in names}
        for source in receipt.sources
    )


class _ParquetBuffer:
    """A Parquet file in memory, from rows as they come: row groups do not depend on how they came."""

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = schema
        self._stream = io.BytesIO()
        self._writer = pq.ParquetWriter(self._stream, schema, write_page_checksum=True)
        self._rows: list[dict[str, Any]] = []

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        self._rows.extend(rows)
        while len(self._rows) >= _ROWS_AT_ONCE:
            self._flush()

    def finish(self) -> bytes:
        if self._rows:
            self._flush()
        return sealed_parquet(self._stream, self._writer)

    def _flush(self) -> None:
        now, self._rows = self._rows[:_ROWS_AT_ONCE], self._rows[_ROWS_AT_ONCE:]
        self._writer.write_table(pa.Table.from_pylist(now, schema=self._schema))


def read_table(path: AnyPath, schema: pa.Schema) -> pa.Table:
    """Read one of the dataset's tables.

    Raises:
        DatasetError: it is missing, unreadable, or has other columns.
    """
    try:
        return read_parquet(read_file(path), schema)
    except FileNotFoundError:
        raise DatasetError(
            f"{path} does not exist: the dataset is not finished, run the command that makes it again"
        ) from None
    except (ValueError, OSError) as error:
        raise DatasetError(
            f"{path} is damaged ({error}): remove it and run the command that made the dataset again"
        ) from error


def receipts_sha256(root: AnyPath, shard_ids: Iterable[str]) -> str:
    """SHA-256 of the receipts' bytes in this order; reading them is far quicker than parsing them."""
    digest = hashlib.sha256()
    paths = (receipt_path(root, shard_id) for shard_id in shard_ids)
    for content in read_many(paths):
        digest.update(content)
    return digest.hexdigest()


def read_tables_summary(root: AnyPath) -> TablesSummary:
    """``tables.json``: from which receipts the tables were merged, and what they are.

    Raises:
        DatasetError: it is missing or damaged.
    """
    path = root / TABLES_FILE
    try:
        body = json.loads(unseal_json(read_file(path), _SEAL))
        files = {name: FileRecord(**record) for name, record in body["files"].items()}
        return TablesSummary(str(body["receipts_sha256"]), files, int(body["shard_bytes"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(
            f"{path} cannot be read ({error}): run the command that made the dataset again, which writes it"
        ) from error


def is_merged(root: AnyPath) -> bool:
    """Whether the tables hold all finished shards."""
    return _is_merged(root, receipts_sha256(root, _in_plan_order(root)))


def _is_merged(root: AnyPath, digest: str) -> bool:
    try:
        summary = read_tables_summary(root)
        sizes = {name: (root / name).stat().st_size for name in TABLE_FILES}
    except (DatasetError, OSError):
        return False
    recorded = {name: record.bytes for name, record in summary.files.items()}
    return summary.receipts_sha256 == digest and sizes == recorded


def _in_plan_order(root: AnyPath) -> list[str]:
    finished = finished_shards(root)
    ordered = [task.shard_id for task in shard_tasks(read_plan(root)) if task.shard_id in finished]
    strangers = finished.difference(ordered)
    if strangers:
        raise DatasetError(
            f"{root / RECEIPTS / min(strangers)}.json is of a shard that plan.parquet does not have: "
            f"`deltacache verify {root} --repair` removes that receipt and its shard"
        )
    return ordered
