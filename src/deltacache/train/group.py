"""The workers that train one model together, as the loop sees them."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn


class Group(Protocol):
    """The seam for several workers: the loop, the order and the draws know no more of them than this."""

    @property
    def workers(self) -> int:
        """How many there are."""
        ...

    @property
    def rank(self) -> int:
        """Which one this is, from 0."""
        ...

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace each worker's gradients by the mean over all workers."""
        ...

    def average(self, values: Tensor) -> Tensor:
        """The mean of ``values`` over all workers."""
        ...


class Alone:
    """One worker: nothing to average."""

    workers = 1
    rank = 0

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """See ``Group``."""

    def average(self, values: Tensor) -> Tensor:
        """See ``Group``."""
        return values
