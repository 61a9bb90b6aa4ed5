"""Looking for damage: every byte of every shard, and whether plan, receipts and tables say the same.

Shards are read in threads, one after the other is let go: memory holds the plan and what is wrong, nothing else
that grows with the dataset.
"""

import json
import os
from collections.abc import Iterator
from functools import partial

from deltacache.pipeline.datasets.commits import STAGING, commits_under_way
from deltacache.pipeline.datasets.dropping import drop_under_way
from deltacache.pipeline.datasets.folding import PARTS, is_part, part_name
from deltacache.pipeline.datasets.plan import PLAN_FILE, ShardTask, iter_tasks
from deltacache.pipeline.datasets.plan_checks import KnownShards, known_shards
from deltacache.pipeline.datasets.preparation import BLACK_FILE, CARD_FILE, read_black, read_card
from deltacache.pipeline.datasets.problems import Problem, Remedy
from deltacache.pipeline.datasets.receipts import RECEIPTS, SHARDS, finished_shards, read_receipt
from deltacache.pipeline.datasets.shard_checks import check_shard
from deltacache.pipeline.datasets.table_checks import TableCheck
from deltacache.pipeline.storage.atomic import is_temporary
from deltacache.pipeline.storage.errors import read_file
from deltacache.pipeline.storage.parallel import in_threads
from deltacache.pipeline.storage.storage import AnyPath, dataset_root, is_local, names_in
from deltacache.schemas.datasets import DatasetCard
from deltacache.schemas.errors import DatasetError, DeltacacheError, StorageError
from deltacache.schemas.progress import Reporter, SilentReporter

__all__ = ["Problem", "verify_dataset"]

_GROUP_FILE = "zarr.json"
_THREADS = max(2, min(8, os.cpu_count() or 2))
"""Checksums and reading leave the interpreter, so that threads use all cores and keep a disk busy."""
_REMOTE_THREADS = 16


def verify_dataset(root: AnyPath | str, reporter: Reporter | None = None) -> list[Problem]:
    """Read a dataset whole and list all that is wrong with it.

    Raises:
        DatasetError: there is no dataset.
        StorageError: its place refuses or does not answer, so that nothing can be judged.
    """
    root = dataset_root(root)
    try:
        card = read_card(root)
    except StorageError:
        raise
    except DatasetError as error:
        if not (root / CARD_FILE).exists() and not finished_shards(root):
            raise
        return [Problem(CARD_FILE, None, f"{error}. Nothing else was judged", Remedy.REMOVE)]
    problems = list(_black(root, card))
    shards = known_shards(root)
    problems.extend(shards.problems)
    problems.extend(_shards(root, card, shards, reporter or SilentReporter()))
    problems.extend(_strays(root, card, shards))
    return problems


def _black(root: AnyPath, card: DatasetCard) -> Iterator[Problem]:
    try:
        read_black(root, card)
    except StorageError:
        raise
    except DatasetError as error:
        yield Problem(BLACK_FILE, None, str(error), Remedy.REMOVE)


def _shards(root: AnyPath, card: DatasetCard, shards: KnownShards, reporter: Reporter) -> Iterator[Problem]:
    """What is wrong with the finished shards, in the plan's order, and then with the tables."""
    held, tables = frozenset(names_in(root / SHARDS)), TableCheck(root)
    for shard_id in shards.finished - shards.planned:
        tables.add_unreadable(shard_id)
    finished = (task for task in iter_tasks(shards.plan) if task.shard_id in shards.finished)
    found = 0
    with reporter.stage("verify", len(shards.finished & shards.planned)) as stage:
        check, threads = (
            partial(check_shard, root, card, held),
            _THREADS if is_local(root) else _REMOTE_THREADS,
        )
        for checked in in_threads(check, _once(finished), threads=threads):
            yield from checked.problems
            found += len(checked.problems)
            stage.advance(1, problems=found)
            receipt_file = f"{RECEIPTS}/{checked.shard_id}.json"
            if checked.receipt is None or any(p.file == receipt_file for p in checked.problems):
                tables.add_unreadable(checked.shard_id)
            else:
                tables.add(checked.receipt)
    lost = shards.planned - shards.finished
    yield from tables.finish(
        lambda shard_id: shard_id in lost or (shards.damaged and shard_id not in shards.finished),
        some_lost=bool(lost) or shards.damaged,
    )


def _once(tasks: Iterator[ShardTask]) -> Iterator[ShardTask]:
    """Each shard once: that a plan holds one twice was said."""
    seen: set[str] = set()
    for task in tasks:
        if task.shard_id not in seen:
            seen.add(task.shard_id)
            yield task


def _strays(root: AnyPath, card: DatasetCard, shards: KnownShards) -> Iterator[Problem]:
    """What lies in the folders of a dataset and belongs to no shard."""
    for shard_id in commits_under_way(root):
        message = f"the commit of shard {shard_id} was begun and not ended"
        yield Problem(STAGING, None, message, Remedy.SWEEP)
    if drop_under_way(root):
        yield Problem(STAGING, None, "dropping shards was begun and not ended", Remedy.SWEEP)
    for folder in ("", f"{RECEIPTS}/", f"{SHARDS}/", f"{PARTS}/", f"{STAGING}/"):
        for name in filter(is_temporary, names_in(root / folder) if folder else names_in(root)):
            message = "was left by a command that died, or is being written now"
            yield Problem(f"{folder}{name}", None, message, Remedy.SWEEP)
    parts = {part_name(shard_id) for shard_id in shards.finished}
    for name in names_in(root / PARTS):
        if not is_temporary(name) and not (is_part(name) and name in parts):
            message, remedy = "is nothing of the dataset's", Remedy.LEAVE
            if is_part(name):
                message, remedy = "is of shards that are not there", Remedy.REMOVE
            yield Problem(f"{PARTS}/{name}", None, message, remedy)
    for name in names_in(root / RECEIPTS):
        shard_id = name.removesuffix(".json")
        if is_temporary(name) or (shard_id in shards.planned and name != shard_id):
            continue
        yield _stray_receipt(root, name, shards)
    for name in names_in(root / SHARDS):
        shard_id = name.removeprefix("shard-").removesuffix(".tar")
        if (
            is_temporary(name)
            or (name == _GROUP_FILE and card.store == "zarr")
            or shard_id in shards.finished
        ):
            continue
        ours = shards.is_id(shard_id) and name.startswith("shard-")
        message = "has no receipt, so that it does not count" if ours else "is nothing of the dataset's"
        remedy = Remedy.DROP_SHARD if ours else Remedy.LEAVE
        yield Problem(f"{SHARDS}/{name}", None, message, remedy, shard_id if ours else None)
    if card.store == "zarr" and any(name.startswith("shard-") for name in names_in(root / SHARDS)):
        yield from _group(root)


def _stray_receipt(root: AnyPath, name: str, shards: KnownShards) -> Problem:
    file, shard_id = f"{RECEIPTS}/{name}", name.removesuffix(".json")
    if shard_id not in shards.finished or name == shard_id:
        return Problem(file, None, "is not the receipt of a shard", Remedy.LEAVE)
    message = f"is of a shard that {PLAN_FILE} does not have"
    if shards.damaged:
        message = "its sources are not the videos that its id says"
        try:
            read_receipt(root, shard_id)
        except StorageError:
            raise
        except DeltacacheError as error:
            message = str(error)
    return Problem(file, None, message, Remedy.DROP_SHARD, shard_id)


def _group(root: AnyPath) -> Iterator[Problem]:
    """The group that holds all Zarr shards is in no receipt, for they share it."""
    name = f"{SHARDS}/{_GROUP_FILE}"
    try:
        node = json.loads(read_file(root / name))
        if node != {"attributes": {}, "zarr_format": 3, "node_type": "group"}:
            raise ValueError("it is not that of a plain Zarr v3 group")
    except StorageError:
        raise
    except (OSError, ValueError) as error:
        yield Problem(name, None, f"cannot be read ({error})", Remedy.REWRITE_GROUP)
