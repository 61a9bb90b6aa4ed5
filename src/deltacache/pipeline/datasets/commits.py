"""Committing shards: the files first, the receipt last."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from deltacache.pipeline.datasets.receipts import (
    SHARDS,
    Failure,
    Receipt,
    SourceRecord,
    StoredClip,
    read_receipt,
    read_receipts,
    receipt_path,
    write_receipt,
)
from deltacache.pipeline.datasets.stores import shard_store
from deltacache.pipeline.storage.atomic import readable_errors
from deltacache.pipeline.storage.storage import AnyPath, make_folder
from deltacache.schemas.datasets import DatasetCard
from deltacache.schemas.errors import MismatchError


def write_shard(
    root: AnyPath,
    card: DatasetCard,
    shard_id: str,
    clips: Iterable[StoredClip],
    failures: Sequence[Failure],
    sources: Sequence[SourceRecord],
    *,
    replace: bool = False,
) -> Receipt:
    """Commit one shard: its files, whole and durable, then the receipt.

    Equal clips give equal bytes. A shard that has its receipt is left as it is, unless it is to be replaced; then
    ``clips`` must remove the receipt behind its last clip, when all has been written aside. Without clips only
    the receipt is written. ``clips`` are taken one by one and not kept; ``failures`` and ``sources`` are read when
    the last clip was taken.

    Raises:
        StorageError: the output cannot be written, such as for want of space or permission.
        MismatchError: the shard was finished for a dataset of another fingerprint.
        ValueError: a clip does not have the shape that ``card`` says.
    """
    from deltacache.models.devices import processor_kind  # torch is imported only where something is written

    if not replace and receipt_path(root, shard_id).exists():
        return checked_receipt(root, shard_id, card)
    folder = root / SHARDS
    with _errors_of_the_work(), readable_errors(folder / f"shard-{shard_id}"):
        make_folder(folder)
        written = shard_store(card).write(folder, shard_id, _work(clips))
        receipt = Receipt(
            shard_id=shard_id,
            fingerprint=card.fingerprint,
            files={f"{SHARDS}/{name}": record for name, record in written.files.items()},
            arrays=written.arrays,
            clips=tuple(written.clips),
            failures=tuple(failures),
            sources=tuple(sources),
            token_file=f"{SHARDS}/{written.token_file}" if written.token_file else "",
            token_offsets=tuple(written.token_offsets),
            frame_stride=written.frame_stride,
            scale_file=f"{SHARDS}/{written.scale_file}" if written.scale_file else "",
            scale_offsets=tuple(written.scale_offsets),
            scale_stride=written.scale_stride,
            made_on=processor_kind(),
        )
        write_receipt(root, receipt)
    return receipt


class _WorkError(Exception):
    """Carries an error of the work past what would take it for one of the output."""


def _work(clips: Iterable[StoredClip]) -> Iterator[StoredClip]:
    try:
        yield from clips
    except Exception as error:
        raise _WorkError from error


@contextmanager
def _errors_of_the_work() -> Iterator[None]:
    try:
        yield
    except _WorkError as carrier:
        if carrier.__cause__ is None:
            raise
        raise carrier.__cause__ from carrier.__cause__.__cause__


def checked_receipt(root: AnyPath, shard_id: str, card: DatasetCard) -> Receipt:
    """The receipt of a finished shard of this dataset.

    Raises:
        DatasetError: it is missing or damaged.
        MismatchError: it belongs to another dataset.
    """
    return _checked(root, read_receipt(root, shard_id), card)


def checked_receipts(root: AnyPath, shard_ids: Iterable[str], card: DatasetCard) -> Iterator[Receipt]:
    """``checked_receipt`` of many shards, in order; from an object store, many are read at once."""
    for receipt in read_receipts(root, shard_ids):
        yield _checked(root, receipt, card)


def _checked(root: AnyPath, receipt: Receipt, card: DatasetCard) -> Receipt:
    if receipt.fingerprint != card.fingerprint:
        raise MismatchError(
            f"{receipt_path(root, receipt.shard_id)} belongs to a dataset with fingerprint {receipt.fingerprint}, but "
            f"this one has {card.fingerprint}: remove it and run the command that made the dataset again"
        )
    return receipt
