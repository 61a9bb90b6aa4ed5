"""Committing shards: the files first, the receipt last."""

from collections.abc import Iterable
from pathlib import Path

from deltacache.pipeline.atomic import readable_errors
from deltacache.pipeline.receipts import (
    SHARDS,
    Failure,
    Receipt,
    StoredClip,
    read_receipt,
    receipt_path,
    write_receipt,
)
from deltacache.pipeline.stores import shard_store
from deltacache.schemas.datasets import DatasetCard
from deltacache.schemas.errors import MismatchError


def write_shard(
    root: Path, card: DatasetCard, shard_id: str, clips: Iterable[StoredClip], failures: list[Failure]
) -> Receipt:
    """Commit one shard: files written aside, flushed and renamed, then the receipt.

    Equal clips give equal bytes. A shard that has its receipt is left as it is. Without clips only the receipt
    is written. ``clips`` are taken one by one and not kept.

    Raises:
        DatasetError: the output cannot be written, such as for want of space or permission.
        MismatchError: the shard was finished for a dataset of another fingerprint.
        ValueError: a clip does not have the shape that ``card`` says.
    """
    if receipt_path(root, shard_id).exists():
        return checked_receipt(root, shard_id, card)
    folder = root / SHARDS
    with readable_errors(folder / f"shard-{shard_id}"):
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


def checked_receipt(root: Path, shard_id: str, card: DatasetCard) -> Receipt:
    """The receipt of a finished shard of this dataset.

    Raises:
        DatasetError: it is missing or damaged.
        MismatchError: it belongs to another dataset.
    """
    receipt = read_receipt(root, shard_id)
    if receipt.fingerprint != card.fingerprint:
        raise MismatchError(
            f"{receipt_path(root, shard_id)} belongs to a dataset with fingerprint {receipt.fingerprint}, but "
            f"this one has {card.fingerprint}: remove it and run the command that made the dataset again"
        )
    return receipt
