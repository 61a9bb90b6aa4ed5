from typing import Any

import pytest

from deltacache.schemas.configs import TrainingConfig
from deltacache.train.optimizer import rate_at, schedule_lines, warmup_constant, warmup_cosine


@pytest.mark.parametrize(
    ("step", "rate"), [(0, 0.0), (1, 0.25e-3), (2, 0.5e-3), (3, 0.75e-3), (4, 1e-3), (5, 1e-3), (10**6, 1e-3)]
)
def test_warmup_is_linear_then_constant(step: int, rate: float) -> None:
    assert warmup_constant(step, 1e-3, 4) == pytest.approx(rate)


def test_no_warmup_starts_at_the_full_rate() -> None:
    assert warmup_constant(0, 1e-4, 0) == 1e-4


def test_cosine_goes_from_the_rate_at_the_end_of_the_warm_up_to_0() -> None:
    rates = [warmup_cosine(step, 2.0, 4, 12) for step in (0, 2, 4, 6, 8, 10, 12, 13, 20)]
    assert rates == pytest.approx([0, 1, 2, 1 + 0.5**0.5, 1, 1 - 0.5**0.5, 0, 0, 0])
    assert warmup_cosine(100, 2.0, 4, None) == 2.0


def training(**changes: Any) -> TrainingConfig:
    settings = {
        "steps": 1000,
        "batch_size": 1,
        "learning_rate": 1e-3,
        "warmup_steps": 100,
        "weight_decay": 0.0,
    }
    return TrainingConfig.model_validate(settings | changes)


def test_fewer_steps_keep_the_shape_of_a_schedule() -> None:
    whole, short = training(decay_steps=1000), training(decay_steps=1000).in_steps(100)
    assert (short.steps, short.warmup_steps, short.decay_steps) == (100, 10, 100)
    assert [rate_at(s, short) for s in (0, 5, 10, 55, 99)] == pytest.approx(
        [rate_at(10 * s, whole) for s in (0, 5, 10, 55, 99)]
    )
    assert training().in_steps(50).decay_steps is None
    given = training(decay_steps=1000).in_steps(100, 3, 70)
    assert (given.steps, given.warmup_steps, given.decay_steps) == (100, 3, 70)


@pytest.mark.parametrize(
    ("config", "done", "lines"),
    [
        (training(), 0, ["1,000 steps: a warm-up of 100 steps to 0.001, then constant"]),
        (training(warmup_steps=0), 0, ["1,000 steps: rate 0.001, then constant"]),
        (training(), 500, ["1,000 steps: rate 0.001, past its warm-up of 100, then constant"]),
        (training(decay_steps=1000), 0, ["100 steps to 0.001, then a cosine to 0 at 1,000"]),
        (
            training(warmup_steps=5000),
            0,
            ["then constant", "ends in its warm-up, at rate 0.0001998 of 0.001"],
        ),
        (
            training(decay_steps=400),
            0,
            ["at 400", "the rate is 0 from step 400 on: the last 600 steps change nothing"],
        ),
        (training(decay_steps=400), 600, ["at 400", "the last 400 steps change nothing"]),
    ],
)
def test_a_schedule_is_one_line_and_what_is_odd_about_it_another(
    config: TrainingConfig, done: int, lines: list[str]
) -> None:
    said = schedule_lines(config, done)
    assert len(said) == len(lines)
    for line, part in zip(said, lines, strict=True):
        assert part in line
