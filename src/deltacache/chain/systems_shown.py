"""The table of ``compare-systems`` as text: a line a bound or system, a column a quantity."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from deltacache.chain.systems_costs import FUTURES
from deltacache.evaluate.report.labels import METHOD_LABELS, PERCENT
from deltacache.evaluate.report.panels import Column as Horizon

Rows = Sequence[Mapping[str, Any]]
Column = tuple[str, str, int]
BOUNDS = ("copy_last", "present")
QUALITY = {
    "smooth_l1": "loss",
    "mode_coverage": "coverage",
    "miou": "mIoU (%)",
    "rmse": "RMSE (m)",
    "delta1": "δ1 (%)",
}
_COSTS = {
    FUTURES: "futures (GFLOP)",
    "step_gflops": "step (GFLOP)",
    "step_seconds": "step (s)",
    "step_gib": "step (GiB)",
}
_NONE = "–"


@dataclass(frozen=True, slots=True)
class ShownTable:
    """Heading, a line a bound or system, and what is said below."""

    heading: list[str]
    body: list[list[str]]
    notes: list[str]

    @property
    def markdown(self) -> str:
        """The whole as Markdown."""
        lines = [self.heading, ["---", *("---:" for _ in self.heading[1:])], *self.body]
        table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        return table + "\n" + "\n".join(self.notes) + "\n"


def shown_table(rows: Rows) -> ShownTable:
    """Arrange the rows of ``systems.parquet``; lines keep the order that they have there."""
    quality = sorted(
        {_column(row) for row in _scores(rows)},
        key=lambda column: (column[0], list(QUALITY).index(column[1]), column[2]),
    )
    costs = [name for name in _COSTS if any(row["quantity"] == name for row in rows)]
    lines: dict[tuple[str, str | None], list[Mapping[str, Any]]] = {}
    for row in rows:
        lines.setdefault((row["system"], row["world"]), []).append(row)
    heading = ["system", *_quality_headings(quality, rows), *(_cost_heading(name, rows) for name in costs)]
    body = [_line(own, quality, costs) for own in lines.values()]
    notes = [_legend(rows), "", _counts(quality, rows), "", *_systems(lines.values())]
    return ShownTable(heading, body, notes)


def print_table(table: ShownTable) -> None:
    """On a terminal with lines as wide as it is, Markdown elsewhere."""
    console = Console()
    if not console.is_terminal:
        print(table.markdown)
        return
    shown = Table(*table.heading, box=box.SIMPLE_HEAD, show_edge=False)
    for line in table.body:
        shown.add_row(*line)
    console.print(shown)
    console.print("\n".join(table.notes), style="dim", highlight=False, markup=False)


def _scores(rows: Rows) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["quantity"] in QUALITY]


def _column(row: Mapping[str, Any]) -> Column:
    return row["dataset"], row["quantity"], row["horizon"]


def _quality_headings(columns: Sequence[Column], rows: Rows) -> Iterator[str]:
    several = len({dataset for dataset, _, _ in columns}) > 1
    for column in columns:
        dataset, quantity, horizon = column
        seconds = next(row["horizon_s"] for row in _scores(rows) if _column(row) == column)
        yield f"{dataset + ' ' if several else ''}{QUALITY[quantity]}, {Horizon(horizon, seconds).heading}"


def _cost_heading(name: str, rows: Rows) -> str:
    return _COSTS[name].replace("futures", "futures without backbone") if _lacks(name, rows) else _COSTS[name]


def _lacks(name: str, rows: Rows) -> bool:
    """Whether the column is without the backbone."""
    return any(row["quantity"] == name and row["includes_backbone"] is False for row in rows)


def _line(own: Rows, quality: Sequence[Column], costs: Sequence[str]) -> list[str]:
    scored = _scores(own)
    name = own[0]["system"] if own[0]["world"] else METHOD_LABELS[own[0]["method"]]
    cells = [
        _quality_text(column[1], [row for row in scored if _column(row) == column]) for column in quality
    ]
    return [name, *cells, *(_cost_text(own, cost) for cost in costs)]


def _quality_text(quantity: str, rows: Rows) -> str:
    """Best, with the mean in brackets; the one number of a single future."""
    values = {row["aggregation"]: _number(quantity, row["value"]) for row in rows}
    if "best" in values:
        return f"{values['best']} ({values['mean']})" if "mean" in values else values["best"]
    return values.get("single", _NONE)


def _number(quantity: str, value: float) -> str:
    return f"{100 * value:.1f}" if quantity in PERCENT else f"{value:.4g}"


def _cost_text(own: Rows, name: str) -> str:
    found = next((row for row in own if row["quantity"] == name), None)
    if found is None:
        return _NONE
    ratio = "" if found["relative"] is None else f" ({found['relative']:.3g}x)"
    return f"{found['value']:.3g}{ratio}"


def _legend(rows: Rows) -> str:
    without = _lacks(FUTURES, rows)
    counted = (
        "tokenizer included, backbone left out: it is not known"
        if without
        else "backbone and tokenizer included"
    )
    ratios = (
        "of a training step the ratio to the first system" if without else "the ratio to the first system"
    )
    return (
        "Quality: best of the samples, their mean in brackets; one number where there is one future. Loss is smooth-L1 "
        f"of features (lower is better).\nCosts: GFLOP of all futures of one image from its context, {counted}; GFLOP "
        f"(of one clip), seconds and GiB of a training step from cached tokens. In brackets {ratios}."
    )


def _counts(columns: Sequence[Column], rows: Rows) -> str:
    """Over how many sequences the columns are; of scenes with several futures over these."""
    found: dict[str, dict[str, list[str]]] = {}
    for column in columns:
        dataset, quantity, horizon = column
        count = max(row["n_sequences"] for row in _scores(rows) if _column(row) == column)
        items = "scenes" if quantity == "mode_coverage" else "sequences"
        name = QUALITY[quantity].split(" (")[0]
        found.setdefault(f"{count} {items} of {dataset}", {}).setdefault(name, []).append(str(horizon))
    texts = []
    for text, names in found.items():
        at = "; ".join(f"{name} at {', '.join(horizons)} steps" for name, horizons in names.items())
        texts.append(f"{text} ({at})")
    return f"Over {' and '.join(texts)}."


def _systems(lines: Iterable[Rows]) -> list[str]:
    """Which model is which: tables and pictures of the evaluation know fingerprints only."""
    return [
        f"- {own[0]['system']}: {METHOD_LABELS.get(own[0]['method'], own[0]['method'])}, world model {own[0]['world']}"
        for own in lines
        if own[0]["world"]
    ]
