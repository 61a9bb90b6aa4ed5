"""What the samples of one sequence are together, collected a few samples at a time.

Shapes: S samples, s of them that come at a time, K horizons that are scored, N patches, D hidden.
"""

import torch
from torch import Tensor

from deltacache.evaluate.metrics import feature_metrics

ENERGY_NUMBERS = 2**26
"""Kept of a sequence for distances between its samples: 256 MiB in float32."""
_ENERGY_PART = 2**22  # of these in float64 at a time: 32 MiB


def sample_counts(samples: int) -> tuple[int, ...]:
    """Numbers of samples for which best and mean are given: 1, 2, 5, 10, 20, 50, ... up to ``samples``."""
    counts, scale = {samples}, 1
    while scale <= samples:
        counts |= {count for count in (scale, 2 * scale, 5 * scale) if count <= samples}
        scale *= 10
    return tuple(sorted(counts))


class SampleSums:
    """Collects samples of one sequence, of ``count`` that will come, and compares them with the truth (K, N, D).

    Args:
        hold: keep the samples for the energy score however many they are: they are in memory anyway.
    """

    def __init__(self, truth: Tensor, count: int, *, hold: bool = False) -> None:
        self._truth, self._count, self._seen = truth, count, 0
        self._total = torch.zeros_like(truth)
        self._offsets = torch.zeros_like(truth, dtype=torch.float64)
        self._squares = torch.zeros_like(truth, dtype=torch.float64)
        self._below = torch.zeros_like(truth, dtype=torch.int32)
        self._kept: list[Tensor] | None = [] if hold or truth.numel() * count <= ENERGY_NUMBERS else None
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
        """Sums of ``pooled``'s task ``samples`` for each horizon, (K, 4 + S + 1) float64, of two or more samples.

        Energy score (Gneiting & Raftery 2007) in its unbiased form, distances being root mean squares over patches
        and hidden; the variance that an ensemble like this one would have to have for the spread to equal the error of
        its mean (Fortin et al. 2014), and that error squared; the rank of each true number among the samples'. The
        energy score is NaN, and so left out, where the samples are too many to be held together.
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
        samples = torch.cat(self._kept)
        return torch.stack([energy_score(samples[:, at], truth) for at, truth in enumerate(self._truth)])


def energy_score(samples: Tensor, truth: Tensor) -> Tensor:
    """Mean distance of samples (S, ...) to the truth (...) less half their mean distance to each other, unbiased.

    In float64 throughout: sums of many numbers in float32 are off in the fourth digit.
    """
    count = len(samples)
    squares = torch.zeros(count + 1, count + 1, dtype=torch.float64, device=samples.device)
    together = torch.cat([samples, truth[None]]).flatten(1)
    for part in together.split(max(1, _ENERGY_PART // (count + 1)), dim=1):
        numbers = part.double()
        squares += torch.cdist(numbers, numbers, compute_mode="donot_use_mm_for_euclid_dist").square()
    distances = squares.sqrt()
    between = distances[:count, :count].sum()
    return distances[count, :count].mean() - between / (2 * count * (count - 1))
