"""How an effective batch is cut into passes: the largest pass that fits, from the memory that a few small ones took.

The effective batch belongs to the recipe, how it is cut to the machine. Gradients of passes of equal size are averaged,
so every cut gives the same numbers to float32 rounding.
"""

import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch

from deltacache.models.devices import forward_precision, free_bytes
from deltacache.models.flops import LivingStorages
from deltacache.schemas.datasets import TrainingPrecision
from deltacache.schemas.errors import DeltacacheError
from deltacache.schemas.progress import duration
from deltacache.schemas.texts import bytes_text, counted
from deltacache.train.order import MicroBatch, Split
from deltacache.train.workers.group import ProcessGroup

BatchT = TypeVar("BatchT")
_TRIED = (1, 2, 4, 8, 16)
"""Samples of the passes that are measured, as far as time and memory allow."""
_ENOUGH_S = 8.0
EARLY_S = 5.0
"""After which something is said about the time, however long a single pass takes."""
_SHARE = {"cuda": 0.9, "cpu": 0.7}
"""Of the free memory; an allocator leaves gaps, and other programs share a host's memory."""


@dataclass(frozen=True, slots=True)
class PassCost:
    """What a forward and backward pass takes on top of the weights, linear in its samples.

    Attributes:
        fixed_bytes: gradients, the optimizer's moments, and what does not grow with the pass.
        sample_bytes: of each further sample.
        sample_seconds: measured in a small pass, so an upper bound where large passes are more efficient.
        free_bytes: that could be taken before the first pass, less what the data will take.
        input_seconds: of making one of those inputs that are computed while training.
    """

    fixed_bytes: int
    sample_bytes: int
    sample_seconds: float
    free_bytes: int
    input_seconds: float = 0.0

    def bytes_of(self, samples: int) -> int:
        """Peak of a pass of so many samples."""
        return self.fixed_bytes + samples * self.sample_bytes


def measure_passes(
    task: Any,
    effective_batch: int,
    device: torch.device,
    precision: TrainingPrecision = "auto",
    *,
    moments_there: bool = False,
    early: Callable[[float, float, bool], None] = lambda sample_s, input_s, at_least: None,
) -> PassCost:
    """Run passes of 1, 2, 4, … samples of the first step, backward included, and change nothing.

    Everything that a pass draws depends on the step and the position alone, so training is not disturbed. Of a task
    whose batches may not be cut, a GPU runs the whole one: the bits of features that it keeps depend on the batch.

    Args:
        task: a ``TrainingTask``.
        effective_batch: samples of a step.
        moments_there: the optimizer has its moments already, as that of a resumed run: they are not free any more.
        early: hears, once, after ``EARLY_S`` if measuring takes longer: seconds of a sample and of an input, and
            whether these are no more than lower bounds, for the first pass still runs. Another thread calls it.

    Raises:
        DeltacacheError: not even one sample fits.
    """
    weights = [weight for weight in task.model.parameters() if weight.requires_grad]
    sizes = [size for size in _TRIED if size <= effective_batch]
    if not task.divisible and device.type != "cpu":
        sizes = [effective_batch]
    state = [(buffer, buffer.clone()) for buffer in task.model.buffers()]  # running means of BatchNorm
    measured: list[tuple[int, int, float]] = []  # samples, peak bytes, seconds
    free, input_seconds, started = 0, 0.0, time.perf_counter()
    begun: float | None = None

    def say_early() -> None:
        if measured:
            early(measured[-1][2] / measured[-1][0], input_seconds, False)
        elif begun is None:
            early(0.0, (time.perf_counter() - started) / sizes[0], True)
        else:
            early((time.perf_counter() - begun) / sizes[0], input_seconds, True)

    with (
        _after(EARLY_S, say_early),
        closing(task.trial_batches(MicroBatch(0, 0, size) for size in sizes)) as batches,
    ):
        for size, batch in zip(sizes, batches, strict=True):
            if not free:
                input_seconds = (time.perf_counter() - started) / size
                free = free_bytes(device) - task.bytes_to_load(device)
            if measured:
                taken = time.perf_counter() - started
                large = len(measured) > 1 and _line(measured)[1] * size > free / 2
                if large or taken + 2 * measured[-1][2] > _ENOUGH_S:
                    break
            begun = time.perf_counter()
            try:
                with _peak(device, [*task.model.parameters(), *task.model.buffers()]) as peak:
                    with forward_precision(device, precision):
                        loss, _ = task.training_loss(batch, MicroBatch(0, 0, size))
                    loss.backward()
                    del loss
            except torch.OutOfMemoryError:
                _forget_gradients(weights)
                if not measured:
                    smallest = "one sample" if size == 1 else f"{size} samples"
                    raise DeltacacheError(
                        f"not even a pass of {smallest} fits in the {bytes_text(free)} that are free on {device}: free "
                        "memory there, choose a smaller model or image size, or another device"
                    ) from None
                break
            _forget_gradients(weights)
            measured.append((size, peak[0], time.perf_counter() - begun))
    with torch.no_grad():
        for buffer, before in state:
            buffer.copy_(before)
    fixed, slope = _line(measured)
    moments = 0 if moments_there else 2 * sum(weight.nbytes for weight in weights)
    size, _, seconds = measured[-1]
    return PassCost(fixed + moments, slope, seconds / size, free, input_seconds)


def _line(measured: list[tuple[int, int, float]]) -> tuple[int, int]:
    """Intercept and slope of bytes over samples, through the last two measurements."""
    if len(measured) == 1:
        return 0, measured[0][1]
    (few, less, _), (many, more, _) = measured[-2:]
    slope = max(1, (more - less) // (many - few))
    return max(0, more - many * slope), slope


def fitting_split(cost: PassCost, split: Split, group: ProcessGroup, device: torch.device) -> Split:
    """``split``, whose pass is all of a worker's step, cut into the fewest passes of equal size that fit.

    All workers of ``group`` take the size that fits the one with the least room. Those of one machine that compute on
    its CPU share its memory.

    Raises:
        DeltacacheError: not even one sample fits.
    """
    sharers = 1 if device.type == "cuda" else group.on_this_node
    room = int(cost.free_bytes * _SHARE.get(device.type, 0.7) / sharers)
    whole = split.batch_size
    sizes = [size for size in range(whole, 0, -1) if whole % size == 0]
    mine = next((size for size in sizes if cost.bytes_of(size) <= room), 0)
    if group.any(mine == 0):
        raise DeltacacheError(
            f"a pass of one sample takes {bytes_text(cost.bytes_of(1))} beside the weights, and "
            f"{bytes_text(room)} may be used on {device}: free memory there, choose a smaller model or image "
            "size, or another device"
        )
    chosen = next(size for size in sizes if not group.any(size > mine))
    return cut_into(split, chosen)


def cut_into(split: Split, samples: int) -> Split:
    """The same effective batch in passes of ``samples``, which divides a worker's samples of a step."""
    passes, left = divmod(split.batch_size * split.accumulation, samples)
    if left:
        raise ValueError(
            f"{counted(split.batch_size * split.accumulation, 'sample does', 'samples do')} not split into "
            f"passes of {samples}"
        )
    return replace(split, batch_size=samples, accumulation=passes)


class CutBatches(Generic[BatchT]):
    """The batches of a training, pass after pass, which can be cut smaller from any step on.

    Attributes:
        split: how steps are cut now.
        divisible: whether they may be cut at all.
    """

    def __init__(self, task: Any, split: Split, steps: range, device: torch.device) -> None:
        self.split, self.device, self.divisible = split, device, bool(task.divisible)
        self._task, self._end = task, steps.stop
        self._batches: Generator[BatchT] = task.batches(split.parts_of(steps))

    def __next__(self) -> BatchT:
        return next(self._batches)

    def close(self) -> None:
        """No more are wanted."""
        self._batches.close()

    @property
    def can_be_smaller(self) -> bool:
        """Whether passes can be cut further without changing the numbers."""
        return self.divisible and self.split.batch_size > 1

    def cut_smaller(self, step: int) -> None:
        """Begin ``step`` again with passes of half the size, or of the next size below that divides the batch."""
        self.close()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        whole, most = self.split.batch_size * self.split.accumulation, self.split.batch_size // 2
        self.split = cut_into(self.split, next(size for size in range(most, 0, -1) if whole % size == 0))
        self._batches = self._task.batches(self.split.parts_of(range(step, self._end)))


def describe_split(cost: PassCost, split: Split, device: torch.device) -> str:
    """Effective batch, passes and memory."""
    return (
        f"effective batch {split}: a pass takes {bytes_text(cost.bytes_of(split.batch_size))} of the "
        f"{bytes_text(cost.free_bytes)} that are free on {device.type}"
    )


def describe_time(seconds: float, steps: int) -> str:
    """How long ``steps`` will take, from passes of few samples, which take longer a sample than large ones."""
    return f"at most about {duration(seconds)} for {counted(steps, 'step', form=',')}"


@contextmanager
def memory_for(what: str, device: torch.device) -> Iterator[None]:
    """Name what ran out of memory inside, where smaller passes are no way out.

    Raises:
        DeltacacheError: memory ran out.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeltacacheError(
            f"out of memory in {what}: free memory on {device}, give a smaller --batch-size or larger --accumulation, "
            f"or choose a smaller model. PyTorch says: {str(error).splitlines()[0]}"
        ) from error


@contextmanager
def _after(seconds: float, call: Callable[[], None]) -> Iterator[None]:
    """Call from another thread if what is inside takes longer; that call has ended when this does."""
    timer = threading.Timer(seconds, call)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def _forget_gradients(weights: list[torch.nn.Parameter]) -> None:
    for weight in weights:
        weight.grad = None


@contextmanager
def _peak(device: torch.device, held: list[torch.Tensor]) -> Iterator[list[int]]:
    """The most bytes that were taken inside at once, beyond those before (``held``): one number, there at the end."""
    peak: list[int] = []
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.append(torch.cuda.max_memory_allocated(device) - before)
        return
    with LivingStorages(held) as storages:
        yield peak
    peak.append(storages.peak - storages.held_bytes)
