"""Learning-rate schedules: pure functions of the step."""

import math

from deltacache.schemas.configs import TrainingConfig


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


def described(config: TrainingConfig, first_step: int) -> list[str]:
    """The schedule of a run that has done ``first_step`` steps, in one line, and a line for what is odd about it."""
    steps, warmup, decay = config.steps, config.warmup_steps, config.decay_steps
    begun = f"a warm-up of {warmup:,} steps to {config.learning_rate:g}"
    if warmup <= first_step:
        begun = f"rate {config.learning_rate:g}" + (f", past its warm-up of {warmup:,}" if warmup else "")
    lines = [
        f"{steps:,} steps: {begun}, then " + ("constant" if decay is None else f"a cosine to 0 at {decay:,}")
    ]
    if first_step < steps <= warmup:
        last = rate_at(steps - 1, config)
        lines.append(
            f"the run ends in its warm-up, at rate {last:g} of {config.learning_rate:g}: give more --steps or fewer "
            "--warmup-steps if that is not meant"
        )
    if decay is not None and decay < steps:
        lines.append(
            f"the rate is 0 from step {decay:,} on: the last {steps - max(decay, first_step):,} steps change nothing; "
            "give a larger --decay-steps if that is not meant"
        )
    return lines
