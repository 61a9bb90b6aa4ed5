import pytest

from deltacache.train.schedules import warmup_constant


@pytest.mark.parametrize(
    ("step", "rate"), [(0, 0.0), (1, 0.25e-3), (2, 0.5e-3), (3, 0.75e-3), (4, 1e-3), (5, 1e-3), (10**6, 1e-3)]
)
def test_warmup_is_linear_then_constant(step: int, rate: float) -> None:
    assert warmup_constant(step, 1e-3, 4) == pytest.approx(rate)


def test_no_warmup_starts_at_the_full_rate() -> None:
    assert warmup_constant(0, 1e-4, 0) == 1e-4
