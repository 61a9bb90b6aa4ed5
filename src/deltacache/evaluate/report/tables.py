"""``metrics.parquet`` as tables on a terminal and as plain text."""

from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deltacache.evaluate.intervals import FEWEST_UNITS
from deltacache.evaluate.report.panels import PUBLISHED_MARK, Panel, panels
from deltacache.evaluate.report.published import SOURCES, published_at
from deltacache.evaluate.rows import UNIT_PLURALS, is_clips, units_text

_MOST_WITH_INTERVALS = 2  # horizons: with more of them, a terminal shows values alone


def rich_tables(metrics: pa.Table) -> list[Table]:
    """A table a metric, for a terminal."""
    tables = []
    for panel in panels(metrics):
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


def plain_text(metrics: pa.Table) -> str:
    """The same as text with aligned columns."""
    return "\n\n".join(_plain_panel(panel) for panel in panels(metrics))


def _plain_panel(panel: Panel) -> str:
    heading = ["method", *(panel.heading(column) for column in range(len(panel.columns)))]
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
        key = row["dataset"], row["task"] == "modes"
        if key not in most or row["n_sequences"] > most[key]["n_sequences"]:
            most[key] = row
    texts = []
    for (dataset, scenes), row in most.items():
        count = row["n_sequences"]
        text = f"{count} {'scene' if scenes else 'sequence'}{'s' if count != 1 else ''}"
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
