"""Merging receipts into the tables of a dataset: ``index.parquet`` and ``failures.parquet``.

``tables.json`` is written after them. It says from which receipts they were merged, so that a finished dataset
is known as such without parsing anything, and what their checksums are.
"""

import hashlib
import io
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from crc32c import crc32c

from deltacache.pipeline.atomic import readable_errors, remove_leftovers, write_if_changed
from deltacache.pipeline.commits import checked_receipt
from deltacache.pipeline.plan import read_plan, shard_tasks
from deltacache.pipeline.preparation import read_card
from deltacache.pipeline.receipts import RECEIPTS, SHARDS, FileRecord, Receipt, finished_shards, receipt_path
from deltacache.schemas.errors import DatasetError
from deltacache.schemas.fingerprints import canonical_json
from deltacache.schemas.tables import FAILURES_SCHEMA, INDEX_SCHEMA

INDEX_FILE = "index.parquet"
FAILURES_FILE = "failures.parquet"
TABLES_FILE = "tables.json"
_ROWS_AT_ONCE = 1 << 16


@dataclass(frozen=True, slots=True)
class MergedTables:
    """The tables as Parquet files."""

    index: bytes
    failures: bytes


def finish_dataset(root: Path) -> None:
    """Merge the receipts, in the plan's order, into ``index.parquet`` and ``failures.parquet``.

    Each table is replaced whole, and only if its content changed: a finished dataset stays as it is.

    Raises:
        DatasetError: a receipt is damaged or of a shard that the plan does not have.
        MismatchError: a receipt belongs to another dataset.
    """
    card = read_card(root)
    shard_ids = _in_plan_order(root)
    digest = receipts_sha256(root, shard_ids)
    with readable_errors(root / INDEX_FILE):
        if not _is_merged(root, digest):
            tables = merge(checked_receipt(root, shard_id, card) for shard_id in shard_ids)
            _write_tables(root, tables, digest)
        for folder in (root, root / SHARDS, root / RECEIPTS):
            remove_leftovers(folder)


def _write_tables(root: Path, tables: MergedTables, digest: str) -> None:
    files = {INDEX_FILE: tables.index, FAILURES_FILE: tables.failures}
    for name, content in files.items():
        write_if_changed(root / name, content)
    records = {name: asdict(FileRecord(len(content), crc32c(content))) for name, content in files.items()}
    summary = canonical_json({"receipts_sha256": digest, "files": records}) + "\n"
    write_if_changed(root / TABLES_FILE, summary.encode())


def merge(receipts: Iterable[Receipt]) -> MergedTables:
    """The tables of these receipts: equal receipts give equal bytes."""
    index, failures = _ParquetBuffer(INDEX_SCHEMA), _ParquetBuffer(FAILURES_SCHEMA)
    for receipt in receipts:
        index.add(receipt.clips)
        failures.add(asdict(failure) for failure in receipt.failures)
    return MergedTables(index.finish(), failures.finish())


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
        self._writer.close()
        return self._stream.getvalue()

    def _flush(self) -> None:
        now, self._rows = self._rows[:_ROWS_AT_ONCE], self._rows[_ROWS_AT_ONCE:]
        self._writer.write_table(pa.Table.from_pylist(now, schema=self._schema))


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """Read one of the dataset's tables.

    Raises:
        DatasetError: it is missing, unreadable, or has other columns.
    """
    if not path.exists():
        raise DatasetError(
            f"{path} does not exist: the dataset is not finished, run the command that makes it again"
        )
    try:
        with pq.ParquetFile(path) as file:  # read_table would take folders named a=b for columns
            table = file.read()
        if not table.schema.equals(schema):
            raise pa.ArrowInvalid(f"its columns are {table.schema.names}, must be {schema.names}")
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(
            f"{path} is damaged ({error}): remove it and run the command that made the dataset again"
        ) from error
    return table


def receipts_sha256(root: Path, shard_ids: Iterable[str]) -> str:
    """SHA-256 of the receipts' bytes in this order; reading them is far quicker than parsing them."""
    digest = hashlib.sha256()
    for shard_id in shard_ids:
        digest.update(receipt_path(root, shard_id).read_bytes())
    return digest.hexdigest()


def read_tables_summary(root: Path) -> tuple[str, dict[str, FileRecord]]:
    """``tables.json``: the digest of the receipts, and size and checksum of each table.

    Raises:
        DatasetError: it is missing or damaged.
    """
    path = root / TABLES_FILE
    try:
        body = json.loads(path.read_bytes())
        files = {name: FileRecord(**record) for name, record in body["files"].items()}
        return str(body["receipts_sha256"]), files
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(
            f"{path} cannot be read ({error}): run the command that made the dataset again, which writes it"
        ) from error


def _is_merged(root: Path, digest: str) -> bool:
    try:
        merged, files = read_tables_summary(root)
        sizes = {name: (root / name).stat().st_size for name in (INDEX_FILE, FAILURES_FILE)}
    except (DatasetError, OSError):
        return False
    return merged == digest and sizes == {name: record.bytes for name, record in files.items()}


def _in_plan_order(root: Path) -> list[str]:
    finished = finished_shards(root)
    ordered = [task.shard_id for task in shard_tasks(read_plan(root)) if task.shard_id in finished]
    strangers = finished.difference(ordered)
    if strangers:
        raise DatasetError(
            f"{root / RECEIPTS / min(strangers)}.json is of a shard that plan.parquet does not have: restore "
            "plan.parquet from a copy, or remove that receipt and its shard"
        )
    return ordered
