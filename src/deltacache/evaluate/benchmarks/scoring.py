"""From the patch tokens of a few sequences to their sums, for every method and horizon.

A horizon h sees ``context`` frames and predicts h steps; its target is always the last frame, which is the
labelled one. So every horizon has its own context, and its own rollout.

Shapes: B sequences, X crops of all of them, C crops of one, T frames, S samples, h steps, N patches, D hidden.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from deltacache.evaluate.benchmarks.labels import LabelScorer
from deltacache.evaluate.benchmarks.loading import LoadedSequence
from deltacache.evaluate.benchmarks.sampling import (
    Ensemble,
    Sampler,
    SequenceBatch,
    Timing,
    TrueDeltas,
    ensemble_of,
)
from deltacache.evaluate.inputs import Models, World
from deltacache.evaluate.metrics import (
    SampleSums,
    check_finite,
    check_finite_frames,
    feature_metrics,
    naming,
    sample_counts,
)
from deltacache.evaluate.output import Aggregation, Method
from deltacache.evaluate.predictions import RolloutProtocol
from deltacache.evaluate.statistics import Series, Statistic
from deltacache.models.futures import decode_steps

# ----------------------------------------------------------------------------------------------------
# Predictions of a target, and how several samples of it become one.
#
# Shapes: X crops of a batch, S samples, N patches, D hidden.
# ----------------------------------------------------------------------------------------------------


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
class ScoredFutures:
    """Samples of one method.

    Attributes:
        single: there is but one of each, so it is neither best nor mean.
        of_crop: patch tokens (S, N, D) of the target, for a sequence of the batch and one of its crops.
    """

    method: Method
    samples: int
    single: bool
    of_crop: Callable[[int, int], Tensor]


def summaries(ensemble: Ensemble, futures: ScoredFutures) -> Iterator[tuple[Summary, Future]]:
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


class BatchScorer:
    """Scores batches of one benchmark. ``labels``: its head, or None for features alone."""

    def __init__(
        self,
        models: Models,
        protocol: RolloutProtocol,
        labels: LabelScorer | None,
        device: torch.device,
        timing: Timing,
    ) -> None:
        self._models, self._protocol, self._labels = models, protocol, labels
        self._device, self._timing = device, timing
        self._sampler = Sampler(models, protocol, device, timing)

    @torch.inference_mode()
    def score(self, batch: SequenceBatch) -> list[Statistic]:
        """Every method's sums on the sequences of ``batch``, at the horizons that they have frames for.

        Raises:
            NotFiniteError: frames, or a prediction, are not finite.
        """
        frames, context = batch.tokens.shape[1], self._protocol.context
        horizons = [horizon for horizon in self._protocol.horizons if context + horizon <= frames]
        for at, loaded in enumerate(batch.sequences):
            own = batch.tokens[batch.first[at] : batch.first[at + 1]]
            check_finite_frames(own, f"{batch.dataset}, sequence {loaded.sequence.sequence_id}")
        halves = [self._label(loaded) for loaded in batch.sequences]
        deltas = self._sampler.true_deltas(batch, horizons)
        found: list[Statistic] = []
        for prediction in self._without_horizon(batch, deltas):
            scored = self._score_prediction(batch, halves, prediction, horizons[0])
            for horizon in horizons:
                found.extend(_at_horizon(scored, batch, horizon))
        for horizon in horizons:
            for prediction in self._single(batch, deltas, horizon):
                found.extend(self._score_prediction(batch, halves, prediction, horizon))
            for world in self._models.worlds:
                found.extend(self._score_world(batch, halves, world, deltas, horizon))
            for name, at_horizon in batch.generated[0]:
                if at_horizon == horizon:
                    found.extend(self._score_generated(batch, halves, name, horizon))
        return found

    def _label(self, loaded: LoadedSequence) -> Tensor | None:
        return None if loaded.label is None else torch.from_numpy(loaded.label).to(self._device)

    def _without_horizon(self, batch: SequenceBatch, deltas: TrueDeltas) -> Iterator[Prediction]:
        """What is the same at every horizon: the truth, and its delta token decoded from the true frame before."""
        yield Prediction(Method("present"), batch.tokens[:, -1])
        for tokenizer in self._models.tokenizers:
            with self._timing.part("decoder", self._device):
                last = deltas[tokenizer.fingerprint][batch.tokens.shape[1] - 1]
                decoded = tokenizer.model.decode(last, batch.tokens[:, -2], self._protocol.grid)
            yield Prediction(tokenizer.method("deltatok_one_step"), decoded)

    def _single(self, batch: SequenceBatch, deltas: TrueDeltas, horizon: int) -> Iterator[Prediction]:
        yield Prediction(Method("copy_last"), batch.tokens[:, -1 - horizon])
        protocol = self._protocol
        for tokenizer in self._models.tokenizers:
            with self._timing.part("decoder", self._device):
                closed = tokenizer.model.reconstruct_closed_loop(
                    batch.tokens, protocol.black, protocol.grid, horizon
                )
            yield Prediction(tokenizer.method("deltatok"), closed[:, -1])
            frames = batch.tokens.shape[1]
            true = [deltas[tokenizer.fingerprint][at] for at in range(frames - horizon, frames)]
            with self._timing.part("decoder", self._device):
                last = batch.tokens[:, -1 - horizon]
                *_, parallel = decode_steps(
                    tokenizer.model, last, torch.stack(true, 1)[:, None], protocol.grid
                )
            yield Prediction(tokenizer.method("deltatok_parallel"), parallel[:, 0])

    def _score_prediction(
        self, batch: SequenceBatch, halves: Sequence[Tensor | None], prediction: Prediction, horizon: int
    ) -> list[Statistic]:
        found = []
        for at in range(len(batch.sequences)):
            tokens = prediction.tokens[batch.first[at] : batch.first[at + 1]]
            totals = self._totals(batch, halves, at, tokens, prediction.method.name, horizon)
            found.extend(_statistics(batch, at, totals, prediction.summary, horizon))
        return found

    def _totals(
        self,
        batch: SequenceBatch,
        halves: Sequence[Tensor | None],
        at: int,
        tokens: Tensor,
        method: str,
        horizon: int,
    ) -> dict[str, Tensor]:
        """Sums by task of the target of one sequence of the batch, predicted as ``tokens`` (C, N, D)."""
        loaded, label = batch.sequences[at], halves[at]
        with self._timing.part("features", self._device):
            metrics = feature_metrics(tokens, batch.tokens[batch.first[at] : batch.first[at + 1], -1])
            sums = metrics.sum(0)
        check_finite(sums, method, loaded.sequence.sequence_id, horizon)
        totals = {"features": torch.cat([sums.new_full((1,), loaded.split.crops), sums])}
        if self._labels is None or label is None:
            return totals
        name = loaded.sequence.sequence_id
        with self._timing.part("heads", self._device), naming(method, name, horizon):
            of_label = self._labels.totals(tokens, loaded.split, label)
        return {self._labels.task: of_label, **totals}

    def _score_world(
        self,
        batch: SequenceBatch,
        halves: Sequence[Tensor | None],
        world: World,
        deltas: TrueDeltas,
        horizon: int,
    ) -> Iterator[Statistic]:
        """Rollouts of a world model, decoded crop by crop."""
        futures = self._sampler.roll_out(world, batch, deltas, horizon)

        def of_crop(at: int, crop: int) -> Tensor:
            return futures.last(batch.first[at] + crop)

        yield from self._score_samples(
            batch, halves, ScoredFutures(world.method, world.samples, world.single, of_crop), horizon
        )

    def _score_generated(
        self, batch: SequenceBatch, halves: Sequence[Tensor | None], name: str, horizon: int
    ) -> Iterator[Statistic]:
        """Frames of a video generator, encoded by the backbone."""
        count = len(batch.generated[0][name, horizon])

        def encoded(at: int, crop: int) -> Tensor:
            return batch.generated[at][name, horizon][:, crop]

        yield from self._score_samples(
            batch, halves, ScoredFutures(Method(name), count, count == 1, encoded), horizon
        )

    def _score_samples(
        self, batch: SequenceBatch, halves: Sequence[Tensor | None], futures: ScoredFutures, horizon: int
    ) -> Iterator[Statistic]:
        """Best and mean of the samples as predictions, and what the samples are together."""
        for at in range(len(batch.sequences)):
            kinds: dict[Summary, list[Future]] = {}
            sums: dict[str, Tensor] = {}
            for crop in range(batch.sequences[at].split.crops):
                truth, samples = batch.tokens[batch.first[at] + crop, -1], futures.of_crop(at, crop)
                with self._timing.part("samples", self._device):
                    ensemble = ensemble_of(samples, truth)
                    name = batch.sequences[at].sequence.sequence_id
                    check_finite(ensemble.metrics, futures.method.name, name, horizon)
                    for summary, future in summaries(ensemble, futures):
                        kinds.setdefault(summary, []).append(future)
                    if len(samples) > 1:
                        together = SampleSums(truth[None], len(samples), hold=True)
                        together.add(samples[:, None])
                        _accumulate(sums, "samples", together.totals()[0])
                with naming(futures.method.name, batch.sequences[at].sequence.sequence_id, horizon):
                    self._vote(sums, batch.sequences[at], halves[at], samples, crop)
            yield from self._score_kinds(batch, halves, at, kinds, horizon)
            summary = Summary(futures.method, "single", futures.samples)
            yield from _statistics(batch, at, sums, summary, horizon)

    def _score_kinds(
        self,
        batch: SequenceBatch,
        halves: Sequence[Tensor | None],
        at: int,
        kinds: Mapping[Summary, Sequence[Future]],
        horizon: int,
    ) -> Iterator[Statistic]:
        """Every summary of the samples of one sequence, a future for each of its crops.

        Those that are alike go through the head once: the best of 5 and of 10 are often one sample.
        """
        scored: dict[tuple[Identity, ...], dict[str, Tensor]] = {}
        for summary, chosen in kinds.items():
            identity = tuple(each.identity for each in chosen)
            if identity not in scored:
                tokens = torch.stack([each.tokens for each in chosen])
                scored[identity] = self._totals(batch, halves, at, tokens, summary.method.name, horizon)
            yield from _statistics(batch, at, scored[identity], summary, horizon)

    def _vote(
        self,
        sums: dict[str, Tensor],
        loaded: LoadedSequence,
        label: Tensor | None,
        samples: Tensor,
        crop: int,
    ) -> None:
        """Add the pixels of a crop that any of several samples (S, N, D) covers."""
        if self._labels is not None and label is not None and len(samples) > 1:
            with self._timing.part("heads", self._device):
                covered = self._labels.covered(samples, loaded.split, label[crop], crop)
            _accumulate(sums, "vote", covered)


def _accumulate(sums: dict[str, Tensor], task: str, totals: Tensor) -> None:
    sums[task] = sums[task] + totals if task in sums else totals


def _statistics(
    batch: SequenceBatch, at: int, totals: dict[str, Tensor], summary: Summary, horizon: int
) -> Iterator[Statistic]:
    sequence = batch.sequences[at].sequence
    for task, sums in totals.items():
        series = Series(batch.dataset, task, summary.method, summary.aggregation, horizon, summary.samples)
        yield Statistic(
            series,
            sequence.sequence_id,
            sequence.group,
            horizon * sequence.spacing_s,
            sums.cpu().numpy().astype(np.float64),
        )


def _at_horizon(statistics: Sequence[Statistic], batch: SequenceBatch, horizon: int) -> Iterator[Statistic]:
    """The same sums under another horizon."""
    spacing = {each.sequence.sequence_id: each.sequence.spacing_s for each in batch.sequences}
    for each in statistics:
        yield replace(
            each,
            series=replace(each.series, horizon=horizon),
            horizon_s=horizon * spacing[each.sequence_id],
        )
