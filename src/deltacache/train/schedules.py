"""Learning-rate schedules: pure functions of the step."""

import math


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
