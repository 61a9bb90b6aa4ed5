"""What FFmpeg and decord print. They write to file descriptor 2, past Python, and it must not reach the user.

decord reports damage nowhere else, so the text is evidence as well as noise.
"""

import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_STDERR = 2
_ADDRESS = re.compile(r" @ 0x[0-9a-f]+")
_lock = threading.RLock()


class NativeLog:
    """The text that went to file descriptor 2 while it was caught."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @property
    def size(self) -> int:
        """Bytes so far: a mark to ask ``text`` from."""
        return os.fstat(self._descriptor).st_size

    def text(self, start: int = 0, *, limit: int = 1 << 16) -> str:
        """The last ``limit`` bytes written after ``start``."""
        end = self.size
        start = max(start, end - limit)
        return os.pread(self._descriptor, end - start, start).decode(errors="replace")

    def last_lines(self, count: int = 3) -> str:
        """The last lines in one, for a message."""
        text = _ADDRESS.sub("", self.text(limit=2000))  # so that the same failure says the same
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return " | ".join(lines[-count:])


_active: NativeLog | None = None


@contextmanager
def native_log() -> Iterator[NativeLog]:
    """Catch file descriptor 2 of this process in a file; inside another ``native_log``, share that one.

    A forked child inherits it, and what it wrote outlives its crash. Threads take turns.
    """
    global _active  # noqa: PLW0603 - file descriptor 2 is global too
    with _lock:
        if _active is not None:
            yield _active
            return
        with tempfile.TemporaryFile("a+b") as file:
            saved = os.dup(_STDERR)
            os.dup2(file.fileno(), _STDERR)
            _active = NativeLog(file.fileno())
            try:
                yield _active
            finally:
                _active = None
                os.dup2(saved, _STDERR)
                os.close(saved)
