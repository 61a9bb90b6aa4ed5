"""Paired differences between two evaluations of the same data: ``deltacache compare A B``.

Benchmarks are compared from the sums in ``statistics.parquet``, whole groups (videos, cities, drives) being resampled
for both runs alike; feature datasets from ``sequences.parquet``, by sequence or scene.

Shapes: n sequences, G groups, K sums, R resamples.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deltacache.evaluate.bootstrap import CONFIDENCE, bootstrap_means
from deltacache.evaluate.comparing.left_out import differing_settings, only_in_one
from deltacache.evaluate.comparing.paired import (
    Series,
    check_same_labels,
    check_same_sequences,
    paired_series,
)
from deltacache.evaluate.foresight.metrics import whole_frame_metrics
from deltacache.evaluate.output import read_sequences
from deltacache.evaluate.pooled import group_sums, metrics_of
from deltacache.evaluate.report.labels import HIGHER_IS_BETTER, NEITHER_IS_BETTER
from deltacache.evaluate.report.runs import ReportRun, open_runs, run_names
from deltacache.schemas.errors import MismatchError
from deltacache.schemas.foresight import DATASET as WHOLE_FRAMES

ROUNDING = 1e-6
"""Differences up to this share of a value are none: sums of another order give as much."""
_FEWEST_GROUPS = 6  # with fewer, all of them pointing one way has a chance above 5 % of being luck
_IN_FEATURE_SPACE = frozenset({"features", "samples", "modes"})
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Difference:
    """One metric of one method in both runs.

    Attributes:
        low: end of the 95 % interval of B − A; NaN where there is none.
        groups: how many are resampled.
    """

    dataset: str
    metric: str
    label: str
    horizon: int
    horizon_s: float
    a: float
    b: float
    low: float
    high: float
    groups: int

    @property
    def difference(self) -> float:
        """B − A."""
        return self.b - self.a

    @property
    def _within_rounding(self) -> bool:
        """Of one group there is no interval, which is NaN."""
        most = ROUNDING * max(abs(self.a), abs(self.b))
        return not any(abs(each) > most for each in (self.difference, self.low, self.high))

    @property
    def verdict(self) -> str:
        """What can be said about B: better, worse, different, equal or undecided."""
        if self._within_rounding:
            return "equal"
        if self.groups < _FEWEST_GROUPS:
            return f"undecided, {self.groups} group{'s' if self.groups > 1 else ''}"
        if not (self.low > 0 or self.high < 0):
            return "undecided"
        if self.metric in NEITHER_IS_BETTER:
            return "different"
        return "better" if (self.low > 0) == (self.metric in HIGHER_IS_BETTER) else "worse"


@dataclass(frozen=True, slots=True)
class Comparison:
    """All differences, and what could not be compared, in words.

    Attributes:
        settings: parts of the protocol that differ.
    """

    names: tuple[str, str]
    settings: tuple[str, ...]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]


def compare_runs(a: Path, b: Path) -> Comparison:
    """Compare what two evaluations have in common.

    Raises:
        DatasetError: one is not the output of an evaluation, or is damaged.
        MismatchError: they are of different data, or have nothing in common.
    """
    runs = open_runs([a, b])
    names = run_names([a, b])
    shared = _shared_datasets(runs, names)
    differences: list[Difference] = []
    notes = [*_not_shared(runs, names, shared), *_feature_spaces(runs, names, shared)]
    held: tuple[set[Series], set[Series]] = (set(), set())
    for kind, rows in (("sums", _statistics(runs)), ("values", _values(runs))):
        pairs = paired_series(rows, shared)
        for own, more in zip(held, pairs.held, strict=True):
            own.update(more)
        for series, of_a, of_b in pairs.found:
            check_same_sequences(series, of_a, of_b, names)
            if kind == "sums":
                check_same_labels(series, of_a, of_b, names)
                differences += _pooled(series, of_a, of_b)
            else:
                differences.append(_averaged(series, of_a, of_b))
    if not differences:
        raise MismatchError(
            f"{names[0]} and {names[1]} have no method, number of samples and horizon in common: evaluate both with "
            "the same --samples and --horizons"
        )
    order = {name: at for at, name in enumerate(shared)}
    differences.sort(key=lambda each: order[each.dataset])
    notes += only_in_one(held, names)
    return Comparison((names[0], names[1]), differing_settings(runs), tuple(differences), tuple(notes))


def _shared_datasets(runs: Sequence[ReportRun], names: Sequence[str]) -> list[str]:
    held = [list(dict.fromkeys(run.metrics["dataset"].to_pylist())) for run in runs]
    shared = [name for name in held[0] if name in held[1]]
    if not shared:
        raise MismatchError(
            f"{names[0]} is an evaluation of {', '.join(held[0])}, {names[1]} one of {', '.join(held[1])}: differences "
            "are between evaluations of the same data; give two of these"
        )
    return shared


def _not_shared(runs: Sequence[ReportRun], names: Sequence[str], shared: Sequence[str]) -> list[str]:
    notes = []
    for run, name in zip(runs, names, strict=True):
        only = [each for each in dict.fromkeys(run.metrics["dataset"].to_pylist()) if each not in shared]
        notes += [f"{each}: only {name} has it" for each in only]
    return notes


def _statistics(runs: Sequence[ReportRun]) -> list[list[Row]]:
    return [_comparable(run.statistics.to_pylist(), runs) for run in runs]


def _spaces(run: ReportRun) -> dict[str, str]:
    """Where the features of each data set live: numbers of other backbones or sizes mean other things."""
    return {row["dataset"]: f"{row['backbone']} at {row['image_size']} px" for row in run.rows}


def _feature_spaces(runs: Sequence[ReportRun], names: Sequence[str], shared: Sequence[str]) -> Iterator[str]:
    a, b = (_spaces(run) for run in runs)
    for dataset in shared:
        if a[dataset] != b[dataset]:
            yield (
                f"{dataset}: distances of features, which are those of {a[dataset]} in {names[0]} and of {b[dataset]} "
                f"in {names[1]}"
            )


def _comparable(rows: Sequence[Row], runs: Sequence[ReportRun]) -> list[Row]:
    """Rows without those in feature spaces that differ."""
    a, b = (_spaces(run) for run in runs)
    return [
        row
        for row in rows
        if row["task"] not in _IN_FEATURE_SPACE or a.get(row["dataset"]) == b.get(row["dataset"])
    ]


def _values(runs: Sequence[ReportRun]) -> list[list[Row]]:
    """Scores of single sequences of what ``statistics.parquet`` does not hold: feature datasets."""
    found = []
    for run in runs:
        pooled = {(row["dataset"], row["task"]) for row in run.statistics.to_pylist()}
        rows = read_sequences(run.out).to_pylist()
        found.append(_comparable([row for row in rows if (row["dataset"], row["task"]) not in pooled], runs))
    return found


def _pooled(series: Series, a: Mapping[str, Row], b: Mapping[str, Row]) -> Iterator[Difference]:
    """Differences of all metrics that follow from sums; both runs see the same resampled groups."""
    sequences = list(a)
    groups = [a[each]["group"] for each in sequences]
    totals = [np.array([run[each]["totals"] for each in sequences], np.float64) for run in (a, b)]
    count = totals[0].shape[1]
    if totals[1].shape[1] != count:
        return  # ranks among another number of samples
    sums = group_sums(np.concatenate(totals, 1), groups)
    resampled = bootstrap_means(sums)
    of = whole_frame_metrics if series.dataset == WHOLE_FRAMES else metrics_of
    whole = [of(series.task, each.sum(0)) for each in totals]
    drawn = [of(series.task, each) for each in (resampled[:, :count], resampled[:, count:])]
    for metric in whole[0]:
        if "/" in metric or np.isnan(whole[0][metric]) or np.isnan(whole[1][metric]):
            continue
        low, high = _interval(drawn[1][metric] - drawn[0][metric], len(sums))
        yield Difference(
            series.dataset,
            metric,
            series.label,
            series.horizon,
            series.seconds,
            float(whole[0][metric]),
            float(whole[1][metric]),
            low,
            high,
            len(sums),
        )


def _averaged(series: Series, a: Mapping[str, Row], b: Mapping[str, Row]) -> Difference:
    """Difference of a mean over sequences."""
    values = np.array([[a[each]["value"], b[each]["value"]] for each in a])
    means = bootstrap_means(values[:, 1:] - values[:, :1])[:, 0]
    low, high = _interval(means, len(values))
    mean = values.mean(0)
    return Difference(
        series.dataset,
        series.metric,
        series.label,
        series.horizon,
        series.seconds,
        float(mean[0]),
        float(mean[1]),
        low,
        high,
        len(values),
    )


def _interval(differences: np.ndarray, groups: int) -> tuple[float, float]:
    """95 % percentile interval of resampled differences (R,)."""
    known = differences[~np.isnan(differences)]
    if not known.size or (groups == 1 and known.any()):
        return float("nan"), float("nan")
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(known, [tail, 1 - tail])
    return float(low), float(high)
