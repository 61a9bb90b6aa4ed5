"""Paired differences between two evaluations of the same data: ``deltacache compare A B``.

The sums in ``statistics.parquet`` are paired by sequence and added up by unit (video, scene, city, drive); units are
left out in both runs alike, see ``intervals``.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deltacache.evaluate.comparing.left_out import differing_settings, only_in_one
from deltacache.evaluate.comparing.paired import Pair, PairedSeries, aligned, by_paired_series
from deltacache.evaluate.foresight.metrics import whole_frame_metrics
from deltacache.evaluate.intervals import FEWEST_UNITS, paired_intervals
from deltacache.evaluate.pooled import group_sums, metrics_of
from deltacache.evaluate.report.labels import HIGHER_IS_BETTER, NEITHER_IS_BETTER
from deltacache.evaluate.report.runs import ReportRun, open_runs, run_names, size_of
from deltacache.evaluate.rows import is_clips, unit_kind, units_text
from deltacache.evaluate.statistics import SequenceSums
from deltacache.schemas.errors import MismatchError
from deltacache.schemas.foresight import DATASET as WHOLE_FRAMES

ROUNDING = 1e-6
"""Differences up to this share of a value are none: sums of another order give as much."""
_IN_FEATURE_SPACE = frozenset({"features", "samples", "modes"})


@dataclass(frozen=True, slots=True)
class Difference:
    """One metric of one method in both runs.

    Attributes:
        low: end of the 95 % interval of B − A; NaN where there is none.
        groups: units that the interval is over, and what these are.
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
    unit_kind: str

    @property
    def difference(self) -> float:
        """B − A."""
        return self.b - self.a

    @property
    def _within_rounding(self) -> bool:
        """Where there is no interval, its ends are NaN."""
        most = ROUNDING * max(abs(self.a), abs(self.b))
        return not any(abs(each) > most for each in (self.difference, self.low, self.high))

    @property
    def verdict(self) -> str:
        """What can be said about B: better, worse, different, equal or undecided."""
        if self._within_rounding:
            return "equal"
        if self.groups < FEWEST_UNITS:
            return f"undecided, {units_text(self.groups, self.unit_kind)}"
        if math.isnan(self.low):
            return "undecided, no interval"
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
    old = dict(_left_out(runs, names, shared))
    reasons = [*_feature_spaces(runs, names, shared), *old.values()]
    notes = [*_not_shared(runs, names, shared), *reasons]
    a_space, b_space = (_spaces(run) for run in runs)
    comparable = [
        {
            series: sums
            for series, sums in run.sums.series.items()
            if series.dataset in shared
            and series.dataset not in old
            and (series.task not in _IN_FEATURE_SPACE or a_space[series.dataset] == b_space[series.dataset])
        }
        for run in runs
    ]
    held = by_paired_series(comparable)
    differences: list[Difference] = []
    for series, key in held[0].items():
        if series in held[1]:
            pair = Pair(
                series, comparable[0][key], comparable[1][held[1][series]], runs[0].sums, runs[1].sums
            )
            differences += _differences(series, *aligned(pair, names))
    if not differences and reasons:
        raise MismatchError(f"{names[0]} and {names[1]} cannot be compared: {'; '.join(reasons)}")
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


def _spaces(run: ReportRun) -> dict[str, str]:
    """Where the features of each data set live: numbers of other backbones or sizes mean other things."""
    return {row["dataset"]: f"{row['backbone']} at {size_of(row)} px" for row in run.rows}


def _feature_spaces(runs: Sequence[ReportRun], names: Sequence[str], shared: Sequence[str]) -> Iterator[str]:
    a, b = (_spaces(run) for run in runs)
    for dataset in shared:
        if a[dataset] != b[dataset]:
            yield (
                f"{dataset}: distances of features, which are those of {a[dataset]} in {names[0]} and of {b[dataset]} "
                f"in {names[1]}"
            )


def _left_out(
    runs: Sequence[ReportRun], names: Sequence[str], shared: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Feature datasets that a run of an older version kept no units of, and why they are not compared."""
    for dataset in filter(is_clips, shared):
        old = [
            name
            for run, name in zip(runs, names, strict=True)
            if any(row["unit_kind"] is None for row in run.rows if row["dataset"] == dataset)
        ]
        if old:
            yield (
                dataset,
                f"{dataset}: {' and '.join(old)} is of an older version, which did not keep what video a sequence is "
                "from: evaluate again into a new folder",
            )


def _differences(series: PairedSeries, a: SequenceSums, b: SequenceSums) -> Iterator[Difference]:
    """Of all metrics that follow from the sums of the same sequences."""
    if a.totals.shape[1] != b.totals.shape[1]:
        return  # ranks among another number of samples
    of = whole_frame_metrics if series.dataset == WHOLE_FRAMES else metrics_of
    whole = [of(series.task, each.totals.sum(0)) for each in (a, b)]
    sums_a, sums_b = (group_sums(each.totals, a.units) for each in (a, b))
    ends = paired_intervals(series.task, sums_a, sums_b, of)
    for metric in whole[0]:
        if "/" in metric or np.isnan(whole[0][metric]) or np.isnan(whole[1][metric]):
            continue
        low, high = ends.get(metric, (float("nan"), float("nan")))
        yield Difference(
            series.dataset,
            metric,
            series.label,
            series.horizon,
            float(a.seconds.mean()),
            float(whole[0][metric]),
            float(whole[1][metric]),
            low,
            high,
            len(sums_a),
            unit_kind(series.dataset, series.task),
        )
