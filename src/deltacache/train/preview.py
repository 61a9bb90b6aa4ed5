"""``--dry-run`` of trainers: what a training would take on this machine, from a few real passes and updates."""

import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import torch

from deltacache.models.devices import forward_precision
from deltacache.models.flops import cpu_bfloat16_gain
from deltacache.schemas.configs import TrainingConfig
from deltacache.schemas.datasets import TrainingPrecision
from deltacache.schemas.progress import duration
from deltacache.schemas.texts import bytes_text, counted, disk_text
from deltacache.train.optimizer import clip_gradients
from deltacache.train.order import MicroBatch, Split
from deltacache.train.passes import PassCost, memory_for

_ENOUGH_S, _LONGEST_PASS_S = 10.0, 5.0
_MOST_PASSES = 16


def preview(
    task: Any,
    config: TrainingConfig,
    optimizer: torch.optim.Optimizer,
    cost: PassCost,
    split: Split,
    steps: int,
) -> Iterator[str]:
    """Lines about parameters, memory, time and what is read; changes the weights of ``task``.

    Args:
        cost: measured on passes of few samples.
        steps: that are left.
    """
    parameters = list(task.model.parameters())
    trained = [weight for weight in parameters if weight.requires_grad]
    device = trained[0].device
    count = sum(weight.numel() for weight in parameters)
    yield f"parameters: {count / 1e6:.1f} M" if count >= 1e5 else f"parameters: {count:,}"
    weights = sum(weight.nbytes for weight in parameters)
    moments = sum(
        each.nbytes for kept in optimizer.state.values() for each in kept.values() if torch.is_tensor(each)
    )
    peak = weights + moments + cost.bytes_of(split.batch_size) + task.bytes_to_load(device)
    yield (
        f"memory at its peak: {bytes_text(peak)} on {device.type}, with weights, gradients, the optimizer's moments"
        + (" and the data" if task.bytes_to_load(device) else "")
    )
    size = min(split.batch_size, max(1, int(_LONGEST_PASS_S / cost.sample_seconds)))
    if not task.divisible and device.type != "cpu":
        size = split.batch_size
    with memory_for(f"passes of {counted(size, 'sample')}", device):
        pass_s = _seconds_of_a_pass(task, config.precision, device, size)
        update_s = _seconds_of_an_update(trained, config, optimizer)
    samples = split.batch_size * split.accumulation
    step_s = pass_s / size * samples + update_s
    inputs = task.inputs_computed(samples * steps)
    seconds = step_s * steps + inputs * cost.input_seconds
    computed = f", and {counted(inputs, 'frame', form=',')} through the backbone" if inputs else ""
    others = ""
    if split.workers > 1:
        shared = " that share this CPU" if device.type == "cpu" else ", each with a device like this one"
        others = f" with {counted(split.workers, 'worker')}{shared}"
    yield (
        f"{counted(steps, 'step', form=',')} of {_step(step_s)}{computed}: {duration(seconds)} on this "
        f"machine{others} (measured "
        f"on passes of {size}; saving and probing are not counted)"
    )
    if (share := bfloat16_share(task, config, device, size)) is not None:
        less = share * pass_s / size * samples * steps
        yield f"--precision bfloat16 would take about {duration(seconds - less)}: this CPU multiplies it faster"
    read = task.bytes_to_read(samples * split.workers * steps)
    yield f"reads {disk_text(read)} of data"


def bfloat16_share(task: Any, config: TrainingConfig, device: torch.device, size: int = 1) -> float | None:
    """The share of a pass that ``--precision bfloat16`` would save on this CPU, from real passes of ``size`` samples.

    ``None`` where it is chosen already, has no effect, or saves less than a tenth.
    """
    if (
        device.type != "cpu"
        or config.precision == "bfloat16"
        or task.kind == "head"
        or cpu_bfloat16_gain() < 1.5
    ):
        return None
    exact, fast = (
        _seconds_of_a_pass(task, precision, device, size, most=3) for precision in ("float32", "bfloat16")
    )
    return 1 - fast / exact if fast < 0.9 * exact else None


def _seconds_of_a_pass(
    task: Any, precision: TrainingPrecision, device: torch.device, size: int, most: int = _MOST_PASSES
) -> float:
    """The mean of several after one that does not count, or of one where that takes long; gradients are left."""
    taken: list[float] = []
    parts = (MicroBatch(step, 0, size) for step in range(most))
    with closing(task.trial_batches(parts)) as batches:
        for step, batch in enumerate(batches):
            begun = time.perf_counter()
            with forward_precision(device, precision):
                loss, _ = task.training_loss(batch, MicroBatch(step, 0, size))
            loss.backward()
            loss.item()  # waits for the device
            taken.append(time.perf_counter() - begun)
            if sum(taken) > _ENOUGH_S:
                break
    counted = taken[1:] or taken
    return sum(counted) / len(counted)


def _seconds_of_an_update(
    trained: list[torch.nn.Parameter], config: TrainingConfig, optimizer: torch.optim.Optimizer
) -> float:
    """The second of two: the first one makes the moments."""
    seconds = 0.0
    for _ in range(2):
        begun = time.perf_counter()
        clip_gradients(trained, config.gradient_clip).item()
        optimizer.step()
        trained[0].flatten()[0].item()
        seconds = time.perf_counter() - begun
    return seconds


def _step(seconds: float) -> str:
    return (
        f"{1e3 * seconds:.3g} ms"
        if seconds < 1
        else f"{seconds:.3g} s"
        if seconds < 1000
        else duration(seconds)
    )
