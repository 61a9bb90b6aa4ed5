"""Metrics from sums, so that sequences pool by addition: whatever was computed where, and in any resample.

A row of sums (``totals``) belongs to one task:

- segmentation: ``[intersection (C) | predicted (C) | labelled (C)]`` in valid pixels, over C classes;
- depth: ``[n, sum (d-g)^2, sum |d-g| / g, count max(d/g, g/d) < 1.25]`` over valid pixels;
- features: ``[n, sum smooth-L1, sum squared error, sum cosine]`` over n crops;
- samples: ``[n, sum energy score, sum (S+1)/S variance, sum squared error of the mean, rank counts (S+1)]``;
- vote: ``[n, covered]`` in valid pixels;
- modes: ``[n, sum coverage, sum balance]`` over n scenes.

Shapes: K sums, S samples, C classes, G groups.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from deltacache.evaluate.metrics import FEATURE_METRICS

_SAMPLE_SUMS = 4
Metrics = dict[str, np.ndarray]
MetricsOf = Callable[[str, np.ndarray], Metrics]
"""From a task and its sums to metrics, as ``metrics_of``."""


def pooled_metrics(task: str, totals: np.ndarray, of: MetricsOf | None = None) -> dict[str, float]:
    """Metrics of one row of sums (K,), or of several (n, K) added up; those over nothing are left out.

    Raises:
        ValueError: an unknown task.
    """
    summed = totals if totals.ndim == 1 else totals.sum(0)
    values = (of or metrics_of)(task, summed)
    return {name: float(value) for name, value in values.items() if not np.isnan(value)}


def group_sums(totals: np.ndarray, groups: np.ndarray | Sequence[str]) -> np.ndarray:
    """(G, K) sums of the rows (n, K) by group: the name or the number of each row's."""
    positions = np.unique(groups, return_inverse=True)[1]
    summed = np.zeros((positions.max() + 1, totals.shape[1]))
    np.add.at(summed, positions, totals)
    return summed


def metrics_of(task: str, totals: np.ndarray) -> Metrics:
    """Metrics (...) by name of sums (..., K); NaN where there is nothing to divide by.

    Raises:
        ValueError: an unknown task.
    """
    if task not in _TASKS:
        raise ValueError(f"task {task!r} has no pooled metrics: {', '.join(_TASKS)} have")
    with np.errstate(divide="ignore", invalid="ignore"):
        return _TASKS[task](totals.astype(np.float64))


def _segmentation(totals: np.ndarray) -> Metrics:
    """Jaccard index, macro over the classes that are predicted or labelled anywhere."""
    intersection, predicted, labelled = np.split(totals, 3, axis=-1)
    union = predicted + labelled - intersection
    iou = np.where(union > 0, intersection / union, np.nan)
    seen = (union > 0).sum(-1)
    metrics = {
        "miou": np.nansum(iou, -1) / seen,
        "accuracy": intersection.sum(-1) / labelled.sum(-1),
    }
    return metrics | {f"iou/{label}": iou[..., label] for label in range(iou.shape[-1])}


def _depth(totals: np.ndarray) -> Metrics:
    count, squared, relative, close = np.moveaxis(totals, -1, 0)
    return {"rmse": np.sqrt(squared / count), "abs_rel": relative / count, "delta1": close / count}


def _features(totals: np.ndarray) -> Metrics:
    means = totals[..., 1:] / totals[..., :1]
    return {name: means[..., at] for at, name in enumerate(FEATURE_METRICS)}


def _samples(totals: np.ndarray) -> Metrics:
    count, energy, variance, squared = np.moveaxis(totals[..., :_SAMPLE_SUMS], -1, 0)
    ranks = totals[..., _SAMPLE_SUMS:]
    shares = ranks / ranks.sum(-1, keepdims=True)
    metrics = {"energy_score": energy / count, "spread_skill": np.sqrt(variance / squared)}
    return metrics | {f"rank/{rank}": shares[..., rank] for rank in range(ranks.shape[-1])}


def _vote(totals: np.ndarray) -> Metrics:
    return {"vote_coverage": totals[..., 1] / totals[..., 0]}


def _modes(totals: np.ndarray) -> Metrics:
    count, covered, balance = np.moveaxis(totals, -1, 0)
    return {"mode_coverage": covered / count, "mode_balance": balance / count}


_TASKS: Mapping[str, Callable[[np.ndarray], Metrics]] = MappingProxyType(
    {
        "segmentation": _segmentation,
        "depth": _depth,
        "features": _features,
        "samples": _samples,
        "vote": _vote,
        "modes": _modes,
    }
)
