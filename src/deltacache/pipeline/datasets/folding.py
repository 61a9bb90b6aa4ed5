"""Folding receipts into parts while a job runs, so that finishing a dataset reads few files.

A part, ``parts/part-<first>-<last>.parquet``, has a row for each of 1,024 shards that follow each other in the plan:
what their receipts give to the tables. It is written once all of them are finished. A part counts only if its
shards are the very ones that the plan has there. Whatever takes a shard out of the dataset, or replaces it, removes
its part first; so a part never says something else than the receipts that are there. Shards at the end of a plan
that are too few for a part are read from their receipts.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, Self

import pyarrow as pa

from deltacache.pipeline.datasets.plan import ordinal_of
from deltacache.pipeline.datasets.receipts import Receipt
from deltacache.pipeline.storage.atomic import readable_errors, remove, sync
from deltacache.pipeline.storage.sealing import open_parquet, read_columns, sealed_table
from deltacache.pipeline.storage.storage import AnyPath, is_local, make_folder, names_in
from deltacache.schemas.tables import FAILURES_SCHEMA, INDEX_SCHEMA, PART_SCHEMA, SOURCES_SCHEMA

PARTS = "parts"
SHARDS_A_PART = 1024
_NAME = re.compile(r"part-(?P<first>[0-9]{7,})-(?P<last>[0-9]{7,})\.parquet")
ReadReceipts = Callable[[Iterable[str]], Iterator[Receipt]]


def failure_rows(receipt: Receipt) -> list[dict[str, Any]]:
    """Its rows of ``failures.parquet``."""
    return [asdict(failure) for failure in receipt.failures]


def source_rows(receipt: Receipt) -> list[dict[str, Any]]:
    """Its rows of ``sources.parquet``."""
    return [
        {"shard": receipt.shard_id} | {name: getattr(source, name) for name in SOURCES_SCHEMA.names[1:]}
        for source in receipt.sources
    ]


def part_row(receipt: Receipt) -> dict[str, Any]:
    """Its row of a part."""
    return {
        "shard": receipt.shard_id,
        "bytes": receipt.total_bytes,
        "clips": list(receipt.clips),
        "failures": failure_rows(receipt),
        "sources": source_rows(receipt),
    }


def clips_in(part: pa.Table) -> pa.Table:
    """The rows of the index in a part."""
    return _rows(part, "clips", INDEX_SCHEMA)


def failures_in(part: pa.Table) -> pa.Table:
    """The rows of ``failures.parquet`` in a part."""
    return _rows(part, "failures", FAILURES_SCHEMA)


def sources_in(part: pa.Table) -> pa.Table:
    """The rows of ``sources.parquet`` in a part."""
    return _rows(part, "sources", SOURCES_SCHEMA)


def _rows(part: pa.Table, column: str, schema: pa.Schema) -> pa.Table:
    batches = [pa.RecordBatch.from_struct_array(chunk.flatten()) for chunk in part[column].chunks]
    return pa.Table.from_batches(batches, schema)


def part_name(shard_id: str) -> str:
    """The file of the part that a shard belongs to."""
    first = ordinal_of(shard_id) // SHARDS_A_PART * SHARDS_A_PART
    return f"part-{first:07d}-{first + SHARDS_A_PART - 1:07d}.parquet"


def is_part(name: str) -> bool:
    """Whether a file in the folder of the parts has the name of one."""
    return _NAME.fullmatch(name) is not None


def by_part(shard_ids: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Shards in the order of their plan, part by part, with the names of the parts."""
    some: list[str] = []
    for shard_id in shard_ids:
        if some and part_name(some[0]) != part_name(shard_id):
            yield part_name(some[0]), some
            some = []
        some.append(shard_id)
    if some:
        yield part_name(some[0]), some


def fold(
    root: AnyPath,
    planned: Iterable[str],
    finished: Collection[str],
    receipts: ReadReceipts,
    *,
    write: bool = False,
) -> Iterator[pa.Table]:
    """What the finished ones of the shards ``planned`` hold: tables of ``PART_SCHEMA``, in the plan's order.

    Parts are read; where one is missing, receipts are read instead, and with ``write`` the part is written.
    """
    held = frozenset(names_in(root / PARTS))
    for name, shards in by_part(planned):
        done = [shard for shard in shards if shard in finished]
        part = read_part(root, name, shards) if name in held and len(done) == len(shards) else None
        if part is None and done:
            part = _part_of(receipts(done))
            if write and len(done) == SHARDS_A_PART:
                _write(root, name, part)
        if part is not None:
            yield part


def read_part(root: AnyPath, name: str, shards: list[str]) -> pa.Table | None:
    """The part of these shards; None if it is damaged, not there, or of others.

    Raises:
        StorageError: the store refuses or does not answer.
    """
    try:
        with open_parquet(root / PARTS / name, PART_SCHEMA) as file:
            part = read_columns(file, PART_SCHEMA)
    except (OSError, ValueError):
        return None
    return part if part["shard"].to_pylist() == shards else None


def write_part(root: AnyPath, shards: list[str], receipts: ReadReceipts) -> None:
    """Fold the receipts of all shards of a part, unless they are too few for one or it is there already."""
    name = part_name(shards[0])
    with readable_errors(root / PARTS / name):
        if len(shards) == SHARDS_A_PART and read_part(root, name, shards) is None:
            _write(root, name, _part_of(receipts(shards)))


def _write(root: AnyPath, name: str, part: pa.Table) -> None:
    make_folder(root / PARTS)
    with sealed_table(root / PARTS / name, PART_SCHEMA) as written:
        written.add(part)


def _part_of(receipts: Iterable[Receipt]) -> pa.Table:
    rows = (pa.RecordBatch.from_pylist([part_row(receipt)], schema=PART_SCHEMA) for receipt in receipts)
    return pa.Table.from_batches(list(rows), PART_SCHEMA).combine_chunks()


def drop_parts(root: AnyPath, shard_ids: Iterable[str]) -> None:
    """Remove the parts that know these shards: their receipts are about to go, or to be others."""
    ordinals = {ordinal_of(shard_id) for shard_id in shard_ids}
    for name in names_in(root / PARTS):
        match = _NAME.fullmatch(name)
        if match and not ordinals.isdisjoint(range(int(match["first"]), int(match["last"]) + 1)):
            remove(root / PARTS / name)
    if is_local(root) and (root / PARTS).is_dir():
        sync(root / PARTS)  # a part that is gone must not come back after its shard was replaced


class Folding:
    """Folds in the background of a job: use as a context, and say which shards were committed."""

    def __init__(
        self, root: AnyPath, planned: Iterable[str], under_way: Collection[str], receipts: ReadReceipts
    ) -> None:
        """``planned`` are all shards in the plan's order; those ``under_way`` are the ones that are not finished."""
        self._root, self._receipts = root, receipts
        self._shards, missing = dict(by_part(planned)), frozenset(under_way)
        self._left = {name: left for name, shards in self._shards.items() if (left := {*shards} & missing)}
        self._pool = ThreadPoolExecutor(1, "fold")
        self._folds: list[Future[None]] = []

    def __enter__(self) -> Self:
        return self

    def committed(self, shard_id: str) -> None:
        """A shard under way was committed. With the last one of its part, the part is written."""
        name = part_name(shard_id)
        left = self._left.get(name, {shard_id, ""})
        left.discard(shard_id)
        if not left:
            self._folds.append(self._pool.submit(write_part, self._root, self._shards[name], self._receipts))
        while self._folds and self._folds[0].done():
            self._folds.pop(0).result()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        if kind is None:
            for each in self._folds:
                each.result()
