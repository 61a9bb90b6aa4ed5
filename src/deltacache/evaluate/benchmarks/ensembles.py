"""Sampled futures of one crop, judged at the one step that is scored.

Shapes: S samples, H horizon, N patches, D hidden.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from deltacache.evaluate.metrics import feature_metrics
from deltacache.models.deltatok import DeltaTok, Grid
from deltacache.models.futures import decode_steps

_CHUNK_NUMBERS = 2**26  # of patch tokens decoded at a time: 256 MiB in float32


@dataclass(frozen=True, repr=False)
class Ensemble:
    """The last step of every sample.

    Attributes:
        samples: (S, N, D).
        metrics: (S, 3) of ``feature_metrics``.
    """

    samples: Tensor
    metrics: Tensor

    @property
    def best(self) -> int:
        """The sample with the lowest smooth-L1 to the truth."""
        return int(self.metrics[:, 0].argmin())

    def first(self, count: int) -> "Ensemble":
        """The first samples alone."""
        return Ensemble(self.samples[:count], self.metrics[:count])

    @property
    def mean(self) -> Tensor:
        """(N, D) features averaged over the samples."""
        return self.samples.mean(0)


def decode_last(model: DeltaTok, last: Tensor, deltas: Tensor, grid: Grid) -> Tensor:
    """The last frames (S, N, D) of futures (S, H, D) after the frame (N, D), some samples at a time."""
    frames = []
    for chunk in deltas.split(max(1, _CHUNK_NUMBERS // last.numel())):
        *_, decoded = decode_steps(model, last[None], chunk[None], grid)
        frames.append(decoded[0])
    return torch.cat(frames)


def judge(samples: Tensor, truth: Tensor) -> Ensemble:
    """Compare samples (S, N, D) with the true frame (N, D)."""
    return Ensemble(samples, feature_metrics(samples, truth))
