"""What ``inspect`` says of evaluations: finished, running, stopped, and of tables alone."""

from collections.abc import Collection, Iterator
from pathlib import Path

import pyarrow.parquet as pq

from deltacache.chain.descriptions.folders import systems_table
from deltacache.chain.descriptions.lines import line, size_of
from deltacache.chain.descriptions.models import LOADERS, made_from
from deltacache.evaluate.output import PARTS, REPORT, STATISTICS, read_metrics
from deltacache.evaluate.report.runs import ReportRun, facts_of, open_runs
from deltacache.evaluate.settings import ClipEvaluation
from deltacache.pipeline.datasets.dataset import open_dataset
from deltacache.pipeline.storage.locking import read_lock
from deltacache.schemas.benchmarks import BENCHMARK_TASK
from deltacache.schemas.errors import CheckpointError, DeltacacheError


def describe_evaluation(path: Path) -> Iterator[str]:
    """A finished one, with what its models are by now.

    Raises:
        DatasetError: a table is damaged.
    """
    (run,) = open_runs([path])
    yield f"{path}: an evaluation, {run.metrics.num_rows} numbers, {size_of(path)}"
    for name, value in facts_of(run).items():
        yield line(name, value)
    yield from _models(run)
    if isinstance(run.settings, ClipEvaluation):
        yield _dataset_parent(run.settings.features)
    if table := systems_table(path):
        yield table
    report = path / REPORT
    yield line("report", report if report.exists() else f"none: deltacache report {path}")


def describe_metrics(path: Path) -> Iterator[str]:
    """A ``metrics.parquet`` without its evaluation.

    Raises:
        DatasetError: it is damaged or another table.
    """
    rows = read_metrics(path).to_pylist()
    yield f"{path}: the table of an evaluation, {len(rows)} numbers, {size_of(path)}"
    for name in (
        "dataset",
        "method",
        "horizon",
        "context",
        "seed",
        "backbone",
        "tokenizer",
        "world",
        "run_id",
    ):
        values = [str(value) for value in dict.fromkeys(row[name] for row in rows) if value is not None]
        yield line(name, ", ".join(values) or "none")


def is_unfinished(path: Path) -> bool:
    """Whether an evaluation was begun in ``path``; one of clips or whole frames leaves its lock alone."""
    lock = read_lock(path)
    return (path / PARTS).is_dir() or (lock is not None and lock.command.startswith("evaluate"))


def describe_unfinished(path: Path) -> Iterator[str]:
    """One without tables yet: how far it is."""
    yield f"{path}: an evaluation without tables yet, {size_of(path)}"
    done: dict[str, list[int]] = {}
    for block in sorted((path / PARTS).glob(f"*/*/{STATISTICS}")):
        sequences = pq.read_table(block, columns=["sequence_id"])["sequence_id"].unique()
        done.setdefault(block.parent.name.rpartition("-")[0], []).append(len(sequences))
    for dataset, counts in done.items():
        yield line("finished", f"{dataset}: {sum(counts)} sequences, in {len(counts)} blocks")
    if not done:
        yield line("finished", "no block of sequences")


def _models(run: ReportRun) -> Iterator[str]:
    """Tokenizers, world models and heads at their recorded paths."""
    settings = run.settings
    recorded = {path: fingerprint for fingerprint, path in run.places.items()}
    any_of_them = {row[name] for row in run.rows for name in ("tokenizer", "world")}
    places = [("tokenizer", path) for path in settings.tokenizers]
    places += [("world", path) for path in settings.worlds]
    for name, path in places:
        yield from _parent(name, path, {recorded[path]} if path in recorded else any_of_them)
    if isinstance(settings, ClipEvaluation) or run.models is None:
        return
    tasks = {**BENCHMARK_TASK}
    for name, head in settings.heads.items():
        yield from _parent(f"{tasks.get(name, name)} head", head, {run.models.heads.get(name)})


def _parent(name: str, path: Path, fingerprints: Collection[str | None]) -> Iterator[str]:
    """What a model that took part was made from, if it is still where it was."""
    try:
        loaded = LOADERS[name](path)
    except CheckpointError:
        yield line(f"made from: {name}", f"{path} is not there any more")
        return
    same = "as it was" if loaded.fingerprint in fingerprints else "another one by now"
    yield line(f"made from: {name}", f"{loaded.fingerprint} at {path}, {same}")
    yield from made_from(loaded.metadata)


def _dataset_parent(features: str) -> str:
    try:
        card = open_dataset(features, "features").card
    except DeltacacheError:
        return line("made from: features", f"{features} is not there any more")
    parents = ", ".join(f"{name} {value[:16]}" for name, value in card.parents.items())
    return line("made from: features", f"{card.fingerprint} at {features}, of {parents}")
