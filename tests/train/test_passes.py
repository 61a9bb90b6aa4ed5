"""An effective batch is cut into the largest passes that fit, and into smaller ones when memory runs out."""

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from cases import Case

from deltacache.models.deltatok import DeltaTok
from deltacache.models.devices import free_bytes
from deltacache.models.flops import LivingStorages
from deltacache.models.worlds.deltaworld import DeltaWorld
from deltacache.schemas.errors import DeltacacheError
from deltacache.train.checkpoints import finished_checkpoints
from deltacache.train.loop import Meter, _gradients
from deltacache.train.order import MicroBatch, Split
from deltacache.train.passes import (
    CutBatches,
    PassCost,
    describe_split,
    describe_time,
    fitting_split,
    measure_passes,
)
from deltacache.train.tokenizer import TokenizerTask
from deltacache.train.workers.group import SingleProcess
from deltacache.train.world import WorldTask
from reporters import Lines
from warm_process import start_script

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GIB = 2**30


def limited(monkeypatch: pytest.MonkeyPatch, most: int, from_step: int = 0) -> list[MicroBatch]:
    """Passes of more than ``most`` samples run out of memory from ``from_step`` on; returns those that did."""
    refused: list[MicroBatch] = []
    for task in (TokenizerTask, WorldTask):
        original = task.training_loss

        def scarce(self: Any, batch: Any, part: MicroBatch, original: Any = original) -> Any:
            if part.step >= from_step and part.stop - part.start > most:
                refused.append(part)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return original(self, batch, part)

        monkeypatch.setattr(task, "training_loss", scarce)
    return refused


def passes_of(checkpoint: Path) -> int:
    return json.loads((checkpoint / "config.json").read_text())["samples_per_pass"]


@pytest.mark.parametrize(
    ("free", "expected"),
    [(1000, (1024, 1)), (119, (1024, 1)), (118, (512, 2)), (14.5, (64, 16)), (4.6, (1, 1024))],
)
def test_the_largest_pass_that_fits(free: float, expected: tuple[int, int]) -> None:
    cost = PassCost(4 * GIB, GIB // 10, 0.01, int(free * GIB))
    split = fitting_split(cost, Split(1024), SingleProcess(), CUDA)
    assert (split.batch_size, split.accumulation) == expected
    assert split.effective_batch == 1024
    said = describe_split(cost, split, CUDA)
    assert said.startswith(
        f"effective batch 1,024 (batch {expected[0]:,} x accumulation {expected[1]:,} x workers 1)"
    )
    assert said.endswith(f"of the {free:,g} GiB that are free on cuda")
    assert describe_time(1024, 100) == "at most about 17 min for 100 steps"


def test_one_sample_that_does_not_fit_is_refused() -> None:
    with pytest.raises(DeltacacheError, match=r"one sample takes 4\.1 GiB .* smaller model or image size"):
        fitting_split(PassCost(4 * GIB, GIB // 10, 0.01, 4 * GIB), Split(1024), SingleProcess(), CUDA)


def test_workers_take_the_size_of_the_one_with_the_least_room() -> None:
    class Beside(SingleProcess):
        """Another worker has room for 12 samples."""

        def any(self, flag: bool) -> bool:
            size, self.asked = self.sizes[self.asked], self.asked + 1
            return flag or (size is not None and size > 12)

    group = Beside()
    group.sizes, group.asked = [None, 96, 48, 32, 24, 16, 12], 0
    split = fitting_split(PassCost(0, 1, 0.01, 1000), Split(96, 1, 2, 1), group, CUDA)
    assert (split.batch_size, split.accumulation, split.workers, split.rank) == (12, 8, 2, 1)


@pytest.mark.parametrize(("device", "size"), [(CPU, 16), (CUDA, 32)])
def test_workers_on_one_cpu_share_its_memory(device: torch.device, size: int) -> None:
    split = fitting_split(
        PassCost(0, GIB, 0.01, 70 * GIB), Split(32), SingleProcess(3, on_this_node=3), device
    )
    assert split.batch_size == size


class Drawn:
    """A task of random tokens, to compare measured passes with a large one."""

    divisible = True

    def __init__(self, kind: str) -> None:
        self._kind = kind
        torch.manual_seed(0)
        self.model: Any = (
            DeltaTok(64, num_heads=4, encoder_layers=2, decoder_layers=2)
            if kind == "tokenizer"
            else DeltaWorld(64, num_heads=4, num_layers=3)
        )

    def batches(self, parts: Iterable[MicroBatch]) -> Iterator[Any]:
        for part in parts:
            size = part.stop - part.start
            yield torch.randn(2, size, 64, 64) if self._kind == "tokenizer" else torch.randn(size, 8, 64)

    trial_batches = batches

    def bytes_to_load(self, device: torch.device) -> int:
        return 0

    def training_loss(self, batch: Any, part: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(0)
        if self._kind == "tokenizer":
            return self.model.training_loss(*batch, (8, 8), "log_cosh", generator=generator).loss, {}
        times = torch.arange(8.0).expand(len(batch), -1)
        kinds = {"grid": (8, 8), "candidates": 32, "beta": 0.1, "generator": generator}
        return self.model.training_loss(batch, times, **kinds).loss, {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tokenizer", "world"])
def test_small_passes_foretell_the_peak_of_a_large_one(kind: str) -> None:
    task = Drawn(kind)
    cost = measure_passes(task, 96, CPU)
    assert all(weight.grad is None for weight in task.model.parameters())
    part = MicroBatch(0, 0, 96)
    batch = next(task.batches([part]))
    weights = sum(weight.nbytes for weight in task.model.parameters())
    with LivingStorages([*task.model.parameters(), batch]) as storages:
        task.training_loss(batch, part)[0].backward()
    peak, moments = storages.peak - weights, 2 * weights  # weights are there before
    there = measure_passes(task, 96, CPU, moments_there=True)  # of a resumed run: they are not free any more
    assert cost.fixed_bytes - there.fixed_bytes == pytest.approx(moments, rel=0.1)
    assert 0.7 * cost.bytes_of(96) <= peak + moments <= 1.1 * cost.bytes_of(96)
    # One sample: what it computes, gradients and moments, and no weights.
    assert cost.bytes_of(1) < 0.1 * peak + weights + moments


@pytest.mark.slow
def test_memory_runs_out_and_the_step_is_done_again_in_smaller_passes(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"steps": 6, "batch_size": 12, "log_every": 1, "save_every": 4}
    whole = case.run(tmp_path / "whole", **training)
    reporter = Lines()
    with monkeypatch.context() as patched:
        refused = limited(patched, most=4, from_step=2)
        cut = case.run(tmp_path / "cut", reporter=reporter, **training)
    assert refused == [MicroBatch(2, 0, 12), MicroBatch(2, 0, 6)]
    assert [line for line in reporter.said if "out of memory" in line] == [
        f"train {case.kind}: out of memory in step 3, now 12 (batch {size} x accumulation {12 // size} x workers 1)"
        for size in (6, 3)
    ]
    losses = [
        pq.read_table(tmp_path / name / "curves.parquet")["loss"].to_pylist() for name in ("whole", "cut")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=2e-5)
    assert (passes_of(whole), passes_of(cut)) == (12, 3)


@pytest.mark.slow
def test_a_resumed_run_keeps_its_passes(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = {"steps": 4, "batch_size": 12, "save_every": 2}
    moments_there: list[bool] = []

    def measured(*given: Any, **options: bool) -> PassCost:
        moments_there.append(options["moments_there"])
        return measure_passes(*given, **options)

    monkeypatch.setattr("deltacache.train.loop.measure_passes", measured)
    with monkeypatch.context() as patched:
        limited(patched, most=3)  # found while measuring: room for one, two and three, not for four
        unbroken = case.run(tmp_path / "unbroken", **training)
        case.run(tmp_path / "broken", **{**training, "steps": 2})
    resumed = case.run(tmp_path / "broken", resume=True, **training)  # now there is room for all twelve
    assert (
        passes_of(unbroken) == passes_of(resumed) == passes_of(finished_checkpoints(tmp_path / "broken")[0])
    )
    assert passes_of(resumed) in (2, 3)
    assert moments_there == [False, False, True]
    for name, weight in case.weights(unbroken).items():
        assert torch.equal(weight, case.weights(resumed)[name]), name


def test_passes_that_were_asked_for_are_kept(case: Case, tmp_path: Path) -> None:
    reporter = Lines()
    made = case.run(tmp_path / "run", reporter=reporter, steps=2, batch_size=4, accumulation=3)
    cut = f"train {case.kind}: effective batch 12 (batch 4 x accumulation 3 x workers 1): a pass takes "
    (said,) = (line for line in reporter.said if line.startswith(cut))
    assert said.endswith(" for 2 steps")
    assert passes_of(made) == 4


def test_no_room_for_one_sample(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        limited(patched, most=0)
        with pytest.raises(DeltacacheError, match=r"not even a pass of one sample fits .* smaller model"):
            case.run(tmp_path / "measured", batch_size=4)
    limited(monkeypatch, most=0, from_step=1)  # of which step 0, which is measured, knows nothing
    with pytest.raises(DeltacacheError, match=r"in step 2.*: free memory .*Tried to allocate 2.00 GiB"):
        case.run(tmp_path / "given", batch_size=1, accumulation=4)


def test_memory_runs_out_in_an_update(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scarce(*given: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(torch.optim.AdamW, "step", scarce)
    with pytest.raises(DeltacacheError, match=r"in the optimizer's update of step 1: free memory on cpu"):
        case.run(tmp_path / "run", steps=2)


@pytest.mark.slow
def test_memory_runs_out_in_probes_and_the_run_goes_on(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"save_every": 50, "probe_every": 3}
    whole = case.run(tmp_path / "whole", steps=5, **training)

    def scarce(self: Any) -> dict[str, float]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with monkeypatch.context() as patched:
        for task in (TokenizerTask, WorldTask):
            patched.setattr(task, "probes", scarce)
        with pytest.raises(
            DeltacacheError, match=r"health probes after step 3, whose state is saved: continue with --resume"
        ):
            case.run(tmp_path / "run", steps=5, **training)
    resumed = case.run(tmp_path / "run", steps=5, resume=True, **training)
    for name, weight in case.weights(whole).items():
        assert torch.equal(weight, case.weights(resumed)[name]), name


REFUSES = """
import sys, time
from types import SimpleNamespace
import torch, torch.distributed as dist
from deltacache.schemas.configs import TrainingConfig
from deltacache.schemas.errors import DeltacacheError
from deltacache.schemas.progress import SilentReporter
from deltacache.train import loop
from deltacache.train.workers.group import stop_on_sigterm
from deltacache.train.workers.group import Distributed
from deltacache.train.workers.group import OtherWorkerFailedError

rank, store, error = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)

def measure(*given, **more):
    if rank == 1:
        raise DeltacacheError("no room") if error == "refused" else ValueError("a bug")
    return None

loop.measure_passes = measure
config = TrainingConfig(steps=1, batch_size=2, learning_rate=1e-3, weight_decay=0.0)
run = loop.Run(None, config, {}, SilentReporter(), group=Distributed(stop_on_sigterm, 2))
try:
    loop._choose_split(SimpleNamespace(kind="world", divisible=True), run, torch.device("cpu"))
except (DeltacacheError, ValueError, OtherWorkerFailedError) as raised:
    print(type(raised).__name__)
"""


@pytest.mark.parametrize("error", ["refused", "bug"])
def test_a_worker_that_cannot_measure_leaves_no_other_waiting(error: str, tmp_path: Path) -> None:
    said = [tmp_path / f"said-{rank}" for rank in range(2)]
    with ExitStack() as stack:
        workers = [
            stack.enter_context(start_script(REFUSES, rank, tmp_path / "store", error, stdout=said[rank]))
            for rank in range(2)
        ]
        for worker in workers:
            worker.wait(120)
    assert [each.read_text().strip() for each in said] == [
        "OtherWorkerFailedError",
        "DeltacacheError" if error == "refused" else "ValueError",
    ]


def test_slow_passes_are_not_measured_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    task, sizes = Drawn("world"), list[int]()
    loss_of = task.training_loss

    def slow(batch: Any, part: MicroBatch) -> Any:
        sizes.append(part.stop)
        time.sleep(0.2)
        return loss_of(batch, part)

    monkeypatch.setattr(task, "training_loss", slow)
    monkeypatch.setattr("deltacache.train.passes._ENOUGH_S", 0.4)
    cost = measure_passes(task, 96, CPU)
    assert sizes == [1]  # two samples might take twice as long
    assert cost.sample_seconds >= 0.2


@pytest.mark.parametrize(("slow", "said"), [(1, "at least "), (2, "at most about ")])
def test_something_is_said_about_the_time_while_a_long_pass_runs(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: int, said: str
) -> None:
    """The first estimate comes within a budget of time, whatever the model."""
    task = TokenizerTask if case.kind == "tokenizer" else WorldTask
    loss_of, reporter, before = task.training_loss, Lines(), list[list[str]]()

    def waits(self: Any, batch: Any, part: MicroBatch) -> Any:
        if part.stop == slow and not before:
            deadline = time.monotonic() + 60
            while not any(" for 2 steps" in line for line in reporter.said) and time.monotonic() < deadline:
                time.sleep(0.01)
            before.append(list(reporter.said))
        return loss_of(self, batch, part)

    monkeypatch.setattr(task, "training_loss", waits)
    monkeypatch.setattr("deltacache.train.passes.EARLY_S", 0.5)
    monkeypatch.setattr("deltacache.train.passes._ENOUGH_S", 600.0)
    case.run(tmp_path / "run", reporter=reporter, steps=2, batch_size=4)
    assert before[0][-1].startswith(f"train {case.kind}: {said}")
    assert sum(" for 2 steps" in line for line in reporter.said) == 2  # and the measured one


def test_the_bar_moves_between_rows(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltacache.train.loop._SHOW_S", 0.0)
    reporter = Lines()
    case.run(tmp_path / "run", reporter=reporter, steps=7, log_every=3, save_every=50)
    assert [steps for steps, _ in reporter.advances] == [1] * 7
    assert [bool(status) for _, status in reporter.advances] == [False, False, True, False, False, True, True]


def test_a_head_that_does_not_fit_is_given_an_option_that_it_has() -> None:
    class Head(Drawn):
        divisible = False

    def scarce(batch: Any, part: MicroBatch) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    task = Head("world")
    batches = CutBatches(task, Split(8), range(1), CPU)
    optimizer, run = (
        torch.optim.SGD(task.model.parameters()),
        SimpleNamespace(group=SingleProcess(), config=SimpleNamespace(precision="auto")),
    )
    with pytest.raises(DeltacacheError, match=r"give a smaller --batch-size, free memory on cpu"):
        _gradients(batches, 0, scarce, optimizer, Meter(0, 8), run)  # pyright: ignore[reportArgumentType]


def test_free_memory_is_less_than_the_machine_has() -> None:
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemTotal:"))
    assert GIB // 8 < free_bytes(CPU) < total
