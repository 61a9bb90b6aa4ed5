"""Writing a dataset: prepare its folder, commit shards, fold receipts, finish the tables, drop shards."""

import hashlib
import json
import re
import socket
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from crc32c import crc32c
from pydantic import ValidationError

from deltacache.pipeline.datasets.plan import (
    SHARD_ID,
    Plan,
    check_shard_id,
    extend_plan,
    hashes,
    open_plan,
    ordinal_of,
    read_plan,
    resize_plan,
    shard_tasks,
    write_plan,
)
from deltacache.pipeline.datasets.receipts import (
    RECEIPTS,
    SHARDS,
    Failure,
    FileRecord,
    Receipt,
    SourceRecord,
    StoredClip,
    finished_shards,
    parse_receipt,
    read_receipt,
    read_receipts,
    receipt_bytes,
    receipt_path,
)
from deltacache.pipeline.datasets.stores import shard_store
from deltacache.pipeline.inputs.folders import VideoSource
from deltacache.pipeline.inputs.sources import video_id_of
from deltacache.pipeline.storage.errors import read_file
from deltacache.pipeline.storage.files import (
    crc32c_of_file,
    crc32c_of_npy,
    is_temporary,
    left_by_the_dead,
    move,
    npy_bytes,
    npy_view,
    open_parquet,
    read_columns,
    readable_errors,
    remove,
    remove_leftovers,
    seal_json,
    seal_of,
    sealed_table,
    sync,
    temporary_path,
    unseal_json,
    write_bytes,
    write_if_changed,
    write_new,
)
from deltacache.pipeline.storage.locking import LOCK_FILE, dataset_lock, held_by
from deltacache.pipeline.storage.storage import (
    AnyPath,
    dataset_root,
    is_local,
    make_folder,
    names_in,
    size_of,
    sizes_in,
)
from deltacache.schemas.clips import CropBox, DeltaClip, FeatureClip, clip_id_of
from deltacache.schemas.datasets import FORMAT_VERSION, DatasetCard, canonical_json, sides
from deltacache.schemas.errors import DatasetError, MismatchError, problems_of
from deltacache.schemas.secrets import has_secrets
from deltacache.schemas.tables import FAILURES_SCHEMA, INDEX_SCHEMA, PART_SCHEMA, SOURCES_SCHEMA
from deltacache.schemas.texts import counted

# ----------------------------------------------------------------------------------------------------
# Folding receipts into parts while a job runs, so that finishing a dataset reads few files.
#
# A part, ``parts/part-<first>-<last>.parquet``, has a row for each of 1,024 shards that follow each other in
# the plan: what their receipts give to the tables. It is written once all of them are finished. A part counts
# only if its shards are the very ones that the plan has there. Whatever takes a shard out of the dataset, or
# replaces it, removes its part first; so a part never says something else than the receipts that are there.
# Shards at the end of a plan that are too few for a part are read from their receipts.
# ----------------------------------------------------------------------------------------------------


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
        "clips": receipt.index_rows,
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


# ----------------------------------------------------------------------------------------------------
# Committing shards: the files first, the receipt last, and both of one attempt.
#
# Several attempts of a shard may run at once, for one that was given up as dead may live. Each writes to a
# folder of its own in ``.staging``. To commit, it makes ``.staging/commit-<shard id>-<receipt>-<number>``,
# which names its folder, the receipt that it is to replace, if any, and the lock of the command that it
# belongs to. Then the files move to ``shards``, the receipt to ``receipts``, and the commit is removed.
# Whoever finds a commit that another attempt of the same command began carries it out first; a step that was
# done already finds nothing to move. Only if the receipt is still the same then is the commit void, as when
# files of its attempt are gone, and the next number is free. A commit is removed when its receipt was
# replaced, or by the next command: so none is ever in the place of another.
#
# The lock is looked at when the commit is there. A command that takes the lock carries out the commits that
# it finds; one that is made later by an attempt of an earlier command is of another lock than the one held,
# and does not count.
#
# ::
#
#     attempt a    write a/   commit a   lock?   move files, receipt   remove commit
#     attempt b    write b/              (finds commit a: moves the rest)      (finds a receipt: removes
# b/)
#     attempt c, late    write c/   commit c   (another lock: removes c/)
# ----------------------------------------------------------------------------------------------------


STAGING = ".staging"
TABLES_FILE = "tables.json"
_COMMIT = "commit-"
_COMMIT_NAME = re.compile(
    rf"{_COMMIT}(?P<shard_id>{SHARD_ID.pattern})(-.*)?"
)  # older versions: no more than the id
_RECEIPT = "receipt.json"
_GROUP = "zarr.json"
_UNREADABLE = 100
_PATIENCE_S = 10.0
"""A network file system may show a file to other machines only after some seconds."""


def write_shard(
    root: AnyPath,
    card: DatasetCard,
    shard_id: str,
    clips: Iterable[StoredClip],
    failures: Sequence[Failure],
    sources: Sequence[SourceRecord],
    *,
    replaces: str = "",
    lock: str = "",
) -> Receipt:
    """Commit one shard: its files, whole and durable, then the receipt.

    Equal clips give equal bytes. A shard that has its receipt is left as it is, unless ``replaces`` is the digest
    of that receipt (``receipt_digest``); then the new files and receipt take the places of the old ones. Without
    clips only the receipt is written. ``clips`` are taken one by one and not kept; ``failures`` and ``sources`` are
    read when the last clip was taken.

    Args:
        lock: the token of the lock (``DatasetLock.token``) of the command that this attempt belongs to: it commits
            only while that is held. Empty: nobody asks for a lock.

    Returns:
        The receipt that the shard has now, which may be that of another attempt.

    Raises:
        StorageError: the output cannot be written, such as for want of space or permission.
        MismatchError: the shard was finished for a dataset of another fingerprint.
        DatasetError: ``lock`` is not held any more.
        ValueError: a clip does not have the shape that ``card`` says, or a replacement lacks clips that the shard has.
    """
    from deltacache.models.devices import processor_kind  # torch is imported only where something is written

    if not replaces and size_of(receipt_path(root, shard_id)) is not None:
        return checked_receipt(root, shard_id, card)
    with _errors_of_the_work(), readable_errors(root / SHARDS / f"shard-{shard_id}"):
        staged = _new_folder(root, shard_id)
        try:
            written = shard_store(card).write(staged, shard_id, _work(clips))
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
            content = receipt_bytes(receipt)
            if replaces and not receipt.arrays.keys() >= read_receipt(root, shard_id).arrays.keys():
                raise ValueError(f"what is to replace shard {shard_id} lacks clips that it has")
            write_bytes(staged / _RECEIPT, content)
            if lock:
                _check_lock(root, lock, shard_id)
        except BaseException:
            _let_go(staged)
            raise
        # From here on a commit may need what lies there, whatever fails.
        digest = _publish(root, shard_id, staged, replaces, lock)
        _let_go(staged)
    ours = digest == hashlib.sha256(content).hexdigest()
    return receipt if ours else checked_receipt(root, shard_id, card)


def _new_folder(root: AnyPath, shard_id: str) -> AnyPath:
    """A folder for the files of one attempt."""
    staging = root / STAGING
    staged = staging / temporary_path(Path(check_shard_id(shard_id))).name
    while is_local(staged):
        make_folder(staging)
        with suppress(FileNotFoundError):  # another attempt has just removed the empty folder
            staged.mkdir()
            break
    return staged


def _let_go(staged: AnyPath) -> None:
    remove(staged)
    if is_local(staged):
        with suppress(OSError):  # others work there
            staged.parent.rmdir()


def _publish(root: AnyPath, shard_id: str, staged: AnyPath, replaces: str, lock: str) -> str:
    """Make what lies in ``staged`` the shard, unless another attempt was first; the digest of its receipt then.

    Raises:
        DatasetError: ``lock`` is not held any more.
    """
    content = json.dumps({"attempt": staged.name, "replaces": replaces, "lock": lock}).encode() + b"\n"
    number, unreadable = 0, 0
    while (digest := receipt_digest(root, shard_id)) == replaces and size_of(staged / _RECEIPT) is not None:
        commit = _commit_path(root, shard_id, replaces, number)
        held = content if write_new(commit, content) else _content_of(commit)
        if lock:
            _check_lock(root, lock, shard_id)  # after the commit is there, before anything moves
        if held is None:
            continue  # it was carried out
        body = _parsed(held)
        if (
            body is None and unreadable < _UNREADABLE
        ):  # on a file system without links, it is just being written
            unreadable += 1
            time.sleep(0.05)
            continue
        if body is not None and (not lock or body.get("lock", "") in ("", lock)):
            _carry_out(root, shard_id, body)
        if receipt_digest(root, shard_id) == replaces:
            number += 1
    if digest != replaces:
        for each in range(number + 1):
            remove(_commit_path(root, shard_id, replaces, each))
    return digest


def _commit_path(root: AnyPath, shard_id: str, replaces: str, number: int) -> AnyPath:
    return root / STAGING / f"{_COMMIT}{shard_id}-{replaces[:16] or 'new'}-{number}"


def _content_of(commit: AnyPath) -> bytes | None:
    try:
        return read_file(commit)
    except FileNotFoundError:
        return None


def _parsed(content: bytes) -> dict[str, str] | None:
    """What a commit says; None if its writer died while it wrote it: nothing has moved."""
    with suppress(ValueError, KeyError, TypeError):
        body = json.loads(content)
        if is_temporary(body["attempt"]) and isinstance(body["replaces"], str):
            return body
    return None


def _check_lock(root: AnyPath, lock: str, shard_id: str) -> None:
    """Refuse to commit for a command that does not hold the lock.

    Raises:
        DatasetError: another one does, or there is no lock.
    """
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        record = held_by(root)
        if record is not None and record.token == lock:
            return
        if record is not None:
            raise DatasetError(
                f"shard {shard_id} was not committed: {root} is being written by {record} now, and attempts of an "
                "earlier command no longer count"
            )
        if time.monotonic() > deadline:
            raise DatasetError(
                f"shard {shard_id} was not committed: {root / LOCK_FILE} is not there on {socket.gethostname()}. "
                "Either the command that makes the dataset has ended, or that node does not see its output: all nodes "
                "and the next command must see one output folder. Give a folder that they share under the same path, "
                "such as one of a network file system, or an object store"
            )
        time.sleep(0.2)


def receipt_digest(root: AnyPath, shard_id: str) -> str:
    """SHA-256 of the receipt of a shard as it is now; empty when it has none."""
    try:
        return hashlib.sha256(read_file(receipt_path(root, shard_id))).hexdigest()
    except FileNotFoundError:
        return ""


def _carry_out(root: AnyPath, shard_id: str, body: Mapping[str, str]) -> None:
    """Do what is left of a commit of this shard, whoever began it."""
    staged = root / STAGING / body["attempt"]
    if receipt_digest(root, shard_id) == body["replaces"]:
        _move(root, staged, shard_id, replaced=bool(body["replaces"]))


def _move(root: AnyPath, staged: AnyPath, shard_id: str, *, replaced: bool) -> None:
    try:
        receipt = parse_receipt(root, shard_id, read_file(staged / _RECEIPT))
    except FileNotFoundError:
        return  # it has just been moved
    files = {staged / name.removeprefix(f"{SHARDS}/"): name for name in receipt.files}
    if not all(_is_there(path, root / name, receipt.files[name]) for path, name in files.items()):
        return  # another command took the attempt for dead while it wrote
    if replaced:
        forget_tables(root, [shard_id])
    make_folder(root / SHARDS)
    in_a_group = any(not name.endswith(".tar") for name in receipt.files)
    if in_a_group and size_of(root / SHARDS / _GROUP) is None:
        move(staged / _GROUP, root / SHARDS / _GROUP)
    for path, name in files.items():
        move(path, root / name)
    target = receipt_path(root, shard_id)
    make_folder(target.parent)
    move(staged / _RECEIPT, target)


def _is_there(staged: AnyPath, final: AnyPath, record: FileRecord) -> bool:
    """Whether a file waits to be moved, or has been moved."""
    if size_of(staged) is not None:
        return True
    return size_of(final) == record.bytes and crc32c_of_file(final) == record.crc32c


def forget_tables(root: AnyPath, shard_ids: Iterable[str]) -> None:
    """Remove ``tables.json`` and the parts that know these shards: they are about to go, or to be replaced."""
    remove(root / TABLES_FILE)
    if is_local(root):
        sync(root)
    drop_parts(root, shard_ids)


def settle_commits(root: AnyPath, *, alone: bool, lock: str = "") -> None:
    """Carry out the commits that dead attempts began, and remove what others of them left.

    Args:
        alone: this command holds the lock of the dataset, and none of its attempts is under way: all that is
            there was left by dead ones. Else what dead processes of this machine left is removed.
        lock: the token of the lock that these attempts had: commits of others were begun late, and do not count.
            Empty: all count, as when a command begins; unless ``alone``, those of whoever holds the lock.
    """
    staging = root / STAGING
    with readable_errors(staging):
        names = names_in(staging)
        dead = [name for name in names if is_temporary(name) and (alone or left_by_the_dead(name))]
        commits = [
            match
            for name in (names_in(staging) if dead else names)
            if (match := _COMMIT_NAME.fullmatch(name))
        ]
        if commits and not alone and not lock:
            holder = held_by(root)
            lock = holder.token if holder else ""
        for match in commits:
            content = _content_of(staging / match[0])
            if content is None:
                continue
            body = _parsed(content)
            if body is not None and (not lock or body.get("lock", "") in ("", lock)):
                _carry_out(root, match["shard_id"], body)
            if alone or (body is not None and receipt_digest(root, match["shard_id"]) != body["replaces"]):
                remove(staging / match[0])
        for name in dead:
            remove(staging / name)
        if is_local(staging):
            if staging.is_dir():
                remove_leftovers(staging)  # of other hosts, after a day
            with suppress(OSError):  # there is no such folder, or others work there
                staging.rmdir()


def commits_under_way(root: AnyPath) -> list[str]:
    """Shards of which a commit was begun and not ended."""
    matches = map(_COMMIT_NAME.fullmatch, names_in(root / STAGING))
    return sorted({match["shard_id"] for match in matches if match})


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


# ----------------------------------------------------------------------------------------------------
# The start of a dataset: ``dataset.json`` and the black frame's patch tokens.
# ----------------------------------------------------------------------------------------------------


CARD_FILE = "dataset.json"
BLACK_FILE = "black_patch_tokens.npy"
DATASET_FILES = frozenset(
    {
        CARD_FILE,
        BLACK_FILE,
        LOCK_FILE,
        RECEIPTS,
        SHARDS,
        "parts",
        STAGING,
        "plan.parquet",
        "index.parquet",
        "failures.parquet",
        "sources.parquet",
        "tables.json",
        "config.yaml",
        "throughput.json",
    }
)
"""All that the commands put into a dataset's folder."""
_CARD_SEAL = "dataset_crc32c"
_MAKE_AGAIN = "run the command that made the dataset again"
_NOT_SETTINGS = frozenset(
    {"code_version", "black_crc32c", "backbone.id", "backbone.source", "tokenizer_image_size"}
)
"""What may differ when a dataset is continued: who wrote it, and what the weights determine."""


def prepare_dataset(root: AnyPath | str, card: DatasetCard, black_patch_tokens: np.ndarray) -> None:
    """Create the dataset at ``root``, or accept the one that is there if its settings are equal.

    Args:
        root: A folder that does not exist, is empty, or is a dataset. One that lost its ``dataset.json`` gets it
            again, if all its receipts are of this very dataset.
        card: What the dataset is to hold.
        black_patch_tokens: (N, D) float16, patch tokens of an all-black frame.

    Raises:
        DatasetError: the folder holds something else, or ``dataset.json`` is damaged.
        MismatchError: it is a dataset with other settings; the message names each.
    """
    root = dataset_root(root)
    shape = (card.patch_grid[0] * card.patch_grid[1], card.hidden_size)
    if black_patch_tokens.shape != shape or black_patch_tokens.dtype != np.float16:
        raise ValueError(
            f"black_patch_tokens are {black_patch_tokens.dtype}{black_patch_tokens.shape}, must be float16{shape}"
        )
    if crc32c_of_npy(black_patch_tokens) != card.black_crc32c:
        raise ValueError(
            f"card.black_crc32c is {card.black_crc32c}, but the array's is {crc32c_of_npy(black_patch_tokens)}"
        )
    with readable_errors(root):
        held = names_in(root)
        if CARD_FILE in held:
            _check_same_settings(root, read_card(root), card)
        else:
            _check_free(root, card, held)
        make_folder(root)
        if is_local(root):
            settle_commits(root, alone=False)
        if CARD_FILE not in held:
            write_bytes(root / CARD_FILE, card_bytes(card))
        for folder in (root, root / SHARDS, root / RECEIPTS):
            make_folder(folder)
            remove_leftovers(folder)
        if BLACK_FILE not in held:
            if read_card(root).black_crc32c != card.black_crc32c:
                raise DatasetError(
                    f"{root / BLACK_FILE} is missing, and this machine computes other values than the one that made "
                    "the dataset: restore it from a copy, or run the command there"
                )
            write_bytes(root / BLACK_FILE, npy_bytes(black_patch_tokens))


def is_dataset(root: AnyPath | str) -> bool:
    """Whether there is a ``dataset.json`` at ``root``.

    Raises:
        StorageError: its store refuses or does not answer.
    """
    if has_secrets(str(root)):
        return False  # a list of videos
    path = dataset_root(root) / CARD_FILE
    with readable_errors(path, "read"):
        return path.is_file()


def card_bytes(card: DatasetCard) -> bytes:
    """The content of ``dataset.json``."""
    body = card.model_dump(mode="json") | {"fingerprint": card.fingerprint, "parents": card.parents}
    return seal_json(json.dumps(body, indent=2).encode(), _CARD_SEAL)


def read_card(root: AnyPath) -> DatasetCard:
    """Read ``dataset.json``; check its checksum, and that its fingerprint is that of its settings.

    Raises:
        DatasetError: not there, damaged, changed by hand, or of another version of the format.
    """
    card = existing_card(root)
    if card is None:
        raise DatasetError(
            f"{root} is not a dataset, it has no {CARD_FILE}: give one made by extract-features or tokenize"
        )
    return card


def existing_card(root: AnyPath) -> DatasetCard | None:
    """``read_card``, or None where there is no ``dataset.json``."""
    path = root / CARD_FILE
    way_out = (
        f"restore it from a copy, or remove it (`deltacache verify {root} --repair` does) and {_MAKE_AGAIN}"
    )
    try:
        content = read_file(path)
        body = json.loads(content)
        fingerprint, parents = body.pop("fingerprint"), body.pop("parents")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DatasetError(f"{path} is damaged ({error!r}): {way_out}") from error
    if body.get("format_version") != FORMAT_VERSION:
        raise DatasetError(
            f"{path} has format version {body.get('format_version')}, this program reads {FORMAT_VERSION}: "
            "use the version of deltacache that wrote it, or make the dataset again"
        )
    body.pop(_CARD_SEAL, None)
    try:
        card = DatasetCard.model_validate(body)
    except ValidationError as error:
        raise DatasetError(f"{path} is damaged ({problems_of(error, DatasetCard)}): {way_out}") from error
    if (fingerprint, parents) != (card.fingerprint, card.parents):
        raise DatasetError(
            f"{path} says fingerprint {fingerprint}, but its settings give {card.fingerprint}: it was changed "
            f"after the dataset was made; {way_out}"
        )
    try:
        unseal_json(content, _CARD_SEAL)
    except ValueError as error:
        raise DatasetError(f"{path} is damaged ({error}): {way_out}") from error
    return card


def read_black(root: AnyPath, card: DatasetCard) -> np.ndarray:
    """The black frame's patch tokens, (N, D) float16.

    Raises:
        DatasetError: missing, damaged, or not those of the dataset.
    """
    path = root / BLACK_FILE
    try:
        content = read_file(path)
        if crc32c(content) != card.black_crc32c:
            raise ValueError(
                f"it is not what {CARD_FILE} says: crc32c {crc32c(content):08x}, must be {card.black_crc32c:08x}"
            )
        return npy_view(memoryview(content)).copy()
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path} cannot be read ({error}): remove it and {_MAKE_AGAIN}") from error


def _check_free(root: AnyPath, card: DatasetCard, names: list[str]) -> None:
    """Refuse a folder that is neither empty nor this dataset without its ``dataset.json``."""
    if is_local(root) and root.exists() and not root.is_dir():
        raise DatasetError(f"{root} is a file: give a folder for the output")
    held = [name for name in names if not is_temporary(name) and name != LOCK_FILE]
    if not held:
        return
    strange, shards = sorted(set(held) - DATASET_FILES), sorted(finished_shards(root))
    if strange or not shards:
        raise DatasetError(
            f"{root} is not empty and not a dataset (it holds {(strange or held)[0]!r}, but no {CARD_FILE}): "
            "give another folder, new or empty; nothing was changed"
        )
    for receipt in read_receipts(root, shards):
        if receipt.fingerprint != card.fingerprint:
            raise MismatchError(
                f"{root} has lost its {CARD_FILE}, and {receipt_path(root, receipt.shard_id)} is of a dataset "
                f"with fingerprint {receipt.fingerprint}, asked for {card.fingerprint}: use its settings, or "
                "another output folder; nothing was changed"
            )
    if BLACK_FILE in held:
        try:
            read_black(root, card)
        except DatasetError as error:
            raise DatasetError(
                f"{root} has lost its {CARD_FILE}, and its black tokens are not those that this machine computes: "
                f"remove {root / BLACK_FILE} and {_MAKE_AGAIN}; nothing was changed"
            ) from error


def _check_same_settings(root: AnyPath, existing: DatasetCard, wanted: DatasetCard) -> None:
    old, new = (dict(_flat(card.model_dump(mode="json"))) for card in (existing, wanted))
    differing = [
        f"{name} is {canonical_json(old.get(name))}, asked for {canonical_json(new.get(name))}"
        for name in {**old, **new}
        if name not in _NOT_SETTINGS and not name.startswith("sources.") and old.get(name) != new.get(name)
    ]
    if differing:
        raise MismatchError(
            f"{root} holds a dataset made with other settings (fingerprint {existing.fingerprint}, asked for "
            f"{wanted.fingerprint}): {'; '.join(differing)}. Use its settings, or another output folder"
        )


def _flat(body: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in body.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


# ----------------------------------------------------------------------------------------------------
# Merging what the finished shards hold into the tables of a dataset: ``index.parquet``, ``failures.parquet``,
# ``sources.parquet``.
#
# ``tables.json`` is written after them. It says of which plan they are, whether all its shards are in them,
# and what they hold together, so that a finished dataset is known as such from a few files, however many
# shards it has. Whatever takes a shard out of a dataset, or replaces it, removes ``tables.json`` first.
# ----------------------------------------------------------------------------------------------------


INDEX_FILE = "index.parquet"
FAILURES_FILE = "failures.parquet"
SOURCES_FILE = "sources.parquet"
TABLE_FILES = (INDEX_FILE, FAILURES_FILE, SOURCES_FILE)
_SCHEMAS = {INDEX_FILE: INDEX_SCHEMA, FAILURES_FILE: FAILURES_SCHEMA, SOURCES_FILE: SOURCES_SCHEMA}
_TABLES_SEAL = "tables_crc32c"


@dataclass(frozen=True, slots=True)
class TablesSummary:
    """The content of ``tables.json``.

    Attributes:
        plan: checksum of the plan that the tables follow.
        planned_shards, planned_videos: what that plan has.
        shards: how many of its shards are in the tables.
        shards_sha256: of their ids in order.
        contents_sha256: of the checksums of their videos' contents and of the ids of their clips: what deltas
            have in common with the features they were made from.
        files: the tables, each with the checksum that its footer has.
        clips: in the index; ``videos`` of which at least one clip is there.
        failures: refused videos and clips by reason; ``failed_videos`` are those that are named.
        shard_bytes: size of all shards together.
    """

    plan: str
    planned_shards: int
    planned_videos: int
    shards: int
    shards_sha256: str
    contents_sha256: str
    files: dict[str, FileRecord]
    clips: int
    videos: int
    failures: dict[str, int]
    failed_videos: int
    shard_bytes: int

    @property
    def complete(self) -> bool:
        """Whether all shards of the plan are in the tables."""
        return self.shards == self.planned_shards > 0


def finish_dataset(root: AnyPath | str, plan: Plan | None = None) -> TablesSummary:
    """Merge what the finished shards hold, in the plan's order, into the tables; what they hold together.

    Each table is replaced whole, and only if its content changed: a finished dataset stays as it is. Receipts
    are read only of shards that no part knows. ``plan`` is the dataset's own, if it is open already.

    Raises:
        DatasetError: a receipt is damaged or of a shard that the plan does not have.
        MismatchError: a receipt belongs to another dataset.
    """
    root = dataset_root(root)
    settle_commits(root, alone=False)
    with readable_errors(root / INDEX_FILE):
        plan = plan or open_plan(root)
        summary = finished_summary(root, plan) or _merged(root, plan)
        for folder in (root, root / SHARDS, root / RECEIPTS, root / PARTS):
            if folder == root or not is_local(folder) or folder.is_dir():
                remove_leftovers(folder)
    return summary


def finished_summary(
    root: AnyPath, plan: Plan, sizes: Mapping[str, int] | None = None
) -> TablesSummary | None:
    """What a dataset holds, if all shards of its plan are finished and in the tables; else None.

    Of an object store ``tables.json`` is believed, which goes before any shard does; a local folder of receipts
    is looked at too, since people remove some by hand. No receipt is read. ``sizes`` are those of what is in the
    dataset's folder, if they are known.
    """
    summary = _summary_of(root, plan, sizes)
    if summary is None or not summary.complete:
        return None
    return summary if not is_local(root) or finished_shards(root) == {*plan.shard_ids} else None


def _summary_of(root: AnyPath, plan: Plan, sizes: Mapping[str, int] | None = None) -> TablesSummary | None:
    """``tables.json`` if it is of this plan and of the tables that are there."""
    try:
        summary = read_tables_summary(root)
    except DatasetError:
        return None
    if sizes is None:
        sizes = sizes_in(root)
    as_written = all(sizes.get(name) == summary.files[name].bytes for name in TABLE_FILES)
    return summary if summary.plan == plan.seal and as_written else None


def _merged(root: AnyPath, plan: Plan) -> TablesSummary:
    card, finished = read_card(root), finished_shards(root)
    done = [shard for shard in plan.shard_ids if shard in finished]
    strangers = finished.difference(done)
    if strangers:
        raise DatasetError(
            f"{root / RECEIPTS / min(strangers)}.json is of a shard that plan.parquet does not have: "
            f"`deltacache verify {root} --repair` removes that receipt and its shard"
        )
    digest, held = ids_sha256(done), _summary_of(root, plan)
    if held is not None and held.shards_sha256 == digest:
        return held

    def receipts(shard_ids: Iterable[str]) -> Iterator[Receipt]:
        return checked_receipts(root, shard_ids, card)

    parts = dict(by_part(plan.shard_ids))
    for name in names_in(root / PARTS):
        if is_part(name) and not (name in parts and finished.issuperset(parts[name])):
            remove(root / PARTS / name)  # of an older plan
    remove(root / TABLES_FILE)
    totals = _Totals()
    with ExitStack() as files:
        tables = [files.enter_context(sealed_table(root / name, schema)) for name, schema in _SCHEMAS.items()]
        for part in fold(root, plan.shard_ids, finished, receipts, write=True):
            rows = (clips_in(part), failures_in(part), sources_in(part))
            totals.add(part, *rows)
            for table, added in zip(tables, rows, strict=True):
                table.add(added)
    summary = TablesSummary(
        plan=plan.seal,
        planned_shards=len(plan.shard_ids),
        planned_videos=distinct(batch.column(0) for batch in plan.batches(["video_uri"])),
        shards=len(done),
        shards_sha256=digest,
        contents_sha256=totals.contents_sha256(),
        files={
            name: FileRecord(table.bytes, int(table.seal, 16))
            for name, table in zip(_SCHEMAS, tables, strict=True)
        },
        clips=totals.clips,
        videos=len(np.unique(np.concatenate(totals.videos))) if totals.videos else 0,
        failures=dict(totals.failures),
        failed_videos=len(totals.failed),
        shard_bytes=totals.bytes,
    )
    write_if_changed(root / TABLES_FILE, seal_json(canonical_json(asdict(summary)).encode(), _TABLES_SEAL))
    return summary


def ids_sha256(shard_ids: Iterable[str]) -> str:
    """SHA-256 of ids in this order."""
    return hashlib.sha256("\n".join(shard_ids).encode()).hexdigest()


def distinct(columns: Iterable[pa.Array]) -> int:
    """How many different values a column of text has that comes in parts, by 64 bits of a hash of each."""
    keys = [hashes(column.unique().to_pylist()) for column in columns]
    return len(np.unique(np.concatenate(keys))) if keys else 0


class _Totals:
    """What the parts hold together, added up as they pass."""

    def __init__(self) -> None:
        self.bytes = self.clips = 0
        self.videos: list[np.ndarray] = []  # hashes of uris
        self.failed: set[str] = set()
        self.failures: Counter[str] = Counter()
        self._digests = [hashlib.sha256() for _ in range(3)]

    def add(self, part: pa.Table, clips: pa.Table, failures: pa.Table, sources: pa.Table) -> None:
        self.bytes += int(part["bytes"].to_numpy().sum())
        self.clips += clips.num_rows
        self.videos.append(hashes(clips["video_uri"].unique().to_pylist()))
        self.failed.update(failures["video_uri"].unique().to_pylist())
        self.failures.update(failures["reason"].to_pylist())
        lengths = (
            pc.call_function("list_value_length", [part[name]]).to_pylist() for name in ("clips", "sources")
        )
        shards = (f"{shard} {c} {s}" for shard, c, s in zip(part["shard"].to_pylist(), *lengths, strict=True))
        for digest, values in zip(
            self._digests, (shards, clips["clip_id"].to_pylist(), sources["sha256"].to_pylist()), strict=True
        ):
            digest.update("".join(f"{value}\n" for value in values).encode())

    def contents_sha256(self) -> str:
        """Of shards, clips and videos; it does not depend on how the shards are divided into parts."""
        return hashlib.sha256(b"".join(digest.digest() for digest in self._digests)).hexdigest()


def read_table(path: AnyPath, schema: pa.Schema) -> pa.Table:
    """Read one of the dataset's tables into memory.

    Raises:
        DatasetError: it is missing, unreadable, or has other columns.
    """
    with open_table(path, schema) as file:
        try:
            return read_columns(file, schema)
        except ValueError as error:
            raise _damaged(path, error) from error


def open_table(path: AnyPath, schema: pa.Schema, summary: TablesSummary | None = None) -> pq.ParquetFile:
    """Open one of the dataset's tables for reading in batches.

    Raises:
        DatasetError: it is missing, unreadable, has other columns, or is another than ``summary`` says.
    """
    try:
        file = open_parquet(path, schema)
        if summary is not None and int(seal_of(file), 16) != summary.files[path.name].crc32c:
            raise ValueError(f"it does not match {TABLES_FILE}")
        return file
    except FileNotFoundError:
        raise DatasetError(
            f"{path} does not exist: the dataset is not finished, run the command that makes it again"
        ) from None
    except (ValueError, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: AnyPath, error: Exception) -> DatasetError:
    return DatasetError(
        f"{path} is damaged ({error}): remove it and run the command that made the dataset again"
    )


def read_tables_summary(root: AnyPath) -> TablesSummary:
    """``tables.json``: of which plan the tables are, and what they hold.

    Raises:
        DatasetError: it is missing, damaged, or of an older version.
    """
    path = root / TABLES_FILE
    try:
        body = json.loads(unseal_json(read_file(path), _TABLES_SEAL))
        body["files"] = {name: FileRecord(**record) for name, record in body["files"].items()}
        return TablesSummary(**{field.name: body[field.name] for field in fields(TablesSummary)})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(
            f"{path} cannot be read ({error!r}): run the command that made the dataset again, which writes it"
        ) from error


# ----------------------------------------------------------------------------------------------------
# Taking finished shards out of a dataset, so that the next run makes them again.
# ----------------------------------------------------------------------------------------------------


_DROP = "drop.json"
"""In the folder of what is under way: shards to be dropped, and sizes that their videos are planned with then."""


def drop_shards(root: AnyPath | str, shard_ids: Iterable[str]) -> None:
    """Remove the receipts of these shards, then their files; the plan keeps them.

    First go ``tables.json``, so that the tables are merged again, and the parts that know these shards; then the
    receipts, and only then what they list: whenever this is interrupted, a shard counts wholly or not at all.
    Names of files come from the ids alone, never from what a receipt says.

    Raises:
        DatasetError: an invalid id.
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
    _carry_out_drops(root)


def settle(root: AnyPath) -> None:
    """End what dead commands began: commits, and the dropping of shards that a flag asked for. Hold the lock.

    Raises:
        StorageError: something cannot be written or removed.
    """
    if STAGING not in names_in(root):  # the usual case, by one request to a store
        return
    settle_commits(root, alone=True)
    if drop_under_way(root):
        _carry_out_drops(root)


def drop_under_way(root: AnyPath) -> bool:
    """Whether dropping shards was begun and not ended."""
    return _DROP in names_in(root / STAGING)


def _carry_out_drops(root: AnyPath) -> None:
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


# ----------------------------------------------------------------------------------------------------
# All of it for clips that somebody has made already: plan, shards, tables.
# ----------------------------------------------------------------------------------------------------


class DatasetWriter:
    """Writes a dataset of clips that are at hand: ``with DatasetWriter(...) as out: out.write(name, [clip])``.

    The dataset is finished when the block ends without an error; until then it does not open. The clips of
    ``videos_per_shard`` videos are held in memory.

    Args:
        root: a new or empty folder.
        card: what the tokens are: backbone, image size, frames per clip, store. Its ``black_crc32c`` is filled in.
        black_patch_tokens: (N, D) float16, the patch tokens of a black frame, before which a clip begins.
        views: clips per video.

    Raises:
        DatasetError: the folder holds something, a video is written twice, or a clip does not fit the card.

    Example:
        >>> with deltacache.DatasetWriter("features/", card, black) as out:
        ...     out.write("cat.mp4", [(tokens, times)])  # (T, N, D) and (T,)
    """

    def __init__(
        self,
        root: AnyPath | str,
        card: DatasetCard,
        black_patch_tokens: np.ndarray,
        *,
        views: int = 1,
        videos_per_shard: int = 64,
    ) -> None:
        self.root = dataset_root(root)
        self.card = card.model_copy(update={"black_crc32c": crc32c_of_npy(black_patch_tokens)})
        self._black, self._views, self._videos_per_shard = black_patch_tokens, views, videos_per_shard
        self._waiting: dict[str, tuple[VideoSource, list[StoredClip]]] = {}
        self._seen: set[str] = set()
        self._lock = ExitStack()

    def __enter__(self) -> Self:
        if is_dataset(self.root):
            raise DatasetError(f"{self.root} holds a dataset already: give a new folder, or remove it")
        with ExitStack() as stack:
            stack.enter_context(dataset_lock(self.root, "DatasetWriter"))
            prepare_dataset(self.root, self.card, self._black)
            write_plan(self.root, read_plan(self.root))
            self._lock = stack.pop_all()
        return self

    def write(
        self,
        name: str,
        clips: Sequence[tuple[np.ndarray, np.ndarray]],
        *,
        video_id: str | None = None,
        crop: CropBox | None = None,
    ) -> None:
        """Add a video by its clips.

        Args:
            name: of the video, unique in the dataset.
            clips: of each view its tokens (float16, (T, N, D) of patches or (T, D) of deltas) and seconds (T,).
            video_id: stands in file names; made from ``name`` without it.
            crop: of the upright frame in pixels; the whole image without it.
        """
        if len(clips) != self._views:
            raise DatasetError(
                f"{name} has {counted(len(clips), 'clip')}, but each video has {self._views} (views): give as many"
            )
        source = VideoSource(video_id or video_id_of(name), name, name, 0)
        if source.video_id in self._seen:
            raise DatasetError(f"{name} is written twice: give each video once")
        rows, columns = sides(self.card.image_size)
        clip_of = FeatureClip if self.card.kind == "features" else DeltaClip
        stored = [
            StoredClip(
                clip_of(clip_id_of(source.video_id, view), tokens, times),
                name,
                view,
                tuple(range(len(times))),
                crop or CropBox(0, 0, rows, columns),
                flip=False,
                decoder="none",
                duplicate_frames=0,
            )
            for view, (tokens, times) in enumerate(clips)
        ]
        self._seen.add(source.video_id)
        self._waiting[source.video_id] = source, stored
        if len(self._waiting) == self._videos_per_shard:
            self._write_waiting()

    def _write_waiting(self) -> None:
        if not self._waiting:
            return
        videos = [source for source, _ in self._waiting.values()]
        before = read_plan(self.root)
        plan = extend_plan(before, videos, self._views, self._videos_per_shard)
        write_plan(self.root, plan)
        for task in shard_tasks(plan.slice(before.num_rows)):
            clips = [clip for video in task.videos for clip in self._waiting[video.video_id][1]]
            sources = [
                SourceRecord(v.video_id, v.video_uri, 0, v.first_view, v.views, "", "") for v in task.videos
            ]
            write_shard(self.root, self.card, task.shard_id, clips, [], sources)
        self._waiting.clear()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._lock:
            if kind is None:
                self._write_waiting()
                finish_dataset(self.root)
