"""The numbers that a reader looks for first, in words."""

from collections.abc import Sequence

from deltacache.evaluate.report.labels import METHOD_LABELS, METRIC_LABELS, data_title
from deltacache.evaluate.report.panels import Line, Panel

_LOSSES = ("miou", "rmse", "smooth_l1")
_SAMPLED = {
    ("deltaworld", "best"): "best future",
    ("deltaworld", "mean"): "average future",
}
_ALONE = {
    ("dino_foresight", "single"): METHOD_LABELS["dino_foresight"],
    ("dino_foresight_delta", "single"): METHOD_LABELS["dino_foresight_delta"],
}
_COPY = {("copy_last", "single"): "repeating the last frame"}
_BOUND = {("present", "single"): "the true future itself"}


def findings(tables: Sequence[Panel]) -> list[str]:
    """Sentences about one run: its first metric on every data set, and modes."""
    sentences = []
    for dataset in dict.fromkeys(panel.dataset for panel in tables):
        by_metric = {panel.metric: panel for panel in tables if panel.dataset == dataset}
        main = next((by_metric[metric] for metric in _LOSSES if metric in by_metric), None)
        if main is not None:
            sentences += [
                text for column in sorted({0, len(main.columns) - 1}) if (text := _sentence(main, column))
            ]
        modes = by_metric.get("mode_coverage")
        if modes is not None:
            sentences += [text for line in modes.lines if (text := _mode_sentence(modes, line))]
    return sentences


def _sentence(panel: Panel, column: int) -> str:
    cells = {(line.method, line.aggregation): line.cells[column] for line in panel.own}
    predicted = _SAMPLED if all(map(cells.get, _SAMPLED)) else _ALONE
    if not any(map(cells.get, predicted)) or not any(map(cells.get, _COPY)):
        return ""
    names = predicted | _COPY | ({} if panel.task == "features" else _BOUND)
    texts = [f"{name} {panel.text(cells[key])[0]}" for key, name in names.items() if cells.get(key)]
    better = panel.title.rsplit(", ", 1)[1]
    label = METRIC_LABELS.get(panel.metric, panel.metric)
    return (
        f"{data_title(panel.dataset)}: {label}, {panel.heading(column)} ahead: {', '.join(texts)} ({better})."
    )


def _mode_sentence(panel: Panel, line: Line) -> str:
    shares = [
        f"in {100 * cell.value:.0f} % of {cell.sequences} scenes {panel.heading(column)} ahead"
        for column, cell in enumerate(line.cells)
        if cell is not None
    ]
    return f"{line.label}: reaches every true future {', '.join(shares)}."
