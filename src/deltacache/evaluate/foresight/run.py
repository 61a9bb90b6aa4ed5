"""Table D: short and mid-term futures of Cityscapes' labelled frames, from a context to the tables."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch

from deltacache import __version__
from deltacache.evaluate.benchmarks.run import content_of, head_notes, sequence_notes
from deltacache.evaluate.evaluation import Evaluation, run_evaluation
from deltacache.evaluate.examples import examples_of
from deltacache.evaluate.foresight.pictures import Album, principal_axes, save_picture
from deltacache.evaluate.foresight.predictions import (
    ForesightInputs,
    WholeSequence,
    depth_place,
    load_inputs,
    load_whole,
    whole_frame_metrics,
)
from deltacache.evaluate.metrics import check_finite, check_finite_frames, naming
from deltacache.evaluate.output import TABLES_VERSION, RunStamp
from deltacache.evaluate.statistics import Series, Statistic, reading_order
from deltacache.models.devices import choose_device
from deltacache.pipeline.benchmarks.layouts import benchmark_sequences
from deltacache.pipeline.benchmarks.windows import FrameCounts, SequenceSet
from deltacache.schemas.benchmarks import LabelledSequence
from deltacache.schemas.datasets import fingerprint_of, sides
from deltacache.schemas.foresight import DATASET, ForesightEvaluation
from deltacache.schemas.progress import Reporter

_NUMBERS_FROM = {"context", "horizons", "seed"}


def evaluate_foresight(settings: ForesightEvaluation, reporter: Reporter) -> Path:
    """Score every method on every labelled frame; write tables and examples. A finished evaluation returns at once.

    Raises:
        DatasetError: a frame, label or depth map is missing or damaged, ``out`` holds something else or another
            evaluation, or another command writes to it.
        CheckpointError: a model is missing or damaged.
        MismatchError: models that do not belong together.
        NotFiniteError: features, a depth map or a prediction are not finite.
    """

    def open_source() -> Evaluation:
        inputs = load_inputs(settings, choose_device(settings.device))
        found = _sequences(settings)
        stamp = _stamp(settings, inputs, found)
        return Evaluation(
            settings=settings,
            run_id=stamp.run_id,
            notes=_notes(settings, found, inputs),
            record=inputs.record,
            stamp=lambda _: stamp,
            samples_of=lambda _: 1,
            score=lambda examples, reporter: _score(settings, found, inputs, examples, reporter),
            order=reading_order,
            metrics_of=whole_frame_metrics,
            command="evaluate-foresight",
        )

    return run_evaluation(settings.out, open_source, reporter)


def _score(
    settings: ForesightEvaluation,
    found: SequenceSet,
    inputs: ForesightInputs,
    folder: Path,
    reporter: Reporter,
) -> Iterator[Iterator[Statistic]]:
    """Sums of all sequences, sequence by sequence; a few are kept in ``folder`` for the report."""
    wanted = examples_of(found.sequences, settings.examples)
    kept = (load_whole(each, settings, inputs) for each in found.sequences if each.sequence_id in wanted)
    album = Album(wanted, principal_axes(each.tokens for each in kept), folder) if wanted else None
    with reporter.stage("evaluate-foresight", len(found.sequences)) as stage:
        for sequence in found.sequences:
            seen = load_whole(sequence, settings, inputs)
            yield _scores(seen, settings, inputs)
            if album is not None and sequence.sequence_id in album.wanted:
                save_picture(seen, settings, inputs, album)
            stage.advance()


def _scores(
    seen: WholeSequence, settings: ForesightEvaluation, inputs: ForesightInputs
) -> Iterator[Statistic]:
    """Sums of every method at every horizon that the sequence has frames for."""
    sequence = seen.sequence
    check_finite_frames(seen.tokens, f"{DATASET}, sequence {sequence.sequence_id}")
    for horizon in settings.horizons:
        if len(sequence.frames) < settings.context + horizon:
            continue
        for method, prediction in inputs.systems.predictions(seen.tokens, horizon):
            with naming(method.name, sequence.sequence_id, horizon):
                found = list(inputs.heads.totals(prediction, seen.tokens[-1], seen.labels))
            for task, totals in found:
                check_finite(torch.from_numpy(totals), method.name, sequence.sequence_id, horizon)
                series = Series(DATASET, task, method, "single", horizon, 1)
                seconds = horizon * sequence.spacing_s
                yield Statistic(series, sequence.sequence_id, sequence.group, seconds, totals)


def _sequences(settings: ForesightEvaluation) -> SequenceSet:
    """Cityscapes' labelled frames: index 19 of a snippet, and before it every third one."""
    counts = FrameCounts(tuple(settings.context + horizon for horizon in settings.horizons))
    return benchmark_sequences("cityscapes", settings.root, counts)


def _notes(settings: ForesightEvaluation, found: SequenceSet, inputs: ForesightInputs) -> list[str]:
    frames = {horizon: settings.context + horizon for horizon in settings.horizons}
    notes = list(sequence_notes(DATASET, "cityscapes", found, frames))
    for task, head in inputs.record.heads.items():
        notes.extend(head_notes(DATASET, head, inputs.record.heads_trained_on.get(task, {})))
    return notes


def _stamp(settings: ForesightEvaluation, inputs: ForesightInputs, found: SequenceSet) -> RunStamp:
    """Columns that all rows share; the id follows from what the numbers follow from, not from paths or the clock."""
    made_from = {
        "foresight": settings.model_dump(mode="json", include=_NUMBERS_FROM),
        "models": dict(inputs.fingerprints),
        "precision": settings.features.precision,
        "data": content_of(found.sequences, lambda each: _labels_of(each, settings)),
        "code_version": __version__,
        "tables": TABLES_VERSION,
    }
    return RunStamp(
        run_id=fingerprint_of(made_from),
        dataset=DATASET,
        context=settings.context,
        image_size=sides(settings.features.image_size),
        seed=settings.seed,
        backbone=inputs.features.name,
        code_version=__version__,
        created_at=datetime.now(UTC),
    )


def _labels_of(sequence: LabelledSequence, settings: ForesightEvaluation) -> list[str | Path]:
    """Those that are used."""
    depth = depth_place(sequence, settings)
    label = [sequence.label] if settings.segmentation_head is not None else []
    return [*label, *([depth] if depth is not None else [])]
