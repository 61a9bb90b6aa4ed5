"""Learning-rate schedules: pure functions of the step."""


def warmup_constant(step: int, learning_rate: float, warmup_steps: int) -> float:
    """The rate for the optimizer step after ``step`` finished ones: linear from 0, then constant.

    Method section 2. The very first step has rate 0, as in the released code, when there is a warm-up.
    """
    if step >= warmup_steps:
        return learning_rate
    return learning_rate * step / warmup_steps
