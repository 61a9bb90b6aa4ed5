"""Names that a person reads, and which way of a metric is better."""

from collections.abc import Mapping
from types import MappingProxyType

from deltacache.schemas.foresight import DATASET as WHOLE_FRAMES

METHOD_LABELS = {
    "copy_last": "Copy of the last frame",
    "present": "True future (bound)",
    "deltatok": "DeltaTok, closed loop",
    "deltatok_parallel": "DeltaTok, parallel",
    "deltatok_one_step": "DeltaTok, one step",
    "deltatok_swapped": "DeltaTok, swapped token",
    "deltaworld": "DeltaWorld",
    "deltaworld_discriminative": "DeltaWorld, learned query",
    "dino_world": "DINO-world",
    "dino_world_best_of_many": "DINO-world, best of many",
    "dino_foresight": "DINO-Foresight",
    "dino_foresight_delta": "DINO-Foresight on delta tokens",
}
METRIC_LABELS = {
    "smooth_l1": "Feature loss (smooth L1)",
    "mse": "Feature loss (squared error)",
    "cosine": "Cosine similarity",
    "mode_coverage": "Mode coverage",
    "mode_balance": "Mode balance",
    "miou": "Mean IoU (%)",
    "miou_movable": "Mean IoU of movable classes (%)",
    "accuracy": "Pixel accuracy (%)",
    "rmse": "Depth RMSE (m)",
    "abs_rel": "Depth AbsRel",
    "delta1": "Depth δ < 1.25 (%)",
    "energy_score": "Energy score",
    "spread_skill": "Spread-skill ratio",
    "vote_coverage": "Coverage of the samples' vote (%)",
}
HIGHER_IS_BETTER = frozenset(
    {"cosine", "mode_coverage", "mode_balance", "miou", "miou_movable", "accuracy", "delta1", "vote_coverage"}
)
NEITHER_IS_BETTER = frozenset({"spread_skill"})
PERCENT = frozenset({"miou", "miou_movable", "accuracy", "delta1", "vote_coverage"})
"""Shares of pixels, which are read in per cent."""

METRIC_WORDS: Mapping[str, str] = MappingProxyType(
    {
        "smooth_l1": "mean smooth L1 (β = 0.1) between predicted and true features, the loss of world models",
        "mse": "mean squared error of the features",
        "cosine": "cosine between predicted and true features of a patch, mean over patches",
        "miou": "overlap of predicted and labelled pixels of a class (intersection over union), mean over classes",
        "miou_movable": "the same over Cityscapes' people and vehicles",
        "accuracy": "share of labelled pixels whose class is right",
        "rmse": "root of the mean squared error of depth over all pixels, in metres",
        "abs_rel": "mean error of depth as a share of the true depth",
        "delta1": "share of pixels whose depth is within 25 % of the true one",
        "energy_score": "distance of the samples to the truth less half their distance to each other: it rewards "
        "samples that are close, and different where the future is open",
        "spread_skill": "how far samples lie apart over how far their mean lies from the truth; below 1 the "
        "samples are too alike",
        "vote_coverage": "share of pixels whose true class is that of at least one sample, or whose true depth lies "
        "between the samples'",
        "mode_coverage": "share of scenes in which the samples reach all true futures",
        "mode_balance": "1 where all true futures are reached equally often, 0 where one is missed",
    }
)

CITYSCAPES_CLASSES = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation"),
    *("terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
)

_TABLE_D = frozenset({"miou_movable", "delta1"})


def leads(dataset: str, metric: str, main: frozenset[str]) -> bool:
    """Whether a metric is one of the ``main`` ones, or one that Table D is about."""
    return metric in main or (dataset == WHOLE_FRAMES and metric in _TABLE_D)


def data_title(dataset: str) -> str:
    """A data set's name in headings."""
    return "Cityscapes as whole frames" if dataset == WHOLE_FRAMES else dataset


def metric_title(metric: str) -> str:
    """The metric's name, and which way is better."""
    label = METRIC_LABELS.get(metric, metric)
    if metric in NEITHER_IS_BETTER:
        return f"{label}, 1 is calibrated"
    return f"{label}, {'higher' if metric in HIGHER_IS_BETTER else 'lower'} is better"


def class_name(dataset: str, label: int) -> str:
    """What a class id stands for, as far as the benchmark's list of names is known."""
    if dataset in ("cityscapes", WHOLE_FRAMES) and label < len(CITYSCAPES_CLASSES):
        return CITYSCAPES_CLASSES[label]
    return f"class {label}"
