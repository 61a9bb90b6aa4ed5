"""What is written into a lock: who holds it, since when, and how far the work is."""

import json
import os
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from deltacache.pipeline.storage.atomic import this_host
from deltacache.pipeline.storage.errors import read_file
from deltacache.pipeline.storage.storage import AnyPath
from deltacache.schemas.errors import DatasetError

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
