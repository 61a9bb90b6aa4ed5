"""Charts of the report, each drawn for light and for dark pages."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: no display, no global figures
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from deltacache.evaluate.pictures import data_uri
from deltacache.evaluate.tables import Line, Panel

Curve = Mapping[str, Sequence[float]]
"""Columns of a ``curves.parquet``."""
_MOST_POINTS = 400


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart as ``data:`` addresses, with a text for those who do not see it."""

    title: str
    light: str
    dark: str
    alt: str


@dataclass(frozen=True, slots=True)
class _Theme:
    text: str
    faint: str
    colours: tuple[str, ...]


# Okabe and Ito's colours, which colour-blind readers can tell apart; lighter ones on dark pages.
_LIGHT = _Theme(
    "#1f2328",
    "#d0d7de",
    ("#57606a", "#0072b2", "#56b4e9", "#cc79a7", "#d55e00", "#e69f00", "#009e73", "#7a5195"),
)
_DARK = _Theme(
    "#e6edf3",
    "#3d444d",
    ("#9aa4af", "#3d9ad6", "#8ccff5", "#e39ac2", "#ff7b32", "#f5b83d", "#35c79a", "#b593d6"),
)
_MARKERS = "sov^DPX*"
_STYLES = ("-", "-", "--", ":", "-", "--", "-.", "-")
_ORDER = (
    ("copy_last", "single"),
    ("deltatok", "single"),
    ("deltatok_parallel", "single"),
    ("deltatok_swapped", "single"),
    ("deltaworld", "best"),
    ("deltaworld", "mean"),
    ("deltaworld_discriminative", "single"),
)


def metric_chart(panel: Panel) -> Chart:
    """A metric against time after the context, with intervals. The perfect bound is left out."""
    lines = [line for line in panel.lines if line.method != "present"]

    def draw(axes: Axes, theme: _Theme) -> None:
        for position, line in enumerate(lines):
            _draw_line(axes, theme, line, _place(line, position))
        seconds = sorted({cell.seconds for cell in panel.cells})
        axes.set_xticks(seconds, [f"{each:.2f}" for each in seconds])
        axes.margins(x=0.12)
        axes.set_xlabel("seconds after the last seen frame")

    values = "; ".join(
        f"{line.label}: {', '.join(panel.text(cell)[0] for cell in line.cells if cell)}" for line in lines
    )
    headings = ", ".join(panel.heading(column) for column in range(len(panel.horizons)))
    return _chart(panel.title, f"{panel.title}, after {headings}. {values}.", draw)


def _place(line: Line, position: int) -> int:
    """A method keeps its colour and marker in every chart."""
    key = (line.method, line.aggregation)
    return _ORDER.index(key) if key in _ORDER else position


def _draw_line(axes: Axes, theme: _Theme, line: Line, place: int) -> None:
    cells = [cell for cell in line.cells if cell is not None]
    values = np.array([cell.value for cell in cells])
    spread = np.array([[cell.value - cell.low, cell.high - cell.value] for cell in cells]).T
    axes.errorbar(
        [cell.seconds for cell in cells],
        values,
        yerr=spread.clip(min=0),
        label=line.label,
        color=theme.colours[place % len(theme.colours)],
        marker=_MARKERS[place % len(_MARKERS)],
        linestyle=_STYLES[place % len(_STYLES)],
        markersize=5,
        linewidth=1.4,
        capsize=2.5,
    )


def curve_chart(title: str, curves: Mapping[str, tuple[Curve, str]]) -> Chart:
    """Columns of training curves over the steps, on a logarithmic scale: label -> (curve, column)."""

    def draw(axes: Axes, theme: _Theme) -> None:
        for position, (label, (curve, column)) in enumerate(curves.items()):
            steps, values = _thinned(curve["step"], curve[column])
            colour = theme.colours[(1 + 3 * position) % len(theme.colours)]
            axes.plot(
                steps, values, label=label, color=colour, linewidth=1.4, linestyle=_STYLES[position % 8]
            )
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlabel("training step")

    ends = "; ".join(
        f"{label} from {curve[column][0]:.3g} to {curve[column][-1]:.3g}"
        for label, (curve, column) in curves.items()
    )
    last = max(curve["step"][-1] for curve, _ in curves.values())
    return _chart(title, f"{title} over {last:,.0f} steps: {ends}.", draw)


def _thinned(steps: Sequence[float], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Means of neighbours, so that a long run stays a small picture."""
    pieces = min(len(steps), _MOST_POINTS)
    parts = np.array_split(np.arange(len(steps)), pieces)
    return np.array([steps[part[-1]] for part in parts]), np.array(
        [np.mean(np.asarray(values)[part]) for part in parts]
    )


def _chart(title: str, alt: str, draw: Callable[[Axes, _Theme], None]) -> Chart:
    return Chart(title, _svg(draw, _LIGHT), _svg(draw, _DARK), alt)


def _svg(draw: Callable[[Axes, _Theme], None], theme: _Theme) -> str:
    settings: dict[Any, Any] = {
        "svg.fonttype": "path",
        "svg.hashsalt": "deltacache",
        "font.size": 10,
        "text.color": theme.text,
        "axes.labelcolor": theme.text,
        "xtick.color": theme.text,
        "ytick.color": theme.text,
        "axes.edgecolor": theme.faint,
        "grid.color": theme.faint,
    }
    with rc_context(settings):
        figure = Figure(figsize=(4.8, 4.1), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        axes.grid(axis="y", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes, theme)
        figure.legend(
            *axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=9
        )
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return data_uri(buffer.getvalue(), "image/svg+xml")
