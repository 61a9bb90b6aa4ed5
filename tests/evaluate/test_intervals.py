"""Intervals by unit against loops and simulations; none where there can be none."""

import numpy as np
import pytest
from scipy import stats

from deltacache.evaluate.metrics import group_sums, intervals, metrics_of, paired_intervals


def losses(values: np.ndarray) -> np.ndarray:
    """Sums of task ``features`` of sequences (n,): the same loss thrice."""
    return np.stack([np.ones(len(values)), values, values, values], 1)


def test_units_are_left_out_one_by_one_on_a_logarithmic_scale() -> None:
    rng = np.random.default_rng(3)
    squared = rng.uniform(1, 9, 5)
    pixels = np.array([10.0, 40.0, 10.0, 10.0, 20.0])
    sums = np.stack([pixels, squared * pixels, squared * pixels, pixels / 2], 1)
    logs = []
    for unit in range(5):
        others = np.delete(sums, unit, 0).sum(0)
        logs.append(np.log(np.sqrt(others[1] / others[0])))
    error = np.sqrt(4 / 5 * np.square(logs - np.mean(logs)).sum())
    shares = pixels / pixels.sum()
    half = stats.t.ppf(0.975, 1 / np.square(shares).sum() - 1) * error
    middle = np.log(np.sqrt(sums[:, 1].sum() / sums[:, 0].sum()))
    expected = np.exp(middle - half), np.exp(middle + half)
    assert intervals("depth", sums)["rmse"] == pytest.approx(expected)


def test_shares_stay_between_zero_and_one() -> None:
    hit = np.array([95.0, 99.0, 80.0, 99.0])
    low, high = intervals("vote", np.stack([np.full(4, 100.0), hit], 1))["vote_coverage"]
    assert 0 < low < hit.mean() / 100 < high < 1
    logits = [np.log(p / (1 - p)) for p in [np.delete(hit, at).mean() / 100 for at in range(4)]]
    half = stats.t.ppf(0.975, 3) * np.sqrt(3 / 4 * np.square(logits - np.mean(logits)).sum())
    assert np.log(high / (1 - high)) - np.log(low / (1 - low)) == pytest.approx(2 * half)


@pytest.mark.parametrize(
    ("task", "metric", "sums", "possible"),
    [
        ("modes", "mode_coverage", [[1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 0.5, 1]], (0, 1)),
        ("features", "smooth_l1", [[1, 0, 0, 1], [1, 0, 0, 1], [1, 0, 0, 1], [1, 0.3, 0.3, 1]], (0, np.inf)),
        ("features", "cosine", [[1, 0, 0, 1], [1, 0, 0, 1], [1, 0, 0, 1], [1, 0, 0, 0.5]], (-1, 1)),
    ],
)
def test_no_interval_leaves_the_possible_values(
    task: str, metric: str, sums: list[list[float]], possible: tuple[float, float]
) -> None:
    """Without one unit the metric is 0 or 1, which its scale has no place for."""
    low, high = intervals(task, np.array(sums, float))[metric]
    assert possible[0] <= low < high <= possible[1]


def test_there_is_none_where_nothing_is_scored() -> None:
    assert intervals("vote", np.zeros((4, 2))) == {}


@pytest.mark.parametrize(
    ("values", "units"),
    [
        ([1.0, 2.0, 3.0, 4.0], ["a", "a", "a", "a"]),  # one unit
        ([1.0, 2.0, 3.0, 4.0], ["a", "a", "b", "b"]),  # two
        ([0.0, 0.0, 0.0, 0.0], ["a", "b", "c", "d"]),  # the truth itself has no loss
        ([0.1, 0.1, 0.1, 0.1], ["a", "b", "c", "d"]),  # equal but for rounding
    ],
)
def test_there_is_none_of_few_units_or_of_units_that_agree(values: list[float], units: list[str]) -> None:
    sums = group_sums(losses(np.array(values)), units)
    assert "smooth_l1" not in intervals("features", sums)
    assert "smooth_l1" not in paired_intervals("features", 0 * sums + [1, 0, 0, 0], sums)


def test_a_class_of_one_unit_alone_has_none_and_spoils_no_mean() -> None:
    totals = np.zeros((4, 6))
    totals[:, :] = [[3, 0, 4, 0, 3, 0], [2, 0, 3, 0, 3, 0], [1, 5, 2, 5, 1, 6], [4, 0, 4, 0, 5, 0]]
    found = intervals("segmentation", totals)
    assert "iou/1" not in found
    assert found["miou"][0] < metrics_of("segmentation", totals.sum(0))["miou"] < found["miou"][1]


@pytest.mark.parametrize(("units", "members"), [(4, 10), (10, 10), (40, 1)])
def test_intervals_and_verdicts_hold_their_level(units: int, members: int) -> None:
    """Correlation 0.8 within a video, skewed between videos; benchmarks/interval_coverage.py has many more."""
    rng = np.random.default_rng(units)
    of = np.repeat(np.arange(units), members)
    held = false = 0
    for _ in range(600):
        hard = [rng.gamma(4, 0.25, units) for _ in range(2)]
        a, b = (group_sums(losses(each[of] * rng.uniform(0.6, 1.4, len(of))), of) for each in hard)
        low, high = intervals("features", a)["smooth_l1"]
        held += low <= 1 <= high
        low, high = paired_intervals("features", a, b)["smooth_l1"]
        false += not low <= 0 <= high
    assert 0.92 <= held / 600 <= 0.98
    assert false / 600 <= 0.075
