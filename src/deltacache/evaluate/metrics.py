"""Metrics: distances between tokens, sums that pool by addition, and their confidence intervals."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType

import numpy as np
import torch
from scipy import special
from torch import Tensor
from torch.nn import functional

from deltacache.models.futures import SMOOTH_L1_BETA
from deltacache.schemas.errors import NotFiniteError
from deltacache.schemas.texts import counted

# ----------------------------------------------------------------------------------------------------
# Distances between predicted and true patch tokens. Shapes: N patches, D hidden.
# ----------------------------------------------------------------------------------------------------


FEATURE_METRICS = ("smooth_l1", "mse", "cosine")
"""The last dimension of ``feature_metrics``. The first two are losses, the last a similarity."""


def feature_metrics(prediction: Tensor, target: Tensor) -> Tensor:
    """Score ``prediction`` (..., N, D) against ``target`` (..., N, D), which broadcasts.

    Returns:
        (..., 3) float64 in the order of ``FEATURE_METRICS``: smooth-L1 with beta 0.1 and squared error,
        each a mean over patches and hidden, and the cosine similarity of a patch, mean over patches.
    """
    prediction, target = torch.broadcast_tensors(prediction, target)
    smooth = functional.smooth_l1_loss(prediction, target, reduction="none", beta=SMOOTH_L1_BETA)
    squared = (prediction - target).square()
    return torch.stack(
        [
            smooth.mean((-2, -1), dtype=torch.float64),
            squared.mean((-2, -1), dtype=torch.float64),
            cosine_similarity(prediction, target).mean(-1),
        ],
        dim=-1,
    )


def cosine_similarity(prediction: Tensor, target: Tensor) -> Tensor:
    """Cosine between vectors (..., D), accumulated in float64 so that a vector with itself gives 1."""
    dot = (prediction * target).sum(-1, dtype=torch.float64)
    squares = prediction.square().sum(-1, dtype=torch.float64) * target.square().sum(-1, dtype=torch.float64)
    return dot / squares.sqrt().clamp_min(torch.finfo(torch.float64).tiny)


def token_distance(tokens: Tensor, others: Tensor) -> Tensor:
    """Euclidean distance over all patch tokens of a frame: (..., N, D) against (..., N, D)."""
    return (tokens - others).square().sum((-2, -1), dtype=torch.float64).sqrt()


def check_finite(values: Tensor, method: str, sequence: str, horizon: int) -> None:
    """Refuse a prediction by what was computed from it; ``values`` (...) may be its metrics or a head's output.

    Left in, it would vanish from means, or win: ``argmin`` prefers NaN.

    Raises:
        NotFiniteError: naming the method, the sequence and the step.
    """
    if not bool(torch.isfinite(values).all()):
        raise NotFiniteError(
            f"{method} predicts values that are not finite (NaN or infinite) for sequence {sequence}, "
            f"{counted(horizon, 'step')} ahead: a score needs finite ones; check the model's weights, "
            "or evaluate without it"
        )


def check_finite_frames(tokens: Tensor, place: str) -> None:
    """Refuse true features (..., T, N, D) of a sequence that ``place`` names, by frame.

    Raises:
        NotFiniteError: naming the sequence and the frame.
    """
    finite = torch.isfinite(tokens).all(-1).all(-1)
    if not bool(finite.all()):
        frame = int((~finite).nonzero()[0, -1])
        raise NotFiniteError(
            f"{place}: the features of frame {frame} are not finite (NaN or infinite): nothing can be compared with "
            "them; extract them again, or check the backbone's weights"
        )


def finite_of_head(values: Tensor) -> Tensor:
    """``values`` that a head reads off finite features; ``argmax`` would take NaN for a class.

    Raises:
        NotFiniteError: they are not finite.
    """
    if not bool(torch.isfinite(values).all()):
        raise NotFiniteError("the head gives values that are not finite (NaN or infinite): check its weights")
    return values


@contextmanager
def naming(method: str, sequence: str, horizon: int) -> Iterator[None]:
    """Say of whose prediction it was that a head's values are not finite."""
    try:
        yield
    except NotFiniteError as error:
        raise NotFiniteError(f"{method}, sequence {sequence}, horizon {horizon}: {error}") from None


# ----------------------------------------------------------------------------------------------------
# Metrics from sums, so that sequences pool by addition: whatever was computed where, and in any resample.
#
# A row of sums (``totals``) belongs to one task:
#
# - segmentation: ``[intersection (C) | predicted (C) | labelled (C)]`` in valid pixels, over C classes;
# - depth: ``[n, sum (d-g)^2, sum |d-g| / g, count max(d/g, g/d) < 1.25]`` over valid pixels;
# - features: ``[n, sum smooth-L1, sum squared error, sum cosine]`` over n crops;
# - samples: ``[n, sum energy score, sum (S+1)/S variance, sum squared error of the mean, rank counts
# (S+1)]``;
# - vote: ``[n, covered]`` in valid pixels;
# - modes: ``[n, sum coverage, sum balance]`` over n scenes;
# - odds: ``[n, sum of odds errors]`` over n scenes.
#
# Shapes: K sums, S samples, C classes, G groups.
# ----------------------------------------------------------------------------------------------------


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


def _odds(totals: np.ndarray) -> Metrics:
    return {"odds_error": totals[..., 1] / totals[..., 0]}


_TASKS: Mapping[str, Callable[[np.ndarray], Metrics]] = MappingProxyType(
    {
        "segmentation": _segmentation,
        "depth": _depth,
        "features": _features,
        "samples": _samples,
        "vote": _vote,
        "modes": _modes,
        "odds": _odds,
    }
)


# ----------------------------------------------------------------------------------------------------
# Confidence intervals of pooled metrics from sums by unit: which video, scene, city or drive a sequence is
# from.
#
# Sequences of one unit are not independent, so whole units are left out, one at a time (the jackknife), and
# the spread of the metric over these gives its standard error; it takes ratios of sums and means over classes
# alike. The interval is that of Student's t on a scale without bounds: the logarithm of a loss, the logit of
# a share. It holds its level from three units on, also where a few units are much worse than the others
# (docs/evaluation.md has the simulated coverage). Units of unequal size count as fewer: the degrees of
# freedom are ``1 / sum(w^2) - 1`` for their shares w of what is scored.
#
# There is no interval (it is left out) with fewer than three units, nor where all units agree: no width is no
# certainty.
#
# Shapes: G units, K sums.
# ----------------------------------------------------------------------------------------------------


CONFIDENCE = 0.95
FEWEST_UNITS = 3
_NO_WIDTH = 1e-9
"""An interval narrower than this share of its value is rounding."""
_SHARES = frozenset(
    {
        *("miou", "miou_movable", "accuracy", "delta1", "vote_coverage"),
        *("mode_coverage", "mode_balance", "odds_error"),
    }
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


# ----------------------------------------------------------------------------------------------------
# What the samples of one sequence are together, collected a few samples at a time.
#
# Shapes: S samples, s of them that come at a time, K horizons that are scored, N patches, D hidden.
# ----------------------------------------------------------------------------------------------------


ENERGY_NUMBERS = 2**26
"""Kept of a sequence for distances between its samples: 256 MiB in float32."""
_ENERGY_PART = 2**22  # of these in float64 at a time: 32 MiB


def sample_counts(samples: int) -> tuple[int, ...]:
    """Numbers of samples for which best and mean are given: 1, 2, 5, 10, 20, 50, ... up to ``samples``."""
    counts, scale = {samples}, 1
    while scale <= samples:
        counts |= {count for count in (scale, 2 * scale, 5 * scale) if count <= samples}
        scale *= 10
    return tuple(sorted(counts))


class SampleSums:
    """Collects samples of one sequence, of ``count`` that will come, and compares them with the truth (K, N, D).

    Args:
        hold: keep the samples for the energy score however many they are: they are in memory anyway.
    """

    def __init__(self, truth: Tensor, count: int, *, hold: bool = False) -> None:
        self._truth, self._count, self._seen = truth, count, 0
        self._total = torch.zeros_like(truth)
        self._offsets = torch.zeros_like(truth, dtype=torch.float64)
        self._squares = torch.zeros_like(truth, dtype=torch.float64)
        self._below = torch.zeros_like(truth, dtype=torch.int32)
        self._kept: list[Tensor] | None = [] if hold or truth.numel() * count <= ENERGY_NUMBERS else None
        self.means: dict[int, Tensor] = {}
        """(K, 3) metrics of the mean of the first n samples, by n."""

    def add(self, samples: Tensor) -> None:
        """Take the next samples (s, K, N, D)."""
        offsets = (samples - self._truth).double()
        self._offsets += offsets.sum(0)
        self._squares += offsets.square().sum(0)
        self._below += (samples < self._truth).sum(0, dtype=torch.int32)
        if self._kept is not None:
            self._kept.append(samples)
        counts = sample_counts(self._count)
        for sample in samples:
            self._total += sample
            self._seen += 1
            if self._seen in counts:
                self.means[self._seen] = feature_metrics(self._total / self._seen, self._truth).cpu()

    @property
    def mean(self) -> Tensor:
        """(K, N, D) features averaged over the samples."""
        return self._total / self._seen

    def totals(self) -> Tensor:
        """Sums of ``pooled``'s task ``samples`` for each horizon, (K, 4 + S + 1) float64, of two or more samples.

        Energy score (Gneiting & Raftery 2007) in its unbiased form, distances being root mean squares over patches
        and hidden; the variance that an ensemble like this one would have to have for the spread to equal the error of
        its mean (Fortin et al. 2014), and that error squared; the rank of each true number among the samples'. The
        energy score is NaN, and so left out, where the samples are too many to be held together.
        """
        count, numbers = self._seen, self._truth[0].numel()
        squared = (self._offsets / count).square().mean((1, 2))
        variance = (self._squares - self._offsets.square() / count).mean((1, 2)) / (count - 1)
        ranks = torch.stack(
            [torch.bincount(each.flatten(), minlength=count + 1) for each in self._below]
        ).double()
        if self._kept is None:
            energy = self._offsets.new_full((len(self._truth),), torch.nan)
        else:
            samples = torch.cat(self._kept)
            scores = [energy_score(samples[:, at], truth) for at, truth in enumerate(self._truth)]
            energy = torch.stack(scores) / numbers**0.5
        sums = torch.stack([torch.ones_like(energy), energy, variance * (count + 1) / count, squared], 1)
        return torch.cat([sums, ranks], 1).cpu()


def energy_score(samples: Tensor, truth: Tensor) -> Tensor:
    """Mean distance of samples (S, ...) to the truth (...) less half their mean distance to each other, unbiased.

    In float64 throughout: sums of many numbers in float32 are off in the fourth digit.
    """
    count = len(samples)
    squares = torch.zeros(count + 1, count + 1, dtype=torch.float64, device=samples.device)
    together = torch.cat([samples, truth[None]]).flatten(1)
    for part in together.split(max(1, _ENERGY_PART // (count + 1)), dim=1):
        numbers = part.double()
        squares += torch.cdist(numbers, numbers, compute_mode="donot_use_mm_for_euclid_dist").square()
    distances = squares.sqrt()
    between = distances[:count, :count].sum()
    return distances[count, :count].mean() - between / (2 * count * (count - 1))
