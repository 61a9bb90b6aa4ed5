"""Files that are there whole or not at all: written aside in the same folder, flushed, renamed.

Temporary names carry the host and process of the attempt, so that leftovers of dead ones can be told from
what somebody is writing now; nothing of that gets into a file.
"""

import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deltacache.pipeline.checksums import crc32c_of_text
from deltacache.schemas.errors import DatasetError

_TEMPORARY = re.compile(r"\.tmp-(?P<host>[0-9a-f]{8})-(?P<pid>[0-9]+)-[0-9a-f]{8}-.+", re.DOTALL)
_ABANDONED_AFTER_S = 24 * 3600.0


def temporary_path(final: Path) -> Path:
    """A name beside ``final`` that no other attempt has."""
    return final.with_name(f".tmp-{_host()}-{os.getpid()}-{secrets.token_hex(4)}-{final.name}")


def is_temporary(name: str) -> bool:
    """Whether ``name`` was made by ``temporary_path``."""
    return _TEMPORARY.fullmatch(name) is not None


def _host() -> str:
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


def remove(path: Path) -> None:
    """Remove a file, or a folder with all it holds, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def readable_errors(target: Path) -> Iterator[None]:
    """Turn what the system refuses while ``target`` is written into an error that says what to do."""
    try:
        yield
    except OSError as error:
        raise DatasetError(
            f"{target} cannot be written ({error.strerror or error}): what was finished is kept. Make room, or give "
            "write permission, and run the command again"
        ) from error


@contextmanager
def replacing(final: Path) -> Iterator[Path]:
    """Yield a temporary path to write a file to; it becomes ``final`` when the block ends without error.

    The block must close the file; this syncs it and its folder.
    """
    temporary = temporary_path(final)
    try:
        yield temporary
        sync(temporary)
        temporary.replace(final)
    finally:
        remove(temporary)
    sync(final.parent)


def write_bytes(final: Path, content: bytes) -> None:
    """Write ``final`` whole or not at all."""
    with replacing(final) as temporary:
        temporary.write_bytes(content)


def write_if_changed(final: Path, content: bytes) -> None:
    """Write ``final`` whole or not at all, unless it holds ``content`` already."""
    if not final.is_file() or final.stat().st_size != len(content) or final.read_bytes() != content:
        write_bytes(final, content)


def remove_leftovers(folder: Path) -> None:
    """Remove what dead attempts left in ``folder``; what a living process may be writing stays.

    An attempt on another host is taken for dead after a day. Being wrong costs that attempt an error, never
    data: its rename finds nothing.
    """
    here = _host()
    for entry in os.scandir(folder):
        match = _TEMPORARY.fullmatch(entry.name)
        if match is None:
            continue
        if match["host"] == here:
            dead = not _is_alive(int(match["pid"]))
        else:
            dead = time.time() - entry.stat(follow_symlinks=False).st_mtime > _ABANDONED_AFTER_S
        if dead:
            remove(Path(entry.path))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's process has this id
        return True
    return True
