"""Committing shards, and merging their receipts into the tables of the dataset."""

import hashlib
import io
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from deltacache.pipeline.atomic import remove_leftovers, write_if_changed
from deltacache.pipeline.plan import read_plan, shard_tasks
from deltacache.pipeline.preparation import read_card
from deltacache.pipeline.receipts import (
    RECEIPTS,
    SHARDS,
    Failure,
    Receipt,
    StoredClip,
    finished_shards,
    read_receipt,
    receipt_path,
    write_receipt,
)
from deltacache.pipeline.stores import shard_store
from deltacache.schemas.datasets import DatasetCard
from deltacache.schemas.errors import DatasetError, MismatchError
from deltacache.schemas.tables import FAILURES_SCHEMA, INDEX_SCHEMA

INDEX_FILE = "index.parquet"
FAILURES_FILE = "failures.parquet"
_RECEIPTS_KEY = b"deltacache.receipts_sha256"
_ROW_GROUP = 1 << 16


def write_shard(
    root: Path, card: DatasetCard, shard_id: str, clips: Iterable[StoredClip], failures: list[Failure]
) -> Receipt:
    """Commit one shard: files written aside, flushed and renamed, then the receipt.

    Equal clips give equal bytes. A shard that has its receipt is left as it is. Without clips only the receipt
    is written.

    Raises:
        MismatchError: the shard was finished for a dataset of another fingerprint.
        ValueError: a clip does not have the shape that ``card`` says.
    """
    if receipt_path(root, shard_id).exists():
        return _checked_receipt(root, shard_id, card)
    folder = root / SHARDS
    folder.mkdir(exist_ok=True)
    written = shard_store(card).write(folder, shard_id, clips)
    receipt = Receipt(
        shard_id=shard_id,
        fingerprint=card.fingerprint,
        files={f"{SHARDS}/{name}": record for name, record in written.files.items()},
        arrays=written.arrays,
        clips=tuple(written.clips),
        failures=tuple(failures),
        token_file=f"{SHARDS}/{written.token_file}" if written.token_file else "",
        token_offsets=tuple(written.token_offsets),
        frame_stride=written.frame_stride,
    )
    write_receipt(root, receipt)
    return receipt


def _checked_receipt(root: Path, shard_id: str, card: DatasetCard) -> Receipt:
    receipt = read_receipt(root, shard_id)
    if receipt.fingerprint != card.fingerprint:
        raise MismatchError(
            f"{receipt_path(root, shard_id)} belongs to a dataset with fingerprint {receipt.fingerprint}, but "
            f"this one has {card.fingerprint}: remove it and run the command that made the dataset again"
        )
    return receipt


def finish_dataset(root: Path) -> None:
    """Merge the receipts, in the plan's order, into ``index.parquet`` and ``failures.parquet``.

    Each table is replaced whole, and only when the receipts changed since it was written.

    Raises:
        DatasetError: a receipt is damaged or of a shard that the plan does not have.
    """
    card = read_card(root)
    finished = finished_shards(root)
    ordered = [task.shard_id for task in shard_tasks(read_plan(root)) if task.shard_id in finished]
    strangers = finished.difference(ordered)
    if strangers:
        raise DatasetError(
            f"{receipt_path(root, min(strangers))} is of a shard that plan.parquet does not have: "
            "restore plan.parquet from a copy, or remove that receipt and its shard"
        )
    digest = _digest(root, ordered)
    if any(_digest_of(root / name) != digest for name in (INDEX_FILE, FAILURES_FILE)):
        index, failures = _merge(root, card, ordered)
        write_if_changed(root / INDEX_FILE, _parquet(index, digest))
        write_if_changed(root / FAILURES_FILE, _parquet(failures, digest))
    for folder in (root, root / SHARDS, root / RECEIPTS):
        remove_leftovers(folder)


def _digest(root: Path, shard_ids: list[str]) -> bytes:
    """SHA-256 of all receipts: reading them is far faster than parsing them."""
    digest = hashlib.sha256()
    for shard_id in shard_ids:
        digest.update(receipt_path(root, shard_id).read_bytes())
    return digest.hexdigest().encode()


def _digest_of(table: Path) -> bytes | None:
    """The receipts from which a table was merged; None when it is missing or unreadable."""
    try:
        metadata: Mapping[bytes, bytes] | None = pq.read_schema(table).metadata
    except (OSError, pa.ArrowInvalid):
        return None
    return None if metadata is None else metadata.get(_RECEIPTS_KEY)


def _merge(root: Path, card: DatasetCard, shard_ids: list[str]) -> tuple[pa.Table, pa.Table]:
    index, failures = [INDEX_SCHEMA.empty_table()], [FAILURES_SCHEMA.empty_table()]
    for shard_id in shard_ids:
        receipt = _checked_receipt(root, shard_id, card)
        index.append(_rows(receipt.clips, INDEX_SCHEMA))
        failures.append(_rows([asdict(failure) for failure in receipt.failures], FAILURES_SCHEMA))
    return pa.concat_tables(index), pa.concat_tables(failures)


def _rows(rows: Iterable[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=schema)


def _parquet(table: pa.Table, digest: bytes) -> bytes:
    stream = io.BytesIO()
    tagged = table.combine_chunks().replace_schema_metadata({_RECEIPTS_KEY: digest})
    pq.write_table(tagged, stream, row_group_size=_ROW_GROUP)
    return stream.getvalue()
