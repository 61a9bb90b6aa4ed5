"""What a run leaves on the disk: rows of the curves and checkpoints. The first worker alone writes them."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch

from deltacache.models.checkpoints import Kind
from deltacache.pipeline.storage.errors import readable_errors
from deltacache.schemas.configs import TrainingConfig
from deltacache.train.checkpoints import checkpoint_folder
from deltacache.train.curves import Row
from deltacache.train.logs import RunLog
from deltacache.train.order import Split
from deltacache.train.saving import CheckpointWriter
from deltacache.train.trained import TrainedModel


class Record(AbstractContextManager["Record"], Protocol):
    """Where rows and checkpoints go; open until the training ends."""

    def add(self, row: Row) -> None:
        """One more row of the curves."""
        ...

    def save(self, model: TrainedModel, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Write the rows so far, then the state after ``step`` steps; returns when it is copied."""
        ...

    def save_now(self, model: TrainedModel, optimizer: torch.optim.Optimizer, step: int) -> None:
        """``save``, unless it is there already, and wait until it is on the disk."""
        ...

    def note_split(self, split: Split) -> None:
        """How steps are cut from now on: a run that is resumed computes the same bits with the same passes."""
        ...

    def finish(self) -> None:
        """Wait until all is on the disk, and draw the curves."""
        ...


class NoRecord:
    """Of all workers but the first."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def add(self, row: Row) -> None:
        """See ``Record``."""

    def save(self, model: TrainedModel, optimizer: torch.optim.Optimizer, step: int) -> None:
        """See ``Record``."""

    def save_now(self, model: TrainedModel, optimizer: torch.optim.Optimizer, step: int) -> None:
        """See ``Record``."""

    def note_split(self, split: Split) -> None:
        """See ``Record``."""

    def finish(self) -> None:
        """See ``Record``."""


class FolderRecord:
    """In the output folder ``out``, going on from the curves up to ``first_step``."""

    def __init__(
        self, out: Path, kind: Kind, config: TrainingConfig, metadata: Mapping[str, Any], first_step: int
    ) -> None:
        self._out = out
        metadata = self._metadata = dict(metadata)
        self._stack = ExitStack()
        self._log = RunLog(out, kind, first_step, wandb=config.wandb, config=metadata)
        self._writer = CheckpointWriter(out, kind, metadata, config.keep)

    def __enter__(self) -> Self:
        self._stack.enter_context(self._writer)
        self._stack.enter_context(self._log)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def add(self, row: Row) -> None:
        """See ``Record``."""
        self._log.add(row)

    def save(self, model: TrainedModel, optimizer: torch.optim.Optimizer, step: int) -> None:
        """See ``Record``."""
        with readable_errors(self._out):
            self._log.save()
        self._writer.save(model, optimizer, step)

    def save_now(self, model: TrainedModel, optimizer: torch.optim.Optimizer, step: int) -> None:
        """See ``Record``."""
        self._writer.wait()
        if checkpoint_folder(self._out, step).exists():
            with readable_errors(self._out):
                self._log.save()
        else:
            self.save(model, optimizer, step)
        self._writer.wait()

    def note_split(self, split: Split) -> None:
        """See ``Record``."""
        self._writer.wait()  # it reads this
        self._metadata["samples_per_pass"] = split.batch_size

    def finish(self) -> None:
        """See ``Record``."""
        self._writer.wait()
        with readable_errors(self._out):
            self._log.plot()
