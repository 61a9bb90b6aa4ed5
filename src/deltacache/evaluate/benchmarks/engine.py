"""``evaluate --data vspw=DIR ...``: the published benchmarks, streamed block by block.

Nothing but sums is kept of a block, so memory does not grow with the benchmark; finished blocks are on disk, so a
killed run goes on; and what a block gives depends on its sequences alone, so any number of processes gives one table.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from deltacache.evaluate import output
from deltacache.evaluate.benchmarks.blocks import Parts
from deltacache.evaluate.benchmarks.cached import CacheWorkerPlan, plan_caches
from deltacache.evaluate.benchmarks.opening import Inputs
from deltacache.evaluate.benchmarks.run import BenchmarkRun, open_benchmarks
from deltacache.evaluate.benchmarks.tables import write_tables
from deltacache.evaluate.benchmarks.timing import Timing
from deltacache.evaluate.benchmarks.worker import WorkerPlan
from deltacache.evaluate.settings import BenchmarkEvaluation
from deltacache.pipeline.cluster import run_tasks
from deltacache.pipeline.dataset import finish_dataset, finished_shards, prepare_dataset, write_plan
from deltacache.pipeline.locking import dataset_lock
from deltacache.pipeline.plan import plan_of
from deltacache.schemas.benchmarks import BenchmarkName
from deltacache.schemas.errors import DatasetError
from deltacache.schemas.progress import Reporter

_MOST_THREADS = 16


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
    if earlier == run.run_id:
        reporter.line(f"evaluate: {metrics} holds this evaluation already ({earlier})")
        return metrics
    if earlier is not None:
        raise DatasetError(
            f"{settings.out} holds another evaluation ({earlier}; this one is {run.run_id}): "
            "its tables are not overwritten; choose another folder"
        )
    for note in run.notes:
        reporter.line(f"evaluate: {note}")
    parts = Parts(settings.out, run.run_id)
    parts.prepare()
    caches = _fill_caches(run, reporter) if settings.cache else {}
    _score(run, parts, caches, reporter)
    write_tables(run, parts, reporter)
    return metrics


def _score(
    run: BenchmarkRun, parts: Parts, caches: dict[tuple[BenchmarkName, int], str], reporter: Reporter
) -> None:
    """Do the blocks that are missing."""
    missing = [block for block in run.blocks if not parts.has(block)]
    left = sum(len(block.sequences) for block in missing)
    plan = WorkerPlan(run.settings, caches, _threads(run.settings))
    timing, started = Timing(), time.perf_counter()
    with reporter.stage("evaluate", run.sequence_count, done=run.sequence_count - left) as stage:
        for block, result in _spread_out(run, missing, plan):
            parts.write(block, result)
            timing.add(result.timing)
            stage.advance(len(block.sequences), waiting=f"{100 * timing.waiting_share:.0f} %")
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
            worker = CacheWorkerPlan(run.settings, _threads(run.settings))
            with reporter.stage(f"cache {plan.benchmark}", total, done=total - left) as stage:
                for _, sequences in _spread_out(run, missing, worker):
                    stage.advance(sequences)
            finish_dataset(plan.root)
        places[plan.benchmark, plan.frames] = str(plan.root)
    return places


def _threads(settings: BenchmarkEvaluation) -> int:
    """That read frames, of one process."""
    return max(1, min(_MOST_THREADS, os.cpu_count() or 1) // (settings.workers or 1))


class _Plan(Protocol):
    """How a worker is built: from loaded models, or on its own process."""

    def worker(self, inputs: Inputs) -> Any: ...

    def build(self, device: str) -> Any: ...


def _spread_out(run: BenchmarkRun, items: Sequence[Any], plan: _Plan) -> Iterator[tuple[Any, Any]]:
    """Each item with its result, as it is done: in this process, or on ``workers`` of them."""
    if run.settings.workers is not None:
        for position, result in run_tasks(plan.build, items, run.settings.workers, run.settings.ray_address):
            yield items[position], result
        return
    worker = plan.worker(run.inputs)
    try:
        with _one_thread(run.inputs.device):
            for at, item in enumerate(items):
                yield item, worker.run(item, items[at + 1 : at + 2])
    finally:
        worker.close()


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU sums depend on the number of threads: one, as on the processes of a cluster."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
