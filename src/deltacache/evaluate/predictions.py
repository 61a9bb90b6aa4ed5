"""Predictions without sampling: the bounds and the tokenizer's reconstructions.

Shapes: B clips, T frames, K horizons that are scored, N patches, D hidden.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from deltacache.evaluate.clips.sequences import ClipBatch
from deltacache.evaluate.inputs import Tokenizer
from deltacache.evaluate.metrics import FEATURE_METRICS, feature_metrics
from deltacache.evaluate.rows import Aggregation, Method, Score, Series
from deltacache.models.deltatok import Grid


@dataclass(frozen=True)
class Protocol:
    """How every sequence is used. ``black`` (N, D): patch tokens of the frame before the first."""

    context: int
    horizons: tuple[int, ...]
    seed: int
    grid: Grid
    black: Tensor

    @property
    def frames(self) -> int:
        """Frames of a sequence that are used."""
        return self.context + self.horizons[-1]

    @property
    def targets(self) -> list[int]:
        """Index of the true frame of each horizon."""
        return [self.context + horizon - 1 for horizon in self.horizons]


def bounds(batch: ClipBatch, protocol: Protocol) -> Iterator[tuple[Method, Tensor]]:
    """Yield what needs no model: the last context frame repeated, and the truth, as (B, K, N, D)."""
    last = batch.own[:, protocol.context - 1, None].expand(-1, len(protocol.horizons), -1, -1)
    yield Method("copy_last"), last
    yield Method("present"), batch.own[:, protocol.targets]


def reconstructions(
    tokenizer: Tokenizer, batch: ClipBatch, deltas: Tensor, protocol: Protocol
) -> Iterator[tuple[Method, Tensor]]:
    """Yield what the tokenizer makes of true frames, as (B, K, N, D).

    Args:
        deltas: (U, T, D) delta tokens of all clips of the batch, from true pairs of frames.
    """
    clips = len(batch.rows)
    steps = [horizon - 1 for horizon in protocol.horizons]
    closed = tokenizer.model.reconstruct_closed_loop(
        batch.own, protocol.black, protocol.grid, protocol.horizons[-1]
    )
    yield tokenizer.method("deltatok"), closed[:, steps]
    yield tokenizer.method("deltatok_parallel"), _decode_true(tokenizer, batch, deltas[:clips], protocol)
    if batch.partners is not None:
        swapped = _decode_true(tokenizer, batch, deltas[batch.partners], protocol)
        yield tokenizer.method("deltatok_swapped"), swapped


def _decode_true(tokenizer: Tokenizer, batch: ClipBatch, deltas: Tensor, protocol: Protocol) -> Tensor:
    """Decode each target's delta token (B, T, D) from the true frame before the target."""
    frames = [
        tokenizer.model.decode(deltas[:, target], batch.own[:, target - 1], protocol.grid)
        for target in protocol.targets
    ]
    return torch.stack(frames, 1)


def score_predictions(
    method: Method, predictions: Tensor, batch: ClipBatch, protocol: Protocol
) -> Iterator[Score]:
    """Compare single predictions (B, K, N, D) with the true frames."""
    values = feature_metrics(predictions, batch.own[:, protocol.targets]).tolist()
    for row, clip_id in enumerate(batch.clip_ids):
        seconds = horizon_seconds(batch.seconds[row], protocol)
        yield from feature_scores(method, "single", 1, clip_id, seconds, values[row], protocol)


def feature_scores(
    method: Method,
    aggregation: Aggregation,
    samples: int,
    clip_id: str,
    seconds: list[float],
    values: list[list[float]],
    protocol: Protocol,
) -> Iterator[Score]:
    """Turn the feature metrics (K, 3) of one sequence into scores."""
    for horizon, horizon_s, numbers in zip(protocol.horizons, seconds, values, strict=True):
        for metric, value in zip(FEATURE_METRICS, numbers, strict=True):
            series = Series(method, "features", metric, aggregation, horizon, samples)
            yield Score(series, clip_id, horizon_s, value)


def horizon_seconds(seconds: Tensor, protocol: Protocol) -> list[float]:
    """Seconds from the last context frame to each target, of one sequence's times (T,)."""
    times = seconds.double()
    return (times[protocol.targets] - times[protocol.context - 1]).tolist()
