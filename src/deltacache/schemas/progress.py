"""How long stages tell what they do. The terminal's bars are one implementation, silence another."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3.4 h``, ``2.1 days``, ``12 years``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    days = seconds / 86400
    return f"{days:.1f} days" if days < 730 else f"{days / 365.25:,.0f} years"


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
