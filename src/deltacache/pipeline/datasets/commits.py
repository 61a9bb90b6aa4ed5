"""Committing shards: the files first, the receipt last, and both of one attempt.

Several attempts of a shard may run at once, for one that was given up as dead may live. Each writes to a folder of
its own in ``.staging``. To commit, it makes ``.staging/commit-<shard id>-<receipt>-<number>``, which names its folder,
the receipt that it is to replace, if any, and the lock of the command that it belongs to. Then the files move to
``shards``, the receipt to ``receipts``, and the commit is removed. Whoever finds a commit that another attempt of the
same command began carries it out first; a step that was done already finds nothing to move. Only if the receipt is
still the same then is the commit void, as when files of its attempt are gone, and the next number is free. A commit
is removed when its receipt was replaced, or by the next command: so none is ever in the place of another.

The lock is looked at when the commit is there. A command that takes the lock carries out the commits that it finds;
one that is made later by an attempt of an earlier command is of another lock than the one held, and does not count.

::

    attempt a    write a/   commit a   lock?   move files, receipt   remove commit
    attempt b    write b/              (finds commit a: moves the rest)      (finds a receipt: removes b/)
    attempt c, late    write c/   commit c   (another lock: removes c/)
"""

import hashlib
import json
import re
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from deltacache.pipeline.datasets.folding import drop_parts
from deltacache.pipeline.datasets.plan import SHARD_ID, check_shard_id
from deltacache.pipeline.datasets.receipts import (
    SHARDS,
    Failure,
    FileRecord,
    Receipt,
    SourceRecord,
    StoredClip,
    parse_receipt,
    read_receipt,
    read_receipts,
    receipt_bytes,
    receipt_path,
)
from deltacache.pipeline.datasets.stores import shard_store
from deltacache.pipeline.storage.atomic import (
    is_temporary,
    left_by_the_dead,
    move,
    readable_errors,
    remove,
    remove_leftovers,
    sync,
    temporary_path,
    write_bytes,
    write_new,
)
from deltacache.pipeline.storage.checksums import crc32c_of_file
from deltacache.pipeline.storage.errors import read_file
from deltacache.pipeline.storage.lock_records import LOCK_FILE, held_by
from deltacache.pipeline.storage.storage import AnyPath, is_local, make_folder, names_in, size_of
from deltacache.schemas.datasets import DatasetCard
from deltacache.schemas.errors import DatasetError, MismatchError

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
                f"shard {shard_id} was not committed: {root} is being written by {record} now, and what attempts of an "
                "earlier command make does not count any more"
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
