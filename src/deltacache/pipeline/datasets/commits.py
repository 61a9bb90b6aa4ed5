"""Committing shards: the files first, the receipt last, and both of one attempt.

Several attempts of a shard may run at once, for one that was given up as dead may live. Each writes to a folder of
its own in ``.staging``. To commit, it makes ``.staging/commit-<shard id>``, which names its folder and the receipt
that it is to replace, if any: one attempt at a time can. Then the files move to ``shards``, the receipt to
``receipts``, and the commit is removed. Whoever finds a commit that another began carries it out first; a step that
was done already finds nothing to move. A commit is void, and its attempt with it, when the receipt is another than
the one that it is to replace, or when files of the attempt are gone. What a command removes of attempts that it takes
for dead goes under a void commit, so that one that lives does not commit what is left of it.

::

    attempt a    write a/   commit a   move files, receipt   remove commit
    attempt b    write b/              (finds commit a: moves the rest)      (finds a receipt: removes b/)
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
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
from deltacache.pipeline.storage.storage import AnyPath, is_local, make_folder, names_in
from deltacache.schemas.datasets import DatasetCard
from deltacache.schemas.errors import MismatchError

STAGING = ".staging"
TABLES_FILE = "tables.json"
_COMMIT = "commit-"
_RECEIPT = "receipt.json"
_GROUP = "zarr.json"
_VOID = "nothing"  # what no receipt has for a digest


def write_shard(
    root: AnyPath,
    card: DatasetCard,
    shard_id: str,
    clips: Iterable[StoredClip],
    failures: Sequence[Failure],
    sources: Sequence[SourceRecord],
    *,
    replaces: str = "",
) -> Receipt:
    """Commit one shard: its files, whole and durable, then the receipt.

    Equal clips give equal bytes. A shard that has its receipt is left as it is, unless ``replaces`` is the digest
    of that receipt (``receipt_digest``); then the new files and receipt take the places of the old ones. Without
    clips only the receipt is written. ``clips`` are taken one by one and not kept; ``failures`` and ``sources`` are
    read when the last clip was taken.

    Returns:
        The receipt that the shard has now, which may be that of another attempt.

    Raises:
        StorageError: the output cannot be written, such as for want of space or permission.
        MismatchError: the shard was finished for a dataset of another fingerprint.
        ValueError: a clip does not have the shape that ``card`` says.
    """
    from deltacache.models.devices import processor_kind  # torch is imported only where something is written

    if not replaces and receipt_path(root, shard_id).exists():
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
            write_bytes(staged / _RECEIPT, content)
        except BaseException:
            _let_go(staged)
            raise
        # From here on a commit may need what lies there, whatever fails.
        digest = _publish(root, shard_id, staged, replaces)
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


def _publish(root: AnyPath, shard_id: str, staged: AnyPath, replaces: str) -> str:
    """Make what lies in ``staged`` the shard, unless another attempt was first; the digest of its receipt then."""
    commit = root / STAGING / f"{_COMMIT}{shard_id}"
    content = json.dumps({"attempt": staged.name, "replaces": replaces}).encode() + b"\n"
    while (digest := receipt_digest(root, shard_id)) == replaces and (staged / _RECEIPT).exists():
        write_new(commit, content)
        _carry_out(root, shard_id)
    return digest


def receipt_digest(root: AnyPath, shard_id: str) -> str:
    """SHA-256 of the receipt of a shard as it is now; empty when it has none."""
    try:
        return hashlib.sha256(read_file(receipt_path(root, shard_id))).hexdigest()
    except FileNotFoundError:
        return ""


def _carry_out(root: AnyPath, shard_id: str) -> None:
    """Do what is left of the commit of this shard, whoever began it, and remove it."""
    commit = root / STAGING / f"{_COMMIT}{shard_id}"
    try:
        content = read_file(commit)
    except FileNotFoundError:
        return
    with suppress(ValueError, KeyError, TypeError):  # its writer died while it wrote it: nothing has moved
        body = json.loads(content)
        staged = root / STAGING / str(body["attempt"])
        if is_temporary(staged.name):
            if receipt_digest(root, shard_id) == body["replaces"]:
                _move(root, staged, shard_id, replaced=bool(body["replaces"]))
            remove(staged)
    with suppress(FileNotFoundError):
        if read_file(commit) == content:
            remove(commit)


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
    if in_a_group and not (root / SHARDS / _GROUP).exists():
        move(staged / _GROUP, root / SHARDS / _GROUP)
    for path, name in files.items():
        move(path, root / name)
    target = receipt_path(root, shard_id)
    make_folder(target.parent)
    move(staged / _RECEIPT, target)


def _is_there(staged: AnyPath, final: AnyPath, record: FileRecord) -> bool:
    """Whether a file waits to be moved, or has been moved."""
    if staged.exists():
        return True
    return final.exists() and final.stat().st_size == record.bytes and crc32c_of_file(final) == record.crc32c


def forget_tables(root: AnyPath, shard_ids: Iterable[str]) -> None:
    """Remove ``tables.json`` and the parts that know these shards: they are about to go, or to be replaced."""
    remove(root / TABLES_FILE)
    if is_local(root):
        sync(root)
    drop_parts(root, shard_ids)


def settle_commits(root: AnyPath, *, alone: bool) -> None:
    """Carry out the commits that dead attempts began, and remove what others of them left.

    Args:
        alone: this command holds the lock of the dataset, and none of its attempts is under way: all that is
            there was left by dead ones. Else what dead processes of this machine left is removed.
    """
    staging = root / STAGING
    with readable_errors(staging):
        names = names_in(staging)
        for name in names:
            if name.startswith(_COMMIT):
                _carry_out(root, name.removeprefix(_COMMIT))
        if is_local(staging) and staging.is_dir():
            remove_leftovers(staging)
        for name in names:
            if is_temporary(name) and (alone or left_by_the_dead(name)):
                _end(root, name)
        if is_local(staging):
            with suppress(OSError):  # there is none, or others work there
                staging.rmdir()


def _end(root: AnyPath, name: str) -> None:
    """Remove what an attempt left in ``.staging``; if it lives, it cannot begin a commit meanwhile."""
    shard_id = name.split("-", 4)[-1]
    if not SHARD_ID.fullmatch(shard_id):
        remove(root / STAGING / name)  # a file that was being written
        return
    content = json.dumps({"attempt": name, "replaces": _VOID}).encode() + b"\n"
    while not write_new(root / STAGING / f"{_COMMIT}{shard_id}", content):
        _carry_out(root, shard_id)
    _carry_out(root, shard_id)


def commits_under_way(root: AnyPath) -> list[str]:
    """Shards of which a commit was begun and not ended."""
    return [name.removeprefix(_COMMIT) for name in names_in(root / STAGING) if name.startswith(_COMMIT)]


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
