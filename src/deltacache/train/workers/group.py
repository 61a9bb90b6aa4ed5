"""The workers that train one model together, as the loop sees them."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from deltacache.train.order import MicroBatch

# ----------------------------------------------------------------------------------------------------
# SIGTERM as a wish to stop: schedulers send it before they take the machine away.
# ----------------------------------------------------------------------------------------------------


@dataclass
class Stop:
    """Whether somebody asked the training to stop."""

    asked: bool = False


@contextmanager
def stop_on_sigterm() -> Iterator[Stop]:
    """Inside, SIGTERM only takes note of the wish. Outside the main thread nothing is changed."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, frame: FrameType | None) -> None:
        stop.asked = True

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


ResultT = TypeVar("ResultT")
Loss = Callable[[Any, MicroBatch], tuple[Tensor, dict[str, Tensor]]]
"""A task's ``training_loss``: of a batch and its part."""


class OtherWorkerFailedError(RuntimeError):
    """Another worker has said why; this one only ends."""


class ProcessGroup(Protocol):
    """The seam for several workers: the loop, the order and the draws know no more of them than this."""

    @property
    def workers(self) -> int:
        """How many there are."""
        ...

    @property
    def rank(self) -> int:
        """Which one this is, from 0. The first one writes and speaks."""
        ...

    @property
    def on_this_node(self) -> int:
        """How many of them share this machine's memory."""
        ...

    def shared(self, model: nn.Module, loss: Loss) -> Loss:
        """``loss``, such that ``backward`` leaves the mean of all workers' gradients in ``model``."""
        ...

    def gathering(self, *, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of one pass: gradients are exchanged in the ``last`` one of a step."""
        ...

    def average(self, values: Tensor) -> Tensor:
        """The mean of ``values`` over all workers."""
        ...

    def any(self, flag: bool) -> bool:
        """Whether the flag of any worker is set."""
        ...

    def rank_zero_first(
        self, first: Callable[[], tuple[ResultT, int]], others: Callable[[int], ResultT]
    ) -> ResultT:
        """The first worker does ``first`` before all others do theirs with the number that it gave.

        If it fails there, the others do not begin.
        """
        ...

    def stopping(self) -> AbstractContextManager[Stop]:
        """Inside, a wish to stop is taken note of."""
        ...


class SingleProcess:
    """One worker, in the process of the command.

    Args:
        workers: more for a preview of the first one of so many.
        on_this_node: how many of them share this machine.
    """

    rank = 0

    def __init__(self, workers: int = 1, on_this_node: int = 1) -> None:
        self.workers, self.on_this_node = workers, on_this_node

    def shared(self, model: nn.Module, loss: Loss) -> Loss:
        return loss

    def gathering(self, *, last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def average(self, values: Tensor) -> Tensor:
        return values

    def any(self, flag: bool) -> bool:
        return flag

    def rank_zero_first(
        self, first: Callable[[], tuple[ResultT, int]], others: Callable[[int], ResultT]
    ) -> ResultT:
        return first()[0]

    def stopping(self) -> AbstractContextManager[Stop]:
        """SIGTERM is such a wish."""
        return stop_on_sigterm()


# ----------------------------------------------------------------------------------------------------
# Several workers in a torch process group: DDP averages their gradients while the backward pass runs.
# ----------------------------------------------------------------------------------------------------


_FAILED = -(2**62)


class Distributed:
    """One worker of the process group that is there; see ``ProcessGroup``. Flags travel by gloo, tensors as they lie.

    Args:
        stopping: where wishes to stop come from; a process that Ray made gets no signals itself.
        on_this_node: how many workers share this machine's memory.
    """

    def __init__(self, stopping: Callable[[], AbstractContextManager[Stop]], on_this_node: int) -> None:
        self.workers, self.rank, self.on_this_node = dist.get_world_size(), dist.get_rank(), on_this_node
        self.stopping = stopping
        self._ddp: DistributedDataParallel | None = None

    def shared(self, model: nn.Module, loss: Loss) -> Loss:
        """The weights of the first worker replace those of the others."""
        self._ddp = DistributedDataParallel(_LossOf(model, loss))
        return self._ddp

    def gathering(self, *, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last or self._ddp is None else self._ddp.no_sync()

    def average(self, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)  # gloo has no mean
        return total / self.workers

    def any(self, flag: bool) -> bool:
        """Costs a round trip and no wait for a GPU."""
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def rank_zero_first(
        self, first: Callable[[], tuple[ResultT, int]], others: Callable[[int], ResultT]
    ) -> ResultT:
        """The first worker goes ahead, the others follow once it has succeeded.

        Raises:
            OtherWorkerFailedError: on the others, when the first one failed.
        """
        told = torch.tensor(_FAILED)
        if self.rank > 0:
            dist.broadcast(told, src=0)
            if told == _FAILED:
                raise OtherWorkerFailedError("the first worker could not begin")
            return others(int(told))
        try:
            result, number = first()
            told = torch.tensor(number)
        finally:
            dist.broadcast(told, src=0)
        return result


class _LossOf(nn.Module):
    """DDP wants a module whose forward pass gives the loss."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, batch: Any, part: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        return self._loss(batch, part)
