"""Whether the tables of a dataset hold what its receipts say."""

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from deltacache.pipeline.checksums import crc32c_of_file
from deltacache.pipeline.finishing import (
    FAILURES_FILE,
    INDEX_FILE,
    TABLES_FILE,
    merge,
    read_table,
    read_tables_summary,
    receipts_sha256,
)
from deltacache.pipeline.receipts import RECEIPTS, FileRecord, Receipt
from deltacache.schemas.errors import DatasetError
from deltacache.schemas.tables import FAILURES_SCHEMA, INDEX_SCHEMA


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: in which file (relative to the dataset), and of which clip if it is one's."""

    file: str
    clip_id: str | None
    message: str

    def __str__(self) -> str:
        clip = "" if self.clip_id is None else f" (clip {self.clip_id})"
        return f"{self.file}{clip}: {self.message}"


def table_problems(root: Path, receipts: list[Receipt]) -> Iterator[Problem]:
    """What is wrong with ``index.parquet``, ``failures.parquet`` and ``tables.json``.

    ``receipts`` are those that can be read, in the plan's order.
    """
    yield from _summary(root, receipts)
    merged = merge(receipts)
    try:
        index = read_table(root / INDEX_FILE, INDEX_SCHEMA)
    except DatasetError as error:
        yield Problem(INDEX_FILE, None, str(error))
    else:
        yield from _index(index, pq.read_table(io.BytesIO(merged.index)))
    try:
        failures = read_table(root / FAILURES_FILE, FAILURES_SCHEMA)
    except DatasetError as error:
        yield Problem(FAILURES_FILE, None, str(error))
    else:
        if not failures.equals(pq.read_table(io.BytesIO(merged.failures))):
            yield Problem(FAILURES_FILE, None, "does not hold the failures that the receipts say")


def _summary(root: Path, receipts: list[Receipt]) -> Iterator[Problem]:
    try:
        digest, files = read_tables_summary(root)
    except DatasetError as error:
        yield Problem(TABLES_FILE, None, str(error))
        return
    if digest != receipts_sha256(root, [receipt.shard_id for receipt in receipts]):
        yield Problem(TABLES_FILE, None, f"is of other {RECEIPTS} than are there: run the command again")
    for name in (INDEX_FILE, FAILURES_FILE):
        path = root / name
        if path.is_file() and FileRecord(path.stat().st_size, crc32c_of_file(path)) != files.get(name):
            yield Problem(
                name, None, f"is not the file that {TABLES_FILE} says: remove it, run the command again"
            )


def _index(index: pa.Table, expected: pa.Table) -> Iterator[Problem]:
    if index.equals(expected):
        return
    held, must = _by_clip(index), _by_clip(expected)
    for clip_id, count in Counter(index["clip_id"].to_pylist()).items():
        if count > 1:
            yield Problem(INDEX_FILE, clip_id, f"has {count} rows")
        if clip_id not in must:
            yield Problem(INDEX_FILE, clip_id, "is in no receipt")
    for clip_id, row in must.items():
        if clip_id not in held:
            yield Problem(INDEX_FILE, clip_id, "is in a receipt but has no row")
        elif held[clip_id] != row:
            names = ", ".join(name for name in row if held[clip_id][name] != row[name])
            yield Problem(INDEX_FILE, clip_id, f"its row differs from the receipt in {names}")
    if len(held) == index.num_rows and held == must:
        yield Problem(INDEX_FILE, None, "has its rows in another order than the plan's")


def _by_clip(table: pa.Table) -> dict[str | None, dict[str, Any]]:
    return {row["clip_id"]: row for row in table.to_pylist()}
