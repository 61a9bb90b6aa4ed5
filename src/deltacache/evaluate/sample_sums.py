"""What the samples of one sequence are together, collected a few samples at a time.

Shapes: S samples, s of them that come at a time, K horizons that are scored, N patches, D hidden.
"""

import torch
from torch import Tensor

from deltacache.evaluate.metrics import feature_metrics, token_distance

_ENERGY_NUMBERS = 2**26  # kept for distances between samples: 256 MiB in float32


def sample_counts(samples: int) -> tuple[int, ...]:
    """Numbers of samples for which best and mean are told: 1, 2, 5, 10, 20, 50, ... up to ``samples``."""
    counts, scale = {samples}, 1
    while scale <= samples:
        counts |= {count for count in (scale, 2 * scale, 5 * scale) if count <= samples}
        scale *= 10
    return tuple(sorted(counts))


class SampleSums:
    """Collects samples of one sequence, of ``count`` that will come, and compares them with the truth (K, N, D)."""

    def __init__(self, truth: Tensor, count: int) -> None:
        self._truth, self._count, self._seen = truth, count, 0
        self._total = torch.zeros_like(truth)
        self._offsets = torch.zeros_like(truth, dtype=torch.float64)
        self._squares = torch.zeros_like(truth, dtype=torch.float64)
        self._below = torch.zeros_like(truth, dtype=torch.int32)
        self._kept: list[Tensor] | None = [] if truth.numel() * count <= _ENERGY_NUMBERS else None
        self.means: dict[int, Tensor] = {}
        """(K, 3) metrics of the mean of the first n samples, by n."""

    def add(self, samples: Tensor) -> None:
        """Take the next samples (s, K, N, D)."""
        offsets = (samples - self._truth).double()
        self._offsets += offsets.sum(0)
        self._squares += offsets.square().sum(0)
        self._below += (samples < self._truth).sum(0, dtype=torch.int32)
        if self._kept is not None:
            self._kept.append(samples)
        counts = sample_counts(self._count)
        for sample in samples:
            self._total += sample
            self._seen += 1
            if self._seen in counts:
                self.means[self._seen] = feature_metrics(self._total / self._seen, self._truth).cpu()

    @property
    def mean(self) -> Tensor:
        """(K, N, D) features averaged over the samples."""
        return self._total / self._seen

    def totals(self) -> Tensor:
        """Sums of ``pooled``'s task ``samples`` for each horizon, (K, 4 + S + 1) float64; see ``sample_totals``.

        The energy score is NaN, and so left out, where the samples are too many to be held together.
        """
        count, numbers = self._seen, self._truth[0].numel()
        squared = (self._offsets / count).square().mean((1, 2))
        variance = (self._squares - self._offsets.square() / count).mean((1, 2)) / (count - 1)
        ranks = torch.stack(
            [torch.bincount(each.flatten(), minlength=count + 1) for each in self._below]
        ).double()
        energy = self._energy() / numbers**0.5
        sums = torch.stack([torch.ones_like(energy), energy, variance * (count + 1) / count, squared], 1)
        return torch.cat([sums, ranks], 1).cpu()

    def _energy(self) -> Tensor:
        """(K,) of ``numbers ** 0.5`` times the unbiased energy score."""
        if self._kept is None:
            return self._offsets.new_full((len(self._truth),), torch.nan)
        samples, scores = torch.cat(self._kept), []
        count = len(samples)
        for at, truth in enumerate(self._truth):
            flat = samples[:, at].flatten(1)
            between = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist").double().sum()
            to_truth = token_distance(samples[:, at], truth).mean()
            scores.append(to_truth - between / (2 * count * (count - 1)))
        return torch.stack(scores)
