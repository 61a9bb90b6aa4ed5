"""Series of sums added up by group, and the rows of ``metrics.parquet`` that follow from them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from deltacache.evaluate.benchmarks.statistics import Statistic, StatisticSeries
from deltacache.evaluate.pooled import MetricsOf, bootstrap, metrics_of, pooled_metrics
from deltacache.evaluate.rows import RunStamp, Series, shared_columns
from deltacache.evaluate.settings import OWN_METHODS


@dataclass(slots=True)
class Pool:
    """A series added up by group."""

    groups: dict[str, np.ndarray] = field(default_factory=dict)
    n_sequences: int = 0
    n_targets: int = 0
    seconds: float = 0.0

    def add(self, statistic: Statistic) -> None:
        """Count one more sequence."""
        held = self.groups.get(statistic.group)
        self.groups[statistic.group] = statistic.totals if held is None else held + statistic.totals
        self.n_sequences += 1
        self.n_targets += statistic.n_targets
        self.seconds += statistic.horizon_s


Pools = dict[StatisticSeries, Pool]
_TASKS = ("segmentation", "depth", "features", "samples", "vote")


def reading_order(series: StatisticSeries) -> tuple[object, ...]:
    """To sort by: labels first, methods from the lower bound to the upper, others' behind."""
    method = series.method.name
    return _TASKS.index(series.task), (method not in OWN_METHODS, method)


def pool(statistics: Iterable[Statistic]) -> Pools:
    """Add up all statistics by series, which keep the order in which they first appear."""
    pools: Pools = {}
    for statistic in statistics:
        pools.setdefault(statistic.series, Pool()).add(statistic)
    return pools


def pooled_rows(
    pools: Mapping[StatisticSeries, Pool], stamp: Callable[[str], RunStamp], of: MetricsOf = metrics_of
) -> Iterator[dict[str, object]]:
    """A row a metric, with its interval under resampling of groups. ``stamp``: of a data set's name."""
    for series, pooled in pools.items():
        totals = np.stack(list(pooled.groups.values()))
        of_run = stamp(series.dataset)
        intervals = bootstrap(series.task, totals, list(pooled.groups), seed=of_run.seed, of=of)
        for metric, value in pooled_metrics(series.task, totals, of).items():
            low, high = intervals.get(metric, (None, None))
            yield {
                "horizon_s": pooled.seconds / pooled.n_sequences,
                "value": value,
                "ci_low": low,
                "ci_high": high,
                "n_sequences": pooled.n_sequences,
                "n_targets": pooled.n_targets,
                **_columns(series, metric, of_run),
            }


def sequence_rows(
    statistic: Statistic, stamp: RunStamp, of: MetricsOf = metrics_of
) -> Iterator[dict[str, object]]:
    """Metrics of one sequence alone, without those that are many (``iou/``, ``rank/``)."""
    for metric, value in pooled_metrics(statistic.series.task, statistic.totals, of).items():
        if "/" not in metric:
            yield {
                "sequence_id": statistic.sequence_id,
                "horizon_s": statistic.horizon_s,
                "value": value,
                "n_targets": statistic.n_targets,
                **_columns(statistic.series, metric, stamp),
            }


def _columns(series: StatisticSeries, metric: str, stamp: RunStamp) -> dict[str, object]:
    """The columns that rows of one metric of a series share."""
    named = Series(series.method, series.task, metric, series.aggregation, series.horizon, series.num_samples)
    return shared_columns(named, stamp)
