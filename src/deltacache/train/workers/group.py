"""The workers that train one model together, as the loop sees them."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from deltacache.train.order import Part
from deltacache.train.stopping import Stop, stop_on_sigterm

ResultT = TypeVar("ResultT")
Loss = Callable[[Any, Part], tuple[Tensor, dict[str, Tensor]]]
"""A task's ``training_loss``: of a batch and its part."""


class OtherWorkerFailedError(RuntimeError):
    """Another worker has said why; this one only ends."""


class Group(Protocol):
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

    def first_alone(
        self, first: Callable[[], tuple[ResultT, int]], others: Callable[[int], ResultT]
    ) -> ResultT:
        """The first worker does ``first`` before all others do theirs with the number that it gave.

        If it fails there, the others do not begin.
        """
        ...

    def stopping(self) -> AbstractContextManager[Stop]:
        """Inside, a wish to stop is taken note of."""
        ...


class Alone:
    """One worker, in the process of the command.

    Args:
        workers: more for a preview of the first one of so many.
        on_this_node: how many of them share this machine.
    """

    rank = 0

    def __init__(self, workers: int = 1, on_this_node: int = 1) -> None:
        self.workers, self.on_this_node = workers, on_this_node

    def shared(self, model: nn.Module, loss: Loss) -> Loss:
        """See ``Group``."""
        return loss

    def gathering(self, *, last: bool) -> AbstractContextManager[None]:
        """See ``Group``."""
        return nullcontext()

    def average(self, values: Tensor) -> Tensor:
        """See ``Group``."""
        return values

    def any(self, flag: bool) -> bool:
        """See ``Group``."""
        return flag

    def first_alone(
        self, first: Callable[[], tuple[ResultT, int]], others: Callable[[int], ResultT]
    ) -> ResultT:
        """See ``Group``."""
        return first()[0]

    def stopping(self) -> AbstractContextManager[Stop]:
        """SIGTERM is such a wish."""
        return stop_on_sigterm()
