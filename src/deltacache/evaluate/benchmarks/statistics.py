"""Sums of single sequences: what a block of sequences leaves behind, and what all tables are made from."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from deltacache.evaluate.rows import Aggregation, Method
from deltacache.schemas.tables import STATISTICS_SCHEMA


@dataclass(frozen=True, slots=True)
class StatisticSeries:
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
        horizon_s: seconds from the last context frame to the target.
        totals: (K,) float64.
    """

    series: StatisticSeries
    sequence_id: str
    group: str
    horizon_s: float
    totals: np.ndarray
    n_targets: int = 1


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


def statistics_of(table: pa.Table) -> Iterable[Statistic]:
    """The rows of a table as they were."""
    for row in table.to_pylist():
        method = Method(row["method"], row["tokenizer"], row["world"])
        series = StatisticSeries(
            row["dataset"], row["task"], method, row["aggregation"], row["horizon"], row["num_samples"]
        )
        totals = np.asarray(row["totals"], dtype=np.float64)
        yield Statistic(series, row["sequence_id"], row["group"], row["horizon_s"], totals, row["n_targets"])
