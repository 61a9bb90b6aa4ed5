"""A reporter that remembers what it was told."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from deltacache.schemas.progress import ProgressStage, SilentReporter


@dataclass
class Lines(SilentReporter):
    """Remembers what was said and shown."""

    said: list[str] = field(default_factory=list)
    stages: list[tuple[str, int | None, int]] = field(default_factory=list)
    advances: list[tuple[int, dict[str, float | str]]] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str, total: int | None, *, done: int = 0) -> Iterator[ProgressStage]:
        self.stages.append((name, total, done))
        yield self

    def advance(self, items: int = 1, **status: float | str) -> None:
        self.advances.append((items, status))

    def line(self, text: str) -> None:
        self.said.append(text)
