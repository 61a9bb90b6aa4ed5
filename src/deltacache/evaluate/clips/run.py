"""``evaluate --data clips=FEATURES``: feature-space metrics on a feature dataset, without labels.

The first ``context`` frames of a clip are seen; the target of horizon h is frame ``context + h - 1``,
counted from 0. The published benchmarks end on a labelled frame instead.
"""

import time
from pathlib import Path

import pyarrow as pa

from deltacache.evaluate import output
from deltacache.evaluate.benchmarks.statistics import statistics_table
from deltacache.evaluate.clips.opening import Run, open_run
from deltacache.evaluate.clips.scoring import ClipScores, score_batch
from deltacache.evaluate.clips.sequences import read_batches
from deltacache.evaluate.model_record import write_models
from deltacache.evaluate.pooling import pool, pooled_rows, sequence_rows
from deltacache.evaluate.rows import RunStamp, metric_table, sequence_table, write_table
from deltacache.evaluate.settings import ClipEvaluation
from deltacache.pipeline.storage.locking import dataset_lock
from deltacache.schemas.configs import save_config
from deltacache.schemas.progress import Reporter
from deltacache.schemas.tables import METRICS_SCHEMA, SEQUENCES_SCHEMA


def evaluate_clips(settings: ClipEvaluation, reporter: Reporter) -> Path:
    """Write ``metrics.parquet``, ``sequences.parquet`` and what the report needs; returns the former's path.

    An evaluation that is there already, of the same data, models and settings, is left alone.

    Raises:
        DatasetError: the features or the futures file are missing or damaged, or ``out`` holds other things.
        CheckpointError: a model is missing or damaged.
        MismatchError: models, features, settings or futures that do not belong together.
    """
    metrics = settings.out / output.METRICS
    earlier = output.finished_run(settings.out)
    run = open_run(settings)
    if output.is_finished(settings.out, earlier, run.stamp.run_id):
        reporter.line(f"evaluate: {metrics} holds this evaluation already ({earlier})")
        return metrics
    for note in run.notes:
        reporter.line(f"evaluate: {note}")
    with dataset_lock(settings.out, "evaluate"):
        output.is_finished(settings.out, output.finished_run(settings.out), run.stamp.run_id)
        with output.new_folder(settings.out / output.EXAMPLES) as examples:
            scores = score_clips(run, examples, reporter)
            for stale in output.TABLES:
                (settings.out / stale).unlink(missing_ok=True)
        _write(run, scores)
    return metrics


def score_clips(run: Run, examples: Path, reporter: Reporter) -> ClipScores:
    """Score all sequences; some are kept in the folder ``examples``."""
    count = len(run.sequences.rows)
    scores = ClipScores()
    started = time.perf_counter()
    reading_s = 0.0
    with reporter.stage("evaluate", count) as stage:
        batches = read_batches(run.dataset, run.sequences, run.protocol.frames, run.device)
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            reading_s += time.perf_counter() - asked
            if batch is None:
                break
            score_batch(run, batch, examples, scores)
            stage.advance(len(batch.rows))
    elapsed_s = time.perf_counter() - started
    share = reading_s / elapsed_s
    reporter.line(
        f"evaluate: {count} sequences, {count / elapsed_s:.2f} sequences/s over {elapsed_s:.1f} s, "
        f"{100 * share:.0f} % of it reading; limit: {'reading' if share > 0.5 else 'the models'}"
    )
    return scores


def _write(run: Run, found: ClipScores) -> None:
    """The metrics come last: a folder with them is finished."""
    out, settings = run.settings.out, run.settings
    worlds = [world.method.world for world in run.models.worlds]
    output.keep_curves(out, settings.tokenizers, worlds, settings.worlds)
    save_config(settings, out / output.CONFIG)
    write_models(out, run.record)
    output.write_notes(out, run.notes)
    write_table(clip_sequences(found, run.stamp), out / output.SEQUENCES)
    write_table(statistics_table(found.statistics), out / output.STATISTICS)
    write_table(metric_table(found.by_count, run.stamp), out / output.SAMPLES)
    write_table(clip_metrics(found, run.stamp), out / output.METRICS)


def clip_sequences(found: ClipScores, stamp: RunStamp) -> pa.Table:
    """All rows of ``sequences.parquet``."""
    alone = [row for statistic in found.statistics for row in sequence_rows(statistic, stamp)]
    return pa.concat_tables(
        [sequence_table(found.scores, stamp), pa.Table.from_pylist(alone, schema=SEQUENCES_SCHEMA)]
    )


def clip_metrics(found: ClipScores, stamp: RunStamp) -> pa.Table:
    """All rows of ``metrics.parquet``: means over sequences, and what pools from sums."""
    pooled = list(pooled_rows(pool(found.statistics), lambda _: stamp))
    return pa.concat_tables(
        [metric_table(found.scores, stamp), pa.Table.from_pylist(pooled, schema=METRICS_SCHEMA)]
    )
