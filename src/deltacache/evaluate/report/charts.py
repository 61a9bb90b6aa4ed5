"""The sections of a report: tables, charts and legends, run beside run in the same colours."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from deltacache.evaluate.report.calibration import (
    rank_chart,
    rank_shares,
    spread_and_error,
    spread_chart,
)
from deltacache.evaluate.report.drawing import Chart
from deltacache.evaluate.report.drift import METRIC, drift_of
from deltacache.evaluate.report.labels import METHOD_LABELS, PERCENT, leads, metric_title
from deltacache.evaluate.report.legends import LegendEntry, legend
from deltacache.evaluate.report.panels import Cell, Panel, labelled
from deltacache.evaluate.report.plots import drawn_lines, drift_chart, limits_of, metric_chart, samples_chart
from deltacache.evaluate.report.runs import ReportRun
from deltacache.evaluate.report.series import Style, style_of, styles_of

Row = dict[str, Any]
MAIN_METRICS = frozenset({"miou", "rmse", "smooth_l1"})
_HORIZON_COLOURS = (4, 1, 6, 3, 2, 5)


@dataclass(frozen=True, slots=True)
class Shown:
    """A chart of one run; ``run`` is empty if there is one run only."""

    run: str
    chart: Chart


@dataclass(frozen=True, slots=True)
class PanelView:
    """A table with its charts."""

    panel: Panel
    charts: tuple[Shown, ...]
    legend: tuple[LegendEntry, ...]


@dataclass(frozen=True, slots=True)
class ChartGroup:
    """Charts that share a title and a legend."""

    title: str
    charts: tuple[Shown, ...]
    legend: tuple[LegendEntry, ...]


def panel_view(panel: Panel, styles: Mapping[str, Style]) -> PanelView:
    """The table of a metric, and for the main ones of features and labels a chart a run."""
    if not leads(panel.dataset, panel.metric, MAIN_METRICS):
        return PanelView(panel, (), ())
    lines = drawn_lines(panel)
    limits = limits_of(panel, lines)
    charts = tuple(
        Shown(run, replace(metric_chart(panel.of_run(run), styles, limits), title="")) for run in panel.runs
    )  # the table has the title
    return PanelView(
        panel, charts, legend((line.label, styles[line.label], bool(line.published)) for line in lines)
    )


def all_styles(shown: Iterable[Panel]) -> dict[str, Style]:
    """Looks of all lines of all panels."""
    return styles_of(line for panel in shown for line in panel.lines)


def drift_group(
    shown: Iterable[Panel], runs: Sequence[ReportRun], styles: Mapping[str, Style]
) -> ChartGroup | None:
    """Loss relative to copying, for every data set and run with enough horizons."""
    charts, labels = [], dict[str, None]()
    by_name = {run.name: run for run in runs}
    for panel in shown:
        for run in panel.runs if panel.metric == METRIC else ():
            drift = drift_of(panel.of_run(run), by_name[run])
            if drift is not None:
                charts.append(Shown(run, drift_chart(f"{panel.dataset}, {drift.over}", drift.ratios, styles)))
                labels |= dict.fromkeys(drift.ratios)
    entries = legend((each, styles[each], False) for each in labels)
    return ChartGroup("", tuple(charts), entries) if charts else None


def samples_groups(runs: Sequence[ReportRun]) -> list[ChartGroup]:
    """Best and mean against the number of samples, at the shortest and the longest horizon."""
    rows = [(run.name, row) for run in runs for row in labelled(run.samples.to_pylist())]
    keys = dict.fromkeys((row["dataset"], row["metric"]) for _, row in rows if row["metric"] in MAIN_METRICS)
    groups = []
    for dataset, metric in keys:
        own = [(run, row) for run, row in rows if (row["dataset"], row["metric"]) == (dataset, metric)]
        charts, styles = [], dict[str, Style]()
        for run in dict.fromkeys(run for run, _ in own):
            of_run = [row for name, row in own if name == run]
            for chart, found in _samples_charts(metric, of_run):
                charts.append(Shown(run, chart))
                styles |= found
        if charts:
            entries = legend((label, style, False) for label, style in styles.items())
            groups.append(ChartGroup(f"{dataset}: {metric_title(metric)}", tuple(charts), entries))
    return groups


def _samples_charts(metric: str, rows: Sequence[Row]) -> Iterator[tuple[Chart, dict[str, Style]]]:
    if len({row["num_samples"] for row in rows}) < 2:
        return
    horizons = sorted({row["horizon"] for row in rows})
    for horizon in dict.fromkeys((horizons[0], horizons[-1])):
        cells: dict[str, dict[int, Cell]] = {}
        styles: dict[str, Style] = {}
        for row in rows:
            if row["horizon"] == horizon:
                label = _summary_label(row)
                values = (row["value"], row["ci_low"], row["ci_high"], row["n_sequences"], row["horizon_s"])
                cells.setdefault(label, {})[row["num_samples"]] = Cell(*values)
                styles[label] = style_of(row["method"], row["aggregation"])
        seconds = next(iter(next(iter(cells.values())).values())).seconds
        title = f"{horizon} step{'s' if horizon > 1 else ''} ({seconds:.2f} s) ahead"
        scale = 100.0 if metric in PERCENT else 1.0
        yield samples_chart(title, metric, cells, styles, scale), styles


def _summary_label(row: Row) -> str:
    """The label without the number of samples."""
    method = METHOD_LABELS.get(row["method"], row["method"])
    model = row["label"].partition("(")[2]
    return f"{method}, {row['aggregation']}" + (f" ({model}" if model else "")


def calibration_groups(runs: Sequence[ReportRun]) -> list[ChartGroup]:
    """Rank histograms at the shortest and longest horizon, and error against spread, of every data set."""
    groups: dict[str, list[Shown]] = {}
    entries: dict[str, LegendEntry] = {}
    for run in runs:
        for dataset, shown in _rank_charts(run):
            groups.setdefault(dataset, []).append(shown)
        for dataset, shown, found in _spread_charts(run):
            groups.setdefault(dataset, []).append(shown)
            entries |= {entry.label: entry for entry in found}
    return [ChartGroup(dataset, tuple(charts), tuple(entries.values())) for dataset, charts in groups.items()]


def _rank_charts(run: ReportRun) -> Iterator[tuple[str, Shown]]:
    rows = [row for row in run.rows if row["metric"].startswith("rank/")]
    keys = dict.fromkeys((row["dataset"], row["world"]) for row in rows)
    for dataset, world in keys:
        own = [row for row in rows if (row["dataset"], row["world"]) == (dataset, world)]
        horizons = sorted({row["horizon"] for row in own})
        for horizon in dict.fromkeys((horizons[0], horizons[-1])):
            at = [row for row in own if row["horizon"] == horizon]
            name = _model_name(run, world)
            title = f"Ranks {_ahead(at[0])}{name}"
            yield dataset, Shown(run.name, rank_chart(title, rank_shares(at), _colour(horizons, horizon)))


def _spread_charts(run: ReportRun) -> Iterator[tuple[str, Shown, tuple[LegendEntry, ...]]]:
    found = {series: own for series, own in run.sums.series.items() if series.task == "samples"}
    for dataset, world in dict.fromkeys((series.dataset, series.method.world) for series in found):
        own = {
            series.horizon: sums.totals
            for series, sums in found.items()
            if (series.dataset, series.method.world) == (dataset, world)
        }
        horizons = sorted(own)
        points, colours, entries = {}, {}, []
        for horizon in dict.fromkeys((horizons[0], horizons[-1])):
            label = f"{horizon} step{'s' if horizon > 1 else ''} ahead"
            points[label] = spread_and_error(own[horizon])
            colours[label] = _colour(horizons, horizon)
            entries.append((label, Style(colours[label], "o"), False))
        chart = spread_chart(f"Error against spread{_model_name(run, world)}", points, colours)
        yield dataset, Shown(run.name, chart), legend(entries, lines=False)


def _colour(horizons: Sequence[int], horizon: int) -> int:
    return _HORIZON_COLOURS[0 if horizon == horizons[0] else 1]


def _ahead(row: Row) -> str:
    horizon = row["horizon"]
    return f"{horizon} step{'s' if horizon > 1 else ''} ({row['horizon_s']:.2f} s) ahead"


def _model_name(run: ReportRun, world: str | None) -> str:
    return f", {run.world_labels[world]}" if world and len(run.world_labels) > 1 else ""
