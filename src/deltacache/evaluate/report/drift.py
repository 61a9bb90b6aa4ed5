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
_NOT_DRAWN = ("copy_last", "present", "deltatok_swapped")
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
    rows = [
        row
        for row in labelled(run.statistics.to_pylist())
        if (row["dataset"], row["task"]) == (panel.dataset, panel.task)
    ]
    last = panel.columns[-1].horizon
    common = {row["sequence_id"] for row in rows if row["horizon"] == last}
    seconds = {column.horizon: column.seconds for column in panel.columns}
    sums: dict[tuple[str, int], list[np.ndarray]] = {}
    for row in rows:
        if row["sequence_id"] in common:
            sums.setdefault((row["label"], row["horizon"]), []).append(np.asarray(row["totals"]))
    losses: Ratios = {}
    for (label, horizon), totals in sums.items():
        losses.setdefault(label, {})[seconds[horizon]] = pooled_metrics(panel.task, np.stack(totals))[METRIC]
    return losses
