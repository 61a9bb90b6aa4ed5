"""Taking finished shards out of a dataset, so that the next run makes them again."""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from deltacache.pipeline.datasets.commits import STAGING, forget_tables, settle_commits
from deltacache.pipeline.datasets.plan import resize_plan
from deltacache.pipeline.datasets.receipts import RECEIPTS, SHARDS, receipt_path
from deltacache.pipeline.storage.atomic import readable_errors, remove, sync, write_bytes
from deltacache.pipeline.storage.errors import read_file
from deltacache.pipeline.storage.storage import AnyPath, dataset_root, is_local, make_folder, names_in

_DROP = "drop.json"
"""In the folder of what is under way: shards to be dropped, and sizes that their videos are planned with then."""


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
        forget_tables(root, receipts)
        for receipt in receipts.values():
            remove(receipt)
        _make_durable(root, RECEIPTS)
        for shard_id in receipts:
            for name in shard_names(shard_id):
                remove(root / SHARDS / name)
        _make_durable(root, SHARDS)


def drop_durably(root: AnyPath, shard_ids: Iterable[str], sizes: Mapping[str, int]) -> None:
    """Drop these shards, and plan them with other sizes of their videos; whatever interrupts this, ``settle`` ends it.

    Raises:
        StorageError: something cannot be written or removed.
    """
    with readable_errors(root / STAGING):
        make_folder(root / STAGING)
        order = {"shards": sorted(shard_ids), "sizes": dict(sizes)}
        write_bytes(root / STAGING / _DROP, json.dumps(order).encode() + b"\n")
    _carry_out(root)


def settle(root: AnyPath) -> None:
    """End what dead commands began: commits, and the dropping of shards that a flag asked for. Hold the lock.

    Raises:
        StorageError: something cannot be written or removed.
    """
    if STAGING not in names_in(root):  # the usual case, by one request to a store
        return
    settle_commits(root, alone=True)
    if drop_under_way(root):
        _carry_out(root)


def drop_under_way(root: AnyPath) -> bool:
    """Whether dropping shards was begun and not ended."""
    return _DROP in names_in(root / STAGING)


def _carry_out(root: AnyPath) -> None:
    order = json.loads(read_file(root / STAGING / _DROP))
    drop_shards(root, order["shards"])
    if order["sizes"]:
        resize_plan(root, order["sizes"])
    with readable_errors(root / STAGING):
        remove(root / STAGING / _DROP)
        _make_durable(root, STAGING)
        if is_local(root):
            with suppress(OSError):  # a late attempt works there
                Path(root / STAGING).rmdir()


def shard_names(shard_id: str) -> tuple[str, str]:
    """What a shard is called in the folder of the shards: as a tar, and as a Zarr group."""
    return f"shard-{shard_id}.tar", f"shard-{shard_id}"


def _make_durable(root: AnyPath, folder: str) -> None:
    """Files that are gone must not come back after their removal was relied on."""
    place = root / folder
    if is_local(place) and place.is_dir():
        sync(place)
