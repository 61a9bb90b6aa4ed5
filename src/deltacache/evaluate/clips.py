"""``evaluate --data clips=FEATURES``: feature-space metrics on a feature dataset, without labels.

The first ``context`` frames of a clip are seen; the target of horizon h is frame ``context + h - 1``,
counted from 0. The published benchmarks end on a labelled frame instead.
"""

import time
from pathlib import Path

from deltacache.evaluate import output
from deltacache.evaluate.opening import Run, open_run
from deltacache.evaluate.rows import Score, metric_table, sequence_table, write_table
from deltacache.evaluate.scoring import score_batch
from deltacache.evaluate.sequences import read_batches
from deltacache.evaluate.settings import ClipEvaluation
from deltacache.schemas.configs import save_config
from deltacache.schemas.errors import DatasetError
from deltacache.schemas.progress import Reporter


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
    if earlier == run.stamp.run_id:
        reporter.line(f"evaluate: {metrics} holds this evaluation already ({earlier})")
        return metrics
    if earlier is not None:
        raise DatasetError(
            f"{settings.out} holds another evaluation ({earlier}; this one is {run.stamp.run_id}): "
            "its tables are not overwritten; choose another folder"
        )
    for note in run.notes:
        reporter.line(f"evaluate: {note}")
    settings.out.mkdir(parents=True, exist_ok=True)
    with output.new_folder(settings.out / output.EXAMPLES) as examples:
        scores = _score(run, examples, reporter)
        for stale in (output.METRICS, output.SEQUENCES, output.REPORT):
            (settings.out / stale).unlink(missing_ok=True)
    _write(run, scores)
    return metrics


def _score(run: Run, examples: Path, reporter: Reporter) -> list[Score]:
    count = len(run.sequences.rows)
    scores: list[Score] = []
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
            scores.extend(score_batch(run, batch, examples))
            stage.advance(len(batch.rows))
    elapsed_s = time.perf_counter() - started
    share = reading_s / elapsed_s
    reporter.line(
        f"evaluate: {count} sequences, {count / elapsed_s:.2f} sequences/s over {elapsed_s:.1f} s, "
        f"{100 * share:.0f} % of it reading; limit: {'reading' if share > 0.5 else 'the models'}"
    )
    return scores


def _write(run: Run, scores: list[Score]) -> None:
    """The metrics come last: a folder with them is finished."""
    out, settings = run.settings.out, run.settings
    models = [("tokenizer", settings.tokenizer)] if settings.tokenizer else []
    named = [
        (world.method.world or "", path)
        for world, path in zip(run.models.worlds, settings.worlds, strict=True)
    ]
    output.keep_curves(out, [*models, *named])
    save_config(settings, out / output.CONFIG)
    output.write_notes(out, run.notes)
    write_table(sequence_table(scores, run.stamp), out / output.SEQUENCES)
    write_table(metric_table(scores, run.stamp), out / output.METRICS)
