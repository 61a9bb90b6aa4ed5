"""The numbers that a reader looks for first, in words."""

from collections.abc import Iterable, Sequence

from deltacache.evaluate.report.labels import METRIC_LABELS, data_title
from deltacache.evaluate.report.panels import Line, Panel

_LOSSES = ("miou", "rmse", "smooth_l1")
_FUTURES = {"best": "best future", "mean": "average future"}
_NOT_PREDICTED = (
    *("copy_last", "present"),
    *("deltatok", "deltatok_parallel", "deltatok_one_step", "deltatok_swapped"),
)
_COPY, _BOUND = ("copy_last", "repeating the last frame"), ("present", "the true future itself")


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
    lines = [line for line in panel.own if line.cells[column] is not None]
    models = _models([line for line in lines if line.method not in _NOT_PREDICTED])
    bounds = {line.method: panel.text(line.cells[column])[0] for line in lines}
    if not models or _COPY[0] not in bounds:
        return ""
    texts = [_model_text(panel, column, each, named=len(models) > 1) for each in models.values()]
    told = (_COPY,) if panel.task == "features" else (_COPY, _BOUND)
    texts.append(", ".join(f"{name} {bounds[method]}" for method, name in told if method in bounds))
    better = panel.title.rsplit(", ", 1)[1]
    label = METRIC_LABELS.get(panel.metric, panel.metric)
    numbers = ("; " if len(models) > 1 else ", ").join(texts)
    return f"{data_title(panel.dataset)}: {label}, {panel.heading(column)} ahead: {numbers} ({better})."


def _models(lines: Iterable[Line]) -> dict[str, list[Line]]:
    """Lines by the model whose futures they are."""
    found: dict[str, list[Line]] = {}
    for line in lines:
        found.setdefault(line.model, []).append(line)
    return found


def _model_text(panel: Panel, column: int, lines: Sequence[Line], *, named: bool) -> str:
    """What one model's futures reach; a lone one that samples needs no name."""
    values = [(_FUTURES.get(line.aggregation, ""), panel.text(line.cells[column])[0]) for line in lines]
    texts = ", ".join(f"{future} {value}".strip() for future, value in values)
    return f"{lines[0].model} {texts}" if named or not values[0][0] else texts


def _mode_sentence(panel: Panel, line: Line) -> str:
    shares = [
        f"in {100 * cell.value:.0f} % of {cell.sequences} scenes {panel.heading(column)} ahead"
        for column, cell in enumerate(line.cells)
        if cell is not None
    ]
    return f"{line.label}: reaches every true future {', '.join(shares)}."
