"""``evaluate --data vspw=DIR ...``: the published benchmarks, streamed block by block.

Nothing but sums is kept of a block, so memory does not grow with the benchmark; finished blocks are on disk, so a
killed run goes on; and what a block gives depends on its sequences alone, so any number of processes gives one table.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from deltacache.evaluate import output
from deltacache.evaluate.benchmarks.benchmark_inputs import BenchmarkInputs
from deltacache.evaluate.benchmarks.cached import CacheWorkerPlan, plan_caches
from deltacache.evaluate.benchmarks.run import BenchmarkRun, FinishedBlocks, open_benchmarks
from deltacache.evaluate.benchmarks.sampling import Advance, Timing
from deltacache.evaluate.benchmarks.worker import WorkerPlan
from deltacache.evaluate.clips.run import score_clips
from deltacache.evaluate.evaluation import Evaluation, run_evaluation
from deltacache.evaluate.output import RunStamp, read_models
from deltacache.evaluate.settings import BenchmarkEvaluation
from deltacache.evaluate.statistics import Series, Statistic, reading_order, statistics_of
from deltacache.pipeline.cluster.tasks import run_tasks
from deltacache.pipeline.datasets.dataset import finish_dataset, finished_shards, prepare_dataset, write_plan
from deltacache.pipeline.datasets.plan import plan_of
from deltacache.pipeline.storage.files import replacing
from deltacache.pipeline.storage.locking import dataset_lock
from deltacache.schemas.benchmarks import BenchmarkName
from deltacache.schemas.progress import Reporter
from deltacache.schemas.texts import counted

# ----------------------------------------------------------------------------------------------------
# Items of work done in this process, or on the processes of a cluster.
# ----------------------------------------------------------------------------------------------------


_MOST_THREADS = 16


def frame_threads(settings: BenchmarkEvaluation) -> int:
    """That read frames, of one process."""
    return max(1, min(_MOST_THREADS, os.cpu_count() or 1) // (settings.workers or 1))


class WorkerBuilder(Protocol):
    """How a worker is built: from loaded models, with whom it tells of sequences, or on its own process."""

    def worker(self, inputs: BenchmarkInputs, advance: Advance) -> Any: ...

    def build(self, device: str) -> Any: ...


def spread_out(
    run: BenchmarkRun,
    items: Sequence[Any],
    plan: WorkerBuilder,
    advance: Advance,
    say: Callable[[str], None],
) -> Iterator[tuple[Any, Any]]:
    """Each item with its result, as it is done: in this process, or on ``workers`` of them.

    Args:
        advance: told how many sequences are done: in this process as they are, of other processes item by item.
        say: hears which cluster does the work, and what is waited for.
    """
    if run.settings.workers is not None:
        tasks = run_tasks(
            plan.build,
            items,
            run.settings.workers,
            run.settings.ray_address,
            wait_s=run.settings.wait_for_nodes_s,
            say=say,
        )
        with closing(tasks):
            for position, result in tasks:
                advance(len(items[position].sequences))
                yield items[position], result
        return
    worker = plan.worker(run.inputs, advance)
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


# ----------------------------------------------------------------------------------------------------
# Pictures of a finished evaluation made again, with a decoder of pictures that it did not have.
# ----------------------------------------------------------------------------------------------------


def lacks_pictures(run: BenchmarkRun) -> bool:
    """Whether a decoder is given that did not make the pictures that are there."""
    decoder, recorded = run.inputs.rgb_fingerprint, read_models(run.settings.out)
    return decoder is not None and (recorded is None or recorded.rgb_decoder != decoder)


def redo_pictures(run: BenchmarkRun, plan: WorkerPlan, reporter: Reporter) -> None:
    """Write the examples of benchmarks again; the tables and what else is there stay."""
    out = run.settings.out
    blocks = [
        replace(
            block, sequences=tuple(each for each in block.sequences if each.sequence_id in block.examples)
        )
        for block in run.blocks
        if block.examples
    ]
    with (
        output.new_folder(out / output.EXAMPLES) as folder,
        reporter.stage("pictures", sum(len(block.sequences) for block in blocks)) as stage,
    ):
        if (out / output.EXAMPLES).exists():
            shutil.copytree(out / output.EXAMPLES, folder, dirs_exist_ok=True)
        for _, result in spread_out(run, blocks, plan, stage.advance, reporter.line):
            for name, content in result.examples.items():
                (folder / name).write_bytes(content)


# ----------------------------------------------------------------------------------------------------
# From the blocks' sums to the tables. What grows with the benchmark is read and written block by block.
# ----------------------------------------------------------------------------------------------------


def _sums(
    run: BenchmarkRun, parts: FinishedBlocks, examples: Path, reporter: Reporter
) -> Iterator[Iterable[Statistic]]:
    """Of all finished blocks, and of the feature dataset that goes into the same tables."""
    for block in run.blocks:
        for path in parts.examples(block):
            (examples / path.name).write_bytes(path.read_bytes())
        yield statistics_of(parts.statistics(block))
    if run.clips is not None:
        yield from score_clips(run.clips, examples, reporter)


def _stamp(run: BenchmarkRun, dataset: str) -> RunStamp:
    """Of a benchmark, or of the feature dataset under the id of the whole run."""
    if run.clips is None or dataset in run.sequences:
        return run.stamp(dataset)
    return replace(run.clips.stamp, run_id=run.run_id, created_at=run.created_at)


def _order(run: BenchmarkRun, series: Series) -> tuple[object, ...]:
    """Data sets as they were given, and within them ``reading_order``; a feature dataset as it was scored, last."""
    datasets = [str(name) for name in run.sequences]
    if series.dataset not in datasets:
        return (len(datasets),)
    worlds = [world.method.world for world in run.inputs.models.worlds]
    world = series.method.world
    return (
        datasets.index(series.dataset),
        *reading_order(series),
        worlds.index(world) if world else -1,
        series.aggregation,
        series.num_samples,
        series.horizon,
    )


def _write_timing(run: BenchmarkRun, parts: FinishedBlocks) -> None:
    """``timing.json``: seconds by part and peaks of memory, of all blocks."""
    timing = Timing()
    for block in run.blocks:
        timing.add(parts.timing(block))
    with replacing(run.settings.out / output.TIMING) as temporary:
        temporary.write_text(json.dumps(asdict(timing) | {"waiting_share": timing.waiting_share}, indent=2))


def evaluate_benchmarks(settings: BenchmarkEvaluation, reporter: Reporter) -> Path:
    """Write ``metrics.parquet`` and what belongs to it; returns its path.

    Raises:
        DatasetError: a benchmark is incomplete or damaged, or ``out`` holds other things.
        CheckpointError: a model is missing or damaged.
        MismatchError: models that do not belong together, or to the benchmark.
    """

    def open_source() -> Evaluation:
        run = open_benchmarks(settings)
        parts = FinishedBlocks(settings.out, run.parts_id)

        def score_blocks(reporter: Reporter) -> None:
            parts.prepare()
            _score(run, parts, _worker_plan(run, reporter), reporter)

        def redo(reporter: Reporter) -> None:
            redo_pictures(run, _worker_plan(run, reporter), reporter)

        return Evaluation(
            settings=run.settings,
            run_id=run.run_id,
            notes=run.notes,
            record=run.models,
            stamp=lambda dataset: _stamp(run, dataset),
            samples_of=run.samples_of,
            score=lambda examples, reporter: _sums(run, parts, examples, reporter),
            counts=run.counts,
            prepare=score_blocks,
            redo_pictures=redo if lacks_pictures(run) else None,
            finish=lambda: _write_timing(run, parts),
            discard=parts.remove,
            order=lambda series: _order(run, series),
        )

    return run_evaluation(settings.out, open_source, reporter)


def _worker_plan(run: BenchmarkRun, reporter: Reporter) -> WorkerPlan:
    caches = _fill_caches(run, reporter) if run.settings.cache else {}
    return WorkerPlan(run.settings, caches, run.generated, frame_threads(run.settings))


def _score(run: BenchmarkRun, parts: FinishedBlocks, plan: WorkerPlan, reporter: Reporter) -> None:
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
            f"evaluate: {counted(timing.sequences, 'sequence')}, {rate:.2f} sequences/s, "
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
