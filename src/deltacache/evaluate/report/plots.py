"""Charts of metrics: against the horizon, against the number of samples, and of training. No legends: the page
has one for all charts of a section."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from deltacache.evaluate.report.drawing import SOFT, Chart, draw_svg, series_colour
from deltacache.evaluate.report.labels import METRIC_LABELS
from deltacache.evaluate.report.panels import Cell, Line, Panel
from deltacache.evaluate.report.series import Style

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
