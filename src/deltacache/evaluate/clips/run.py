"""``evaluate --data clips=FEATURES``: feature-space metrics on a feature dataset, without labels.

The first ``context`` frames of a clip are seen; the target of horizon h is frame ``context + h - 1``,
counted from 0. The published benchmarks end on a labelled frame instead.
"""

import time
from collections.abc import Iterator
from pathlib import Path

from deltacache.evaluate import output
from deltacache.evaluate.clips.opening import Run, open_run
from deltacache.evaluate.clips.scoring import score_batch
from deltacache.evaluate.clips.sequences import read_batches
from deltacache.evaluate.model_record import write_models
from deltacache.evaluate.pooling import TableWriter
from deltacache.evaluate.settings import ClipEvaluation
from deltacache.evaluate.statistics import Statistic
from deltacache.pipeline.storage.locking import dataset_lock
from deltacache.schemas.configs import save_config
from deltacache.schemas.progress import Reporter


def evaluate_clips(settings: ClipEvaluation, reporter: Reporter) -> Path:
    """Write ``metrics.parquet``, ``sequences.parquet`` and what the report needs; returns the former's path.

    An evaluation that is there already, of the same data, models and settings, is left alone.

    Raises:
        DatasetError: the features or the futures file are missing or damaged, or ``out`` holds other things.
        CheckpointError: a model is missing or damaged.
        MismatchError: models, features, settings or futures that do not belong together.
        NotFiniteError: features or a prediction are not finite.
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
        for stale in output.TABLES:
            (settings.out / stale).unlink(missing_ok=True)
        tables = TableWriter(settings.out, lambda _: run.stamp, run.samples_of)
        with output.new_folder(settings.out / output.EXAMPLES) as examples, tables:
            for statistics in score_clips(run, examples, reporter):
                tables.add(statistics)
        output.keep_curves(settings.out, settings.tokenizers, run.world_fingerprints, settings.worlds)
        save_config(settings, settings.out / output.CONFIG)
        write_models(settings.out, run.record)
        output.write_notes(settings.out, run.notes)
        tables.finish(lambda _: 0)
    return metrics


def score_clips(run: Run, examples: Path, reporter: Reporter) -> Iterator[Iterator[Statistic]]:
    """Sums of all sequences, a few sequences at a time; some are kept in the folder ``examples``."""
    count = len(run.sequences.rows)
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
            yield score_batch(run, batch, examples)
            stage.advance(len(batch.rows))
    elapsed_s = time.perf_counter() - started
    share = reading_s / elapsed_s
    reporter.line(
        f"evaluate: {count} sequences, {count / elapsed_s:.2f} sequences/s over {elapsed_s:.1f} s, "
        f"{100 * share:.0f} % of it reading; limit: {'reading' if share > 0.5 else 'the models'}"
    )
