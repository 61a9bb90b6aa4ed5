"""``metrics.parquet`` as tables that a person reads: on a terminal, as plain text, and for the report."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

METHOD_LABELS = {
    "copy_last": "Copy of the last frame",
    "present": "True future (bound)",
    "deltatok": "DeltaTok, closed loop",
    "deltatok_parallel": "DeltaTok, parallel",
    "deltatok_swapped": "DeltaTok, swapped token",
    "deltaworld": "DeltaWorld",
    "deltaworld_discriminative": "DeltaWorld, learned query",
}
METRIC_LABELS = {
    "smooth_l1": "Feature loss (smooth L1)",
    "mse": "Feature loss (squared error)",
    "cosine": "Cosine similarity",
    "mode_coverage": "Mode coverage",
    "mode_balance": "Mode balance",
}
HIGHER_IS_BETTER = frozenset({"cosine", "mode_coverage", "mode_balance"})


_MOST_WITH_INTERVALS = 2  # horizons: with more of them, a terminal shows values alone


@dataclass(frozen=True, slots=True)
class Cell:
    """One number with its interval, over ``sequences`` sequences, ``seconds`` after the context."""

    value: float
    low: float
    high: float
    sequences: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Line:
    """One method, summarised in one way, at every horizon of the panel."""

    method: str
    aggregation: str
    label: str
    cells: tuple[Cell | None, ...]


@dataclass(frozen=True, slots=True)
class Panel:
    """One metric of one task on one dataset: methods by horizons."""

    dataset: str
    task: str
    metric: str
    horizons: tuple[int, ...]
    lines: tuple[Line, ...]

    @property
    def title(self) -> str:
        """The metric's name, and which way is better."""
        label = METRIC_LABELS.get(self.metric, self.metric)
        return f"{label}, {'higher' if self.metric in HIGHER_IS_BETTER else 'lower'} is better"

    @property
    def decimals(self) -> int:
        """Digits behind the point: four that count for the largest value, two for shares of scenes."""
        if self.task == "modes":
            return 2
        largest = max(abs(cell.value) for cell in self.cells)
        return 3 if largest == 0 else min(8, max(3, 3 - math.floor(math.log10(largest))))

    @property
    def cells(self) -> list[Cell]:
        """All numbers."""
        return [cell for line in self.lines for cell in line.cells if cell is not None]

    def heading(self, column: int) -> str:
        """The horizon, in steps and seconds."""
        horizon = self.horizons[column]
        cells = [cell for line in self.lines if (cell := line.cells[column]) is not None]
        return f"{horizon} step{'s' if horizon > 1 else ''} ({cells[0].seconds:.2f} s)"

    def text(self, cell: Cell | None) -> tuple[str, str]:
        """A number and its interval."""
        if cell is None:
            return "", ""
        digits = self.decimals
        return f"{cell.value:.{digits}f}", f"[{cell.low:.{digits}f}, {cell.high:.{digits}f}]"


def panels(metrics: pa.Table) -> tuple[Panel, ...]:
    """Arrange the rows of ``metrics.parquet``; everything keeps the order it has there."""
    rows = metrics.to_pylist()
    keys = dict.fromkeys((row["dataset"], row["task"], row["metric"]) for row in rows)
    return tuple(
        _panel(key, [row for row in rows if (row["dataset"], row["task"], row["metric"]) == key])
        for key in keys
    )


def _panel(key: tuple[str, str, str], rows: Sequence[dict[str, Any]]) -> Panel:
    horizons = tuple(sorted({row["horizon"] for row in rows}))
    names = {
        row["method"]: {other["world"] for other in rows if other["method"] == row["method"]} for row in rows
    }
    groups: dict[tuple[str, str, str | None], dict[int, dict[str, Any]]] = {}
    for row in rows:
        identity = (row["method"], row["aggregation"], row["world"])
        groups.setdefault(identity, {})[row["horizon"]] = row
    lines = [
        Line(
            method,
            aggregation,
            _label(next(iter(by_horizon.values())), several=len(names[method]) > 1),
            tuple(_cell(by_horizon.get(horizon)) for horizon in horizons),
        )
        for (method, aggregation, _), by_horizon in groups.items()
    ]
    return Panel(*key, horizons, tuple(lines))


def _label(row: dict[str, Any], *, several: bool) -> str:
    method = str(row["method"])
    label = METHOD_LABELS.get(method, method)
    if row["aggregation"] != "single":
        label += f", {row['aggregation']} of {row['num_samples']}"
    elif row["num_samples"] > 1:
        label += f", {row['num_samples']} samples"
    return f"{label} ({row['world'][:8]})" if several else label


def _cell(row: dict[str, Any] | None) -> Cell | None:
    if row is None:
        return None
    return Cell(row["value"], row["ci_low"], row["ci_high"], row["n_sequences"], row["horizon_s"])


def rich_tables(metrics: pa.Table) -> list[Table]:
    """A table a metric, for a terminal."""
    tables = []
    for panel in panels(metrics):
        intervals = len(panel.horizons) <= _MOST_WITH_INTERVALS
        table = Table(
            title=escape(f"{panel.dataset}: {panel.title}"),
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD,
            show_edge=False,
        )
        table.add_column("method", no_wrap=True)
        for column in range(len(panel.horizons)):
            table.add_column(panel.heading(column), justify="right", no_wrap=True)
        for line in panel.lines:
            texts = [panel.text(cell) for cell in line.cells]
            cells = [f"{value} [dim]{escape(interval) if intervals else ''}[/]" for value, interval in texts]
            table.add_row(escape(line.label), *cells)
        tables.append(table)
    return tables


def plain_text(metrics: pa.Table) -> str:
    """The same as text with aligned columns."""
    return "\n\n".join(_plain_panel(panel) for panel in panels(metrics))


def _plain_panel(panel: Panel) -> str:
    heading = ["method", *(panel.heading(column) for column in range(len(panel.horizons)))]
    body = [[line.label, *(" ".join(panel.text(cell)) for cell in line.cells)] for line in panel.lines]
    widths = [max(len(row[column]) for row in [heading, *body]) for column in range(len(heading))]
    lines = [_aligned(row, widths) for row in [heading, *body]]
    return "\n".join([f"{panel.dataset}: {panel.title}", *lines])


def _aligned(row: Iterable[str], widths: Sequence[int]) -> str:
    first, *others = row
    cells = [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
    return "  ".join(["", first.ljust(widths[0]), *cells])


def print_metrics(metrics: pa.Table, console: Console) -> None:
    """Print tables on a terminal, aligned text elsewhere; what brackets mean comes last."""
    if console.is_terminal:
        for table in rich_tables(metrics):
            console.print(table, "")
    else:
        console.print(plain_text(metrics), markup=False, highlight=False, soft_wrap=True)
    console.print(caption(metrics), markup=False, highlight=False, soft_wrap=True)


def caption(metrics: pa.Table) -> str:
    """What the numbers are over, and what the brackets mean."""
    counts = [
        f"{max(cell.sequences for cell in panel.cells)} {'scenes' if task == 'modes' else 'sequences'}"
        for task, panel in {panel.task: panel for panel in panels(metrics)}.items()
    ]
    return f"Over {' and '.join(counts)}; in brackets 95 % bootstrap intervals."
