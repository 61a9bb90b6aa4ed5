"""Sums of single sequences: what all tables are made from, and how they are read again.

Shapes: n sequences, K sums.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from deltacache.evaluate.rows import Aggregation, Method, method_now
from deltacache.schemas.errors import DatasetError, NotFiniteError
from deltacache.schemas.tables import STATISTICS_SCHEMA

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
    rows = [
        {
            "dataset": each.series.dataset,
            "task": each.series.task,
            "method": each.series.method.name,
            "tokenizer": each.series.method.tokenizer,
            "world": each.series.method.world,
            "aggregation": each.series.aggregation,
            "horizon": each.series.horizon,
            "horizon_s": each.horizon_s,
            "num_samples": each.series.num_samples,
            "sequence_id": each.sequence_id,
            "group": each.group,
            "n_targets": each.n_targets,
            "totals": each.totals,
        }
        for each in statistics
    ]
    return pa.Table.from_pylist(rows, schema=STATISTICS_SCHEMA)


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
