"""Progress on a terminal, and plain lines where there is none."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from deltacache.schemas.progress import ProgressStage, Reporter, duration
from deltacache.schemas.secrets import without_secrets

_PLAIN_INTERVAL_S = 15.0


def _status_text(status: dict[str, float | str]) -> str:
    """``loss 0.0123, clips_per_s 12.3`` with as many digits as a person reads."""
    return ", ".join(
        f"{name.replace('_', ' ')} {value if isinstance(value, str) else format(value, '.4g')}"
        for name, value in status.items()
    )


class _BarStage:
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance(self, items: int = 1, **status: float | str) -> None:
        self._progress.advance(self._task, items)
        if status:
            self._progress.update(self._task, status=_status_text(status))


class _StatusColumn(ProgressColumn):
    """The only column that may shrink: on a narrow terminal the figures are cut, not the count and the time left."""

    def __init__(self) -> None:
        super().__init__(Column(no_wrap=False))

    def render(self, task: Task) -> Text:
        return Text(task.fields["status"], style="dim", no_wrap=True, overflow="ellipsis")


class BarReporter:
    """One bar a stage; finished bars stay on the screen."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def stage(self, name: str, total: int | None, *, done: int = 0) -> Iterator[ProgressStage]:
        whole = Column(no_wrap=True)
        columns = (
            SpinnerColumn(finished_text="[green]✓[/]", table_column=whole),
            TextColumn("{task.description}", style="bold"),
            BarColumn(bar_width=24 if self._console.width >= 100 else 8, table_column=whole),
            MofNCompleteColumn(table_column=whole),
            TimeElapsedColumn(table_column=whole),
            TimeRemainingColumn(table_column=whole),
            _StatusColumn(),
        )
        with Progress(*columns, console=self._console) as progress:
            yield _BarStage(progress, progress.add_task(name, total=total, completed=done, status=""))

    def line(self, text: str) -> None:
        self._console.print(without_secrets(text), highlight=False, soft_wrap=True)


class _PlainStage:
    def __init__(self, name: str, total: int | None, done: int) -> None:
        self._name, self._total, self._done, self._began_at = name, total, done, done
        self._start = self._last = time.monotonic()
        self._status: dict[str, float | str] = {}

    def advance(self, items: int = 1, **status: float | str) -> None:
        self._done += items
        self._status = status or self._status
        if time.monotonic() - self._last > _PLAIN_INTERVAL_S:
            self._last = time.monotonic()
            self.say()

    def say(self) -> None:
        """Print where the stage is."""
        total = "" if self._total is None else f"/{self._total}"
        elapsed = time.monotonic() - self._start
        status = f" ({_status_text(self._status)})" if self._status else ""
        print(
            f"{self._name}: {self._done}{total} in {elapsed:.0f} s{self._left(elapsed)}{status}", flush=True
        )

    def _left(self, elapsed: float) -> str:
        done = self._done - self._began_at
        if self._total is None or not done > 0 or self._done >= self._total:
            return ""
        return f", {duration((self._total - self._done) * elapsed / done)} left"


class PlainReporter:
    """A line every quarter of a minute and one at the end of a stage."""

    @contextmanager
    def stage(self, name: str, total: int | None, *, done: int = 0) -> Iterator[ProgressStage]:
        stage = _PlainStage(name, total, done)
        print(f"{name}: {'starting' if not done else f'continuing at {done}'}", flush=True)
        yield stage
        stage.say()

    def line(self, text: str) -> None:
        print(without_secrets(text), flush=True)


def terminal_reporter() -> Reporter:
    """Bars on a terminal, plain lines elsewhere."""
    return BarReporter(Console()) if sys.stdout.isatty() else PlainReporter()
