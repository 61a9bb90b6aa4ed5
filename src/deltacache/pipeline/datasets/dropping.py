"""Taking finished shards out of a dataset, so that the next run makes them anew."""

from collections.abc import Iterable

from deltacache.pipeline.datasets.finishing import TABLES_FILE
from deltacache.pipeline.datasets.folding import drop_parts
from deltacache.pipeline.datasets.receipts import RECEIPTS, SHARDS, receipt_path
from deltacache.pipeline.storage.atomic import readable_errors, remove, sync
from deltacache.pipeline.storage.storage import AnyPath, dataset_root, is_local


def drop_shards(root: AnyPath | str, shard_ids: Iterable[str]) -> None:
    """Remove the receipts of these shards, then their files; the plan keeps them.

    First go ``tables.json``, so that the tables are merged again, and the parts that know these shards; then the
    receipts, and only then what they list: whenever this is interrupted, a shard counts wholly or not at all.
    Names of files come from the ids alone, never from what a receipt says.

    Raises:
        DatasetError: an id that is none.
        StorageError: something cannot be removed.
    """
    root = dataset_root(root)
    receipts = {shard_id: receipt_path(root, shard_id) for shard_id in shard_ids}  # checks the ids
    if not receipts:
        return
    with readable_errors(root):
        remove(root / TABLES_FILE)
        drop_parts(root, receipts)
        for receipt in receipts.values():
            remove(receipt)
        _make_durable(root, RECEIPTS)
        for shard_id in receipts:
            for name in shard_names(shard_id):
                remove(root / SHARDS / name)
        _make_durable(root, SHARDS)


def forget_receipt(root: AnyPath, shard_id: str) -> None:
    """Remove the receipt of one shard, ``tables.json`` and its part before: its files are about to be replaced.

    Raises:
        StorageError: it cannot be removed.
    """
    with readable_errors(root):
        remove(root / TABLES_FILE)
        drop_parts(root, [shard_id])
        remove(receipt_path(root, shard_id))
        _make_durable(root, RECEIPTS)


def shard_names(shard_id: str) -> tuple[str, str]:
    """What a shard is called in the folder of the shards: as a tar, and as a Zarr group."""
    return f"shard-{shard_id}.tar", f"shard-{shard_id}"


def _make_durable(root: AnyPath, folder: str) -> None:
    """Files that are gone must not come back after their removal was relied on."""
    place = root / folder
    if is_local(place) and place.is_dir():
        sync(place)
