"""Which rows of two evaluations belong together, and whether they are of the same data."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltacache.evaluate.report.labels import METHOD_LABELS
from deltacache.evaluate.report.panels import model_of, summary_of
from deltacache.schemas.errors import MismatchError

_NAMES_SHOWN = 3
Row = dict[str, Any]
BySequence = dict[str, Row]


@dataclass(frozen=True, slots=True)
class Series:
    """What paired rows have in common. ``metric`` is empty where sums stand for all metrics of a task.

    ``world`` is a fingerprint where a run has several models of one kind, else empty: two runs may each have
    trained their own.
    """

    dataset: str
    task: str
    metric: str
    method: str
    aggregation: str
    horizon: int
    num_samples: int
    world: str
    seconds: float = 0.0

    @property
    def label(self) -> str:
        """As in the tables of an evaluation."""
        return self._named(summary_of(self.aggregation, self.num_samples))

    @property
    def model(self) -> str:
        """The label without how it is summarised."""
        return self._named("")

    def _named(self, summary: str) -> str:
        label = METHOD_LABELS.get(self.method, self.method) + summary
        return f"{label} ({self.world[:8]})" if self.world else label


@dataclass(frozen=True, slots=True)
class Pairs:
    """Series that both runs have with their rows by sequence, and all that each one has."""

    found: tuple[tuple[Series, BySequence, BySequence], ...]
    held: tuple[frozenset[Series], frozenset[Series]]


def paired_series(rows: Sequence[Sequence[Row]], datasets: Collection[str]) -> Pairs:
    """Match the rows of two runs. ``datasets``: those that both have."""
    several = _methods_of_several_models(rows)
    grouped: list[dict[Series, BySequence]] = []
    for own in rows:
        groups: dict[Series, BySequence] = {}
        for row in own:
            if row["dataset"] in datasets:
                groups.setdefault(_series(row, several), {})[row["sequence_id"]] = row
        grouped.append(groups)
    found = []
    for series, of_a in grouped[0].items():
        of_b = grouped[1].get(series)
        if of_b is not None:
            seconds = float(np.mean([row["horizon_s"] for row in of_a.values()]))
            found.append((_timed(series, seconds), of_a, of_b))
    return Pairs(tuple(found), (frozenset(grouped[0]), frozenset(grouped[1])))


def _methods_of_several_models(rows: Sequence[Sequence[Row]]) -> set[str]:
    found = set()
    for own in rows:
        models: dict[str, set[str]] = {}
        for row in own:
            models.setdefault(row["method"], set()).add(model_of(row))
        found |= {method for method, each in models.items() if len(each) > 1}
    return found


def _series(row: Row, several: Collection[str]) -> Series:
    world = model_of(row) if row["method"] in several else ""
    names = ("dataset", "task", "method", "aggregation", "horizon", "num_samples")
    return Series(**{name: row[name] for name in names}, metric=row.get("metric", ""), world=world)


def _timed(series: Series, seconds: float) -> Series:
    return Series(
        **{name: getattr(series, name) for name in Series.__slots__ if name != "seconds"}, seconds=seconds
    )


def check_same_sequences(series: Series, a: BySequence, b: BySequence, names: Sequence[str]) -> None:
    """Refuse runs over other sequences.

    Raises:
        MismatchError: naming some of them.
    """
    if a.keys() == b.keys():
        return
    lists = []
    for own, other, name in ((a, b, names[0]), (b, a, names[1])):
        only = sorted(own.keys() - other.keys())
        if only:
            more = ", …" if len(only) > _NAMES_SHOWN else ""
            lists.append(f"{len(only)} only in {name} ({', '.join(only[:_NAMES_SHOWN])}{more})")
    raise MismatchError(
        f"{series.dataset}, horizon {series.horizon}: {names[0]} has {len(a)} sequences and {names[1]} {len(b)}; "
        f"{'; '.join(lists)}: a paired difference needs the same sequences in both; evaluate both on the same data"
    )


def check_same_labels(
    series: Series, a: Mapping[str, Row], b: Mapping[str, Row], names: Sequence[str]
) -> None:
    """Refuse sequences of the same name with other labels: those are in the sums, whatever was predicted.

    Raises:
        MismatchError: naming the sequence.
    """
    for sequence, row in a.items():
        if _labelled(series.task, row["totals"]) != _labelled(series.task, b[sequence]["totals"]):
            raise MismatchError(
                f"{series.dataset}: sequence {sequence} has other labels in {names[0]} than in {names[1]}: a paired "
                "difference needs the same labels in both; evaluate both on the same data"
            )


def _labelled(task: str, totals: Sequence[float]) -> list[float]:
    """What the sums say about the label alone; see ``pooled``."""
    if task == "segmentation":
        return list(totals[2 * len(totals) // 3 :])
    return [totals[0]]
