"""How predictions go astray: feature loss over that of copying, at every horizon over the same sequences.

Long horizons exist only for some sequences of a benchmark, and a curve over ever other ones would show these and
not the drift. So what is drawn is over those that have the last horizon; a feature dataset's have all.
"""

from dataclasses import dataclass

import numpy as np

from deltacache.evaluate.pooled import pooled_metrics
from deltacache.evaluate.report.panels import Panel, labelled
from deltacache.evaluate.report.runs import ReportRun

METRIC = "smooth_l1"
_FEWEST_HORIZONS = 3
_NOT_DRAWN = ("copy_last", "present", "deltatok_one_step", "deltatok_swapped")
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
            return f"over all {self.of} sequences"
        return f"over the {self.sequences} of {self.of} sequences that reach {self.horizon} steps"


def drift_of(panel: Panel, run: ReportRun) -> Drift | None:
    """Curves of the panel of the feature loss of one run; None with few horizons, or without a copy to compare with."""
    counts = panel.counts
    copy = next((line.label for line in panel.own if line.method == "copy_last"), None)
    if len(counts) < _FEWEST_HORIZONS or copy is None:
        return None
    losses = _losses(panel) if len(set(counts)) == 1 else _common_losses(panel, run)
    base = losses.get(copy, {})  # nothing, if an older evaluation kept no sums
    hidden = {line.label for line in panel.own if line.method in _NOT_DRAWN}
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
        ]
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
