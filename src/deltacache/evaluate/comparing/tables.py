"""A comparison of two evaluations as tables on a terminal and as plain text."""

import math
from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console
from rich.markup import escape

from deltacache.evaluate.comparing.compare import Comparison, Difference
from deltacache.evaluate.intervals import FEWEST_UNITS
from deltacache.evaluate.report.labels import PERCENT, leads, metric_title
from deltacache.evaluate.rows import units_text

MAIN = frozenset(
    {"miou", "rmse", "smooth_l1", "mode_coverage", "mode_balance", "energy_score", "spread_skill"}
)
_STYLES = {"better": "green", "worse": "red", "different": "yellow"}
_HEADING = ("method", "ahead", "A", "B", "B − A", "95 % interval", "B is")
Groups = dict[tuple[str, str], list[Difference]]


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
    for (dataset, metric), rows in _by_metric(shown).items():
        console.print(f"\n{dataset}: {metric_title(metric)}", markup=False, highlight=False, style="bold")
        _print_rows(rows, console)
    _print_equal(shown, console)
    for note in comparison.notes:
        console.print(f"not compared: {note}", markup=False, highlight=False, soft_wrap=True)
    console.print(_caption(shown), markup=False, highlight=False, soft_wrap=True)


def _by_metric(shown: Sequence[Difference]) -> Groups:
    """Rows of methods that differ in anything."""
    groups: Groups = {}
    same = _same(shown)
    for each in shown:
        if (each.dataset, each.label) not in same:
            groups.setdefault((each.dataset, each.metric), []).append(each)
    return groups


def _same(shown: Sequence[Difference]) -> dict[tuple[str, str], None]:
    """Methods without any difference, by data set."""
    differing = {(each.dataset, each.label) for each in shown if each.verdict != "equal"}
    return {(each.dataset, each.label): None for each in shown if (each.dataset, each.label) not in differing}


def _print_rows(rows: list[Difference], console: Console) -> None:
    digits = _digits(rows)
    table = [_HEADING, *(_texts(row, digits) for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(_HEADING))]
    for line, row in zip(table, [None, *rows], strict=True):
        first, *middle, last = line
        cells = [text.rjust(width) for text, width in zip(middle, widths[1:-1], strict=True)]
        text = escape("  ".join(["", first.ljust(widths[0]), *cells]))
        style = _STYLES.get(row.verdict, "") if row else "bold"
        verdict = f"[{style}]{last}[/]" if style else last
        console.print(f"{text}  {verdict}", highlight=False, soft_wrap=True)


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


def _digits(rows: Iterable[Difference]) -> int:
    """Two that count for the smallest difference that is not tiny; one for per cents at the least."""
    rows = list(rows)
    if rows[0].metric in PERCENT:
        return 2
    largest = max(abs(each.difference) for each in rows) or max(abs(each.a) for each in rows) or 1.0
    return min(8, max(3, 2 - math.floor(math.log10(largest))))


def _print_equal(shown: Sequence[Difference], console: Console) -> None:
    labels: dict[str, list[str]] = {}
    for dataset, label in _same(shown):
        labels.setdefault(dataset, []).append(label)
    for dataset, equal in labels.items():
        text = f"\n{dataset}: no difference beyond rounding for {', '.join(equal)}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def _caption(shown: Iterable[Difference]) -> str:
    counts = dict.fromkeys(_counts(shown))
    return (
        f"\nOver {', '.join(counts)}. Intervals: 95 % of the paired difference, by units that are left out in both "
        "alike, since sequences of one unit are not independent. Undecided: the interval holds 0, or none is given: "
        f"with fewer than {FEWEST_UNITS} units, where the difference is the same whichever unit is left out (no spread "
        "to judge it by), or where the metric does not exist without one of them."
    )


def _counts(shown: Iterable[Difference]) -> Iterator[str]:
    most: dict[tuple[str, str], int] = {}
    for each in shown:
        key = each.dataset, each.unit_kind
        most[key] = max(most.get(key, 0), each.groups)
    yield from (f"{units_text(count, kind)} of {dataset}" for (dataset, kind), count in most.items())
