"""The one way of every evaluation: inputs are opened and checked, scored, and written into its folder.

Feature datasets (``clips``), published benchmarks (``benchmarks``) and whole frames (``foresight``) are sources of
sequences: each opens what it needs and hands over an ``Evaluation``. What becomes of its sums is here and in
``statistics``.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltacache.evaluate import output
from deltacache.evaluate.metrics import MetricsOf, metrics_of
from deltacache.evaluate.output import ModelRecord, RunStamp
from deltacache.evaluate.settings import EvaluationSettings
from deltacache.evaluate.statistics import Series, Statistic, TableWriter
from deltacache.pipeline.storage.locking import dataset_lock
from deltacache.schemas.configs import save_config
from deltacache.schemas.foresight import ForesightEvaluation
from deltacache.schemas.hub import origins_within
from deltacache.schemas.progress import Reporter


@dataclass(frozen=True)
class Evaluation:
    """A source of sequences that has been opened and checked; nothing is computed or written yet.

    Attributes:
        settings: with ``auto`` resolved.
        run_id: follows from what the numbers follow from: not from paths, the workers, the device or the clock.
        notes: what a reader of the numbers should know, in words: for the terminal, ``notes.json`` and the report.
        record: what ``models.json`` says.
        stamp: columns that all rows of a data set (its name) share.
        samples_of: how many futures of each sequence a method (its name) has.
        score: sums of all sequences, part by part; some sequences are kept for the report in the folder it is given.
        counts: how much there is to score, in words, for the terminal alone.
        prepare: what is done before the tables are begun and outlives a killed run.
        redo_pictures: makes the pictures of a finished evaluation again, where it lacks those that are asked for.
        finish: writes what belongs to this source alone, just before the metrics.
        discard: removes what only an unfinished evaluation needs.
        order: to sort rows by; where it is always the same they stay as they were scored.
        metrics_of: a task's metrics from sums.
        command: as messages name it.
    """

    settings: EvaluationSettings | ForesightEvaluation
    run_id: str
    notes: Sequence[str]
    record: ModelRecord
    stamp: Callable[[str], RunStamp]
    samples_of: Callable[[str], int]
    score: Callable[[Path, Reporter], Iterator[Iterable[Statistic]]]
    counts: Sequence[str] = ()
    prepare: Callable[[Reporter], None] | None = None
    redo_pictures: Callable[[Reporter], None] | None = None
    finish: Callable[[], None] | None = None
    discard: Callable[[], None] | None = None
    order: Callable[[Series], Any] = lambda _: 0
    metrics_of: MetricsOf = metrics_of
    command: str = "evaluate"


def run_evaluation(out: Path, open_source: Callable[[], Evaluation], reporter: Reporter) -> Path:
    """Write ``metrics.parquet`` and what belongs to it, and return its path.

    An evaluation that is there already, of the same data, models and settings, is left alone.

    Raises:
        DatasetError: ``out`` holds something else, or another command writes to it; and what ``open_source`` raises.
        OtherEvaluationError: it holds another evaluation.
        NotFiniteError: features or a prediction are not finite.
    """
    metrics = out / output.METRICS
    earlier = output.finished_run(out)
    source = open_source()
    finished = output.is_finished(out, earlier, source.run_id)
    if finished and source.redo_pictures is None:
        reporter.line(f"{source.command}: {metrics} holds this evaluation already ({earlier})")
        return metrics
    with dataset_lock(out, source.command):
        if not output.is_finished(out, output.finished_run(out), source.run_id):
            write_evaluation(out, source, reporter)
        elif source.redo_pictures is not None:  # and not another command that was faster
            reporter.line(f"{source.command}: {metrics} already holds these numbers: only pictures are made")
            source.redo_pictures(reporter)
            (out / output.REPORT).unlink(missing_ok=True)
            save_config(source.settings, out / output.CONFIG)
            output.write_models(out, source.record, origins_within(source.settings.model_dump()))
    return metrics


def write_evaluation(out: Path, source: Evaluation, reporter: Reporter) -> None:
    """Score, and write everything that belongs to a finished evaluation; the metrics come last."""
    for line in (*source.counts, *source.notes):
        reporter.line(f"{source.command}: {line}")
    if source.prepare is not None:
        source.prepare(reporter)
    for stale in output.TABLES:
        (out / stale).unlink(missing_ok=True)
    tables = TableWriter(out, source.stamp, source.samples_of, source.metrics_of)
    with output.new_folder(out / output.EXAMPLES) as examples, tables:
        for statistics in source.score(examples, reporter):
            tables.add(statistics)
    settings = source.settings
    output.keep_curves(out, settings.tokenizers, source.record.worlds, settings.worlds)
    save_config(settings, out / output.CONFIG)
    output.write_notes(out, source.notes)
    output.write_models(out, source.record, origins_within(source.settings.model_dump()))
    if source.finish is not None:
        source.finish()
    tables.finish(source.order)
    if source.discard is not None:
        source.discard()
