"""Files that are there whole or not at all: on local disks written aside in the same folder, flushed, renamed;
in object stores uploaded under their names when they are complete.

Temporary names carry the host and process of the attempt, so that leftovers of dead ones can be told from
what somebody is writing now; nothing of that gets into a file.
"""

import errno
import filecmp
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deltacache.pipeline.storage.checksums import crc32c_of_text
from deltacache.pipeline.storage.errors import is_refusal, read_file, readable_errors
from deltacache.pipeline.storage.storage import (
    AnyPath,
    copy_object,
    is_local,
    make_folder,
    objects_below,
    put,
    remove_object,
    retried,
    size_of,
    upload,
)

__all__ = [
    "is_alive",
    "is_temporary",
    "move",
    "readable_errors",
    "remove",
    "remove_leftovers",
    "replacing",
    "replacing_folder",
    "sync",
    "temporary_path",
    "this_host",
    "write_bytes",
    "write_if_changed",
    "write_new",
]

_TEMPORARY = re.compile(r"\.tmp-(?P<host>[0-9a-f]{8})-(?P<pid>[0-9]+)-[0-9a-f]{8}-.+", re.DOTALL)
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK, errno.EACCES, errno.EINVAL)
_ABANDONED_AFTER_S = 24 * 3600.0


def temporary_path(final: Path) -> Path:
    """A name beside ``final`` that no other attempt has."""
    return final.with_name(f".tmp-{this_host()}-{os.getpid()}-{secrets.token_hex(4)}-{final.name}")


def is_temporary(name: str) -> bool:
    """Whether ``name`` was made by ``temporary_path``."""
    return _TEMPORARY.fullmatch(name) is not None


def this_host() -> str:
    """Eight hex digits for this machine and process namespace, within which process ids mean something."""
    namespace = Path("/proc/self/ns/pid")
    inside = str(namespace.readlink()) if namespace.is_symlink() else ""
    return f"{crc32c_of_text(socket.gethostname() + inside):08x}"


def sync(path: Path) -> None:
    """Make a file's content, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: AnyPath) -> None:
    """Remove a file, or a folder with all it holds, if it is there."""
    if not is_local(path):
        for held in objects_below(path):
            remove_object(held)
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        retried(path.unlink, missing_ok=True)


@contextmanager
def replacing(final: AnyPath, *, keep_equal: bool = False) -> Iterator[Path]:
    """Yield a local path to write a file to; it becomes ``final`` when the block ends without error.

    The block must close the file; this syncs it and its folder, or uploads it. With ``keep_equal``, a local
    ``final`` of the same content stays as it is.
    """
    if not is_local(final):
        with spool_folder() as folder:
            yield folder / final.name
            upload(folder / final.name, final)
        return
    temporary = temporary_path(final)
    try:
        yield temporary
        if keep_equal and final.is_file() and filecmp.cmp(temporary, final, shallow=False):
            return
        sync(temporary)
        temporary.replace(final)
    finally:
        remove(temporary)
    sync(final.parent)


@contextmanager
def replacing_folder(final: AnyPath) -> Iterator[Path]:
    """Yield an empty local folder to write files to; it becomes ``final`` when the block ends without error.

    In an object store the files appear one by one, and what was below ``final`` and is not among them goes
    last: who reads must know by something written later that all are there.
    """
    if not is_local(final):
        with spool_folder() as folder:
            yield folder
            files = {final / path.relative_to(folder).as_posix(): path for path in _files(folder)}
            for target, path in files.items():
                upload(path, target)
            for stranger in set(objects_below(final)) - files.keys():
                remove_object(stranger)
        return
    temporary = temporary_path(final)
    try:
        temporary.mkdir()
        yield temporary
        for parent, _, names in os.walk(temporary, topdown=False):
            for name in names:
                sync(Path(parent, name))
            sync(Path(parent))
        _put_in_place(temporary, final)
    finally:
        remove(temporary)
    sync(final.parent)


@contextmanager
def spool_folder() -> Iterator[Path]:
    """A folder on a local disk for uploads and fetched videos; what dead processes left there is removed."""
    place = Path(tempfile.gettempdir())
    with suppress(OSError):  # somebody else's
        remove_leftovers(place)
    folder = temporary_path(place / "deltacache")
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        remove(folder)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _put_in_place(temporary: Path, final: Path) -> None:
    """Rename a folder to its name. An equal one that another attempt left there may be in use: it stays."""
    try:
        temporary.rename(final)
    except OSError:
        if not final.is_dir():
            raise
        if _equal(temporary, final):
            return
        aside = temporary_path(final)
        final.rename(aside)
        try:
            temporary.rename(final)
        finally:
            remove(aside)


def _equal(one: Path, other: Path) -> bool:
    names = [path.relative_to(one) for path in _files(one)]
    if names != [path.relative_to(other) for path in _files(other)]:
        return False
    return all(filecmp.cmp(one / name, other / name, shallow=False) for name in names)


def write_bytes(final: AnyPath, content: bytes) -> None:
    """Write ``final`` whole or not at all."""
    if not is_local(final):
        put(final, content)
        return
    retried(_replace_bytes, final, content)  # as a whole: what was not synced may be lost


def _replace_bytes(final: Path, content: bytes) -> None:
    with replacing(final) as temporary:
        temporary.write_bytes(content)


def write_new(final: AnyPath, content: bytes) -> bool:
    """Write ``final`` unless something is there; whether it holds ``content`` then.

    On a local disk without hard links, who reads it while it is written, or after a crash, may find the beginning of
    ``content``.
    """
    if is_local(final):
        return retried(_created, final, content)
    try:
        put(final, content, exclusive=True)
    except Exception as error:
        if not is_refusal(error):
            raise
        try:
            return (
                read_file(final) == content
            )  # stores say in several ways that it is there, and answers get lost
        except FileNotFoundError:
            if isinstance(error, FileExistsError):
                return False  # and is gone again
            raise error from None
    return True


def _created(final: Path, content: bytes) -> bool:
    """Make a local file unless something is there; whether it holds ``content`` then."""
    temporary = temporary_path(final)
    try:
        temporary.write_bytes(content)
        sync(temporary)
        final.hardlink_to(temporary)
    except FileExistsError:
        return final.read_bytes() == content  # an earlier try made it, and failed then
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        try:
            with final.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except FileExistsError:
            return False
    finally:
        remove(temporary)
    sync(final.parent)
    return True


def move(source: AnyPath, final: AnyPath) -> None:
    """Give a file, flushed, another name in the same place, whatever had it; nothing if ``source`` is not there.

    In an object store it is copied within the store, then removed.
    """
    with suppress(FileNotFoundError):
        if is_local(source):
            make_folder(final.parent)
            retried(source.replace, str(final))
            retried(sync, Path(str(final)).parent)
        elif not is_local(final):
            copy_object(source, final)
            remove_object(source)


def write_if_changed(final: AnyPath, content: bytes) -> None:
    """Write ``final`` whole or not at all, unless it holds ``content`` already."""
    if size_of(final) != len(content) or read_file(final) != content:
        write_bytes(final, content)


def remove_leftovers(folder: AnyPath) -> None:
    """Remove what dead attempts left in ``folder``; what a living process may be writing stays.

    An object store has none: an upload that was broken off is no object.

    An attempt on another host is taken for dead after a day. Being wrong costs that attempt an error, never
    data: its rename finds nothing.
    """
    if not is_local(folder):
        return
    here = this_host()
    for entry in os.scandir(folder):
        match = _TEMPORARY.fullmatch(entry.name)
        if match is None:
            continue
        if match["host"] == here:
            dead = not is_alive(int(match["pid"]))
        else:
            dead = time.time() - entry.stat(follow_symlinks=False).st_mtime > _ABANDONED_AFTER_S
        if dead:
            remove(Path(entry.path))


def left_by_the_dead(name: str) -> bool:
    """Whether a temporary name is that of a process of this machine which has ended."""
    match = _TEMPORARY.fullmatch(name)
    return match is not None and match["host"] == this_host() and not is_alive(int(match["pid"]))


def is_alive(pid: int) -> bool:
    """Whether this machine has a process of this id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's process has this id
        return True
    return True
