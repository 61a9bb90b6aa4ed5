"""Checkpoints written beside the training: a copy of the state is taken, and a thread writes it to the disk."""

import copy
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from deltacache.models.checkpoints import Kind
from deltacache.train.checkpoints import TrainingState, delete_old, save_checkpoint
from deltacache.train.trained import TrainedModel


class CheckpointWriter:
    """Writes one checkpoint at a time, then deletes those beyond ``keep``. Errors come up at the next call."""

    def __init__(self, out: Path, kind: Kind, metadata: Mapping[str, Any], keep: int) -> None:
        self._out, self._metadata, self._keep = out, metadata, keep
        self._kind: Kind = kind
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True)  # also when training failed: what was begun is finished
        if error is None:
            self.wait()

    def save(self, model: TrainedModel, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Take the state after ``step`` steps; returns when it is copied, not when it is written."""
        self.wait()
        state = TrainingState(
            weights=_copied(model.state_dict()),
            arguments=copy.deepcopy(model.arguments),
            optimizer=_copied(optimizer.state_dict()),
        )
        self._pending = self._pool.submit(self._write, state, step)

    def wait(self) -> None:
        """Until what was given is on the disk."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, state: TrainingState, step: int) -> None:
        save_checkpoint(self._out, self._kind, state, {**self._metadata, "step": step})
        delete_old(self._out, self._keep)


def _copied(value: Any) -> Any:
    """Nested dicts and lists with their tensors copied into the CPU's memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(each) for each in value)
    return value
