"""Several workers in a torch process group: DDP averages their gradients while the backward pass runs."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from deltacache.train.order import Part
from deltacache.train.stopping import Stop
from deltacache.train.workers.group import Loss, OtherWorkerFailedError

ResultT = TypeVar("ResultT")
_FAILED = -(2**62)


class Distributed:
    """One worker of the process group that is there; see ``Group``. Flags travel by gloo, tensors as they lie.

    Args:
        stopping: where wishes to stop come from; a process that Ray made gets no signals itself.
        on_this_node: how many workers share this machine's memory.
    """

    def __init__(self, stopping: Callable[[], AbstractContextManager[Stop]], on_this_node: int) -> None:
        self.workers, self.rank, self.on_this_node = dist.get_world_size(), dist.get_rank(), on_this_node
        self.stopping = stopping
        self._ddp: DistributedDataParallel | None = None

    def shared(self, model: nn.Module, loss: Loss) -> Loss:
        """See ``Group``. The weights of the first worker replace those of the others."""
        self._ddp = DistributedDataParallel(_LossOf(model, loss))
        return self._ddp

    def gathering(self, *, last: bool) -> AbstractContextManager[Any]:
        """See ``Group``."""
        return nullcontext() if last or self._ddp is None else self._ddp.no_sync()

    def average(self, values: Tensor) -> Tensor:
        """See ``Group``."""
        total = values.clone()
        dist.all_reduce(total)  # gloo has no mean
        return total / self.workers

    def any(self, flag: bool) -> bool:
        """See ``Group``. Costs a round trip and no wait for a GPU."""
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def first_alone(
        self, first: Callable[[], tuple[ResultT, int]], others: Callable[[int], ResultT]
    ) -> ResultT:
        """See ``Group``.

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

    def forward(self, batch: Any, part: Part) -> tuple[Tensor, dict[str, Tensor]]:
        return self._loss(batch, part)
