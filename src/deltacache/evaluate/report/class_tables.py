"""IoU of every class at the longest horizon, for those who wonder which classes a mean hides."""

from collections.abc import Sequence
from dataclasses import dataclass

from deltacache.evaluate.report.labels import class_name
from deltacache.evaluate.report.panels import labelled
from deltacache.evaluate.report.runs import ReportRun

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
            for row in labelled(run.rows)
            if row["dataset"] == dataset and row["metric"].startswith(_PREFIX)
        ]
        if not rows:
            continue
        longest = max(row["horizon"] for row in rows)
        at = [row for row in rows if row["horizon"] == longest]
        steps = f"{longest} step{'s' if longest > 1 else ''} ahead"
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
