"""AdamW as all trainers use it: groups, clipping, rate, and no update from what is not finite."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from deltacache.models.optimizer_groups import decay_groups
from deltacache.schemas.configs import TrainingConfig
from deltacache.schemas.texts import counted


def make_optimizer(
    model: nn.Module, config: TrainingConfig, state: dict[str, Any] | None = None
) -> torch.optim.AdamW:
    """AdamW with weight decay on Linear and Conv weights only; moments and step count are taken from ``state``.

    Weight decay and rate are those of ``config``, also when ``state`` is that of a stage with others.
    """
    groups = [dict(group) for group in decay_groups(model, config.weight_decay)]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
    if state is not None:
        decays = [group["weight_decay"] for group in optimizer.param_groups]
        optimizer.load_state_dict(state)
        for group, decay in zip(optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> float:
    """Give every group the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float | None) -> Tensor:
    """Scale the gradients to a norm of at most ``limit`` and return their norm before that."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = get_total_norm(gradients, foreach=True)
    if limit is not None:
        clip_grads_with_norm_(parameters, limit, norm, foreach=True)
    return norm


class FiniteGuard:
    """From the first loss or norm on that is not finite, fused AdamW changes nothing any more.

    The optimizer's own kernel reads the flag on the device (it is there for loss scaling), so that nobody
    waits for a GPU at every step, and the state before the bad step can still be saved when it is noticed.
    """

    def __init__(self, optimizer: torch.optim.AdamW, device: torch.device) -> None:
        self._bad = torch.zeros((), device=device)
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        optimizer.found_inf = self._bad  # type: ignore[attr-defined]

    def look_at(self, loss: Tensor, norm: Tensor) -> None:
        """Before each update."""
        finite = loss.isfinite() & norm.isfinite()
        self._bad.copy_(torch.maximum(self._bad, (~finite).float()))


# ----------------------------------------------------------------------------------------------------
# Learning-rate schedules: pure functions of the step.
# ----------------------------------------------------------------------------------------------------


def warmup_constant(step: int, learning_rate: float, warmup_steps: int) -> float:
    """The rate for the optimizer step after ``step`` finished ones: linear from 0, then constant.

    Method section 2. The very first step has rate 0, as in the released code, when there is a warm-up.
    """
    if step >= warmup_steps:
        return learning_rate
    return learning_rate * step / warmup_steps


def warmup_cosine(step: int, learning_rate: float, warmup_steps: int, last_step: int | None) -> float:
    """``warmup_constant``, and after it a cosine to 0 at ``last_step``; ``None``: constant."""
    rate = warmup_constant(step, learning_rate, warmup_steps)
    if last_step is None or step <= warmup_steps:
        return rate
    if step >= last_step:
        return 0.0
    return 0.5 * rate * (1.0 + math.cos(math.pi * (step - warmup_steps) / (last_step - warmup_steps)))


def rate_at(step: int, config: TrainingConfig) -> float:
    """The learning rate of the optimizer step after ``step`` finished ones."""
    return warmup_cosine(step, config.learning_rate, config.warmup_steps, config.decay_steps)


def schedule_lines(config: TrainingConfig, first_step: int) -> list[str]:
    """The schedule of a run that has done ``first_step`` steps, in one line, and a line for what is odd about it."""
    steps, warmup, decay = config.steps, config.warmup_steps, config.decay_steps
    begun = f"a warm-up of {counted(warmup, 'step', form=',')} to {config.learning_rate:g}"
    if warmup <= first_step:
        begun = f"rate {config.learning_rate:g}" + (f", past its warm-up of {warmup:,}" if warmup else "")
    lines = [
        f"{counted(steps, 'step', form=',')}: {begun}, then "
        + ("constant" if decay is None else f"a cosine to 0 at {decay:,}")
    ]
    if first_step < steps <= warmup:
        last = rate_at(steps - 1, config)
        lines.append(
            f"the run ends in its warm-up, at rate {last:g} of {config.learning_rate:g}: give more --steps or fewer "
            "--warmup-steps if that is not meant"
        )
    if decay is not None and decay < steps:
        lines.append(
            f"the rate is 0 from step {decay:,} on: the last "
            f"{counted(steps - max(decay, first_step), 'step changes', 'steps change', form=',')} nothing; "
            "give a larger --decay-steps if that is not meant"
        )
    return lines
