"""What a command that ran left behind."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """What a finished command left behind."""

    code: int
    stdout: str
    stderr: str

    def refused(self, *words: str) -> None:
        """Exit 1 or 2, one message with these words, no traceback."""
        assert self.code in (1, 2), self
        assert "Traceback" not in self.stderr, self.stderr
        for word in words:
            assert word in self.stderr, (word, self.stderr)

    def done(self) -> "Outcome":
        """Exit 0."""
        assert self.code == 0, self
        return self


Command = Callable[..., Outcome]
