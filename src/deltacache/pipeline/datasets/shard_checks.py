"""Whether one shard is what its receipt says, and its receipt what the plan says."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath

import numpy as np

from deltacache.pipeline.datasets.commits import checked_receipt
from deltacache.pipeline.datasets.dropping import shard_names
from deltacache.pipeline.datasets.plan import ShardTask
from deltacache.pipeline.datasets.problems import Problem, Remedy
from deltacache.pipeline.datasets.receipts import RECEIPTS, SHARDS, FileRecord, Receipt
from deltacache.pipeline.datasets.shard_reading import altered_array, clip_arrays
from deltacache.pipeline.datasets.stores import SCALES, TIMESTAMPS, Stretch, shard_store, token_array
from deltacache.pipeline.storage.checksums import crc32c_of_array, crc32c_of_file
from deltacache.pipeline.storage.mapped import MappedFiles
from deltacache.pipeline.storage.storage import AnyPath, is_local, objects_below
from deltacache.schemas.clips import clip_id_of
from deltacache.schemas.datasets import DatasetCard
from deltacache.schemas.errors import DeltacacheError, StorageError


@dataclass(frozen=True, slots=True)
class CheckedShard:
    """One shard with all that is wrong with it; ``receipt`` is None when it cannot be read."""

    shard_id: str
    receipt: Receipt | None
    problems: list[Problem]


def check_shard(root: AnyPath, card: DatasetCard, held: frozenset[str], task: ShardTask) -> CheckedShard:
    """Read one finished shard whole.

    Args:
        held: names in the folder of the shards.

    Raises:
        StorageError: the place of the dataset refuses or does not answer, so that nothing can be judged.
    """
    try:
        receipt = checked_receipt(root, task.shard_id, card)
    except StorageError:
        raise
    except DeltacacheError as error:
        file = f"{RECEIPTS}/{task.shard_id}.json"
        return CheckedShard(
            task.shard_id, None, [Problem(file, None, str(error), Remedy.DROP_SHARD, task.shard_id)]
        )
    try:
        problems = [*_receipt(card, task, receipt), *_files(root, card, receipt)]
    except (ValueError, TypeError, KeyError) as error:  # fields of other types, under a checksum that fits
        file = f"{RECEIPTS}/{task.shard_id}.json"
        problems = [_problem(receipt, file, None, f"its content makes no sense ({error!r})")]
    return CheckedShard(task.shard_id, receipt, [*problems, *_unlisted(root, receipt, held)])


def _receipt(card: DatasetCard, task: ShardTask, receipt: Receipt) -> Iterator[Problem]:
    """Whether a receipt agrees with itself, and holds all that was planned and nothing else."""
    problem = partial(_problem, receipt, f"{RECEIPTS}/{receipt.shard_id}.json")
    if tuple(source.planned() for source in receipt.sources) != task.videos:
        yield problem(None, "its sources are not the videos that the plan has in this shard")
    planned = {
        clip_id_of(video.video_id, view): (video.video_uri, view)
        for video in task.videos
        for view in range(video.first_view, video.first_view + video.views)
    }
    place = {clip_id: index for index, clip_id in enumerate(planned)}
    last = -1
    for row, about in enumerate(receipt.clips):
        clip_id, crcs = about["clip_id"], receipt.arrays[about["clip_id"]]
        times = crc32c_of_array(np.asarray(about[TIMESTAMPS], np.float32))
        if (crcs.get(token_array(card)), crcs.get(TIMESTAMPS)) != (about["crc32c"], times):
            yield problem(clip_id, "the checksums of its arrays are not those of its index row")
        where = (about["shard"], about["row"])
        if planned.get(clip_id) != (about["video_uri"], about["view"]) or where != (receipt.shard_id, row):
            yield problem(clip_id, "is not a clip that the plan has in this shard, or is in another place")
        elif place[clip_id] < last:
            yield problem(clip_id, "is not where the plan's order puts it")
        last = max(last, place.get(clip_id, -1))
    refused = {(failure.video_uri, failure.view) for failure in receipt.failures}
    for clip_id, (uri, view) in planned.items():
        if clip_id not in receipt.arrays and not refused & {(uri, None), (uri, view)}:
            yield problem(clip_id, f"view {view} of {uri} is neither a clip nor a failure")


def _problem(receipt: Receipt, file: str, clip_id: str | None, message: str) -> Problem:
    return Problem(file, clip_id, message, Remedy.DROP_SHARD, receipt.shard_id)


def _files(root: AnyPath, card: DatasetCard, receipt: Receipt) -> Iterator[Problem]:
    """Missing and altered files, and what of them belongs to a clip."""
    whole = True
    for name, record in receipt.files.items():
        path = root / name
        if not path.is_file():
            whole = False
            yield _problem(receipt, name, None, f"is missing; its receipt says {record.bytes} bytes")
            continue
        try:
            held = FileRecord(path.stat().st_size, crc32c_of_file(path))
        except OSError as error:
            yield _problem(receipt, name, None, f"cannot be read ({error})")
            continue
        if held != record:
            message = f"{_record(held)}, but its receipt says {_record(record)}"
            yield _problem(receipt, name, None, message)
    if receipt.clips and (root / receipt.token_file).is_file():
        yield from _clips(root, card, receipt)
    if receipt.clips and card.store == "zarr" and whole:
        yield from _group_ids(root, receipt)


def _record(record: FileRecord) -> str:
    return f"{record.bytes} bytes of crc32c {record.crc32c:08x}"


def _clips(root: AnyPath, card: DatasetCard, receipt: Receipt) -> Iterator[Problem]:
    """Which clips of a shard are altered, or are others than the receipt says."""
    store, files, file = shard_store(card), MappedFiles(), receipt.token_file
    for row, about in enumerate(receipt.clips):
        clip_id = about["clip_id"]
        try:
            arrays = clip_arrays(files, root, card, receipt, row)
        except (OSError, ValueError):
            message = "its tokens are not there: the file ends before them"
            if receipt.scale_file:
                message = "its tokens or their scales are not there: a file is missing or ends before them"
            yield _problem(receipt, file, clip_id, message)
            continue
        crcs = {**receipt.arrays[clip_id], token_array(card): about["crc32c"]}
        named = set[str]()
        altered = altered_array(card, arrays, crcs)
        if altered is not None:
            where = receipt.scale_file if altered.array == SCALES else file
            named.add(where)
            yield _problem(receipt, where, clip_id, altered.message)
        for stretch in store.surroundings(receipt, row, arrays):
            if stretch.file not in named and not _is_there(files, root, stretch):
                named.add(stretch.file)
                message = "the bytes around its tokens, or its times, are altered or of another clip"
                yield _problem(receipt, stretch.file, clip_id, message)


def _is_there(files: MappedFiles, root: AnyPath, stretch: Stretch) -> bool:
    size = len(stretch.content)
    try:
        held = files.array(root / stretch.file, np.uint8, stretch.offset, (size,), 1)
    except FileNotFoundError:  # listed as missing already
        return True
    except (OSError, ValueError):
        return False
    return held.tobytes() == stretch.content


def _group_ids(root: AnyPath, receipt: Receipt) -> Iterator[Problem]:
    """Which clips the group of a Zarr shard names otherwise than the receipt."""
    file = "/".join([*PurePosixPath(receipt.token_file).parts[:2], "zarr.json"])
    ids = [row["clip_id"] for row in receipt.clips]
    try:
        held = list(json.loads((root / file).read_bytes())["attributes"]["clip_ids"])
    except (OSError, ValueError, KeyError, TypeError):  # altered: listed already
        return
    for clip_id, named in zip(ids, held + [None] * len(ids), strict=False):
        if named != clip_id:
            yield _problem(receipt, file, clip_id, f"the group's clip_ids have {named!r} in its place")


def _unlisted(root: AnyPath, receipt: Receipt, held: frozenset[str]) -> Iterator[Problem]:
    """Files under the shard's names that its receipt does not list."""
    for name in held.intersection(shard_names(receipt.shard_id)):
        for file in _below(root, f"{SHARDS}/{name}"):
            if file not in receipt.files:
                message = "is not listed in the shard's receipt"
                yield Problem(file, None, message, Remedy.LEAVE, receipt.shard_id)


def _below(root: AnyPath, name: str) -> list[str]:
    """Files below a folder of the dataset, or the file of this name."""
    top = root / name
    if is_local(top):
        paths = sorted(path for path in top.rglob("*") if not path.is_dir()) if top.is_dir() else [top]
    else:
        paths = objects_below(top)
    start = len(root.as_posix().rstrip("/")) + 1
    return [path.as_posix()[start:] for path in paths]
