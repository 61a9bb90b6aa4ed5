"""Table D: short and mid-term futures of Cityscapes' labelled frames, from a context to the tables."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from deltacache import __version__
from deltacache.evaluate import output
from deltacache.evaluate.benchmarks.statistics import Statistic, StatisticSeries, statistics_table
from deltacache.evaluate.foresight.inputs import Inputs, load_inputs
from deltacache.evaluate.foresight.scoring import Labels, movable_totals
from deltacache.evaluate.pooling import pool, pooled_rows, sequence_rows
from deltacache.evaluate.rows import RunStamp, write_table
from deltacache.models.devices import choose_device
from deltacache.pipeline.benchmarks.full_frames import depth_of, read_depth_map, read_whole
from deltacache.pipeline.benchmarks.layouts import benchmark_sequences
from deltacache.pipeline.benchmarks.reading import frame_shape, read_label
from deltacache.pipeline.benchmarks.windows import FrameCounts, SequenceSet
from deltacache.schemas.benchmarks import LabelledSequence
from deltacache.schemas.configs import save_config
from deltacache.schemas.fingerprints import fingerprint_of
from deltacache.schemas.foresight import DATASET, ForesightEvaluation
from deltacache.schemas.images import sides
from deltacache.schemas.progress import Reporter
from deltacache.schemas.tables import METRICS_SCHEMA, SEQUENCES_SCHEMA

_NUMBERS_FROM = {"context", "horizons", "seed"}


def evaluate_foresight(settings: ForesightEvaluation, reporter: Reporter) -> Path:
    """Score every method on every labelled frame and write the tables; a finished evaluation returns at once.

    Raises:
        DatasetError: a frame, label or depth map is missing or damaged, or ``out`` holds something else.
        CheckpointError: a model is missing or damaged.
        MismatchError: models that do not belong together.
    """
    device = choose_device(settings.device)
    finished = output.finished_run(settings.out)
    inputs = load_inputs(settings, device)
    found = _sequences(settings)
    stamp = _stamp(settings, inputs, found)
    if finished == stamp.run_id:
        reporter.line(f"evaluate-foresight: {settings.out} has these numbers already, nothing to do")
        return settings.out / output.METRICS
    statistics: list[Statistic] = []
    with reporter.stage("evaluate-foresight", len(found.sequences)) as stage:
        for sequence in found.sequences:
            statistics.extend(score_sequence(sequence, settings, inputs, device))
            stage.advance()
    _write(settings, found, statistics, stamp)
    return settings.out / output.METRICS


def score_sequence(
    sequence: LabelledSequence, settings: ForesightEvaluation, inputs: Inputs, device: torch.device
) -> Iterator[Statistic]:
    """Sums of every method at every horizon that the sequence has frames for."""
    size = sides(settings.features.image_size)
    frames = inputs.features.tokens([read_whole(path, size) for path in sequence.frames])
    labels = _labels(sequence, settings, inputs, device)
    for horizon in settings.horizons:
        if len(sequence.frames) < settings.context + horizon:
            continue
        for method, prediction in inputs.systems.predictions(frames, horizon):
            for task, totals in inputs.heads.totals(prediction, frames[-1], labels):
                series = StatisticSeries(DATASET, task, method, "single", horizon, 1)
                seconds = horizon * sequence.spacing_s
                yield Statistic(series, sequence.sequence_id, sequence.group, seconds, totals)


def _labels(
    sequence: LabelledSequence, settings: ForesightEvaluation, inputs: Inputs, device: torch.device
) -> Labels:
    shape = frame_shape("cityscapes", sequence.frames[-1])
    classes = depth = None
    if inputs.heads.segmentation is not None:
        classes = torch.from_numpy(read_label("cityscapes", sequence.label, shape)).to(device)
    if settings.depth is not None:
        place = depth_of(sequence.label, "val", settings.depth)
        depth = torch.from_numpy(read_depth_map(place, shape)).to(device)
    return Labels(classes, depth)


def _sequences(settings: ForesightEvaluation) -> SequenceSet:
    """Cityscapes' labelled frames: index 19 of a snippet, and before it every third one."""
    counts = FrameCounts(tuple(settings.context + horizon for horizon in settings.horizons))
    return benchmark_sequences("cityscapes", settings.root, counts)


def _write(
    settings: ForesightEvaluation, found: SequenceSet, statistics: list[Statistic], stamp: RunStamp
) -> None:
    """Everything that belongs to a finished evaluation; the metrics come last."""
    out = settings.out
    out.mkdir(parents=True, exist_ok=True)
    for stale in output.TABLES:
        (out / stale).unlink(missing_ok=True)
    save_config(settings, out / output.CONFIG)
    output.write_notes(out, _notes(settings, found))
    write_table(statistics_table(statistics), out / output.STATISTICS)
    rows = [row for each in statistics for row in _of_one(each, stamp)]
    write_table(pa.Table.from_pylist(rows, schema=SEQUENCES_SCHEMA), out / output.SEQUENCES)
    write_table(
        pa.Table.from_pylist(list(_of_all(statistics, stamp)), schema=METRICS_SCHEMA), out / output.METRICS
    )


def _of_one(statistic: Statistic, stamp: RunStamp) -> Iterator[Mapping[str, Any]]:
    yield from _without_units(sequence_rows(statistic, stamp))
    for movable in _movable([statistic]):
        yield from _renamed(sequence_rows(movable, stamp))


def _of_all(statistics: list[Statistic], stamp: RunStamp) -> Iterator[Mapping[str, Any]]:
    yield from _without_units(pooled_rows(pool(statistics), lambda _: stamp))
    yield from _renamed(pooled_rows(pool(_movable(statistics)), lambda _: stamp))


def _movable(statistics: Iterable[Statistic]) -> Iterator[Statistic]:
    """The same over the classes that move."""
    for each in statistics:
        if each.series.task == "segmentation":
            yield replace(each, totals=movable_totals(each.totals))


def _renamed(rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    return ({**row, "metric": "miou_movable"} for row in rows if row["metric"] == "miou")


def _without_units(rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Without depth's absolute error: relative maps have no metres."""
    return (row for row in rows if row["metric"] != "rmse")


def _notes(settings: ForesightEvaluation, found: SequenceSet) -> list[str]:
    notes = [f"{DATASET}: {count} dropped: {reason}" for reason, count in found.dropped.items()]
    for horizon in settings.horizons:
        frames = settings.context + horizon
        short = sum(len(each.frames) < frames for each in found.sequences)
        if short:
            notes.append(
                f"{DATASET}: {short} of {len(found.sequences)} sequences have fewer than {frames} frames: not scored "
                f"at horizon {horizon}"
            )
    return notes


def _stamp(settings: ForesightEvaluation, inputs: Inputs, found: SequenceSet) -> RunStamp:
    """Columns that all rows share; the id follows from what the numbers follow from, not from paths or the clock."""
    made_from = {
        "foresight": settings.model_dump(mode="json", include=_NUMBERS_FROM),
        "models": dict(inputs.fingerprints),
        "precision": settings.features.precision,
        "data": [_content(each, settings) for each in found.sequences],
        "code_version": __version__,
    }
    return RunStamp(
        run_id=fingerprint_of(made_from),
        dataset=DATASET,
        context=settings.context,
        image_size=sides(settings.features.image_size)[0],
        seed=settings.seed,
        backbone=inputs.features.name,
        code_version=__version__,
        created_at=datetime.now(UTC),
    )


def _content(sequence: LabelledSequence, settings: ForesightEvaluation) -> list[object]:
    """Names and sizes of all files of a sequence."""
    files = [Path(path) for path in (*sequence.frames, sequence.label)]
    if settings.depth is not None:
        files.append(depth_of(sequence.label, "val", settings.depth))
    return [sequence.sequence_id, *([path.name, path.stat().st_size] for path in files)]
