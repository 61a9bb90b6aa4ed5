"""Both trainers behind one interface, and a reporter that remembers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

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


@dataclass(frozen=True)
class Case:
    """One of the two trainers, on small data."""

    kind: str
    train: Callable[..., Path]
    config: Callable[..., Any]
    load: Callable[[Path], Any]
    root: Path

    def run(
        self,
        out: Path,
        *,
        resume: bool = False,
        reporter: Any = None,
        start_from: Path | None = None,
        **training: Any,
    ) -> Path:
        return self.train(
            self.root,
            out,
            self.config(**training),
            resume=resume,
            device="cpu",
            reporter=reporter or SilentReporter(),
            start_from=start_from,
        )

    def weights(self, checkpoint: Path) -> dict[str, torch.Tensor]:
        return self.load(checkpoint).model.state_dict()
