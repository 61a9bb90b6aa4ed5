"""Futures sampled from a world model, judged without ever holding all of them decoded.

Shapes: B clips, S samples, H longest horizon, K horizons that are scored, F true futures, N patches,
D hidden, C context.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deltacache.evaluate.clips.sequences import CachedSequences
from deltacache.evaluate.inputs import World
from deltacache.evaluate.metrics import SampleSums, check_finite, feature_metrics, token_distance
from deltacache.evaluate.predictions import AboutSequence, RolloutProtocol, feature_statistics
from deltacache.evaluate.statistics import Series, Statistic
from deltacache.models.futures import decode_future

# Decoded futures are held in chunks of samples below this many numbers (256 MiB in float32).
_CHUNK_NUMBERS = 2**26


@dataclass(frozen=True)
class Futures:
    """Sampled futures of one sequence.

    Attributes:
        count: S.
        frames: patch tokens (s, H, N, D) of some of them.
        numbers: that are held at once for each of them.
    """

    count: int
    frames: Callable[[slice], Tensor]
    numbers: int


@dataclass(frozen=True)
class ScoredSamples:
    """What is left of one sequence's samples once they were decoded and compared.

    Attributes:
        metrics: (S, K, 3) of every sample, float64.
        distances: (S, K, F) float64 to every true future, or ``None``.
        kept: (s, H, N, D) float16, the first samples, for pictures.
        mean: (K, N, D) float16, the averaged features.
        means: (K, 3) metrics of the mean of the first n samples, by n.
        totals: (K, 4 + S + 1) sums of what the samples are together, see ``pooled``; none of a single sample.
    """

    metrics: Tensor
    distances: np.ndarray | None
    kept: np.ndarray
    mean: np.ndarray
    means: Mapping[int, Tensor]
    totals: np.ndarray | None


def sequence_generator(seed: int, clip_id: str) -> torch.Generator:
    """Random numbers that depend on the seed and the clip alone, never on the batch or the order."""
    digest = hashlib.sha256(f"rollout {seed} {clip_id}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def roll_out(
    world: World, batch: CachedSequences, deltas: Mapping[str, Tensor], protocol: RolloutProtocol
) -> list[Futures]:
    """Futures sampled for every sequence of ``batch``.

    Args:
        deltas: (U, T, ...) delta tokens of its clips, by the tokenizer's fingerprint.
    """
    clips, model, grid = len(batch.rows), world.model, protocol.grid
    noise = None
    if model.stochastic:
        shape = (world.samples, protocol.horizons[-1], model.noise_size)
        drawn = [
            model.draw_noise(shape, sequence_generator(protocol.seed, clip_id)) for clip_id in batch.clip_ids
        ]
        noise = torch.stack(drawn).to(batch.own.device)
    seconds = batch.seconds[:, : protocol.frames]
    tokenizer = world.tokenizer
    if tokenizer is None:
        return [
            _of_patches(world, batch.own[row, : protocol.context], seconds[row], noise, row, protocol)
            for row in range(clips)
        ]
    context = deltas[tokenizer.fingerprint][:clips, : protocol.context]
    sampled = model.rollout(context, seconds, noise, grid=grid)

    def decoded(row: int) -> Callable[[slice], Tensor]:
        last = batch.own[row, None, protocol.context - 1]
        return lambda part: decode_future(tokenizer.model, last, sampled[row, None, part], grid)[0]

    numbers = batch.own[0, 0].numel() * protocol.horizons[-1]
    return [Futures(world.samples, decoded(row), numbers) for row in range(clips)]


def _of_patches(
    world: World, context: Tensor, seconds: Tensor, noise: Tensor | None, row: int, protocol: RolloutProtocol
) -> Futures:
    """Futures of a model of patch tokens, predicted when they are asked for: all at once would be too many."""

    def frames(part: slice) -> Tensor:
        some = None if noise is None else noise[row, None, part]
        return world.model.rollout(context[None], seconds[None], some, grid=protocol.grid)[0]

    return Futures(world.samples, frames, world.numbers_of_patches(context, protocol.horizons[-1]))


def score_samples(
    world: World,
    sampled: Futures,
    clip: Tensor,
    about: AboutSequence,
    protocol: RolloutProtocol,
    futures: Tensor | None = None,
    keep: int = 0,
) -> ScoredSamples:
    """Compare one sequence's sampled futures with the truth, some samples at a time.

    Args:
        clip: (T, N, D) the sequence's true frames.
        futures: (F, K, N, D) all true futures of its scene.
        keep: how many samples to keep.

    Raises:
        NotFiniteError: a sample is not finite.
    """
    truth = clip[protocol.targets]
    metrics, distances, kept = [], [], []
    sums = SampleSums(truth, sampled.count)
    most = max(1, _CHUNK_NUMBERS // sampled.numbers)
    for start in range(0, sampled.count, most):
        decoded = sampled.frames(slice(start, min(start + most, sampled.count)))
        scored = decoded[:, [horizon - 1 for horizon in protocol.horizons]]
        metrics.append(feature_metrics(scored, truth).cpu())
        for at, horizon in enumerate(protocol.horizons):
            check_finite(metrics[-1][:, at], world.method.name, about.sequence_id, horizon)
        sums.add(scored)
        if futures is not None:
            distances.append(torch.stack([token_distance(scored, each) for each in futures], -1).cpu())
        kept.append(decoded[: max(0, keep - sum(map(len, kept)))].half().cpu())
    return ScoredSamples(
        metrics=torch.cat(metrics),
        distances=torch.cat(distances).numpy() if distances else None,
        kept=torch.cat(kept).numpy(),
        mean=sums.mean.half().cpu().numpy(),
        means=sums.means,
        totals=sums.totals().numpy() if sampled.count > 1 else None,
    )


def sample_statistics(world: World, judged: ScoredSamples, about: AboutSequence) -> Iterator[Statistic]:
    """Best and mean of the first 1, 2, 5, ... samples and of all, and what the samples are together at each horizon.

    Best at a horizon is the sample with the lowest smooth-L1 there, whatever its other metrics. A single prediction
    is neither best nor mean. What fewer than all samples give is what fewer ``--samples`` would have given.
    """
    if world.single:
        yield from feature_statistics(world.method, "single", 1, about, judged.metrics[0])
        return
    for count, mean in judged.means.items():
        best = best_samples(judged.metrics[:count])
        yield from feature_statistics(world.method, "best", count, about, best)
        yield from feature_statistics(world.method, "mean", count, about, mean)
    if judged.totals is None:
        return
    for horizon, seconds, totals in zip(about.horizons, about.seconds, judged.totals, strict=True):
        series = Series(about.dataset, "samples", world.method, "single", horizon, world.samples)
        yield Statistic(series, about.sequence_id, about.video, seconds, totals)


def best_samples(metrics: Tensor) -> Tensor:
    """From (S, K, 3) metrics those (K, 3) of the sample that is best at each horizon."""
    winners = metrics[:, :, 0].argmin(0)
    return metrics[winners, torch.arange(metrics.shape[1])]
