"""A comparison of two evaluations as tables on a terminal and as plain text."""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
from rich.console import Console
from rich.markup import escape
from tabulate import tabulate

from deltacache.evaluate.foresight.predictions import whole_frame_metrics
from deltacache.evaluate.metrics import FEWEST_UNITS, group_sums, metrics_of, paired_intervals
from deltacache.evaluate.output import is_clips, unit_kind, units_text
from deltacache.evaluate.report.panels import (
    HIGHER_IS_BETTER,
    METHOD_LABELS,
    NEITHER_IS_BETTER,
    PERCENT,
    leads,
    metric_title,
    summary_of,
)
from deltacache.evaluate.report.runs import ReportRun, open_runs, run_names, size_of
from deltacache.evaluate.statistics import SequenceSums, Series, Sums
from deltacache.schemas.errors import MismatchError
from deltacache.schemas.foresight import DATASET as WHOLE_FRAMES
from deltacache.schemas.foresight import ForesightEvaluation
from deltacache.schemas.texts import counted

# ----------------------------------------------------------------------------------------------------
# Which sums of two evaluations belong together, and whether they are of the same data.
# ----------------------------------------------------------------------------------------------------


_NAMES_SHOWN = 3


@dataclass(frozen=True, slots=True)
class PairedSeries:
    """What paired sums have in common.

    ``world`` is a fingerprint where a run has several models of one kind, else empty: two runs may each have
    trained their own.
    """

    dataset: str
    task: str
    method: str
    aggregation: str
    horizon: int
    num_samples: int
    world: str

    @property
    def label(self) -> str:
        """As in the tables of an evaluation."""
        return self._named(summary_of(self.aggregation, self.num_samples))

    @property
    def model(self) -> str:
        """The label without how it is summarised."""
        return self._named("")

    def _named(self, summary: str) -> str:
        label = METHOD_LABELS.get(self.method, self.method) + summary
        return f"{label} ({self.world[:8]})" if self.world else label


@dataclass(frozen=True, slots=True, repr=False)
class Pair:
    """A series in both runs: its sequences, and the names that these have."""

    series: PairedSeries
    a: SequenceSums
    b: SequenceSums
    names_a: Sums
    names_b: Sums


def by_paired_series(runs: Sequence[Iterable[Series]]) -> list[dict[PairedSeries, Series]]:
    """What the series of two runs are called when they are paired."""
    several = set()
    for own in runs:
        models: dict[str, set[str]] = {}
        for series in own:
            models.setdefault(series.method.name, set()).add(_model(series))
        several |= {method for method, each in models.items() if len(each) > 1}
    return [
        {
            PairedSeries(
                series.dataset,
                series.task,
                series.method.name,
                series.aggregation,
                series.horizon,
                series.num_samples,
                _model(series) if series.method.name in several else "",
            ): series
            for series in own
        }
        for own in runs
    ]


def _model(series: Series) -> str:
    return series.method.world or series.method.tokenizer or ""


def aligned(pair: Pair, names: Sequence[str]) -> tuple[SequenceSums, SequenceSums]:
    """The sums of both runs with the sequences, and so the units, in one order.

    Raises:
        MismatchError: other sequences, sequences of other units, or other labels.
    """
    series, a, b = pair.series, pair.a, pair.b
    own = [pair.names_a.names[at] for at in a.sequences]
    place = {pair.names_b.names[at]: row for row, at in enumerate(b.sequences)}
    if place.keys() != set(own):
        _refuse_sequences(series, own, place.keys(), names)
    order = np.array([place[name] for name in own])
    b = SequenceSums(b.sequences[order], b.units[order], b.seconds[order], b.totals[order])
    for row, name in enumerate(own):
        unit_a, unit_b = pair.names_a.unit_names[a.units[row]], pair.names_b.unit_names[b.units[row]]
        if unit_a != unit_b:
            raise MismatchError(
                f"{series.dataset}: sequence {name} is from {unit_a} in {names[0]} and from {unit_b} in {names[1]}: a "
                "paired difference needs the same data in both; evaluate both on the same data"
            )
    other = (_labelled(series.task, a.totals) != _labelled(series.task, b.totals)).any(1)
    if other.any():
        raise MismatchError(
            f"{series.dataset}: sequence {own[int(other.argmax())]} has other labels in {names[0]} than in {names[1]}: "
            "a paired difference needs the same labels in both; evaluate both on the same data"
        )
    return a, b


def _refuse_sequences(
    series: PairedSeries, a: Collection[str], b: Collection[str], names: Sequence[str]
) -> NoReturn:
    lists = []
    for own, other, name in ((a, b, names[0]), (b, a, names[1])):
        only = sorted(set(own) - set(other))
        if only:
            more = ", …" if len(only) > _NAMES_SHOWN else ""
            lists.append(f"{len(only)} only in {name} ({', '.join(only[:_NAMES_SHOWN])}{more})")
    raise MismatchError(
        f"{series.dataset}, horizon {series.horizon}: {names[0]} has {counted(len(a), 'sequence')} and "
        f"{names[1]} {len(b)}; "
        f"{'; '.join(lists)}: a paired difference needs the same sequences in both; evaluate both on the same data"
    )


def _labelled(task: str, totals: np.ndarray) -> np.ndarray:
    """What the sums (n, K) say about the label alone, whatever was predicted; see ``pooled``."""
    return totals[:, 2 * totals.shape[1] // 3 :] if task == "segmentation" else totals[:, :1]


# ----------------------------------------------------------------------------------------------------
# What two evaluations do not have in common, in words: settings, horizons, and what only one says of a
# method.
# ----------------------------------------------------------------------------------------------------


def differing_settings(runs: Sequence[ReportRun]) -> tuple[str, ...]:
    """Parts of the protocol that are not the same in both, with the value of each."""
    a, b = (_protocol(run) for run in runs)
    return tuple(
        f"{name} {a.get(name, 'none')} and {b.get(name, 'none')}"
        for name in {**a, **b}
        if a.get(name) != b.get(name)
    )


def _protocol(run: ReportRun) -> Mapping[str, str]:
    settings = run.settings
    whole = isinstance(settings, ForesightEvaluation)
    sizes = dict.fromkeys(map(size_of, run.rows))
    protocol = {
        "context": str(settings.context),
        "horizons": _listed(settings.horizons),
        "seed": str(settings.seed),
        "image size": f"{_listed(sizes)} px",
        "backbone": _listed(_values(run, "backbone")),
    }
    return protocol if whole else protocol | {"samples": str(settings.samples)}


def _values(run: ReportRun, column: str) -> list[str]:
    return sorted({str(value) for value in run.metrics[column].to_pylist()})


def only_in_one(held: Sequence[Collection[PairedSeries]], names: Sequence[str]) -> Iterator[str]:
    """A line for the horizons of a data set that one run alone has, and one a method for the rest."""
    missing = [[each for each in held[at] if each not in held[1 - at]] for at in (0, 1)]
    missing = [sorted(each, key=_order) for each in missing]
    horizons = [{(each.dataset, each.horizon) for each in own} for own in held]
    by_method: dict[str, list[str]] = {}
    for at, name in enumerate(names):
        others = horizons[1 - at]
        yield from _whole_horizons(horizons[at] - others, name)
        partly = [each for each in missing[at] if (each.dataset, each.horizon) in others]
        for model in dict.fromkeys(each.model for each in partly):
            parts = _parts([each for each in partly if each.model == model])
            by_method.setdefault(model, []).append(f"only {name} has it{parts}")
    yield from (f"{model}: {'; '.join(parts)}" for model, parts in by_method.items())


def _order(series: PairedSeries) -> tuple[str, str, str, int, int, str]:
    return series.method, series.world, series.dataset, series.horizon, series.num_samples, series.aggregation


def _whole_horizons(found: Iterable[tuple[str, int]], name: str) -> Iterator[str]:
    by_dataset: dict[str, list[int]] = {}
    for dataset, horizon in sorted(found):
        by_dataset.setdefault(dataset, []).append(horizon)
    for dataset, horizons in by_dataset.items():
        yield f"{dataset}, {_horizons(horizons)}: only {name} has {'it' if len(horizons) == 1 else 'them'}"


def _parts(series: Sequence[PairedSeries]) -> str:
    """Summaries of one method, with the horizons of each data set: `` (best of 20; clips, horizons 1, 3)``."""
    summaries = dict.fromkeys(summary_of(each.aggregation, each.num_samples)[2:] for each in series)
    horizons: dict[str, set[int]] = {}
    for each in series:
        horizons.setdefault(each.dataset, set()).add(each.horizon)
    places = [f"{dataset}, {_horizons(sorted(at))}" for dataset, at in horizons.items()]
    return f" ({'; '.join(filter(None, [_listed(filter(None, summaries)), *places]))})"


def _horizons(horizons: Sequence[int]) -> str:
    return f"horizon{'s' if len(horizons) > 1 else ''} {_listed(horizons)}"


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


# ----------------------------------------------------------------------------------------------------
# Paired differences between two evaluations of the same data: ``deltacache compare A B``.
#
# The sums in ``statistics.parquet`` are paired by sequence and added up by unit (video, scene, city,
# drive); units are
# left out in both runs alike, see ``intervals``.
# ----------------------------------------------------------------------------------------------------


ROUNDING = 1e-6
"""Differences up to this share of a value do not count: sums in another order differ by as much."""
_IN_FEATURE_SPACE = frozenset({"features", "samples", "modes", "odds"})


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
    def verdict(self) -> str:
        """What can be said about B: better, worse, different, equal or undecided."""
        rounding = ROUNDING * max(abs(self.a), abs(self.b))
        if not any(
            abs(each) > rounding for each in (self.difference, self.low, self.high)
        ):  # NaN: no interval
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
    datasets = [list(dict.fromkeys(run.metrics["dataset"].to_pylist())) for run in runs]
    shared = [name for name in datasets[0] if name in datasets[1]]
    if not shared:
        raise MismatchError(
            f"{names[0]} is an evaluation of {', '.join(datasets[0])}, {names[1]} one of {', '.join(datasets[1])}: "
            "differences are between evaluations of the same data; give two of these"
        )
    # What cannot be compared, with the reason.
    old = dict(_left_out(runs, names, shared))
    # Where the features of each data set live: numbers of other backbones or sizes mean other things.
    a_space, b_space = (
        {row["dataset"]: f"{row['backbone']} at {size_of(row)} px" for row in run.rows} for run in runs
    )
    reasons = [
        f"{dataset}: distances of features, which are those of {a_space[dataset]} in {names[0]} and of "
        f"{b_space[dataset]} in {names[1]}"
        for dataset in shared
        if a_space[dataset] != b_space[dataset]
    ]
    reasons += old.values()
    notes = [
        f"{dataset}: only {name} has it"
        for own, name in zip(datasets, names, strict=True)
        for dataset in own
        if dataset not in shared
    ]
    notes += reasons
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


MAIN = frozenset(
    {
        *("miou", "rmse", "smooth_l1", "energy_score", "spread_skill"),
        *("mode_coverage", "mode_balance", "odds_error"),
    }
)
_STYLES = {"better": "green", "worse": "red", "different": "yellow"}
_HEADING = ("method", "ahead", "A", "B", "B − A", "95 % interval", "B is")


def print_comparison(comparison: Comparison, console: Console, *, every_metric: bool = False) -> None:
    """Print a table a metric, what is equal in one line, and what could not be compared."""
    shown = [
        each for each in comparison.differences if every_metric or leads(each.dataset, each.metric, MAIN)
    ]
    a, b = comparison.names
    console.print(f"A: {a}\nB: {b}", markup=False, highlight=False, soft_wrap=True)
    if comparison.settings:
        differing = "; ".join(comparison.settings)
        console.print(f"settings that differ: {differing}", markup=False, highlight=False, soft_wrap=True)
    # A table per metric of the methods that differ in anything, and a line for those that do not.
    differing_methods = {(each.dataset, each.label) for each in shown if each.verdict != "equal"}
    groups: dict[tuple[str, str], list[Difference]] = {}
    equal: dict[str, dict[str, None]] = {}
    for each in shown:
        if (each.dataset, each.label) in differing_methods:
            groups.setdefault((each.dataset, each.metric), []).append(each)
        else:
            equal.setdefault(each.dataset, {})[each.label] = None
    for (dataset, metric), rows in groups.items():
        console.print(f"\n{dataset}: {metric_title(metric)}", markup=False, highlight=False, style="bold")
        _print_rows(rows, console)
    for dataset, labels in equal.items():
        text = f"\n{dataset}: no difference beyond rounding for {', '.join(labels)}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    for note in comparison.notes:
        console.print(f"not compared: {note}", markup=False, highlight=False, soft_wrap=True)
    most: dict[tuple[str, str], int] = {}
    for each in shown:
        key = each.dataset, each.unit_kind
        most[key] = max(most.get(key, 0), each.groups)
    counts = dict.fromkeys(
        f"{units_text(count, kind)} of {dataset}" for (dataset, kind), count in most.items()
    )
    caption = (
        f"\nOver {', '.join(counts)}. Intervals: 95 % of the paired difference, by units that are left out in both "
        "alike, since sequences of one unit are not independent. Undecided: the interval holds 0, or none is given: "
        f"with fewer than {FEWEST_UNITS} units, where the difference is the same whichever unit is left out (no spread "
        "to judge it by), or where the metric does not exist without one of them."
    )
    console.print(caption, markup=False, highlight=False, soft_wrap=True)


def _print_rows(rows: list[Difference], console: Console) -> None:
    # Two digits that count for the smallest difference that is not tiny; one for per cents at the least.
    largest = max(abs(each.difference) for each in rows) or max(abs(each.a) for each in rows) or 1.0
    digits = 2 if rows[0].metric in PERCENT else min(8, max(3, 2 - math.floor(math.log10(largest))))
    table = [_HEADING, *(_texts(row, digits) for row in rows)]
    sides = ["left", *["right"] * (len(_HEADING) - 2), "left"]
    lines = tabulate(table, tablefmt="plain", colalign=sides, disable_numparse=True).splitlines()
    for line, (*_, verdict), row in zip(lines, table, [None, *rows], strict=True):
        text = line.rstrip().removesuffix(verdict)
        style = _STYLES.get(row.verdict, "") if row else "bold"
        shown = f"[{style}]{verdict}[/]" if style else verdict
        console.print(f"  {escape(text)}{shown}", highlight=False, soft_wrap=True)


def _texts(row: Difference, digits: int) -> tuple[str, ...]:
    scale = 100.0 if row.metric in PERCENT else 1.0
    interval = "none"
    if not math.isnan(row.low):
        interval = f"[{scale * row.low:+.{digits}f}, {scale * row.high:+.{digits}f}]"
    return (
        row.label,
        f"{row.horizon} ({row.horizon_s:.2f} s)",
        f"{scale * row.a:.{digits}f}",
        f"{scale * row.b:.{digits}f}",
        f"{scale * row.difference:+.{digits}f}",
        interval,
        row.verdict,
    )
