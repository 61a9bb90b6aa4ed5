"""From the blocks' sums to the tables. What grows with the benchmark is read and written block by block."""

import json
from dataclasses import asdict, replace

from deltacache.evaluate import output
from deltacache.evaluate.benchmarks.blocks import Parts
from deltacache.evaluate.benchmarks.run import BenchmarkRun
from deltacache.evaluate.benchmarks.timing import Timing
from deltacache.evaluate.clips.run import score_clips
from deltacache.evaluate.model_record import write_models
from deltacache.evaluate.pooling import TableWriter, reading_order
from deltacache.evaluate.rows import RunStamp
from deltacache.evaluate.statistics import Series, statistics_of
from deltacache.pipeline.storage.atomic import replacing
from deltacache.schemas.configs import save_config
from deltacache.schemas.progress import Reporter


def write_tables(run: BenchmarkRun, parts: Parts, reporter: Reporter) -> None:
    """Write everything that belongs to a finished evaluation; the metrics come last."""
    out, settings = run.settings.out, run.settings
    for stale in output.TABLES:
        (out / stale).unlink(missing_ok=True)
    tables = TableWriter(out, lambda dataset: _stamp(run, dataset), run.samples_of)
    with output.new_folder(out / output.EXAMPLES) as examples, tables:
        for block in run.blocks:
            for path in parts.examples(block):
                (examples / path.name).write_bytes(path.read_bytes())
            tables.add(statistics_of(parts.statistics(block)))
        for statistics in score_clips(run.clips, examples, reporter) if run.clips else ():
            tables.add(statistics)
    worlds = [world.method.world for world in run.inputs.models.worlds]
    output.keep_curves(out, settings.tokenizers, worlds, settings.worlds)
    save_config(settings, out / output.CONFIG)
    output.write_notes(out, run.notes)
    write_models(out, run.models)
    _write_timing(run, parts)
    tables.finish(lambda series: _order(run, series))
    parts.remove()


def _stamp(run: BenchmarkRun, dataset: str) -> RunStamp:
    """Of a benchmark, or of the feature dataset under the id of the whole run."""
    if run.clips is None or dataset in run.sequences:
        return run.stamp(dataset)
    return replace(run.clips.stamp, run_id=run.run_id, created_at=run.created_at)


def _order(run: BenchmarkRun, series: Series) -> tuple[object, ...]:
    """Data sets as they were given, and within them ``reading_order``; a feature dataset as it was scored, last."""
    datasets = [str(name) for name in run.sequences]
    if series.dataset not in datasets:
        return (len(datasets),)
    worlds = [world.method.world for world in run.inputs.models.worlds]
    world = series.method.world
    return (
        datasets.index(series.dataset),
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
