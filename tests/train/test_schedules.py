import pytest

from deltacache.train.schedules import warmup_constant, warmup_cosine


@pytest.mark.parametrize(
    ("step", "rate"), [(0, 0.0), (1, 0.25e-3), (2, 0.5e-3), (3, 0.75e-3), (4, 1e-3), (5, 1e-3), (10**6, 1e-3)]
)
def test_warmup_is_linear_then_constant(step: int, rate: float) -> None:
    assert warmup_constant(step, 1e-3, 4) == pytest.approx(rate)


def test_no_warmup_starts_at_the_full_rate() -> None:
    assert warmup_constant(0, 1e-4, 0) == 1e-4


def test_cosine_goes_from_the_rate_at_the_end_of_the_warm_up_to_0() -> None:
    rates = [warmup_cosine(step, 2.0, 4, 12) for step in (0, 2, 4, 6, 8, 10, 12, 20)]
    assert rates == pytest.approx([0, 1, 2, 1 + 0.5**0.5, 1, 1 - 0.5**0.5, 0, 0])
    assert warmup_cosine(100, 2.0, 4, None) == 2.0
