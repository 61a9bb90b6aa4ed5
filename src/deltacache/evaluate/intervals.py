"""Confidence intervals of pooled metrics from sums by unit: which video, scene, city or drive a sequence is from.

Sequences of one unit are not independent, so whole units are left out, one at a time (the jackknife), and the spread of
the metric over these gives its standard error; it takes ratios of sums and means over classes alike. The interval is
that of Student's t on a scale without bounds: the logarithm of a loss, the logit of a share. It holds its level from
three units on, also where a few units are much worse than the others (docs/evaluation.md has the simulated coverage).
Units of unequal size count as fewer: the degrees of freedom are ``1 / sum(w^2) - 1`` for their shares w of what is
scored.

There is no interval (it is left out) with fewer than three units, nor where all units agree: no width is no certainty.

Shapes: G units, K sums.
"""

from collections.abc import Callable

import numpy as np
from scipy import special

from deltacache.evaluate.pooled import MetricsOf, metrics_of

CONFIDENCE = 0.95
FEWEST_UNITS = 3
_NO_WIDTH = 1e-9
"""An interval narrower than this share of its value is rounding."""
_SHARES = frozenset(
    {"miou", "miou_movable", "accuracy", "delta1", "vote_coverage", "mode_coverage", "mode_balance"}
)
Intervals = dict[str, tuple[float, float]]
Map = Callable[[np.ndarray], np.ndarray]


def intervals(task: str, sums: np.ndarray, of: MetricsOf = metrics_of) -> Intervals:
    """95 % intervals of ``pooled.pooled_metrics`` of the sums (G, K) of all units, by metric."""
    found: Intervals = {}
    if len(sums) < FEWEST_UNITS:
        return found
    whole = of(task, sums.sum(0))
    left_out = of(task, sums.sum(0) - sums)
    freedom = _degrees_of_freedom(task, sums)
    for metric, value in whole.items():
        (there, back), limits = _scale_of(metric)
        with np.errstate(divide="ignore", invalid="ignore"):
            middle, others = there(value), there(left_out[metric])
        if not (np.isfinite(middle) and np.isfinite(others).all()):  # a share of 0 or 1 has no logit
            (there, back), middle, others = _PLAIN, value, left_out[metric]
        half = _half_width(others, freedom)
        low, high = np.clip([float(back(middle - half)), float(back(middle + half))], *limits).tolist()
        if high - low > _NO_WIDTH * abs(value):  # not of NaN: a class that one unit alone has
            found[metric] = low, high
    return found


def paired_intervals(task: str, a: np.ndarray, b: np.ndarray, of: MetricsOf = metrics_of) -> Intervals:
    """95 % intervals of the differences B − A of metrics of the same units, from the sums (G, K) of both."""
    found: Intervals = {}
    if len(a) < FEWEST_UNITS:
        return found
    whole = [of(task, each.sum(0)) for each in (a, b)]
    left_out = [of(task, each.sum(0) - each) for each in (a, b)]
    freedom = _degrees_of_freedom(task, a)
    for metric in whole[0]:
        middle = whole[1][metric] - whole[0][metric]
        half = _half_width(left_out[1][metric] - left_out[0][metric], freedom)
        if half > _NO_WIDTH * max(abs(whole[0][metric]), abs(whole[1][metric])):
            found[metric] = float(middle - half), float(middle + half)
    return found


def _half_width(left_out: np.ndarray, freedom: float) -> float:
    """Of the interval of a metric whose values without each unit are (G,)."""
    count = len(left_out)
    variance = (count - 1) / count * np.square(left_out - left_out.mean()).sum()
    # A quantile of Student's t; scipy.stats has it too, and costs every command a second to import.
    return float(special.stdtrit(freedom, (1 + CONFIDENCE) / 2) * np.sqrt(variance))


def _degrees_of_freedom(task: str, sums: np.ndarray) -> float:
    """Units of one size are G - 1; one that is much larger than all others leaves 1."""
    sizes = sums[:, 2 * sums.shape[1] // 3 :].sum(1) if task == "segmentation" else sums[:, 0]
    with np.errstate(invalid="ignore"):  # no label is valid: nothing is scored, and all metrics are NaN
        shares = sizes / sizes.sum()
    return max(1.0, 1 / np.square(shares).sum() - 1)


def _scale_of(metric: str) -> tuple[tuple[Map, Map], tuple[float, float]]:
    """To a scale without bounds, and back; the values that are possible."""
    if metric in _SHARES or metric.startswith(("iou/", "rank/")):
        return (lambda share: np.log(share / (1 - share)), lambda logit: 1 / (1 + np.exp(-logit))), (0.0, 1.0)
    if metric == "cosine":
        return (np.arctanh, np.tanh), (-1.0, 1.0)
    return (np.log, np.exp), (
        -np.inf if metric == "energy_score" else 0.0,
        np.inf,
    )  # unbiased, so rarely below 0


_PLAIN: tuple[Map, Map] = (lambda value: value), (lambda value: value)
