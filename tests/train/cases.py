"""Both trainers behind one interface."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltacache.schemas.progress import SilentReporter


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
