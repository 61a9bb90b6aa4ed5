"""Looking for damage: every byte of every shard, and whether plan, receipts and tables say the same."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from deltacache.pipeline.atomic import is_temporary
from deltacache.pipeline.checksums import crc32c_of_array, crc32c_of_file
from deltacache.pipeline.commits import checked_receipt
from deltacache.pipeline.mapped import MappedFiles
from deltacache.pipeline.plan import PLAN_FILE, ShardTask, read_plan, shard_id_of, shard_tasks
from deltacache.pipeline.preparation import BLACK_FILE, read_black, read_card
from deltacache.pipeline.receipts import RECEIPTS, SHARDS, FileRecord, Receipt
from deltacache.pipeline.stores import TIMESTAMPS, Stretch, shard_store, token_array, token_shape
from deltacache.pipeline.table_checks import Problem, table_problems
from deltacache.schemas.clips import clip_id_of
from deltacache.schemas.datasets import DatasetCard
from deltacache.schemas.errors import DatasetError, DeltacacheError


def verify_dataset(root: Path) -> list[Problem]:
    """Read a dataset whole and list all that is wrong with it.

    Raises:
        DatasetError: there is no dataset, or its ``dataset.json`` is damaged, so that nothing can be judged.
    """
    card = read_card(root)
    problems = list(_black(root, card))
    tasks = _plan(root, problems)
    receipts = _receipts(root, card, tasks, problems)
    for receipt in receipts:
        problems.extend(_shard(root, card, receipt))
    problems.extend(_strays(root, card, receipts))
    problems.extend(table_problems(root, receipts))
    return problems


def _black(root: Path, card: DatasetCard) -> Iterator[Problem]:
    try:
        read_black(root, card)
    except DatasetError as error:
        yield Problem(BLACK_FILE, None, str(error))


def _plan(root: Path, problems: list[Problem]) -> dict[str, ShardTask]:
    """The shards of the plan by id; an id that its videos do not give is a problem."""
    try:
        tasks = shard_tasks(read_plan(root))
    except DatasetError as error:
        problems.append(Problem(PLAN_FILE, None, str(error)))
        return {}
    for ordinal, task in enumerate(tasks):
        if shard_id_of(ordinal, task.videos) != task.shard_id:
            problems.append(
                Problem(PLAN_FILE, None, f"shard {task.shard_id} has other videos than its id says")
            )
    return {task.shard_id: task for task in tasks}


def _receipts(
    root: Path, card: DatasetCard, tasks: dict[str, ShardTask], problems: list[Problem]
) -> list[Receipt]:
    """The readable receipts in the plan's order."""
    receipts: dict[str, Receipt] = {}
    names = [name for name in _names(root / RECEIPTS) if not is_temporary(name)]
    for name in names:
        file, shard_id = f"{RECEIPTS}/{name}", name.removesuffix(".json")
        if shard_id not in tasks:
            problems.append(Problem(file, None, "is of a shard that the plan does not have"))
            continue
        try:
            receipts[shard_id] = checked_receipt(root, shard_id, card)
        except DeltacacheError as error:
            problems.append(Problem(file, None, str(error)))
            continue
        problems.extend(_receipt(file, card, tasks[shard_id], receipts[shard_id]))
    missing = [shard_id for shard_id in tasks if f"{shard_id}.json" not in names]
    if missing:
        what = f"{len(missing)} of {len(tasks)} shards have no receipt, the first is {missing[0]}"
        problems.append(Problem(PLAN_FILE, None, f"{what}: not finished, run the command again"))
    return [receipts[shard_id] for shard_id in tasks if shard_id in receipts]


def _receipt(file: str, card: DatasetCard, task: ShardTask, receipt: Receipt) -> Iterator[Problem]:
    """Whether a receipt agrees with itself, and holds all that was planned and nothing else."""
    planned = {
        clip_id_of(video.video_id, view): (video.video_uri, view)
        for video in task.videos
        for view in range(video.first_view, video.first_view + video.views)
    }
    for row in receipt.clips:
        clip_id, crcs = row["clip_id"], receipt.arrays[row["clip_id"]]
        times = crc32c_of_array(np.asarray(row[TIMESTAMPS], np.float32))
        if (crcs.get(token_array(card)), crcs.get(TIMESTAMPS)) != (row["crc32c"], times):
            yield Problem(file, clip_id, "the checksums of its arrays are not those of its index row")
        if planned.get(clip_id) != (row["video_uri"], row["view"]) or row["shard"] != receipt.shard_id:
            yield Problem(file, clip_id, "is not a clip that the plan has in this shard")
    refused = {(failure.video_uri, failure.view) for failure in receipt.failures}
    for clip_id, (uri, view) in planned.items():
        if clip_id not in receipt.arrays and not refused & {(uri, None), (uri, view)}:
            yield Problem(file, clip_id, f"view {view} of {uri} is neither a clip nor a failure")


def _shard(root: Path, card: DatasetCard, receipt: Receipt) -> Iterator[Problem]:
    """Missing and altered files; of altered ones, the clips."""
    altered = set()
    for name, record in receipt.files.items():
        path = root / name
        if not path.is_file():
            yield Problem(name, None, f"is missing; its receipt says {record.bytes} bytes")
            continue
        held = FileRecord(path.stat().st_size, crc32c_of_file(path))
        if held != record:
            yield Problem(name, None, f"{_record(held)}, but its receipt says {_record(record)}")
            altered.add(name)
    if altered:
        yield from _clips(root, card, receipt)


def _record(record: FileRecord) -> str:
    return f"{record.bytes} bytes of crc32c {record.crc32c:08x}"


def _clips(root: Path, card: DatasetCard, receipt: Receipt) -> Iterator[Problem]:
    """Which clips of a shard are altered."""
    store, files, file = shard_store(card), MappedFiles(), receipt.token_file
    for row, offset in enumerate(receipt.token_offsets):
        clip_id = receipt.clips[row]["clip_id"]
        try:
            tokens = files.float16(root / file, offset, token_shape(card), receipt.frame_stride)
        except (OSError, ValueError):
            yield Problem(file, clip_id, "its tokens are not there: the file ends before them")
            continue
        crc = crc32c_of_array(tokens)
        if crc != receipt.clips[row]["crc32c"]:
            must = receipt.clips[row]["crc32c"]
            yield Problem(file, clip_id, f"its tokens have crc32c {crc:08x}, must be {must:08x}")
            continue
        for stretch in store.surroundings(receipt, row, tokens):
            if not _is_there(root, stretch):
                yield Problem(stretch.file, clip_id, "the bytes around its tokens, or its times, are altered")


def _is_there(root: Path, stretch: Stretch) -> bool:
    try:
        with (root / stretch.file).open("rb") as file:
            file.seek(stretch.offset)
            return file.read(len(stretch.content)) == stretch.content
    except FileNotFoundError:  # listed as missing already
        return True


def _strays(root: Path, card: DatasetCard, receipts: list[Receipt]) -> Iterator[Problem]:
    """Files in the shards' folder that no receipt lists, and clips that two list."""
    known = {name for receipt in receipts for name in receipt.files}
    with_receipt = {name.removesuffix(".json") for name in _names(root / RECEIPTS)}
    for name in _names(root / SHARDS):
        shard_id = name.removeprefix("shard-").removesuffix(".tar")
        if is_temporary(name) or (name == "zarr.json" and card.store == "zarr"):
            continue
        if shard_id not in with_receipt:
            yield Problem(f"{SHARDS}/{name}", None, "has no receipt, so that it does not count")
        elif any(PurePosixPath(file).parts[1] == name for file in known):
            yield from _unlisted(root, f"{SHARDS}/{name}", known)
    if card.store == "zarr" and known:
        yield from _group(root)
    counts = Counter(row["clip_id"] for receipt in receipts for row in receipt.clips)
    for clip_id in (clip_id for clip_id, count in counts.items() if count > 1):
        yield Problem(RECEIPTS, clip_id, "is in more than one shard")


def _unlisted(root: Path, name: str, known: set[str]) -> Iterator[Problem]:
    for path in sorted((root / name).rglob("*")):
        file = path.relative_to(root).as_posix()
        if path.is_file() and file not in known:
            yield Problem(file, None, "is not listed in the shard's receipt")


def _group(root: Path) -> Iterator[Problem]:
    """The group that holds all Zarr shards is in no receipt, for they share it."""
    name = f"{SHARDS}/zarr.json"
    try:
        node = json.loads((root / name).read_bytes())
        if node.get("node_type") != "group" or node.get("zarr_format") != 3:
            raise ValueError("it is not that of a Zarr v3 group")
    except (OSError, ValueError, AttributeError) as error:
        yield Problem(name, None, f"cannot be read ({error}): run the command that made the dataset again")


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder)) if folder.is_dir() else []
