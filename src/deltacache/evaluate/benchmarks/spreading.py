"""Items of work done in this process, or on the processes of a cluster."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, Protocol

import torch

from deltacache.evaluate.benchmarks.opening import Inputs
from deltacache.evaluate.benchmarks.run import BenchmarkRun
from deltacache.evaluate.benchmarks.timing import Advance
from deltacache.evaluate.settings import BenchmarkEvaluation
from deltacache.pipeline.cluster import run_tasks

_MOST_THREADS = 16


def frame_threads(settings: BenchmarkEvaluation) -> int:
    """That read frames, of one process."""
    return max(1, min(_MOST_THREADS, os.cpu_count() or 1) // (settings.workers or 1))


class WorkerBuilder(Protocol):
    """How a worker is built: from loaded models, with whom it tells of sequences, or on its own process."""

    def worker(self, inputs: Inputs, advance: Advance) -> Any: ...

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
