"""``metrics.parquet`` as tables on a terminal and as plain text."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from textwrap import indent
from types import MappingProxyType
from typing import Any

import pyarrow as pa
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tabulate import tabulate

from deltacache.evaluate.metrics import FEWEST_UNITS
from deltacache.evaluate.output import SCENE_TASKS, UNIT_PLURALS, is_clips, units_text
from deltacache.evaluate.report.panels import (
    HIGHER_IS_BETTER,
    METRIC_LABELS,
    NOT_PREDICTED,
    PERCENT,
    PUBLISHED_MARK,
    SOURCES,
    Line,
    Panel,
    class_name,
    data_title,
    labelled,
    panels,
    published_at,
)
from deltacache.evaluate.report.runs import ReportRun
from deltacache.schemas.texts import counted

_MOST_WITH_INTERVALS = 2  # horizons: with more of them, a terminal shows values alone


def rich_tables(metrics: pa.Table, names: Mapping[str, str] = MappingProxyType({})) -> list[Table]:
    """A table a metric, for a terminal; ``names`` as of ``labelled``."""
    tables = []
    for panel in panels(metrics, {"": names}):
        intervals = len(panel.columns) <= _MOST_WITH_INTERVALS
        table = Table(
            title=escape(f"{panel.dataset}: {panel.title}"),
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD,
            show_edge=False,
        )
        table.add_column("method", no_wrap=True)
        for column in range(len(panel.columns)):
            table.add_column(panel.heading(column), justify="right", no_wrap=True)
        for line in panel.lines:
            texts = [panel.text(cell) for cell in line.cells]
            cells = [f"{value} [dim]{escape(interval) if intervals else ''}[/]" for value, interval in texts]
            table.add_row(escape(line.label), *cells, style="italic" if line.published else None)
        tables.append(table)
    return tables


def plain_text(metrics: pa.Table, names: Mapping[str, str] = MappingProxyType({})) -> str:
    """The same as text with aligned columns."""
    tables = []
    for panel in panels(metrics, {"": names}):
        heading = ["method", *(panel.heading(column) for column in range(len(panel.columns)))]
        body = [[line.label, *(" ".join(panel.text(cell)) for cell in line.cells)] for line in panel.lines]
        sides = ["left", *["right"] * len(panel.columns)]
        table = tabulate([heading, *body], tablefmt="plain", colalign=sides, disable_numparse=True)
        tables.append(f"{panel.dataset}: {panel.title}\n{indent(table, '  ')}")
    return "\n\n".join(tables)


def print_metrics(
    metrics: pa.Table, console: Console, names: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Print tables on a terminal, aligned text elsewhere; what brackets mean comes last."""
    if console.is_terminal:
        for table in rich_tables(metrics, names):
            console.print(table, "")
    else:
        console.print(plain_text(metrics, names), markup=False, highlight=False, soft_wrap=True)
    console.print(caption(metrics), markup=False, highlight=False, soft_wrap=True)


def caption(metrics: pa.Table) -> str:
    """What the numbers are over, what the brackets mean, and where published numbers are from."""
    shown = panels(metrics)
    text = f"Over {' and '.join(over(metrics))}; in brackets {intervals_text(metrics)}."
    published = {line.published for panel in shown for line in panel.published}
    if published:
        at = published_at(panel.dataset for panel in shown)
        sources = "; ".join(f"{name}: {SOURCES[name]}" for name in SOURCES if name in published)
        text += f"\n{PUBLISHED_MARK} published by others, on the whole sets, {at}: {sources}"
    return text


def over(metrics: pa.Table) -> list[str]:
    """What the numbers are over: sequences or scenes of each data set, and the units that they are from."""
    rows = metrics.select(["dataset", "task", "unit_kind", "n_units", "n_sequences"]).to_pylist()
    several = len({row["dataset"] for row in rows}) > 1
    most: dict[tuple[str, bool], dict[str, Any]] = {}
    for row in rows:
        key = row["dataset"], row["task"] in SCENE_TASKS
        if key not in most or row["n_sequences"] > most[key]["n_sequences"]:
            most[key] = row
    texts = []
    for (dataset, scenes), row in most.items():
        count = row["n_sequences"]
        text = counted(count, "scene" if scenes else "sequence")
        if not scenes and row["n_units"] is not None:
            text += f" of {units_text(row['n_units'], row['unit_kind'])}"
        texts.append(f"{text} of {dataset}" if several else text)
    return texts


def intervals_text(metrics: pa.Table) -> str:
    """What the intervals of a table are."""
    kinds = [UNIT_PLURALS[kind] for kind in metrics["unit_kind"].unique().to_pylist() if kind is not None]
    if not kinds:
        text = "95 % percentile bootstrap intervals of an older version, too narrow where there are few units"
        if any(map(is_clips, metrics["dataset"].unique().to_pylist())):
            text += (
                "; of feature datasets they are over sequences, so too narrow also where these share a video"
            )
        return text
    return f"95 % intervals over {', '.join(kinds)} (none where there are fewer than {FEWEST_UNITS}, or all agree)"


# ----------------------------------------------------------------------------------------------------
# IoU of every class at the longest horizon, for those who wonder which classes a mean hides.
# ----------------------------------------------------------------------------------------------------


_PREFIX = "iou/"


@dataclass(frozen=True, slots=True)
class ClassTable:
    """IoU in per cent: a line a class, a column a method; empty where a class is nowhere."""

    title: str
    methods: tuple[str, ...]
    lines: tuple[tuple[str, tuple[str, ...]], ...]


def class_tables(runs: Sequence[ReportRun], dataset: str) -> list[ClassTable]:
    """A table a run that has classes on this data set."""
    tables = []
    for run in runs:
        rows = [
            row
            for row in labelled(run.rows, run.names)
            if row["dataset"] == dataset and row["metric"].startswith(_PREFIX)
        ]
        if not rows:
            continue
        longest = max(row["horizon"] for row in rows)
        at = [row for row in rows if row["horizon"] == longest]
        steps = f"{counted(longest, 'step')} ahead"
        values = {(int(row["metric"].removeprefix(_PREFIX)), row["label"]): row["value"] for row in at}
        methods = tuple(dict.fromkeys(row["label"] for row in at))
        lines = tuple(
            (class_name(dataset, label), tuple(_text(values.get((label, method))) for method in methods))
            for label in sorted({label for label, _ in values})
        )
        name = f", {run.name}" if run.name else ""
        tables.append(ClassTable(f"IoU by class (%), {steps}{name}", methods, lines))
    return tables


def _text(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


# ----------------------------------------------------------------------------------------------------
# The numbers that a reader looks for first, in words.
# ----------------------------------------------------------------------------------------------------


_LOSSES = ("miou", "rmse", "smooth_l1")
_FUTURES = {"best": "best future", "mean": "average future"}
_COPY, _BOUND = ("copy_last", "copying the last frame"), ("present", "the true future itself")


def findings(tables: Sequence[Panel]) -> list[str]:
    """Sentences about one run: its first metric on every data set, and modes."""
    sentences = []
    for dataset in dict.fromkeys(panel.dataset for panel in tables):
        by_metric = {panel.metric: panel for panel in tables if panel.dataset == dataset}
        main = next((by_metric[metric] for metric in _LOSSES if metric in by_metric), None)
        if main is not None:
            sentences += [
                text for column in sorted({0, len(main.columns) - 1}) if (text := _sentence(main, column))
            ]
        modes = by_metric.get("mode_coverage")
        if modes is not None:
            sentences += [text for line in modes.lines if (text := _mode_sentence(modes, line))]
    return sentences


def _sentence(panel: Panel, column: int) -> str:
    lines = [line for line in panel.own if line.cells[column] is not None]
    models = _models([line for line in lines if line.method not in NOT_PREDICTED])
    bounds = {line.method: panel.text(line.cells[column])[0] for line in lines}
    if not models or _COPY[0] not in bounds:
        return ""
    texts = [_model_text(panel, column, each, named=len(models) > 1) for each in models.values()]
    told = (_COPY,) if panel.task == "features" else (_COPY, _BOUND)
    texts.append(", ".join(f"{name} {bounds[method]}" for method, name in told if method in bounds))
    better = panel.title.rsplit(", ", 1)[1]
    label = METRIC_LABELS.get(panel.metric, panel.metric)
    numbers = ("; " if len(models) > 1 else ", ").join(texts)
    return f"{data_title(panel.dataset)}: {label}, {panel.heading(column)} ahead: {numbers} ({better})."


_BEATS = "beats copying the last frame"


def headline(tables: Sequence[Panel]) -> str:
    """One sentence on one run that a person can repeat: how its best model compares with copying the last frame.

    It is about the first metric of the first data set; empty where no model predicted or nothing was copied.
    """
    panel = next((each for metric in _LOSSES for each in tables if each.metric == metric), None)
    if panel is None:
        return ""
    by_method = {line.method: line for line in panel.own}
    ahead = sorted({0, len(panel.columns) - 1})
    sign = -1 if panel.metric in HIGHER_IS_BETTER else 1
    predicted = [
        line
        for line in panel.own
        if line.method not in NOT_PREDICTED and line.aggregation != "mean" and all(line.cells)
    ]
    copy = by_method.get(_COPY[0])
    if not predicted or copy is None or not all(copy.cells):
        return ""
    model = min(predicted, key=lambda line: sign * _value(line, 0))
    average = next(
        (each for each in panel.own if each.model == model.model and each.aggregation == "mean"), None
    )
    kind, text = _against_copying(panel, model, copy, ahead)
    who = (
        model.model
        if model.aggregation == "single"
        else f"The best of {model.samples} futures of {model.model}"
    )
    sentence = f"{who} {text}"
    if average is not None and all(average.cells):
        also, more = _against_copying(panel, average, copy, ahead)
        more = more.removeprefix(_BEATS) if also == kind == "better" else f" {more}"
        sentence += f"; the average future{more}"
    if kind == "worse":
        rebuilt = by_method.get("deltatok")
        tokenizer = rebuilt is not None and _against_copying(panel, rebuilt, copy, [0])[0] == "worse"
        part = "the tokenizer, which is worse than copying too," if tokenizer else "the world model"
        sentence += f": train {part} longer"
    several = len({each.dataset for each in tables}) > 1
    metric = METRIC_LABELS[panel.metric].partition(" (")[0]
    return f"{sentence} ({metric[:1].lower()}{metric[1:]}{f' on {data_title(panel.dataset)}' if several else ''})."


def _value(line: Line, column: int) -> float:
    cell = line.cells[column]
    return math.nan if cell is None else cell.value


def _against_copying(panel: Panel, line: Line, copy: Line, ahead: Sequence[int]) -> tuple[str, str]:
    """Whether a line is better or worse than copying at some columns, or neither, and that as a verb with numbers.

    Where both intervals overlap, neither is said; paired over the same sequences they would be narrower.
    """
    verdicts, amounts = [], []
    for column in ahead:
        ours, theirs = line.cells[column], copy.cells[column]
        if ours is None or theirs is None:
            continue
        gain = theirs.value - ours.value
        gain = -gain if panel.metric in HIGHER_IS_BETTER else gain
        low, high = (
            (max(a.value if a.low is None else a.low for a in (ours, theirs))),
            (min(a.value if a.high is None else a.high for a in (ours, theirs))),
        )
        verdicts.append("similar" if low <= high else "better" if gain > 0 else "worse")
        if panel.metric in PERCENT:
            size = f"{100 * abs(gain):.1f} points"
        else:
            size = f"{100 * abs(gain) / theirs.value:.0f} %" if theirs.value > 0 else f"{abs(gain):.3g}"
        amounts.append((size, f"at {panel.columns[column].seconds:.3g} s"))
    kind = verdicts[0] if len(set(verdicts)) == 1 else "mixed"
    joined = " and ".join(f"by {size} {at}" for size, at in amounts)
    if kind == "better":
        return kind, f"{_BEATS} {joined}"
    if kind == "worse":
        return kind, f"is worse than copying the last frame {joined}"
    if kind == "similar":
        return (
            kind,
            f"is not clearly better or worse than copying the last frame {' and '.join(at for _, at in amounts)}",
        )
    texts = [
        f"similar {at}" if verdict == "similar" else f"{size} {verdict} {at}"
        for verdict, (size, at) in zip(verdicts, amounts, strict=True)
    ]
    return kind, f"is, compared with copying the last frame, {' and '.join(texts)}"


def _models(lines: Iterable[Line]) -> dict[str, list[Line]]:
    """Lines by the model whose futures they are."""
    found: dict[str, list[Line]] = {}
    for line in lines:
        found.setdefault(line.model, []).append(line)
    return found


def _model_text(panel: Panel, column: int, lines: Sequence[Line], *, named: bool) -> str:
    """What one model's futures reach; a lone one that samples needs no name."""
    values = [(_FUTURES.get(line.aggregation, ""), panel.text(line.cells[column])[0]) for line in lines]
    texts = ", ".join(f"{future} {value}".strip() for future, value in values)
    return f"{lines[0].model} {texts}" if named or not values[0][0] else texts


def _mode_sentence(panel: Panel, line: Line) -> str:
    shares = [
        f"in {100 * cell.value:.0f} % of {cell.sequences} scenes {panel.heading(column)} ahead"
        for column, cell in enumerate(line.cells)
        if cell is not None
    ]
    return f"{line.label}: reaches every true future {', '.join(shares)}."
