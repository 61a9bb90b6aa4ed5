"""Which sums of two evaluations belong together, and whether they are of the same data."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from deltacache.evaluate.report.labels import METHOD_LABELS
from deltacache.evaluate.report.panels import summary_of
from deltacache.evaluate.statistics import SequenceSums, Series, Sums
from deltacache.schemas.errors import MismatchError

_NAMES_SHOWN = 3


@dataclass(frozen=True, slots=True)
class PairedSeries:
    """What paired sums have in common.

    ``world`` is a fingerprint where a run has several models of one kind, else empty: two runs may each have
    trained their own.
    """

    dataset: str
    task: str
    method: str
    aggregation: str
    horizon: int
    num_samples: int
    world: str

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


@dataclass(frozen=True, slots=True, repr=False)
class Pair:
    """A series in both runs: its sequences, and the names that these have."""

    series: PairedSeries
    a: SequenceSums
    b: SequenceSums
    names_a: Sums
    names_b: Sums


def by_paired_series(runs: Sequence[Iterable[Series]]) -> list[dict[PairedSeries, Series]]:
    """What the series of two runs are called when they are paired."""
    several = set()
    for own in runs:
        models: dict[str, set[str]] = {}
        for series in own:
            models.setdefault(series.method.name, set()).add(_model(series))
        several |= {method for method, each in models.items() if len(each) > 1}
    return [
        {
            PairedSeries(
                series.dataset,
                series.task,
                series.method.name,
                series.aggregation,
                series.horizon,
                series.num_samples,
                _model(series) if series.method.name in several else "",
            ): series
            for series in own
        }
        for own in runs
    ]


def _model(series: Series) -> str:
    return series.method.world or series.method.tokenizer or ""


def aligned(pair: Pair, names: Sequence[str]) -> tuple[SequenceSums, SequenceSums]:
    """The sums of both runs with the sequences, and so the units, in one order.

    Raises:
        MismatchError: other sequences, sequences of other units, or other labels.
    """
    series, a, b = pair.series, pair.a, pair.b
    own = [pair.names_a.names[at] for at in a.sequences]
    place = {pair.names_b.names[at]: row for row, at in enumerate(b.sequences)}
    if place.keys() != set(own):
        _refuse_sequences(series, own, place.keys(), names)
    order = np.array([place[name] for name in own])
    b = SequenceSums(b.sequences[order], b.units[order], b.seconds[order], b.totals[order])
    for row, name in enumerate(own):
        unit_a, unit_b = pair.names_a.unit_names[a.units[row]], pair.names_b.unit_names[b.units[row]]
        if unit_a != unit_b:
            raise MismatchError(
                f"{series.dataset}: sequence {name} is from {unit_a} in {names[0]} and from {unit_b} in {names[1]}: a "
                "paired difference needs the same data in both; evaluate both on the same data"
            )
    other = (_labelled(series.task, a.totals) != _labelled(series.task, b.totals)).any(1)
    if other.any():
        raise MismatchError(
            f"{series.dataset}: sequence {own[int(other.argmax())]} has other labels in {names[0]} than in {names[1]}: "
            "a paired difference needs the same labels in both; evaluate both on the same data"
        )
    return a, b


def _refuse_sequences(
    series: PairedSeries, a: Collection[str], b: Collection[str], names: Sequence[str]
) -> NoReturn:
    lists = []
    for own, other, name in ((a, b, names[0]), (b, a, names[1])):
        only = sorted(set(own) - set(other))
        if only:
            more = ", …" if len(only) > _NAMES_SHOWN else ""
            lists.append(f"{len(only)} only in {name} ({', '.join(only[:_NAMES_SHOWN])}{more})")
    raise MismatchError(
        f"{series.dataset}, horizon {series.horizon}: {names[0]} has {len(a)} sequences and {names[1]} {len(b)}; "
        f"{'; '.join(lists)}: a paired difference needs the same sequences in both; evaluate both on the same data"
    )


def _labelled(task: str, totals: np.ndarray) -> np.ndarray:
    """What the sums (n, K) say about the label alone, whatever was predicted; see ``pooled``."""
    return totals[:, 2 * totals.shape[1] // 3 :] if task == "segmentation" else totals[:, :1]
