"""Are the samples as different from each other as the truth is from them? Rank histograms and spread against error.

Shapes: S samples, n sequences.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from deltacache.evaluate.report.drawing import SOFT, Chart, draw_svg, series_colour

_BINS = 12
_RANKS = 4  # sums before the rank counts in a row of ``samples``
Row = dict[str, Any]


def rank_chart(title: str, shares: Sequence[float], colour: int) -> Chart:
    """Rank histogram: share of features of which r of the S samples are lower than the truth (S + 1 shares)."""
    level = 1 / len(shares)

    def draw(axes: Axes) -> None:
        axes.bar(range(len(shares)), shares, width=0.85, color=series_colour(colour), alpha=0.85)
        axes.axhline(level, color=SOFT, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel("samples that are lower than the truth")
        axes.set_ylabel("share of features")

    outside = shares[0] + shares[-1]
    alt = (
        f"{title}: rank histogram of the truth among {len(shares) - 1} samples. {100 * outside:.0f} % of features lie "
        f"outside all samples, {100 * 2 * level:.0f} % would be calibrated."
    )
    return Chart(title, draw_svg(draw, width=3.6, height=2.5), alt)


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
    title: str, points: Mapping[str, tuple[np.ndarray, np.ndarray]], colours: Mapping[str, int]
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
    return Chart(title, draw_svg(draw, width=3.6, height=2.5), f"{title}: error against spread. {texts}.")
