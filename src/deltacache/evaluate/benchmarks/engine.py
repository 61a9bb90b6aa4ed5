"""``evaluate --data vspw=DIR ...``: the published benchmarks, streamed block by block.

Nothing but sums is kept of a block, so memory does not grow with the benchmark; finished blocks are on disk, so a
killed run goes on; and what a block gives depends on its sequences alone, so any number of processes gives one table.
"""

import time
from pathlib import Path

from deltacache.evaluate import output
from deltacache.evaluate.benchmarks.blocks import Parts
from deltacache.evaluate.benchmarks.cached import CacheWorkerPlan, plan_caches
from deltacache.evaluate.benchmarks.redoing import lacks_pictures, redo_pictures
from deltacache.evaluate.benchmarks.run import BenchmarkRun, open_benchmarks
from deltacache.evaluate.benchmarks.spreading import frame_threads, spread_out
from deltacache.evaluate.benchmarks.tables import write_tables
from deltacache.evaluate.benchmarks.timing import Timing
from deltacache.evaluate.benchmarks.worker import WorkerPlan
from deltacache.evaluate.settings import BenchmarkEvaluation
from deltacache.pipeline.datasets.dataset import finish_dataset, finished_shards, prepare_dataset, write_plan
from deltacache.pipeline.datasets.plan import plan_of
from deltacache.pipeline.storage.locking import dataset_lock
from deltacache.schemas.benchmarks import BenchmarkName
from deltacache.schemas.progress import Reporter


def evaluate_benchmarks(settings: BenchmarkEvaluation, reporter: Reporter) -> Path:
    """Write ``metrics.parquet`` and what belongs to it; returns its path.

    Raises:
        DatasetError: a benchmark is incomplete or damaged, or ``out`` holds other things.
        CheckpointError: a model is missing or damaged.
        MismatchError: models that do not belong together, or to the benchmark.
    """
    earlier = output.finished_run(settings.out)
    run = open_benchmarks(settings)
    metrics = settings.out / output.METRICS
    if output.is_finished(settings.out, earlier, run.run_id) and not lacks_pictures(run):
        reporter.line(f"evaluate: {metrics} holds this evaluation already ({earlier})")
        return metrics
    with dataset_lock(settings.out, "evaluate"):
        if output.is_finished(settings.out, output.finished_run(settings.out), run.run_id):
            redo_pictures(run, _worker_plan(run, reporter), reporter)
            return metrics
        for line in (*run.counts, *run.notes):
            reporter.line(f"evaluate: {line}")
        parts = Parts(settings.out, run.parts_id)
        parts.prepare()
        _score(run, parts, _worker_plan(run, reporter), reporter)
        write_tables(run, parts, reporter)
    return metrics


def _worker_plan(run: BenchmarkRun, reporter: Reporter) -> WorkerPlan:
    caches = _fill_caches(run, reporter) if run.settings.cache else {}
    return WorkerPlan(run.settings, caches, run.generated, frame_threads(run.settings))


def _score(run: BenchmarkRun, parts: Parts, plan: WorkerPlan, reporter: Reporter) -> None:
    """Do the blocks that are missing."""
    missing = [block for block in run.blocks if not parts.has(block)]
    left = sum(len(block.sequences) for block in missing)
    timing, started = Timing(), time.perf_counter()
    with reporter.stage("evaluate", run.sequence_count, done=run.sequence_count - left) as stage:
        for block, result in spread_out(run, missing, plan, stage.advance, reporter.line):
            parts.write(block, result)
            timing.add(result.timing)
            stage.advance(0, waiting=f"{100 * timing.waiting_share:.0f} %")
    if missing:
        rate = timing.sequences / (time.perf_counter() - started)
        reporter.line(
            f"evaluate: {timing.sequences} sequences, {rate:.2f} sequences/s, "
            f"{100 * timing.waiting_share:.0f} % of the workers' time waiting for frames; {timing}"
        )


def _fill_caches(run: BenchmarkRun, reporter: Reporter) -> dict[tuple[BenchmarkName, int], str]:
    """Compute the patch tokens that the cache lacks; returns where each dataset lies."""
    places = {}
    for plan in plan_caches(run.settings, run.inputs, run.sequences):
        with dataset_lock(plan.root, "evaluate --cache"):
            prepare_dataset(plan.root, plan.card, run.inputs.black)
            write_plan(plan.root, plan_of(task for task, _ in plan.shards))
            missing = plan.work(plan.shard_ids - finished_shards(plan.root))
            total = sum(len(sequences) for _, sequences in plan.shards)
            left = sum(len(shard.sequences) for shard in missing)
            worker = CacheWorkerPlan(run.settings, frame_threads(run.settings))
            with reporter.stage(f"cache {plan.benchmark}", total, done=total - left) as stage:
                for _ in spread_out(run, missing, worker, stage.advance, reporter.line):
                    pass
            finish_dataset(plan.root)
        places[plan.benchmark, plan.frames] = str(plan.root)
    return places
