"""Sums of single sequences: what all tables are made from, and how they are read again.

Shapes: n sequences, K sums.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from deltacache.evaluate import output
from deltacache.evaluate.metrics import MetricsOf, intervals, metrics_of, pooled_metrics
from deltacache.evaluate.output import Aggregation, Method, RunStamp, method_now, unit_kind, write_table
from deltacache.evaluate.settings import OWN_METHODS
from deltacache.pipeline.storage.files import replacing
from deltacache.schemas.errors import DatasetError, NotFiniteError
from deltacache.schemas.tables import METRICS_SCHEMA, SEQUENCES_SCHEMA, STATISTICS_SCHEMA

_BATCH_ROWS = 4096
_KEYS = ("dataset", "task", "method", "tokenizer", "world", "aggregation", "horizon", "num_samples")


@dataclass(frozen=True, slots=True)
class Series:
    """What the rows of one series have in common."""

    dataset: str
    task: str
    method: Method
    aggregation: Aggregation
    horizon: int
    num_samples: int


@dataclass(frozen=True, slots=True, repr=False)
class Statistic:
    """Sums of one sequence; what they are for each task says ``evaluate.pooled``.

    Attributes:
        group: the video, scene, city or drive that the sequence is from.
        horizon_s: seconds from the last context frame to the target.
        totals: (K,) float64.
    """

    series: Series
    sequence_id: str
    group: str
    horizon_s: float
    totals: np.ndarray
    n_targets: int = 1


@dataclass(frozen=True, slots=True, repr=False)
class SequenceSums:
    """All sequences of one series.

    Attributes:
        sequences, units: (n,) positions in the names of ``Sums``.
        seconds: (n,) from the last context frame to the target.
        totals: (n, K) float64.
    """

    sequences: np.ndarray
    units: np.ndarray
    seconds: np.ndarray
    totals: np.ndarray


@dataclass(frozen=True, slots=True, repr=False)
class Sums:
    """``statistics.parquet`` as numbers: the names of sequences and units are held once."""

    names: tuple[str, ...]
    unit_names: tuple[str, ...]
    series: dict[Series, SequenceSums]


def statistics_table(statistics: Iterable[Statistic]) -> pa.Table:
    """Rows of ``statistics.parquet``, in the order given."""
    own = list(statistics)
    series = [each.series for each in own]
    columns = {  # a row as a dict of its own would take 1 KiB
        "dataset": [each.dataset for each in series],
        "task": [each.task for each in series],
        "method": [each.method.name for each in series],
        "tokenizer": [each.method.tokenizer for each in series],
        "world": [each.method.world for each in series],
        "aggregation": [each.aggregation for each in series],
        "horizon": [each.horizon for each in series],
        "horizon_s": [each.horizon_s for each in own],
        "num_samples": [each.num_samples for each in series],
        "sequence_id": [each.sequence_id for each in own],
        "group": [each.group for each in own],
        "n_targets": [each.n_targets for each in own],
        "totals": [each.totals for each in own],
    }
    return pa.table(columns, schema=STATISTICS_SCHEMA)


def statistics_of(table: pa.Table) -> Iterator[Statistic]:
    """The rows of a table as they were."""
    for row in table.to_pylist():
        totals = np.asarray(row["totals"], dtype=np.float64)
        yield Statistic(
            _series(row), row["sequence_id"], row["group"], row["horizon_s"], totals, row["n_targets"]
        )


def _series(row: dict[str, object]) -> Series:
    dataset, task, name, tokenizer, world, *summary = (row[key] for key in _KEYS)
    return Series(dataset, task, Method(name, tokenizer, world), *summary)  # pyright: ignore[reportArgumentType]


def read_sums(path: Path, *, older: bool = False) -> Sums:
    """Read ``statistics.parquet`` a few thousand rows at a time; nothing of a file that is not there.

    Args:
        older: the tables are of a version before units, see ``method_now``.

    Raises:
        DatasetError: it is damaged, or has other columns.
        NotFiniteError: an older version wrote sums that are not finite.
    """
    names: dict[str, int] = {}
    unit_names: dict[str, int] = {}
    parts: dict[Series, list[SequenceSums]] = {}
    if not path.exists():
        return Sums((), (), {})
    try:
        with pq.ParquetFile(path) as file:
            if not set(STATISTICS_SCHEMA.names) <= set(file.schema_arrow.names):
                raise DatasetError(
                    f"{path} has the columns {', '.join(file.schema_arrow.names)}, not those of evaluate: give the "
                    "output folder of an evaluation"
                )
            for batch in file.iter_batches(_BATCH_ROWS):
                _add_batch(batch, names, unit_names, parts)
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(
            f"{path} cannot be read ({error}): run evaluate again into a new folder"
        ) from error
    joined = {
        series: SequenceSums(
            *(np.concatenate([getattr(part, name) for part in own]) for name in SequenceSums.__slots__)
        )
        for series, own in parts.items()
    }
    for series, own in joined.items():
        _check_sums(path, series, own, tuple(names))
    if older:
        joined = {
            replace(series, method=replace(series.method, name=method_now(series.method.name))): own
            for series, own in joined.items()
        }
    return Sums(tuple(names), tuple(unit_names), joined)


def _check_sums(path: Path, series: Series, own: SequenceSums, names: Sequence[str]) -> None:
    """Left in, they would make a metric vanish; the energy score alone may be missing, see ``SampleSums``."""
    bad = ~np.isfinite(own.totals)
    if series.task == "samples":
        bad[:, 1] = np.isinf(own.totals[:, 1])
    if bad.any():
        name = names[own.sequences[int(bad.any(1).argmax())]]
        raise NotFiniteError(
            f"{path}: {series.task} of {series.method.name} on {series.dataset}, horizon {series.horizon}, are not "
            f"finite for sequence {name}: an older version let such predictions into its tables; run evaluate again "
            "into a new folder"
        )


def _add_batch(
    batch: pa.RecordBatch,
    names: dict[str, int],
    unit_names: dict[str, int],
    parts: dict[Series, list[SequenceSums]],
) -> None:
    """Sort the rows of a batch into their series."""
    key = np.zeros(len(batch), np.int64)
    for column in _KEYS:
        encoded = batch[column].dictionary_encode(null_encoding="encode")
        key = np.unique(
            key * (len(encoded.dictionary) + 1) + encoded.indices.to_numpy(), return_inverse=True
        )[1]
    sequences, units = _numbered(batch["sequence_id"], names), _numbered(batch["group"], unit_names)
    seconds = batch["horizon_s"].to_numpy(zero_copy_only=False)
    values = batch["totals"].values.to_numpy(zero_copy_only=False)
    starts = batch["totals"].offsets.to_numpy()[:-1]
    widths = batch["totals"].value_lengths().to_numpy(zero_copy_only=False)
    firsts = np.unique(key, return_index=True)[1]
    for first in np.sort(firsts):  # in the order in which series appear
        rows = np.flatnonzero(key == key[first])
        series = _series({column: batch[column][int(first)].as_py() for column in _KEYS})
        totals = values[starts[rows, None] + np.arange(widths[first])]
        parts.setdefault(series, []).append(SequenceSums(sequences[rows], units[rows], seconds[rows], totals))


def _numbered(column: pa.Array, names: dict[str, int]) -> np.ndarray:
    """(n,) positions of the texts of a column in ``names``, which grows."""
    encoded = column.dictionary_encode()
    known = [names.setdefault(name, len(names)) for name in encoded.dictionary.to_pylist()]
    return np.array(known, np.int32)[encoded.indices.to_numpy()]


# ----------------------------------------------------------------------------------------------------
# From the sums of single sequences to the tables of an evaluation, sequence by sequence.
#
# What grows with the data is written as it comes: ``statistics.parquet`` and ``sequences.parquet``. Sums by
# unit are held, from which ``metrics.parquet`` and ``samples.parquet`` follow.
#
# Shapes: U units of a data set, K sums.
# ----------------------------------------------------------------------------------------------------


Stamp = Callable[[str], RunStamp]
"""Of a data set's name."""
_HELD_NUMBERS = 2**20  # sums of sequences that are written together: 8 MiB
_TASKS = ("segmentation", "depth", "features", "samples", "vote", "modes", "odds")


class Pool:
    """A series added up by unit: (U, K) sums and how many sequences each unit has, in arrays that grow."""

    def __init__(self, sums: int) -> None:
        self._totals, self._counts = np.zeros((4, sums)), np.zeros(4, np.int64)
        self.n_targets, self._seconds = 0, 0.0

    def add(self, unit: int, statistic: Statistic) -> None:
        """Count one more sequence of the unit of this number."""
        if unit >= len(self._counts):
            grown = max(unit + 1, len(self._counts) * 3 // 2) - len(self._counts)
            self._totals = np.concatenate([self._totals, np.zeros((grown, self._totals.shape[1]))])
            self._counts = np.concatenate([self._counts, np.zeros(grown, np.int64)])
        self._totals[unit] += statistic.totals
        self._counts[unit] += 1
        self.n_targets += statistic.n_targets
        self._seconds += statistic.horizon_s

    @property
    def sums(self) -> np.ndarray:
        """(G, K) of the units that have a sequence."""
        return self._totals[self._counts > 0]

    @property
    def n_sequences(self) -> int:
        """Of all units."""
        return int(self._counts.sum())

    @property
    def horizon_s(self) -> float:
        """Mean over the sequences."""
        return self._seconds / self.n_sequences


class Pools:
    """Pools of all series, which keep the order in which they first appear."""

    def __init__(self) -> None:
        self._units: dict[tuple[str, str], dict[str, int]] = {}
        self.pools: dict[Series, Pool] = {}

    def add(self, statistic: Statistic) -> None:
        """Count one more sequence."""
        series = statistic.series
        units = self._units.setdefault((series.dataset, unit_kind(series.dataset, series.task)), {})
        pool = self.pools.get(series)
        if pool is None:
            pool = self.pools[series] = Pool(len(statistic.totals))
        pool.add(units.setdefault(statistic.group, len(units)), statistic)

    def table(self, stamp: Stamp, order: Callable[[Series], Any], of: MetricsOf = metrics_of) -> pa.Table:
        """Rows of ``metrics.parquet``: one a metric, with its interval where there is one. ``order``: of the series."""
        rows = [row for series in sorted(self.pools, key=order) for row in self._rows(series, stamp, of)]
        return pa.Table.from_pylist(rows, schema=METRICS_SCHEMA)

    def _rows(self, series: Series, stamp: Stamp, of: MetricsOf) -> Iterator[dict[str, object]]:
        pool = self.pools[series]
        sums = pool.sums
        ends = intervals(series.task, sums, of)
        for metric, value in pooled_metrics(series.task, sums, of).items():
            low, high = ends.get(metric, (None, None))
            yield {
                "metric": metric,
                "horizon_s": pool.horizon_s,
                "value": value,
                "ci_low": low,
                "ci_high": high,
                "n_sequences": pool.n_sequences,
                "n_targets": pool.n_targets,
                "n_units": len(sums),
                **_shared_columns(series, stamp(series.dataset)),
            }


class TableWriter:
    """Writes the tables of an evaluation into the folder ``out``; they appear when the block ends without error.

    Args:
        samples_of: how many futures of each sequence a method (its name) has. Rows of fewer go into
            ``samples.parquet`` alone: with them the tables of single sequences would be four times as long.
    """

    def __init__(
        self, out: Path, stamp: Stamp, samples_of: Callable[[str], int], of: MetricsOf = metrics_of
    ) -> None:
        self._out, self._stamp, self._samples_of, self._of = out, stamp, samples_of, of
        self._held: list[Statistic] = []
        self._held_numbers = 0
        self._pools, self._by_count = Pools(), Pools()
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with self._stack as opened:
            self._statistics = _writer(opened, self._out / output.STATISTICS, STATISTICS_SCHEMA)
            self._sequences = _writer(opened, self._out / output.SEQUENCES, SEQUENCES_SCHEMA)
            self._stack = opened.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        try:
            if error[0] is None:
                self._write_held()
        finally:
            self._stack.__exit__(*error)  # pyright: ignore[reportArgumentType]

    def add(self, statistics: Iterable[Statistic]) -> None:
        """Take the sums of more sequences."""
        for each in statistics:
            series = each.series
            if series.aggregation != "single":
                self._by_count.add(each)
                if series.num_samples < self._samples_of(series.method.name):
                    continue
            self._pools.add(each)
            self._held.append(each)
            self._held_numbers += len(each.totals)
        if self._held_numbers > _HELD_NUMBERS:
            self._write_held()

    def finish(self, order: Callable[[Series], Any]) -> None:
        """Write the tables over all sequences, the metrics last: a folder with them is finished."""
        write_table(self._by_count.table(self._stamp, order, self._of), self._out / output.SAMPLES)
        write_table(self._pools.table(self._stamp, order, self._of), self._out / output.METRICS)

    def _write_held(self) -> None:
        self._statistics.write_table(statistics_table(self._held))
        by_series: dict[Series, list[Statistic]] = {}
        for each in self._held:
            by_series.setdefault(each.series, []).append(each)
        for series, own in by_series.items():
            for table in sequence_tables(series, own, self._stamp(series.dataset), self._of):
                self._sequences.write_table(table)
        self._held, self._held_numbers = [], 0


def sequence_tables(
    series: Series, statistics: Iterable[Statistic], stamp: RunStamp, of: MetricsOf = metrics_of
) -> Iterator[pa.Table]:
    """Rows of ``sequences.parquet`` of one series, a table a metric; not those that are many (``iou/``, ``rank/``)."""
    own = list(statistics)
    shared = _shared_columns(series, stamp)
    for metric, values in of(series.task, np.stack([each.totals for each in own])).items():
        kept = np.flatnonzero(~np.isnan(values))
        if "/" in metric or not len(kept):
            continue
        columns = {
            "sequence_id": [own[at].sequence_id for at in kept],
            "unit": [own[at].group for at in kept],
            "horizon_s": [own[at].horizon_s for at in kept],
            "n_targets": [own[at].n_targets for at in kept],
            "value": values[kept],
        }
        fixed = {**shared, "metric": metric}
        yield pa.table(
            [
                pa.array(columns[field.name], field.type)
                if field.name in columns
                else pa.repeat(pa.scalar(fixed[field.name], field.type), len(kept))
                for field in SEQUENCES_SCHEMA
            ],
            schema=SEQUENCES_SCHEMA,
        )


def reading_order(series: Series) -> tuple[object, ...]:
    """To sort by: labels first, methods from the lower bound to the upper, others' behind."""
    method = series.method.name
    return _TASKS.index(series.task), (method not in OWN_METHODS, method)


def _writer(stack: ExitStack, path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """A table that is there whole once the stack is closed without error."""
    temporary = stack.enter_context(replacing(path))
    return stack.enter_context(pq.ParquetWriter(temporary, schema))


def _shared_columns(series: Series, stamp: RunStamp) -> Mapping[str, object]:
    """The columns that rows of a series have in both tables."""
    models = (series.method.tokenizer or "", series.method.world or "")
    other_sizes = dict.fromkeys(stamp.trained_sizes[each] for each in models if each in stamp.trained_sizes)
    return {
        "run_id": stamp.run_id,
        "method": series.method.name,
        "dataset": stamp.dataset,
        "task": series.task,
        "aggregation": series.aggregation,
        "horizon": series.horizon,
        "context": stamp.context,
        "num_samples": series.num_samples,
        "image_size": stamp.image_size[0],
        "image_width": stamp.image_size[1],
        "seed": stamp.seed,
        "backbone": stamp.backbone,
        "tokenizer": series.method.tokenizer,
        "world": series.method.world,
        "code_version": stamp.code_version,
        "created_at": stamp.created_at,
        "unit_kind": unit_kind(series.dataset, series.task),
        "trained_image_size": ", ".join(other_sizes) or None,
    }
