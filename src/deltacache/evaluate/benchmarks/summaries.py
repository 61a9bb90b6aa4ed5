"""Predictions of a target, and how several samples of it become one.

Shapes: X crops of a batch, S samples, N patches, D hidden.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from deltacache.evaluate.benchmarks.ensembles import Ensemble
from deltacache.evaluate.rows import Aggregation, Method
from deltacache.evaluate.sample_sums import sample_counts


@dataclass(frozen=True, slots=True)
class Summary:
    """Who predicted, and how ``samples`` futures became one prediction."""

    method: Method
    aggregation: Aggregation
    samples: int


@dataclass(frozen=True, repr=False)
class Prediction:
    """The last frame of every crop as one method predicts it: ``tokens`` (X, N, D)."""

    method: Method
    tokens: Tensor

    @property
    def summary(self) -> Summary:
        """A single prediction is neither best nor mean."""
        return Summary(self.method, "single", 1)


Identity = tuple[str, int]


@dataclass(frozen=True, slots=True, repr=False)
class Future:
    """One future (N, D) of a crop. Those of the same ``identity`` are the same: a sample, or a mean of the first."""

    identity: Identity
    tokens: Tensor


@dataclass(frozen=True)
class Futures:
    """Samples of one method.

    Attributes:
        single: there is but one of each, so it is neither best nor mean.
        of_crop: patch tokens (S, N, D) of the target, for a sequence of the batch and one of its crops.
    """

    method: Method
    samples: int
    single: bool
    of_crop: Callable[[int, int], Tensor]


def summaries(ensemble: Ensemble, futures: Futures) -> Iterator[tuple[Summary, Future]]:
    """Best and mean (N, D) of the first 1, 2, 5, ... samples and of all; the one future of a single sample."""
    samples = ensemble.samples
    if futures.single:
        yield Summary(futures.method, "single", 1), Future(("sample", 0), samples[0])
        return
    for count in sample_counts(len(samples)):
        first = ensemble.first(count)
        best = Future(("sample", first.best), samples[first.best])
        mean = Future(("mean", count), first.mean) if count > 1 else Future(("sample", 0), samples[0])
        yield Summary(futures.method, "best", count), best
        yield Summary(futures.method, "mean", count), mean
