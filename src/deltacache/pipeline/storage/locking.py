"""One command at a time writes to a dataset, and tells others how far it is.

``.lock`` lies in the dataset while a command writes. In a local folder the kernel holds it (``flock``) and lets go
of it when the process dies, however that happens. In object stores, and where there is no ``flock``, it is a lease.
"""

import errno
import fcntl
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any, Protocol

from deltacache.pipeline.storage.errors import is_refusal, read_file, readable_errors
from deltacache.pipeline.storage.files import is_alive, this_host, write_bytes, write_new
from deltacache.pipeline.storage.storage import (
    AnyPath,
    dataset_root,
    is_local,
    make_folder,
    names_in,
    patience_of_at_most,
    patience_s,
    put,
    remove_object,
)
from deltacache.schemas.errors import DatasetError, StorageError

# ----------------------------------------------------------------------------------------------------
# What is written into a lock: who holds it, since when, and how far the work is.
# ----------------------------------------------------------------------------------------------------


LOCK_FILE = ".lock"
_WRITTEN_AFTER = 5  # looks


@dataclass(slots=True)
class LockRecord:
    """The holder of a lock.

    Attributes:
        machine: eight hex digits for the machine and process namespace within which ``pid`` means something.
        token: drawn for this one lock.
        kind: ``flock`` or ``lease``.
        grace_s: of a lease: without renewal for this long it is abandoned.
        status: JSON values.
    """

    command: str
    kind: str
    grace_s: float = 0.0
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    machine: str = field(default_factory=this_host)
    token: str = field(default_factory=lambda: secrets.token_hex(16))
    started_at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    updated_at: str = ""
    renewals: int = 0
    status: Mapping[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """As JSON of now: no two calls give the same."""
        self.renewals += 1
        self.updated_at = datetime.now(UTC).isoformat(timespec="milliseconds")
        names = [name for name in LockRecord.__dataclass_fields__ if name != "status"]
        body = {name: getattr(self, name) for name in names} | {"status": dict(self.status)}
        return json.dumps(body).encode() + b"\n"

    def __str__(self) -> str:
        return f"`{self.command}` (process {self.pid} on {self.host}, since {self.started_at})"


def parse_record(content: bytes | None) -> LockRecord | None:
    """The record in a lock's content; None if there is none, or it is just being written."""
    if content is None:
        return None
    try:
        record = LockRecord(**json.loads(content))
        datetime.fromisoformat(record.started_at)
        datetime.fromisoformat(record.updated_at)
    except (ValueError, TypeError):
        return None
    return record


def held_by(root: AnyPath) -> LockRecord | None:
    """Who holds the lock of the dataset at ``root``, or did when it died; None where no lock is to be seen.

    Raises:
        StorageError: the store refuses or does not answer.
    """
    for _ in range(_WRITTEN_AFTER):
        try:
            record = parse_record(read_file(root / LOCK_FILE))
        except (FileNotFoundError, NotADirectoryError):
            return None
        if record is not None:
            return record
        time.sleep(0.02)  # it is just being written
    return None


def refused(path: AnyPath, holder: LockRecord | None) -> DatasetError:
    """The error of a command that finds the lock held."""
    who = f"{holder}" if holder else "another command, which says nothing of itself yet"
    return DatasetError(
        f"{path.parent} is being written by {who}: two commands must not write to one output. Wait until it has "
        "ended, or stop it, and run this one again; or give another output"
    )


# ----------------------------------------------------------------------------------------------------
# Leases: a lock for places without ``flock``. An object that its owner renews; one that is not, is taken
# over.
#
# Nothing is compared but contents, and nobody's clock with another's: who finds a lease watches it by his
# own.
# ----------------------------------------------------------------------------------------------------


_TAKEOVERS = 3
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # it runs on while the machine sleeps
_NO_CONDITIONS = (errno.ENOSYS, errno.EOPNOTSUPP)


@dataclass(frozen=True, slots=True)
class LeaseTimes:
    """Seconds between renewals, and how long a lease is watched before it counts as abandoned."""

    renew_s: float = 5.0
    grace_s: float = 30.0


class Lease:
    """A lease on ``path``, once ``take`` returned."""

    def __init__(self, path: AnyPath, record: LockRecord, times: LeaseTimes) -> None:
        self._path = path
        self._record = record
        self._times = times
        self._renewed = 0.0  # when the last write that is known to have succeeded began
        self._written = b""  # by it
        self._held = 0.0  # when this was last seen to lie there
        self._lost = ""
        self._writing = Lock()
        self._stop = Event()
        self._thread = Thread(target=self._keep, name="lease", daemon=True)

    def take(self, say: Callable[[str], object]) -> None:
        """Take the lease, of a dead owner too, after having watched it.

        Raises:
            DatasetError: its owner is alive.
            OSError: the lease cannot be written; other errors of a storage library too.
        """
        settle_s = 0.0
        for _ in range(_TAKEOVERS):
            self._renewed = self._held = time.clock_gettime(_CLOCK)
            with patience_of_at_most(self._times.renew_s):
                created = self._create()
            if created:
                if settle_s:
                    time.sleep(settle_s)
                    self._check_ours()
                self._thread.start()
                return
            found = self._read()
            if found is None:
                continue
            self._refuse_living(found)
            say(f"{self._path}: taking over from {parse_record(found)}, which no longer renews its lock")
            if self._read() == found:
                self._remove()
            settle_s = self._times.renew_s  # another one may have decided the same, and remove ours
        raise self._refused(self._read())

    def publish(self) -> None:
        """Nothing now: the next renewal carries what the record says."""

    def check(self) -> None:
        """Refuse to go on without the lease.

        Raises:
            DatasetError: it was taken over.
            StorageError: the store does not say so, for as long as what may pass is tried again.
        """
        if not self._lost and time.clock_gettime(_CLOCK) - self._renewed > self._times.grace_s:
            deadline = time.monotonic() + patience_s()
            while True:  # the machine slept, or the store does not answer
                try:
                    with readable_errors(self._path):
                        self._renew()
                    break
                except StorageError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(self._times.renew_s)
        if self._lost:
            raise DatasetError(
                f"{self._path} was lost: {self._lost}. What was finished is kept; run the command again when no "
                "other is writing there"
            )

    def release(self) -> None:
        """Give the lease back, if it is still held."""
        self._stop.set()
        self._thread.join()
        if not self._lost and self._is_ours(self._read()):
            self._remove()

    def _keep(self) -> None:
        while not self._lost and not self._stop.wait(self._times.renew_s):
            try:
                self._renew()
            except Exception as error:
                if not is_refusal(error) and not isinstance(error, DatasetError):
                    raise  # else the store does not answer: nobody is known to have taken over

    def _renew(self) -> None:
        """Write the record once more, if the lease is still ours.

        Stores have no condition for this write that all of them honour. Whoever takes over watches for ``grace_s``, and
        looks once more ``renew_s`` after the new lease was made. So a write that came within either time replaced no
        lease that somebody works by; one that came later may have, and then nobody goes on.
        """
        with self._writing:
            if self._lost:
                return
            reading = time.clock_gettime(_CLOCK)
            held = self._read()
            if not self._is_ours(held):
                self._lost = f"it belongs to {parse_record(held)} now" if held else "it was removed"
                return
            if held == self._written:  # else a write that seemed to fail was carried out, nobody knows when
                self._held = reading
            content, writing = self._record.to_bytes(), time.clock_gettime(_CLOCK)
            with patience_of_at_most(self._times.renew_s):
                write_bytes(self._path, content)
            ended = time.clock_gettime(_CLOCK)
            if ended - self._renewed > self._times.grace_s and ended - self._held > self._times.renew_s:
                late_s = ended - self._renewed
                self._lost = (
                    f"it was not renewed for {late_s:.0f} s, so another command may have taken it over"
                )
                if self._is_ours(self._read()):
                    self._remove()
                return
            self._renewed, self._written, self._held = writing, content, ended

    def _refuse_living(self, found: bytes) -> None:
        record = parse_record(found)
        if record is not None and record.machine == this_host() and not is_alive(record.pid):
            return
        deadline = time.monotonic() + self._times.grace_s
        while time.monotonic() < deadline:
            time.sleep(min(self._times.renew_s / 2, 1.0))
            now = self._read()
            if now is None:
                return
            if now != found:
                raise self._refused(now)

    def _check_ours(self) -> None:
        held = self._read()
        if not self._is_ours(held):
            raise self._refused(held)

    def _is_ours(self, held: bytes | None) -> bool:
        record = parse_record(held)
        return record is not None and record.token == self._record.token

    def _refused(self, held: bytes | None) -> DatasetError:
        return refused(self._path, parse_record(held))

    def _create(self) -> bool:
        """Make the object unless there is one."""
        content = self._record.to_bytes()
        if is_local(self._path):
            return write_new(self._path, content)
        if self._path.name in names_in(
            self._path.parent
        ):  # a store that knows no conditions would write over it
            return False
        try:
            created = write_new(self._path, content)
            honoured = not created or self._is_refused_again()
        except Exception as error:
            if getattr(error, "errno", None) not in _NO_CONDITIONS and not isinstance(
                error, NotImplementedError
            ):
                raise
            honoured = created = False
        if honoured:
            return created
        if created and self._is_ours(self._read()):
            self._remove()
        raise DatasetError(
            f"{self._path.parent} cannot be locked: its store ignores the condition `If-None-Match: *`, by which an "
            "object is written only if it does not exist, so that two commands could write to one output at once. "
            "Write to a store that honours it (AWS S3, Google Cloud Storage, Azure, MinIO, R2), or to a local folder, "
            "and copy that"
        )

    def _is_refused_again(self) -> bool:
        """Whether the store refuses to make an object that is there: the lock itself, which was just made."""
        assert not is_local(self._path)
        content = self._record.to_bytes()  # other than what lies there, should an answer get lost
        try:
            put(self._path, content, exclusive=True)
        except FileExistsError:
            return True
        except Exception as error:
            if not is_refusal(error):
                raise
            return self._read() != content
        return False

    def _remove(self) -> None:
        with patience_of_at_most(self._times.renew_s):
            if is_local(self._path):
                self._path.unlink(missing_ok=True)
            else:
                remove_object(self._path)  # remove() would look for objects below it first

    def _read(self) -> bytes | None:
        try:
            with patience_of_at_most(self._times.renew_s):
                return read_file(self._path)
        except FileNotFoundError:
            return None


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
