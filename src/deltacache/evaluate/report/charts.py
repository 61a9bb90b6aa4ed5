"""The sections of a report: tables, charts and legends, run beside run in the same colours."""

import hashlib
import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from deltacache.evaluate.metrics import pooled_metrics
from deltacache.evaluate.report.panels import (
    METRIC_LABELS,
    NOT_PREDICTED,
    PERCENT,
    Cell,
    Line,
    Panel,
    labelled,
    leads,
    metric_title,
)
from deltacache.evaluate.report.runs import ReportRun
from deltacache.schemas.texts import counted

# ----------------------------------------------------------------------------------------------------
# One picture of matplotlib as inline SVG whose colours and fonts are those of the page, light or dark.
# ----------------------------------------------------------------------------------------------------


SERIES = 10
TEXT, SOFT, FAINT = "#0000f0", "#0000f1", "#0000f2"
_VARIABLES = {TEXT: "--text", SOFT: "--soft", FAINT: "--line"}
_VARIABLES |= {f"#0000a{number}": f"--s{number}" for number in range(SERIES)}


def series_colour(number: int) -> str:
    """What stands for ``--s<number>`` while matplotlib draws."""
    return f"#0000a{number % SERIES}"


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart as SVG, with a text for those who do not see it, and a sentence on what it shows."""

    title: str
    svg: str
    alt: str
    verdict: str = ""


def draw_svg(draw: Callable[[Axes], None], *, width: float = 4.6, height: float = 3.0) -> str:
    """An ``<svg>`` element for the middle of a page; ``draw`` fills the axes. Sizes in inches."""
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "deltacache",
        "font.size": 10,
        "text.color": TEXT,
        "axes.labelcolor": TEXT,
        "axes.titlecolor": TEXT,
        "xtick.color": SOFT,
        "ytick.color": SOFT,
        "axes.edgecolor": SOFT,
        "grid.color": FAINT,
        "axes.unicode_minus": True,
    }
    with rc_context(settings):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.subplots()
        axes.patch.set_visible(False)
        axes.grid(axis="y", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _for_page(buffer.getvalue())


def _for_page(svg: str) -> str:
    """Drop what a file needs and a page does not; names inside stay apart from those of other charts."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = (
        re.sub(r'\s(xmlns(:\w+)?|width|height|version)="[^"]*"', "", svg[: svg.index(">")])
        + svg[svg.index(">") :]
    )
    key = hashlib.sha256(svg.encode()).hexdigest()[:8]
    svg = re.sub(r'id="([^"]+)"', rf'id="{key}\1"', svg)
    svg = re.sub(r"url\(#", f"url(#{key}", svg)
    svg = re.sub(r'xlink:href="#', f'href="#{key}', svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(r"(font: [^;\"]*?px) [^;\"]*", r"\1 system-ui, sans-serif", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", svg)
    return re.sub(r"\s*\n\s*", " ", svg)


# ----------------------------------------------------------------------------------------------------
# Are the samples as different from each other as the truth is from them? Rank histograms and spread against
# error.
#
# Shapes: S samples, n sequences.
# ----------------------------------------------------------------------------------------------------


_BINS = 12
Row = dict[str, Any]


def rank_chart(title: str, shares: Sequence[float], colour: int) -> Chart:
    """Rank histogram: share of features of which r of the S samples are lower than the truth (S + 1 shares)."""
    level = 1 / len(shares)

    def draw(axes: Axes) -> None:
        axes.bar(range(len(shares)), shares, width=0.85, color=series_colour(colour), alpha=0.85)
        axes.axhline(level, color=SOFT, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel("samples lower than the true future")
        axes.set_ylabel("share of features")

    outside = shares[0] + shares[-1]
    alt = (
        f"{title}: rank histogram of the truth among {counted(len(shares) - 1, 'sample')}. "
        f"{100 * outside:.0f} % of features lie "
        f"outside all samples, {100 * 2 * level:.0f} % would be calibrated."
    )
    return Chart(title, draw_svg(draw, width=3.6, height=2.5), alt, rank_verdict(shares))


_OUTSIDE_FACTOR = 1.5  # times the share outside all samples that a calibrated model has
_LARGEST_BIAS = 0.1  # of the mean rank from the middle, as a share of all ranks
_CLOSE = (0.9, 1.1)  # ratios of spread to error that are called calibrated


def rank_verdict(shares: Sequence[float]) -> str:
    """What a rank histogram says about the samples."""
    outside, level = shares[0] + shares[-1], 2 / len(shares)
    bias = sum(at * share for at, share in enumerate(shares)) / (len(shares) - 1) / sum(shares) - 0.5
    text = (
        f"{100 * outside:.0f} % of features lie outside all samples, {100 * level:.0f} % would if calibrated"
    )
    if outside > _OUTSIDE_FACTOR * level:
        return f"In single features the samples are too alike: {text}."
    if outside < level / _OUTSIDE_FACTOR:
        return f"In single features the samples are too different: {text}."
    if abs(bias) > _LARGEST_BIAS:
        return f"The samples are {'lower' if bias > 0 else 'higher'} than the true future on average: {text}."
    return f"Close to calibrated: {text}."


def spread_verdict(ratios: Mapping[str, float]) -> str:
    """What ``spread_skill`` says about the samples: label -> ratio."""
    texts = []
    for label, ratio in ratios.items():
        low, high = _CLOSE
        words = "too alike" if ratio < low else "too different" if ratio > high else "close to calibrated"
        texts.append(f"{label} {ratio:.2f}, {words}")
    return f"Spread over error: {'; '.join(texts)} (1 is calibrated)."


def rank_shares(rows: Sequence[Row]) -> list[float]:
    """Shares by rank of ``rank/<r>`` rows of ``metrics.parquet``, in order."""
    shares = {int(row["metric"].removeprefix("rank/")): row["value"] for row in rows}
    return [shares[rank] for rank in sorted(shares)]


def spread_and_error(totals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Spread of the samples and error of their mean, of each sequence or of bins of sequences with alike spread.

    Args:
        totals: (n, 4 + S + 1) rows of task ``samples``; see ``pooled``.

    Returns:
        Two arrays, at most ``_BINS`` long: root mean squares over each bin.
    """
    variance, squared = totals[:, 2] / totals[:, 0], totals[:, 3] / totals[:, 0]
    order = np.argsort(variance)
    bins = np.array_split(order, min(_BINS, len(order)))
    return (
        np.sqrt([variance[each].mean() for each in bins]),
        np.sqrt([squared[each].mean() for each in bins]),
    )


def spread_chart(
    title: str,
    points: Mapping[str, tuple[np.ndarray, np.ndarray]],
    colours: Mapping[str, int],
    verdict: str = "",
) -> Chart:
    """Error of the samples' mean against their spread: label -> (spread, error). Calibrated lies on the diagonal."""

    def draw(axes: Axes) -> None:
        largest = max(float(max(spread.max(), error.max())) for spread, error in points.values())
        axes.plot([0, 1.05 * largest], [0, 1.05 * largest], color=SOFT, linewidth=1.2, linestyle=(0, (4, 3)))
        for label, (spread, error) in points.items():
            axes.plot(spread, error, "o", color=series_colour(colours[label]), markersize=5, alpha=0.9)
        axes.set_xlim(0, 1.05 * largest)
        axes.set_ylim(0, 1.05 * largest)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.set_xlabel("spread of the samples")
        axes.set_ylabel("error of their mean")

    texts = "; ".join(
        f"{label}: spread {spread.mean():.3g}, error {error.mean():.3g} on average"
        for label, (spread, error) in points.items()
    )
    alt = f"{title}: error against spread. {texts}."
    return Chart(title, draw_svg(draw, width=3.6, height=2.5), alt, verdict)


# ----------------------------------------------------------------------------------------------------
# How the error grows with the horizon: feature loss over that of copying, at every horizon over the same sequences.
#
# Long horizons exist only for some sequences of a benchmark, and a curve over ever other ones would show
# these and not the drift. So what is drawn is over those that have the last horizon; a feature dataset's have
# all.
# ----------------------------------------------------------------------------------------------------


METRIC = "smooth_l1"
_FEWEST_HORIZONS = 3
_NOT_DRIFTING = ("copy_last", "present", "deltatok_one_step", "deltatok_swapped")
Ratios = dict[str, dict[float, float]]


@dataclass(frozen=True, slots=True)
class Drift:
    """Curves of one run and data set.

    Attributes:
        ratios: loss over that of copying, by label and seconds.
        sequences: over which every point is; ``of`` so many at the first horizon.
    """

    ratios: Ratios
    sequences: int
    of: int
    horizon: int

    @property
    def over(self) -> str:
        """Which sequences these are."""
        if self.sequences == self.of:
            return f"over all {counted(self.of, 'sequence')}"
        return f"over the {self.sequences} of {self.of} sequences that reach {counted(self.horizon, 'step')}"


def drift_of(panel: Panel, run: ReportRun) -> Drift | None:
    """Curves of the panel of the feature loss of one run; None with few horizons, or without a copy to compare with."""
    counts = panel.counts
    copy = next((line.label for line in panel.own if line.method == "copy_last"), None)
    if len(counts) < _FEWEST_HORIZONS or copy is None:
        return None
    losses = _losses(panel) if len(set(counts)) == 1 else _common_losses(panel, run)
    base = losses.get(copy, {})  # nothing, if an older evaluation kept no sums
    hidden = {line.label for line in panel.own if line.method in _NOT_DRIFTING}
    ratios = {
        label: {at: loss / base[at] for at, loss in values.items() if base.get(at, 0) > 0}
        for label, values in losses.items()
        if label not in hidden and base
    }
    return Drift(ratios, counts[-1], counts[0], panel.columns[-1].horizon) if ratios else None


def _losses(panel: Panel) -> Ratios:
    """Of the table: all horizons are over the same sequences."""
    return {
        line.label: {
            column.seconds: cell.value
            for column, cell in zip(panel.columns, line.cells, strict=True)
            if cell is not None
        }
        for line in panel.own
    }


def _common_losses(panel: Panel, run: ReportRun) -> Ratios:
    """From the sums of the sequences that have the last horizon."""
    found = {
        series: own
        for series, own in run.sums.series.items()
        if (series.dataset, series.task) == (panel.dataset, panel.task)
    }
    labels = labelled(
        [
            {
                **{name: getattr(series, name) for name in ("aggregation", "num_samples")},
                **{
                    "method": series.method.name,
                    "tokenizer": series.method.tokenizer,
                    "world": series.method.world,
                },
            }
            for series in found
        ],
        run.names,
    )
    last = panel.columns[-1].horizon
    common = np.unique(
        np.concatenate([own.sequences for series, own in found.items() if series.horizon == last] or [[]])
    )
    seconds = {column.horizon: column.seconds for column in panel.columns}
    losses: Ratios = {}
    for (series, own), row in zip(found.items(), labels, strict=True):
        totals = own.totals[np.isin(own.sequences, common)]
        if len(totals):
            losses.setdefault(row["label"], {})[seconds[series.horizon]] = pooled_metrics(panel.task, totals)[
                METRIC
            ]
    return losses


# ----------------------------------------------------------------------------------------------------
# How a method looks in every chart and legend: the same in all panels, all runs and both colour schemes.
# ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Style:
    """Colour ``--s<colour>`` of the page, a marker of matplotlib, and a dash pattern in points."""

    colour: int
    marker: str
    dash: tuple[float, ...] = ()


_STYLES: Mapping[tuple[str, str], Style] = MappingProxyType(
    {
        ("copy_last", "single"): Style(0, "s"),
        ("deltatok", "single"): Style(1, "o"),
        ("deltatok_parallel", "single"): Style(2, "v", (4, 2)),
        ("deltatok_one_step", "single"): Style(2, "<", (1, 1.5)),
        ("deltatok_swapped", "single"): Style(3, "^", (1, 1.5)),
        ("deltaworld", "best"): Style(4, "D"),
        ("deltaworld", "mean"): Style(5, "P", (4, 2)),
        ("deltaworld", "single"): Style(4, "D"),
        ("deltaworld_discriminative", "single"): Style(6, "X"),
        ("deltaworld_energy", "best"): Style(8, "h"),
        ("deltaworld_energy", "mean"): Style(8, "h", (4, 2)),
        ("deltaworld_flow", "best"): Style(9, "p"),
        ("deltaworld_flow", "mean"): Style(9, "p", (4, 2)),
        ("present", "single"): Style(7, ">"),
        ("dino_world", "single"): Style(8, "h"),
        ("cosmos_12b", "best"): Style(9, "p"),
        ("cosmos_12b", "mean"): Style(9, "p"),
    }
)
_OTHERS = (Style(8, "h"), Style(9, "p"), Style(3, "^"), Style(6, "X"))
_WORLD_COLOURS = (4, 6, 9, 8, 3, 5, 7, 2)
_DASHES = ((), (4, 2), (1, 1.5), (4, 1.5, 1, 1.5))


def style_of(method: str, aggregation: str) -> Style:
    """The look of a method; one that is not known gets one that follows from its name."""
    known = _STYLES.get((method, aggregation))
    return known or _OTHERS[sum((method + aggregation).encode()) % len(_OTHERS)]


def styles_of(lines: Iterable[Line]) -> dict[str, Style]:
    """Looks by label, and by model and ``<model>, <aggregation>``.

    Every world model has its own colour, in which its mean is dashed; several tokenizers differ in dashes.
    """
    seen: dict[tuple[str, str, str], int] = {}
    worlds: dict[str, tuple[int, int]] = {}
    styles: dict[str, Style] = {}
    for line in lines:
        if line.label in styles:
            continue
        style = style_of(line.method, line.aggregation)
        if line.method not in NOT_PREDICTED and not line.published:
            if line.model not in worlds:
                own = style_of(line.method, "single" if line.aggregation == "single" else "best").colour
                taken = [colour for colour, _ in worlds.values()]
                free = [each for each in (own, *_WORLD_COLOURS) if each not in taken] or _WORLD_COLOURS
                worlds[line.model] = free[0], len(worlds) // len(_WORLD_COLOURS)
            colour, turn = worlds[line.model]
            dash = (4, 2) if line.aggregation == "mean" else _DASHES[2 * turn % 4]
            look = Style(colour, style.marker, dash)
            styles |= {line.label: look, f"{line.model}, {line.aggregation}": look}
            styles.setdefault(line.model, look)
            continue
        key = (line.method, line.aggregation, line.published)
        number = seen[key] = seen.get(key, -1) + 1
        styles[line.label] = Style(style.colour, style.marker, _DASHES[number % 4] if number else style.dash)
    return styles


# ----------------------------------------------------------------------------------------------------
# Legends of charts as HTML with small swatches, so that nothing overlaps and the text has the page's size.
# ----------------------------------------------------------------------------------------------------


_CORNERS = {"s": (4, 45), "D": (4, 0), "^": (3, -90), "v": (3, 90), "p": (5, -90), "h": (6, 0), ">": (3, 0)}


@dataclass(frozen=True, slots=True)
class LegendEntry:
    """A label and how its line looks, as SVG."""

    label: str
    swatch: str


def legend(entries: Iterable[tuple[str, Style, bool]], *, lines: bool = True) -> tuple[LegendEntry, ...]:
    """Of (label, look, published) entries, each label once."""
    found = {label: LegendEntry(label, _swatch(style, hollow, lines)) for label, style, hollow in entries}
    return tuple(found.values())


def _swatch(style: Style, hollow: bool, line: bool) -> str:
    colour = f"var(--s{style.colour % SERIES})"
    dash = (1, 3) if hollow else style.dash
    pattern = f' stroke-dasharray="{" ".join(str(1.5 * each) for each in dash)}"' if dash else ""
    stroke = f'<path d="M1 7H33" stroke="{colour}" stroke-width="2"{pattern}/>' if line else ""
    fill = f'fill="none" stroke="{colour}" stroke-width="1.6"' if hollow else f'fill="{colour}"'
    return f'<svg class="swatch" viewBox="0 0 34 14" aria-hidden="true">{stroke}{_marker(style.marker, fill)}</svg>'


def _marker(marker: str, fill: str) -> str:
    if marker in _CORNERS:
        corners, turn = _CORNERS[marker]
        angles = [math.radians(turn + 360 * at / corners) for at in range(corners)]
        points = " ".join(
            f"{17 + 5.5 * math.cos(each):.1f},{7 + 5.5 * math.sin(each):.1f}" for each in angles
        )
        return f'<polygon points="{points}" {fill}/>'
    if marker in ("P", "X"):
        turn = ' transform="rotate(45 17 7)"' if marker == "X" else ""
        return f'<path d="M15 2h4v3h3v4h-3v3h-4v-3h-3v-4h3z" {fill}{turn}/>'
    return f'<circle cx="17" cy="7" r="4" {fill}/>'


# ----------------------------------------------------------------------------------------------------
# Charts of metrics: against the horizon, against the number of samples, and of training. No legends: the page
# has one for all charts of a section.
# ----------------------------------------------------------------------------------------------------


Curve = Mapping[str, Sequence[float]]
"""Columns of a ``curves.parquet``."""
Styles = Mapping[str, Style]
Limits = tuple[float, float] | None
_MOST_POINTS = 400
_MOST_TICKS = 8
_NOT_DRAWN = frozenset({"present", "copy_last", "deltatok"})  # of published rows: they are in the table


def drawn_lines(panel: Panel) -> list[Line]:
    """Lines that a chart of the panel shows: not the bound where it is perfect, and few published ones."""
    bound_is_perfect = panel.task == "features"
    own = [line for line in panel.own if not (bound_is_perfect and line.method == "present")]
    return own + [
        line
        for line in panel.published
        if line.method not in _NOT_DRAWN and line.aggregation != "mean" and any(line.cells)
    ]


def limits_of(panel: Panel, lines: Sequence[Line]) -> Limits:
    """A range of values for all runs of a panel, so that their charts can be compared by eye."""
    values = [
        panel.scale * number
        for line in lines
        for cell in line.cells
        if cell is not None
        for number in (cell.low, cell.value, cell.high)
        if number is not None and np.isfinite(number)
    ]
    if not values:
        return None
    margin = 0.06 * (max(values) - min(values)) or 0.05 * abs(max(values)) or 1.0
    return min(values) - margin, max(values) + margin


def metric_chart(panel: Panel, styles: Styles, limits: Limits = None) -> Chart:
    """A metric of one run against time after the context, with intervals; published numbers are hollow."""
    lines = drawn_lines(panel)

    def draw(axes: Axes) -> None:
        own = [line for line in lines if not line.published]
        for position, line in enumerate(own):
            shift = 0.004 * (position - (len(own) - 1) / 2)
            _draw_own(axes, panel, line, styles[line.label], shift)
        for line in lines:
            if line.published:
                _draw_published(axes, panel, line, styles[line.label])
        seconds = [column.seconds for column in panel.columns]
        ticks = seconds[:: -(-len(seconds) // _MOST_TICKS)]
        axes.set_xticks(ticks, [f"{each:.2f}" for each in ticks])
        axes.margins(x=0.1 if len(seconds) > 1 else 1)
        axes.yaxis.set_major_locator(MaxNLocator(6))
        if limits is not None:
            axes.set_ylim(*limits)
        axes.set_xlabel("seconds after the last seen frame")
        axes.set_ylabel(METRIC_LABELS.get(panel.metric, panel.metric))

    values = "; ".join(
        f"{line.label}: {', '.join(panel.text(cell)[0] for cell in line.cells if cell)}" for line in lines
    )
    headings = ", ".join(column.heading for column in panel.columns)
    return Chart(panel.title, draw_svg(draw), f"{panel.title}, after {headings}. {values}.")


def _spread(panel: Panel, cells: Sequence[Cell]) -> np.ndarray:
    """(2, n) distances of the interval's ends from the value."""
    ends = [
        (0.0, 0.0)
        if cell.low is None or cell.high is None
        else (cell.value - cell.low, cell.high - cell.value)
        for cell in cells
    ]
    return panel.scale * np.array(ends).T.clip(min=0)


def _draw_own(axes: Axes, panel: Panel, line: Line, style: Style, shift: float) -> None:
    cells = [cell for cell in line.cells if cell is not None]
    if not cells:
        return
    axes.errorbar(
        [cell.seconds + shift for cell in cells],
        [panel.scale * cell.value for cell in cells],
        yerr=_spread(panel, cells),
        color=series_colour(style.colour),
        marker=style.marker,
        linestyle=(0, style.dash) if style.dash else "-",
        markersize=5,
        linewidth=1.5,
        elinewidth=0.9,
        capsize=2.5,
    )


def _draw_published(axes: Axes, panel: Panel, line: Line, style: Style) -> None:
    cells = [cell for cell in line.cells if cell is not None]
    released = line.published == "released"
    axes.plot(
        [cell.seconds for cell in cells],
        [panel.scale * cell.value for cell in cells],
        color=series_colour(style.colour),
        marker=style.marker,
        markerfacecolor="none",
        markersize=8 if released else 6,
        linestyle=(0, (1, 3)),
        linewidth=1,
    )


def samples_chart(
    title: str, metric: str, panel_lines: Mapping[str, Mapping[int, Cell]], styles: Styles, scale: float
) -> Chart:
    """A metric against the number of samples: label -> number of samples -> value. Logarithmic steps."""

    def draw(axes: Axes) -> None:
        counts = sorted({count for cells in panel_lines.values() for count in cells})
        for label, cells in panel_lines.items():
            style = styles[label]
            at = sorted(cells)
            values = np.array([scale * cells[count].value for count in at])
            colour = series_colour(style.colour)
            axes.plot(at, values, color=colour, marker=style.marker, markersize=5, linewidth=1.5,
                      linestyle=(0, style.dash) if style.dash else "-")  # fmt: skip
            low = [cells[count].low for count in at]
            high = [cells[count].high for count in at]
            if None not in (*low, *high):
                axes.fill_between(at, scale * np.array(low, float), scale * np.array(high, float),
                                  color=colour, alpha=0.14, linewidth=0)  # fmt: skip
        axes.set_xscale("log")
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="x", which="minor", length=0)
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel("number of sampled futures")
        axes.set_ylabel(METRIC_LABELS.get(metric, metric))

    texts = "; ".join(
        f"{label}: " + ", ".join(f"{scale * cells[count].value:.4g} of {count}" for count in sorted(cells))
        for label, cells in panel_lines.items()
    )
    return Chart(title, draw_svg(draw), f"{title}. {texts}.")


def drift_chart(title: str, ratios: Mapping[str, Mapping[float, float]], styles: Styles) -> Chart:
    """Loss over that of copying the last frame against time: label -> seconds -> ratio."""

    def draw(axes: Axes) -> None:
        axes.axhline(1, color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
        seconds = sorted({each for values in ratios.values() for each in values})
        for label, values in ratios.items():
            style = styles[label]
            axes.plot(list(values), list(values.values()), color=series_colour(style.colour), markersize=4.5,
                      marker=style.marker, linewidth=1.5, linestyle=(0, style.dash) if style.dash else "-")  # fmt: skip
        ticks = seconds[:: -(-len(seconds) // _MOST_TICKS)]
        axes.set_xticks(ticks, [f"{each:.2f}" for each in ticks])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("seconds after the last seen frame")
        axes.set_ylabel("loss ÷ loss of copying")

    texts = "; ".join(
        f"{label}: " + ", ".join(f"{value:.2f} at {at:.2f} s" for at, value in values.items())
        for label, values in ratios.items()
    )
    return Chart(
        title, draw_svg(draw), f"Drift on {title}: feature loss over that of copying the last frame. {texts}."
    )


def curve_chart(title: str, curves: Mapping[str, tuple[Curve, str, Style]]) -> Chart:
    """Columns of training curves over the steps, on a logarithmic scale: label -> (curve, column, look)."""

    def draw(axes: Axes) -> None:
        for curve, column, style in curves.values():
            steps, values = _thinned(curve["step"], curve[column])
            axes.plot(steps, values, color=series_colour(style.colour), linewidth=1.5,
                      linestyle=(0, style.dash) if style.dash else "-")  # fmt: skip
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlabel("training step")
        axes.set_ylabel("loss, logarithmic")

    ends = "; ".join(
        f"{label} from {curve[column][0]:.3g} to {curve[column][-1]:.3g}"
        for label, (curve, column, _) in curves.items()
    )
    last = max(curve["step"][-1] for curve, _, _ in curves.values())
    return Chart(title, draw_svg(draw), f"{title} over {last:,.0f} steps: {ends}.")


def _thinned(steps: Sequence[float], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Means of neighbours, so that a long run stays a small picture."""
    pieces = min(len(steps), _MOST_POINTS)
    parts = np.array_split(np.arange(len(steps)), pieces)
    return np.array([steps[part[-1]] for part in parts]), np.array(
        [np.mean(np.asarray(values)[part]) for part in parts]
    )


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


def samples_groups(runs: Sequence[ReportRun], looks: Styles) -> list[ChartGroup]:
    """Best and mean against the number of samples, at the shortest and the longest horizon."""
    rows = [(run.name, row) for run in runs for row in labelled(run.samples.to_pylist(), run.names)]
    keys = dict.fromkeys((row["dataset"], row["metric"]) for _, row in rows if row["metric"] in MAIN_METRICS)
    groups = []
    for dataset, metric in keys:
        own = [(run, row) for run, row in rows if (row["dataset"], row["metric"]) == (dataset, metric)]
        charts, styles = [], dict[str, Style]()
        for run in dict.fromkeys(run for run, _ in own):
            of_run = [row for name, row in own if name == run]
            for chart, found in _samples_charts(metric, of_run, looks):
                charts.append(Shown(run, chart))
                styles |= found
        if charts:
            entries = legend((label, style, False) for label, style in styles.items())
            groups.append(ChartGroup(f"{dataset}: {metric_title(metric)}", tuple(charts), entries))
    return groups


def _samples_charts(
    metric: str, rows: Sequence[Row], looks: Styles
) -> Iterator[tuple[Chart, dict[str, Style]]]:
    if len({row["num_samples"] for row in rows}) < 2:
        return
    horizons = sorted({row["horizon"] for row in rows})
    for horizon in dict.fromkeys((horizons[0], horizons[-1])):
        cells: dict[str, dict[int, Cell]] = {}
        styles: dict[str, Style] = {}
        for row in rows:
            if row["horizon"] == horizon:
                label = f"{row['model']}, {row['aggregation']}"
                values = (row["value"], row["ci_low"], row["ci_high"], row["n_sequences"], row["horizon_s"])
                cells.setdefault(label, {})[row["num_samples"]] = Cell(*values)
                styles[label] = looks.get(label) or style_of(row["method"], row["aggregation"])
        seconds = next(iter(next(iter(cells.values())).values())).seconds
        title = f"{counted(horizon, 'step')} ({seconds:.2f} s) ahead"
        scale = 100.0 if metric in PERCENT else 1.0
        yield samples_chart(title, metric, cells, styles, scale), styles


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
        points, colours, entries, ratios = {}, {}, [], dict[str, float]()
        for horizon in dict.fromkeys((horizons[0], horizons[-1])):
            label = f"{counted(horizon, 'step')} ahead"
            points[label] = spread_and_error(own[horizon])
            ratios[label] = pooled_metrics("samples", own[horizon])["spread_skill"]
            colours[label] = _colour(horizons, horizon)
            entries.append((label, Style(colours[label], "o"), False))
        title = f"Error against spread{_model_name(run, world)}"
        chart = spread_chart(title, points, colours, spread_verdict(ratios))
        yield dataset, Shown(run.name, chart), legend(entries, lines=False)


def _colour(horizons: Sequence[int], horizon: int) -> int:
    return _HORIZON_COLOURS[0 if horizon == horizons[0] else 1]


def _ahead(row: Row) -> str:
    horizon = row["horizon"]
    return f"{counted(horizon, 'step')} ({row['horizon_s']:.2f} s) ahead"


def _model_name(run: ReportRun, world: str | None) -> str:
    return f", {run.world_labels[world]}" if world and len(run.world_labels) > 1 else ""
