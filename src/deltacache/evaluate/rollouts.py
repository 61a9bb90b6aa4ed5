"""Futures sampled from a world model, judged without ever holding all of them decoded.

Shapes: B clips, S samples, H longest horizon, K horizons that are scored, F true futures, N patches,
D hidden, C context.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deltacache.evaluate.benchmarks.statistics import Statistic, StatisticSeries
from deltacache.evaluate.inputs import Tokenizer, World
from deltacache.evaluate.metrics import feature_metrics, token_distance
from deltacache.evaluate.predictions import Protocol, feature_scores, horizon_seconds
from deltacache.evaluate.rows import Score
from deltacache.evaluate.sample_sums import SampleSums
from deltacache.evaluate.sequences import ClipBatch
from deltacache.models.futures import decode_future

# Decoded futures are held in chunks of samples below this many numbers (256 MiB in float32).
_CHUNK_NUMBERS = 2**26


@dataclass(frozen=True)
class JudgedSamples:
    """What is left of one sequence's samples once they were decoded and compared.

    Attributes:
        metrics: (S, K, 3) of every sample, float64.
        mean_metrics: (K, 3) of the features averaged over the samples, float64.
        distances: (S, K, F) float64 to every true future, or ``None``.
        kept: (s, H, N, D) float16, the first samples, for pictures.
        mean: (K, N, D) float16, the averaged features.
        means: (K, 3) metrics of the mean of the first n samples, by n.
        totals: (K, 4 + S + 1) sums of what the samples are together, see ``pooled``; none of a single sample.
    """

    metrics: np.ndarray
    mean_metrics: np.ndarray
    distances: np.ndarray | None
    kept: np.ndarray
    mean: np.ndarray
    means: Mapping[int, np.ndarray]
    totals: np.ndarray | None


def sequence_generator(seed: int, clip_id: str) -> torch.Generator:
    """Random numbers that depend on the seed and the clip alone, never on the batch or the order."""
    digest = hashlib.sha256(f"rollout {seed} {clip_id}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def roll_out(world: World, batch: ClipBatch, deltas: Tensor, protocol: Protocol) -> Tensor:
    """Delta tokens (B, S, H, D) of sampled futures, after the context's part of ``deltas`` (U, T, D)."""
    clips, width = len(batch.rows), deltas.shape[-1]
    noise = None
    if world.model.q_embed is None:
        shape = (world.samples, protocol.horizons[-1], width)
        drawn = [
            world.model.draw_noise(shape, sequence_generator(protocol.seed, clip_id))
            for clip_id in batch.clip_ids
        ]
        noise = torch.stack(drawn).to(deltas.device)
    context = deltas[:clips, : protocol.context]
    return world.model.rollout(context, batch.seconds[:, : protocol.frames], noise)


def judge_samples(
    tokenizer: Tokenizer,
    clip: Tensor,
    deltas: Tensor,
    protocol: Protocol,
    futures: Tensor | None = None,
    keep: int = 0,
) -> JudgedSamples:
    """Decode one sequence's sampled futures and compare them with the truth.

    Args:
        clip: (T, N, D) the sequence's true frames.
        deltas: (S, H, D) its sampled futures.
        futures: (F, K, N, D) all true futures of its scene.
        keep: how many samples to keep.
    """
    truth = clip[protocol.targets]
    metrics, distances, kept = [], [], []
    sums = SampleSums(truth, len(deltas))
    for chunk in deltas.split(max(1, _CHUNK_NUMBERS // (clip[0].numel() * deltas.shape[1]))):
        decoded = decode_future(
            tokenizer.model, clip[None, protocol.context - 1], chunk[None], protocol.grid
        )[0]
        scored = decoded[:, [horizon - 1 for horizon in protocol.horizons]]
        metrics.append(feature_metrics(scored, truth).cpu())
        sums.add(scored)
        if futures is not None:
            distances.append(torch.stack([token_distance(scored, each) for each in futures], -1).cpu())
        kept.append(decoded[: max(0, keep - sum(map(len, kept)))].half().cpu())
    return JudgedSamples(
        metrics=torch.cat(metrics).numpy(),
        mean_metrics=sums.means[len(deltas)].numpy(),
        distances=torch.cat(distances).numpy() if distances else None,
        kept=torch.cat(kept).numpy(),
        mean=sums.mean.half().cpu().numpy(),
        means={count: each.numpy() for count, each in sums.means.items()},
        totals=sums.totals().numpy() if len(deltas) > 1 else None,
    )


def score_samples(
    world: World, judged: JudgedSamples, clip_id: str, seconds: Tensor, protocol: Protocol
) -> Iterator[Score]:
    """Best and mean of a world model's samples; a single prediction is neither.

    Best at a horizon is the sample with the lowest smooth-L1 there, whatever its other metrics.
    """
    times = horizon_seconds(seconds, protocol)
    best = best_samples(judged.metrics)
    if world.model.q_embed is not None:
        yield from feature_scores(world.method, "single", 1, clip_id, times, best, protocol)
        return
    count = world.samples
    yield from feature_scores(world.method, "best", count, clip_id, times, best, protocol)
    mean = judged.mean_metrics.tolist()
    yield from feature_scores(world.method, "mean", count, clip_id, times, mean, protocol)


def score_first_samples(
    world: World, judged: JudgedSamples, clip_id: str, seconds: Tensor, protocol: Protocol
) -> Iterator[Score]:
    """Best and mean of the first 1, 2, 5, ... samples: what fewer ``--samples`` would have given."""
    if world.model.q_embed is not None:
        return
    times = horizon_seconds(seconds, protocol)
    for count, mean in judged.means.items():
        best = best_samples(judged.metrics[:count])
        yield from feature_scores(world.method, "best", count, clip_id, times, best, protocol)
        yield from feature_scores(world.method, "mean", count, clip_id, times, mean.tolist(), protocol)


def ensemble_statistics(
    world: World, judged: JudgedSamples, clip_id: str, seconds: Tensor, protocol: Protocol, dataset: str
) -> Iterator[Statistic]:
    """What the samples are together at each horizon: spread, error of their mean, ranks of the truth."""
    if judged.totals is None:
        return
    times = horizon_seconds(seconds, protocol)
    for horizon, horizon_s, totals in zip(protocol.horizons, times, judged.totals, strict=True):
        series = StatisticSeries(dataset, "samples", world.method, "single", horizon, world.samples)
        yield Statistic(series, clip_id, clip_id, horizon_s, totals)


def best_samples(metrics: np.ndarray) -> list[list[float]]:
    """From (S, K, 3) metrics those (K, 3) of the sample that is best at each horizon."""
    winners = metrics[:, :, 0].argmin(0)
    return metrics[winners, np.arange(metrics.shape[1])].tolist()
