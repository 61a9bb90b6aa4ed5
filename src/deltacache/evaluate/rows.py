"""From scores of single sequences to ``sequences.parquet`` and ``metrics.parquet``."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from deltacache.evaluate.bootstrap import bootstrap_intervals
from deltacache.pipeline.storage.atomic import replacing
from deltacache.schemas.tables import METRICS_SCHEMA, SEQUENCES_SCHEMA

Aggregation = Literal["best", "mean", "single"]


@dataclass(frozen=True, slots=True)
class Method:
    """Who predicted. ``tokenizer`` and ``world`` are fingerprints of what took part, else ``None``."""

    name: str
    tokenizer: str | None = None
    world: str | None = None


@dataclass(frozen=True, slots=True)
class Series:
    """What the scores of one row of ``metrics.parquet`` have in common."""

    method: Method
    task: str
    metric: str
    aggregation: Aggregation
    horizon: int
    num_samples: int


@dataclass(frozen=True, slots=True)
class Score:
    """One number of one sequence. ``horizon_s``: seconds from the last context frame to the target."""

    series: Series
    sequence_id: str
    horizon_s: float
    value: float
    n_targets: int = 1


@dataclass(frozen=True, slots=True)
class RunStamp:
    """Columns that every row of a run shares."""

    run_id: str
    dataset: str
    context: int
    image_size: int
    seed: int
    backbone: str
    code_version: str
    created_at: datetime


def sequence_table(scores: Iterable[Score], stamp: RunStamp) -> pa.Table:
    """One row a score, in the order given."""
    rows = [
        {
            "sequence_id": score.sequence_id,
            "horizon_s": score.horizon_s,
            "value": score.value,
            "n_targets": score.n_targets,
            **shared_columns(score.series, stamp),
        }
        for score in scores
    ]
    return pa.Table.from_pylist(rows, schema=SEQUENCES_SCHEMA)


def metric_table(scores: Iterable[Score], stamp: RunStamp) -> pa.Table:
    """One row a series: the mean over its sequences with its bootstrap interval."""
    series = group_by_series(scores)
    intervals = _intervals(series, stamp.seed)
    rows = [
        {
            "horizon_s": float(np.mean([score.horizon_s for score in members])),
            "value": float(np.mean([score.value for score in members])),
            "ci_low": intervals[each][0],
            "ci_high": intervals[each][1],
            "n_sequences": len(members),
            "n_targets": sum(score.n_targets for score in members),
            **shared_columns(each, stamp),
        }
        for each, members in series.items()
    ]
    return pa.Table.from_pylist(rows, schema=METRICS_SCHEMA)


def group_by_series(scores: Iterable[Score]) -> dict[Series, list[Score]]:
    """Series in the order they first appear, each with its scores in order."""
    groups: dict[Series, list[Score]] = {}
    for score in scores:
        groups.setdefault(score.series, []).append(score)
    return groups


def _intervals(groups: Mapping[Series, Sequence[Score]], seed: int) -> dict[Series, tuple[float, float]]:
    """Series over equally many sequences are resampled together: their intervals see the same draws."""
    by_count: dict[int, list[Series]] = {}
    for series, members in groups.items():
        by_count.setdefault(len(members), []).append(series)
    intervals: dict[Series, tuple[float, float]] = {}
    for together in by_count.values():
        values = np.array([[score.value for score in groups[series]] for series in together]).T
        for series, (low, high) in zip(together, bootstrap_intervals(values, seed=seed), strict=True):
            intervals[series] = (float(low), float(high))
    return intervals


def shared_columns(series: Series, stamp: RunStamp) -> dict[str, object]:
    """The columns that rows of a series have in both tables."""
    return {
        "run_id": stamp.run_id,
        "method": series.method.name,
        "dataset": stamp.dataset,
        "task": series.task,
        "metric": series.metric,
        "aggregation": series.aggregation,
        "horizon": series.horizon,
        "context": stamp.context,
        "num_samples": series.num_samples,
        "image_size": stamp.image_size,
        "seed": stamp.seed,
        "backbone": stamp.backbone,
        "tokenizer": series.method.tokenizer,
        "world": series.method.world,
        "code_version": stamp.code_version,
        "created_at": stamp.created_at,
    }


def write_table(table: pa.Table, path: Path) -> None:
    """Write a Parquet file that is either whole or not there."""
    with replacing(path) as temporary:
        pq.write_table(table, temporary)
