"""Futures sampled from a world model, scored without ever holding all of them decoded.

Shapes: B clips, S samples, H longest horizon, K horizons that are scored, F true futures, N patches,
D hidden, C context.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deltacache.evaluate.inputs import Tokenizer, World
from deltacache.evaluate.metrics import SampleSums, check_finite, feature_metrics, token_distance
from deltacache.evaluate.predictions import AboutSequence, RolloutProtocol, feature_statistics
from deltacache.evaluate.statistics import Series, Statistic
from deltacache.models.futures import decode_future, sequence_generator

# Decoded futures are held in chunks of samples below this many numbers (256 MiB in float32).
_CHUNK_NUMBERS = 2**26


@dataclass(frozen=True)
class Futures:
    """Sampled futures of one sequence.

    Attributes:
        count: S.
        frames: patch tokens (s, H, N, D) of some of them.
        numbers: that are held at once for each of them.
        deltas: (S, H, ...) delta tokens that they are decoded from; ``None`` where patch tokens are predicted.
    """

    count: int
    frames: Callable[[slice], Tensor]
    numbers: int
    deltas: Tensor | None = None

    def chunks(self) -> Iterator[Tensor]:
        """The patch tokens of all of them, as many at a time as are held."""
        most = max(1, _CHUNK_NUMBERS // self.numbers)
        for start in range(0, self.count, most):
            yield self.frames(slice(start, min(start + most, self.count)))


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


def delta_tokens(tokenizer: Tokenizer, clip: Tensor, protocol: RolloutProtocol) -> Tensor:
    """(T, ...) of a clip (T, N, D), those of the context apart from what comes after it.

    A product's last bits depend on how many rows it has. So those of the context, and the futures that follow from
    them, are the same however far the clip goes on and whatever else is evaluated with it.
    """
    model, seen = tokenizer.model, clip[: protocol.context]
    deltas = model.encode_clip(seen[None], protocol.black, protocol.grid)[0]
    if len(clip) == len(seen):
        return deltas
    return torch.cat([deltas, model.encode(clip[len(seen) - 1 : -1], clip[len(seen) :], protocol.grid)])


def roll_out(
    world: World,
    context: Tensor,
    seconds: Tensor,
    deltas: Tensor | None,
    clip_id: str,
    protocol: RolloutProtocol,
) -> Futures:
    """Futures sampled for one sequence, which depend on it, the models and the protocol alone.

    Args:
        context: (C, N, D) patch tokens.
        seconds: (C+H,) float32 since the first frame, of all frames that are seen and predicted.
        deltas: (C, ...) delta tokens of the context, of the world model's tokenizer.
    """
    model, grid, tokenizer = world.model, protocol.grid, world.tokenizer
    noise = None
    if model.stochastic:
        shape = (world.samples, protocol.horizons[-1], model.noise_width(grid))
        noise = model.draw_noise(shape, sequence_generator(protocol.seed, clip_id)).to(context.device)
    if tokenizer is None:

        def predicted(part: slice) -> Tensor:
            """Patch tokens, predicted when they are asked for: those of all samples would be too many."""
            some = None if noise is None else noise[None, part]
            return model.rollout(context[None], seconds[None], some, grid=grid)[0]

        return Futures(world.samples, predicted, world.numbers_of_patches(context, protocol.horizons[-1]))
    assert deltas is not None  # there is a tokenizer
    noises = None if noise is None else noise[None]
    sampled = model.rollout(deltas[None], seconds[None], noises, grid=grid)[0]

    def decoded(part: slice) -> Tensor:
        return decode_future(tokenizer.model, context[None, -1], sampled[None, part], grid)[0]

    return Futures(world.samples, decoded, context[0].numel() * protocol.horizons[-1], sampled)


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
    for decoded in sampled.chunks():
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


def sample_statistics(world: World, scored: ScoredSamples, about: AboutSequence) -> Iterator[Statistic]:
    """Best and mean of the first 1, 2, 5, ... samples and of all, and what the samples are together at each horizon.

    Best at a horizon is the sample with the lowest smooth-L1 there, whatever its other metrics. A single prediction
    is neither best nor mean. What fewer than all samples give is what fewer ``--samples`` would have given.
    """
    if world.single:
        yield from feature_statistics(world.method, "single", 1, about, scored.metrics[0])
        return
    for count, mean in scored.means.items():
        best = best_samples(scored.metrics[:count])
        yield from feature_statistics(world.method, "best", count, about, best)
        yield from feature_statistics(world.method, "mean", count, about, mean)
    if scored.totals is None:
        return
    for horizon, seconds, totals in zip(about.horizons, about.seconds, scored.totals, strict=True):
        series = Series(about.dataset, "samples", world.method, "single", horizon, world.samples)
        yield Statistic(series, about.sequence_id, about.video, seconds, totals)


def best_samples(metrics: Tensor) -> Tensor:
    """From (S, K, 3) metrics those (K, 3) of the sample that is best at each horizon."""
    winners = metrics[:, :, 0].argmin(0)
    return metrics[winners, torch.arange(metrics.shape[1])]
