"""What is said of whole frames beyond the metrics of the benchmarks, and what is not."""

import numpy as np

from deltacache.evaluate.pooled import Metrics, metrics_of

MOVABLE = tuple(range(11, 19))
"""Cityscapes' train ids of what moves: person, rider, car, truck, bus, train, motorcycle, bicycle."""


def movable_totals(totals: np.ndarray) -> np.ndarray:
    """Of the sums of segmentation (..., 3 C) those of the classes that move."""
    parts = np.split(totals, 3, axis=-1)
    return np.concatenate([part[..., list(MOVABLE)] for part in parts], axis=-1)


def whole_frame_metrics(task: str, totals: np.ndarray) -> Metrics:
    """``metrics_of`` with ``miou_movable``, and without depth's absolute error: relative maps have no metres."""
    metrics = {name: values for name, values in metrics_of(task, totals).items() if name != "rmse"}
    if task == "segmentation":
        metrics["miou_movable"] = metrics_of(task, movable_totals(totals))["miou"]
    return metrics
