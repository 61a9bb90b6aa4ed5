"""Predictions without sampling: the bounds and the tokenizer's reconstructions.

Shapes: B clips, T frames, K horizons that are scored, N patches, D hidden.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deltacache.evaluate.clips.sequences import CachedSequences
from deltacache.evaluate.inputs import Tokenizer
from deltacache.evaluate.metrics import check_finite, feature_metrics
from deltacache.evaluate.output import Aggregation, Method
from deltacache.evaluate.statistics import Series, Statistic
from deltacache.models.deltatok import Grid
from deltacache.models.futures import decode_future


@dataclass(frozen=True)
class RolloutProtocol:
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


@dataclass(frozen=True, slots=True)
class AboutSequence:
    """What the statistics of one sequence of a feature dataset share.

    Attributes:
        video: that it is from.
        horizons: that are scored, each after so many ``seconds`` from the last context frame.
    """

    dataset: str
    sequence_id: str
    video: str
    horizons: tuple[int, ...]
    seconds: tuple[float, ...]


def about_sequences(batch: CachedSequences, protocol: RolloutProtocol, dataset: str) -> list[AboutSequence]:
    """Of every sequence of ``batch``, what its statistics in the tables of ``dataset`` share."""
    times = batch.seconds.double()
    seconds = (times[:, protocol.targets] - times[:, protocol.context - 1, None]).tolist()
    return [
        AboutSequence(dataset, clip_id, video, protocol.horizons, tuple(each))
        for clip_id, video, each in zip(batch.clip_ids, batch.videos, seconds, strict=True)
    ]


def reference_predictions(
    batch: CachedSequences, protocol: RolloutProtocol
) -> Iterator[tuple[Method, Tensor]]:
    """Yield what needs no model: the last context frame repeated, and the truth, as (B, K, N, D)."""
    last = batch.own[:, protocol.context - 1, None].expand(-1, len(protocol.horizons), -1, -1)
    yield Method("copy_last"), last
    yield Method("present"), batch.own[:, protocol.targets]


def reconstructions(
    tokenizer: Tokenizer, batch: CachedSequences, deltas: Tensor, protocol: RolloutProtocol
) -> Iterator[tuple[Method, Tensor]]:
    """Yield what the tokenizer makes of true frames, as (B, K, N, D).

    Args:
        deltas: (U, T, D) delta tokens of all clips of the batch, from true pairs of frames.
    """
    model, grid, clips = tokenizer.model, protocol.grid, len(batch.rows)
    steps = [horizon - 1 for horizon in protocol.horizons]
    longest = protocol.horizons[-1]
    closed = model.reconstruct_closed_loop(batch.own, protocol.black, grid, longest)
    yield tokenizer.method("deltatok"), closed[:, steps]
    last = batch.own[:, protocol.context - 1]
    true = deltas[:clips, None, protocol.context : protocol.context + longest]
    parallel = decode_future(model, last, true, grid)[:, 0]
    yield tokenizer.method("deltatok_parallel"), parallel[:, steps]
    yield tokenizer.method("deltatok_one_step"), _decode_one_step(tokenizer, batch, deltas[:clips], protocol)
    if batch.partners is not None:
        swapped = _decode_one_step(tokenizer, batch, deltas[batch.partners], protocol)
        yield tokenizer.method("deltatok_swapped"), swapped


def _decode_one_step(
    tokenizer: Tokenizer, batch: CachedSequences, deltas: Tensor, protocol: RolloutProtocol
) -> Tensor:
    """Decode each target's delta token (B, T, D) from the true frame before the target."""
    frames = [
        tokenizer.model.decode(deltas[:, target], batch.own[:, target - 1], protocol.grid)
        for target in protocol.targets
    ]
    return torch.stack(frames, 1)


def score_predictions(
    method: Method,
    predictions: Tensor,
    batch: CachedSequences,
    about: Sequence[AboutSequence],
    protocol: RolloutProtocol,
) -> Iterator[Statistic]:
    """Compare single predictions (B, K, N, D) with the true frames."""
    values = feature_metrics(predictions, batch.own[:, protocol.targets]).cpu()
    for each, numbers in zip(about, values, strict=True):
        yield from feature_statistics(method, "single", 1, each, numbers)


def feature_statistics(
    method: Method, aggregation: Aggregation, samples: int, about: AboutSequence, values: Tensor
) -> Iterator[Statistic]:
    """Sums of task ``features`` of one sequence from its feature metrics (K, 3).

    Raises:
        NotFiniteError: the prediction is not finite.
    """
    for horizon, seconds, numbers in zip(about.horizons, about.seconds, values, strict=True):
        check_finite(numbers, method.name, about.sequence_id, horizon)
        series = Series(about.dataset, "features", method, aggregation, horizon, samples)
        totals = np.concatenate([[1.0], numbers.numpy()])
        yield Statistic(series, about.sequence_id, about.video, seconds, totals)
