"""Leases: a lock for places without ``flock``. An object that its owner renews; one that is not, is taken over.

Nothing is compared but contents, and nobody's clock with another's: who finds a lease watches it by his own.
"""

import errno
import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event, Lock, Thread

from deltacache.pipeline.storage.atomic import is_alive, this_host, write_bytes, write_new
from deltacache.pipeline.storage.errors import is_refusal, read_file, readable_errors
from deltacache.pipeline.storage.lock_records import LockRecord, parse_record, refused
from deltacache.pipeline.storage.remote_files import patience_of_at_most, patience_s
from deltacache.pipeline.storage.storage import AnyPath, is_local, names_in, put, remove_object
from deltacache.schemas.errors import DatasetError, StorageError

_TAKEOVERS = 3
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
        self._renewed = 0.0
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
            with patience_of_at_most(self._times.renew_s):
                created = self._create()
            if created:
                if settle_s:
                    time.sleep(settle_s)
                    self._check_ours()
                self._renewed = time.monotonic()
                self._thread.start()
                return
            found = self._read()
            if found is None:
                continue
            self._refuse_living(found)
            say(
                f"{self._path}: taking over from {parse_record(found)}, which does not renew its lock any more"
            )
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
        if not self._lost and time.monotonic() - self._renewed > self._times.grace_s:
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
        with self._writing:
            held = self._read()
            if not self._is_ours(held):
                self._lost = f"it belongs to {parse_record(held)} now" if held else "it was removed"
                return
            with patience_of_at_most(self._times.renew_s):
                write_bytes(self._path, self._record.to_bytes())
            self._renewed = time.monotonic()

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
