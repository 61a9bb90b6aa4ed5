"""From the patch tokens of a few sequences to their sums, for every method and horizon.

A horizon h sees ``context`` frames and predicts h steps; its target is always the last frame, which is the
labelled one. So every horizon has its own context, and its own roll-out.

Shapes: B sequences, X crops of all of them, C crops of one, T frames, S samples, h steps, N patches, D hidden.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from deltacache.evaluate.benchmarks.ensembles import Ensemble, decode_last, judge, sample_totals
from deltacache.evaluate.benchmarks.labels import LabelScorer
from deltacache.evaluate.benchmarks.loading import LoadedSequence
from deltacache.evaluate.benchmarks.sampling import Sampler, SequenceBatch
from deltacache.evaluate.benchmarks.statistics import Statistic, StatisticSeries
from deltacache.evaluate.benchmarks.timing import Timing
from deltacache.evaluate.inputs import Models, World
from deltacache.evaluate.metrics import feature_metrics
from deltacache.evaluate.predictions import Protocol
from deltacache.evaluate.rows import Aggregation, Method
from deltacache.evaluate.sample_sums import sample_counts


@dataclass(frozen=True, repr=False)
class Prediction:
    """The last frame of every crop as one method predicts it: ``tokens`` (X, N, D)."""

    method: Method
    aggregation: Aggregation
    samples: int
    tokens: Tensor


class BatchScorer:
    """Scores batches of one benchmark. ``labels``: its head, or None for features alone."""

    def __init__(
        self,
        models: Models,
        protocol: Protocol,
        labels: LabelScorer | None,
        device: torch.device,
        timing: Timing,
    ) -> None:
        self._models, self._protocol, self._labels = models, protocol, labels
        self._device, self._timing = device, timing
        self.sampler = Sampler(models, protocol, device, timing)

    @torch.inference_mode()
    def score(self, batch: SequenceBatch) -> list[Statistic]:
        """Every method's sums on the sequences of ``batch``, at the horizons that they have frames for."""
        frames, context = batch.tokens.shape[1], self._protocol.context
        horizons = [horizon for horizon in self._protocol.horizons if context + horizon <= frames]
        halves = [self._label(loaded) for loaded in batch.sequences]
        deltas = self.sampler.true_deltas(batch, horizons)
        found: list[Statistic] = []
        for prediction in self._without_horizon(batch, deltas):
            scored = self._score_prediction(batch, halves, prediction, horizons[0])
            for horizon in horizons:
                found.extend(_at_horizon(scored, batch, horizon))
        for horizon in horizons:
            for prediction in self._single(batch, horizon):
                found.extend(self._score_prediction(batch, halves, prediction, horizon))
            for world in self._models.worlds:
                found.extend(self._score_world(batch, halves, world, deltas, horizon))
            for name, at_horizon in batch.generated[0]:
                if at_horizon == horizon:
                    found.extend(self._score_generated(batch, halves, name, horizon))
        return found

    def _label(self, loaded: LoadedSequence) -> Tensor | None:
        return None if loaded.label is None else torch.from_numpy(loaded.label).to(self._device)

    def _without_horizon(self, batch: SequenceBatch, deltas: dict[int, Tensor]) -> Iterator[Prediction]:
        """What is the same at every horizon: the truth, and its delta token decoded from the true frame before."""
        yield Prediction(Method("present"), "single", 1, batch.tokens[:, -1])
        tokenizer = self._models.tokenizer
        if tokenizer is not None:
            with self._timing.part("decoder", self._device):
                last = deltas[batch.tokens.shape[1] - 1]
                decoded = tokenizer.model.decode(last, batch.tokens[:, -2], self._protocol.grid)
            yield Prediction(tokenizer.method("deltatok_parallel"), "single", 1, decoded)

    def _single(self, batch: SequenceBatch, horizon: int) -> Iterator[Prediction]:
        yield Prediction(Method("copy_last"), "single", 1, batch.tokens[:, -1 - horizon])
        tokenizer, protocol = self._models.tokenizer, self._protocol
        if tokenizer is not None:
            with self._timing.part("decoder", self._device):
                closed = tokenizer.model.reconstruct_closed_loop(
                    batch.tokens, protocol.black, protocol.grid, horizon
                )
            yield Prediction(tokenizer.method("deltatok"), "single", 1, closed[:, -1])

    def _score_prediction(
        self, batch: SequenceBatch, halves: Sequence[Tensor | None], prediction: Prediction, horizon: int
    ) -> list[Statistic]:
        metrics = feature_metrics(prediction.tokens, batch.tokens[:, -1])
        found = []
        for at, loaded in enumerate(batch.sequences):
            crops, label = slice(batch.first[at], batch.first[at + 1]), halves[at]
            sums = metrics[crops].sum(0)
            totals = {"features": torch.cat([sums.new_tensor([loaded.split.crops]), sums])}
            if self._labels is not None and label is not None:
                with self._timing.part("heads", self._device):
                    of_label = self._labels.totals(prediction.tokens[crops], loaded.split, label)
                totals = {self._labels.task: of_label, **totals}
            found.extend(_statistics(batch, at, totals, prediction, horizon))
        return found

    def _score_world(
        self,
        batch: SequenceBatch,
        halves: Sequence[Tensor | None],
        world: World,
        deltas: dict[int, Tensor],
        horizon: int,
    ) -> Iterator[Statistic]:
        """Roll-outs of a world model, decoded crop by crop."""
        tokenizer = self._models.tokenizer
        assert tokenizer is not None  # a world model has one
        rollouts = self.sampler.roll_out(world, batch, deltas, horizon)

        def decoded(at: int, crop: int) -> Tensor:
            position = batch.first[at] + crop
            last = batch.tokens[position, -1 - horizon]
            with self._timing.part("decoder", self._device):
                return decode_last(tokenizer.model, last, rollouts[position], self._protocol.grid)

        single = world.model.q_embed is not None
        yield from self._score_samples(
            batch, halves, Futures(world.method, world.samples, single, decoded), horizon
        )

    def _score_generated(
        self, batch: SequenceBatch, halves: Sequence[Tensor | None], name: str, horizon: int
    ) -> Iterator[Statistic]:
        """Frames of a video generator, encoded by the backbone."""
        count = len(batch.generated[0][name, horizon])

        def encoded(at: int, crop: int) -> Tensor:
            return batch.generated[at][name, horizon][:, crop]

        yield from self._score_samples(
            batch, halves, Futures(Method(name), count, count == 1, encoded), horizon
        )

    def _score_samples(
        self, batch: SequenceBatch, halves: Sequence[Tensor | None], futures: "Futures", horizon: int
    ) -> Iterator[Statistic]:
        """Best and mean of the samples as predictions, and what the samples are together."""
        kinds: dict[tuple[Aggregation, int], list[Tensor]] = {}
        together = []
        for at, loaded in enumerate(batch.sequences):
            sums: dict[str, Tensor] = {}
            for crop in range(loaded.split.crops):
                truth, label = batch.tokens[batch.first[at] + crop, -1], halves[at]
                samples = futures.of_crop(at, crop)
                ensemble = judge(samples, truth)
                for key, tokens in _summaries(ensemble, futures.single):
                    kinds.setdefault(key, []).append(tokens)
                if len(samples) > 1:
                    _accumulate(sums, "samples", sample_totals(ensemble, truth))
                if self._labels is not None and label is not None and len(samples) > 1:
                    with self._timing.part("heads", self._device):
                        covered = self._labels.covered(samples, loaded.split, label[crop], crop)
                    _accumulate(sums, "vote", covered)
            together.append(sums)
        for (aggregation, count), tokens in kinds.items():
            prediction = Prediction(futures.method, aggregation, count, torch.stack(tokens))
            yield from self._score_prediction(batch, halves, prediction, horizon)
        ensemble_of = Prediction(futures.method, "single", futures.samples, batch.tokens[:, -1])
        for at, sums in enumerate(together):
            yield from _statistics(batch, at, sums, ensemble_of, horizon)


def _summaries(ensemble: Ensemble, single: bool) -> Iterator[tuple[tuple[Aggregation, int], Tensor]]:
    """Best and mean (N, D) of the first 1, 2, 5, ... samples and of all; the one future of a single sample."""
    if single:
        yield ("single", 1), ensemble.samples[0]
        return
    for count in sample_counts(len(ensemble.samples)):
        first = ensemble.first(count)
        yield ("best", count), first.samples[first.best]
        yield ("mean", count), first.mean


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


def _accumulate(sums: dict[str, Tensor], task: str, totals: Tensor) -> None:
    sums[task] = sums[task] + totals if task in sums else totals


def _statistics(
    batch: SequenceBatch, at: int, totals: dict[str, Tensor], prediction: Prediction, horizon: int
) -> Iterator[Statistic]:
    sequence = batch.sequences[at].sequence
    for task, sums in totals.items():
        series = StatisticSeries(
            batch.dataset, task, prediction.method, prediction.aggregation, horizon, prediction.samples
        )
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
