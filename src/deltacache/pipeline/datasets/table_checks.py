"""Whether the tables of a dataset hold what its receipts say: row by row, in the order of both."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from deltacache.pipeline.datasets.finishing import (
    FAILURES_FILE,
    INDEX_FILE,
    SOURCES_FILE,
    TABLE_FILES,
    TABLES_FILE,
    ids_sha256,
    read_tables_summary,
)
from deltacache.pipeline.datasets.folding import PARTS, failure_rows, part_name, part_row, source_rows
from deltacache.pipeline.datasets.problems import Problem, Remedy
from deltacache.pipeline.datasets.receipts import RECEIPTS, FileRecord, Receipt
from deltacache.pipeline.storage.sealing import open_parquet, seal_of
from deltacache.pipeline.storage.storage import AnyPath
from deltacache.schemas.errors import DatasetError
from deltacache.schemas.tables import FAILURES_SCHEMA, INDEX_SCHEMA, PART_SCHEMA, SOURCES_SCHEMA

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
        for row in receipt.clips:
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
            self._name_rows(is_lost)
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

    def _name_rows(self, is_lost: Callable[[str], bool]) -> None:
        """Say what is left when all rows have been paired."""
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
