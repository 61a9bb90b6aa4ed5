"""From the blocks' sums to the tables. What grows with the benchmark is read and written block by block."""

import json
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from deltacache.evaluate import output
from deltacache.evaluate.benchmarks.blocks import Parts
from deltacache.evaluate.benchmarks.run import BenchmarkRun
from deltacache.evaluate.benchmarks.statistics import (
    StatisticSeries,
    statistics_of,
    statistics_table,
)
from deltacache.evaluate.benchmarks.timing import Timing
from deltacache.evaluate.clips.run import clip_metrics, clip_sequences, score_clips
from deltacache.evaluate.clips.scoring import ClipScores
from deltacache.evaluate.model_record import write_models
from deltacache.evaluate.pooling import Pool, Pools, pooled_rows, reading_order, sequence_rows
from deltacache.evaluate.rows import (
    RunStamp,
    metric_table,
    write_table,
)
from deltacache.pipeline.storage.atomic import replacing
from deltacache.schemas.configs import save_config
from deltacache.schemas.progress import Reporter
from deltacache.schemas.tables import METRICS_SCHEMA, SEQUENCES_SCHEMA, STATISTICS_SCHEMA


def write_tables(run: BenchmarkRun, parts: Parts, reporter: Reporter) -> None:
    """Write everything that belongs to a finished evaluation; the metrics come last."""
    out, settings = run.settings.out, run.settings
    with output.new_folder(out / output.EXAMPLES) as examples:
        clips = score_clips(run.clips, examples, reporter) if run.clips else None
        for block in run.blocks:
            for path in parts.examples(block):
                (examples / path.name).write_bytes(path.read_bytes())
    for stale in output.TABLES:
        (out / stale).unlink(missing_ok=True)
    pools, by_count = _stream(run, parts, clips)
    worlds = [world.method.world for world in run.inputs.models.worlds]
    output.keep_curves(out, settings.tokenizers, worlds, settings.worlds)
    save_config(settings, out / output.CONFIG)
    output.write_notes(out, run.notes)
    write_models(out, run.models)
    _write_timing(run, parts)
    samples, metrics = [_metric_table(run, by_count)], [_metric_table(run, pools)]
    if clips:
        samples.append(metric_table(clips.by_count, _clip_stamp(run)))
        metrics.append(clip_metrics(clips, _clip_stamp(run)))
    write_table(pa.concat_tables(samples), out / output.SAMPLES)
    write_table(pa.concat_tables(metrics), out / output.METRICS)
    parts.remove()


def _stream(run: BenchmarkRun, parts: Parts, clips: ClipScores | None) -> tuple[Pools, Pools]:
    """Write the rows of single sequences block by block; returns them added up, and those by number of samples.

    What is of fewer than all samples is added up alone: it would make the tables of single sequences four times
    as long.
    """
    pools: Pools = {}
    by_count: Pools = {}
    out = run.settings.out
    with ExitStack() as stack:
        statistics = _writer(stack, out / output.STATISTICS, STATISTICS_SCHEMA)
        sequences = _writer(stack, out / output.SEQUENCES, SEQUENCES_SCHEMA)
        for block in run.blocks:
            rows, whole = [], []
            for statistic in statistics_of(parts.statistics(block)):
                series = statistic.series
                if series.aggregation != "single":
                    by_count.setdefault(series, Pool()).add(statistic)
                    if series.num_samples < run.samples_of(series.method.name):
                        continue
                pools.setdefault(series, Pool()).add(statistic)
                whole.append(statistic)
                rows.extend(sequence_rows(statistic, run.stamp(series.dataset)))
            statistics.write_table(statistics_table(whole))
            sequences.write_table(pa.Table.from_pylist(rows, schema=SEQUENCES_SCHEMA))
        if clips:
            statistics.write_table(statistics_table(clips.statistics))
            sequences.write_table(clip_sequences(clips, _clip_stamp(run)))
    return pools, by_count


def _writer(stack: ExitStack, path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """A table that is there whole once the stack is closed without error."""
    temporary = stack.enter_context(replacing(path))
    return stack.enter_context(pq.ParquetWriter(temporary, schema))


def _clip_stamp(run: BenchmarkRun) -> RunStamp:
    """That of the feature dataset, under the id of the whole run."""
    assert run.clips is not None
    return replace(run.clips.stamp, run_id=run.run_id, created_at=run.created_at)


def _metric_table(run: BenchmarkRun, pools: Pools) -> pa.Table:
    ordered = {series: pools[series] for series in sorted(pools, key=lambda series: _order(run, series))}
    return pa.Table.from_pylist(list(pooled_rows(ordered, run.stamp)), schema=METRICS_SCHEMA)


def _order(run: BenchmarkRun, series: StatisticSeries) -> tuple[object, ...]:
    """Data sets as they were given, and within them ``reading_order``."""
    worlds = [world.method.world for world in run.inputs.models.worlds]
    world = series.method.world
    return (
        [str(name) for name in run.sequences].index(series.dataset),
        *reading_order(series),
        worlds.index(world) if world else -1,
        series.aggregation,
        series.num_samples,
        series.horizon,
    )


def _write_timing(run: BenchmarkRun, parts: Parts) -> None:
    """``timing.json``: seconds by part and peaks of memory, of all blocks."""
    timing = Timing()
    for block in run.blocks:
        timing.add(parts.timing(block))
    with replacing(run.settings.out / output.TIMING) as temporary:
        temporary.write_text(json.dumps(asdict(timing) | {"waiting_share": timing.waiting_share}, indent=2))
