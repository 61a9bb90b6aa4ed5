"""How long stages tell what they do. The terminal's bars are one implementation, silence another."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class ProgressStage(Protocol):
    """One running stage, counted in items."""

    def advance(self, items: int = 1, **status: float | str) -> None:
        """``items`` more are done; ``status`` names figures to show beside the bar, such as ``loss``."""
        ...


class Reporter(Protocol):
    """Where a command's progress goes."""

    def stage(self, name: str, total: int | None, *, done: int = 0) -> AbstractContextManager[ProgressStage]:
        """Open a bar of ``total`` items (``None``: unknown), of which ``done`` were done earlier."""
        ...

    def line(self, text: str) -> None:
        """Say one line that stays on the screen."""
        ...


class _SilentStage:
    def advance(self, items: int = 1, **status: float | str) -> None:
        pass


class SilentReporter:
    """Says nothing: for library use and tests."""

    @contextmanager
    def stage(self, name: str, total: int | None, *, done: int = 0) -> Iterator[ProgressStage]:
        yield _SilentStage()

    def line(self, text: str) -> None:
        pass
