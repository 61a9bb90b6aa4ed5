"""One command at a time writes to a dataset, and tells others how far it is.

``.lock`` lies in the dataset while a command writes. In a local folder the kernel holds it (``flock``) and lets go
of it when the process dies, however that happens. In object stores, and where there is no ``flock``, it is a lease.
"""

import errno
import fcntl
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from deltacache.pipeline.storage.atomic import is_alive, this_host
from deltacache.pipeline.storage.errors import read_file, readable_errors
from deltacache.pipeline.storage.leases import Lease, LeaseTimes
from deltacache.pipeline.storage.lock_records import LOCK_FILE, LockRecord, held_by, parse_record, refused
from deltacache.pipeline.storage.storage import AnyPath, dataset_root, is_local, make_folder
from deltacache.schemas.errors import DatasetError

_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_PUBLISH_S = 1.0
_PATIENCE_S = 0.5
"""Who looks whether a lock is held, holds it for a moment."""


_TIMES = LeaseTimes()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True)
class LockInfo:
    """Who writes to a dataset.

    Attributes:
        alive: whether the command still runs, as far as can be known from here.
    """

    host: str
    pid: int
    command: str
    started_at: datetime
    updated_at: datetime
    status: Mapping[str, Any]
    alive: bool


class _Hold(Protocol):
    def publish(self) -> None: ...

    def check(self) -> None: ...

    def release(self) -> None: ...


class DatasetLock:
    """The lock while it is held."""

    def __init__(self, record: LockRecord, hold: _Hold) -> None:
        self._record = record
        self._hold = hold

    @property
    def token(self) -> str:
        """Drawn for this one lock."""
        return self._record.token

    def check(self) -> None:
        """Refuse to go on without the lock.

        Raises:
            DatasetError: it was lost to another command.
        """
        self._hold.check()

    def update(self, status: Mapping[str, Any]) -> None:
        """Publish JSON values for ``read_lock``, once a second at most (a lease: with its next renewal).

        Raises:
            DatasetError: the lock was lost to another command.
        """
        self.check()
        self._record.status = dict(status)
        self._hold.publish()


@contextmanager
def dataset_lock(
    root: AnyPath | str,
    command: str,
    times: LeaseTimes = _TIMES,
    say: Callable[[str], object] = _say,
) -> Iterator[DatasetLock]:
    """Hold the lock of the dataset at ``root`` (made if need be) for the time of the block.

    A lease that nobody seems to renew is watched for ``times.grace_s`` before it is taken over; ``say`` is told.

    Raises:
        DatasetError: another command holds it; the message says which. At the end: it was lost meanwhile.
        StorageError: ``root`` cannot be written.
    """
    root = dataset_root(root)
    path, made = root / LOCK_FILE, False
    with readable_errors(root):
        if is_local(root):
            if root.exists() and not root.is_dir():
                raise DatasetError(f"{root} is a file: give a folder for the output")
            made = not root.exists()
        make_folder(root)
        record, hold = _take(path, command, times, say)
    try:
        yield DatasetLock(record, hold)
        with readable_errors(path):
            hold.check()
    finally:
        with readable_errors(path):
            hold.release()
        if made and is_local(root):
            with suppress(OSError):
                root.rmdir()  # nothing came of it


def _take(
    path: AnyPath, command: str, times: LeaseTimes, say: Callable[[str], object]
) -> tuple[LockRecord, _Hold]:
    if is_local(path):
        try:
            record = LockRecord(command, "flock")
            return record, _Flock(path, record)
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
    record = LockRecord(command, "lease", times.grace_s)
    lease = Lease(path, record, times)
    lease.take(say)
    return record, lease


class _Flock:
    """A file that this process has locked."""

    def __init__(self, path: Path, record: LockRecord) -> None:
        """Lock ``path``.

        Raises:
            DatasetError: somebody else holds it.
        """
        self._path = path
        self._record = record
        self._descriptor = _locked(path)
        self._published = 0.0
        self._write()
        with suppress(OSError):
            os.fsync(self._descriptor)  # or other nodes of a network file system would not see it

    def publish(self) -> None:
        now = time.monotonic()
        if self._published and now - self._published < _PUBLISH_S:
            return
        self._write()
        self._published = now

    def _write(self) -> None:
        content = self._record.to_bytes()
        with suppress(OSError):  # a full disk: the status is for people, the work goes on
            os.pwrite(self._descriptor, content, 0)
            os.ftruncate(self._descriptor, len(content))

    def check(self) -> None:
        """The kernel keeps it."""

    def release(self) -> None:
        self._path.unlink(missing_ok=True)
        os.close(self._descriptor)


def _locked(path: Path) -> int:
    """A descriptor that holds the lock."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise refused(path, parse_record(read_file(path))) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        time.sleep(0.02)


def read_lock(root: AnyPath | str) -> LockInfo | None:
    """Who writes to the dataset at ``root``, or did when it died; None if nobody does.

    Raises:
        StorageError: ``root`` cannot be read.
    """
    root = dataset_root(root)
    path, record = root / LOCK_FILE, held_by(root)
    if record is None:
        return None
    started, updated = (datetime.fromisoformat(text) for text in (record.started_at, record.updated_at))
    alive = _holder_lives(path, record, updated)
    return LockInfo(record.host, record.pid, record.command, started, updated, record.status, alive)


def _holder_lives(path: AnyPath, record: LockRecord, updated: datetime) -> bool:
    if record.kind == "flock" and is_local(path):
        with suppress(FileNotFoundError), path.open("rb") as file:
            try:
                fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False
    if record.machine == this_host():
        return is_alive(record.pid)
    return (datetime.now(UTC) - updated).total_seconds() < record.grace_s
