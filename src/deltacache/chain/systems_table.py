"""``compare-systems``: one table of the systems that ``train-systems`` made: how well, and at what cost.

Quality comes from one evaluation of all of them; GFLOPs are counted from the models; time and memory of a training step
are measured side by side on this machine.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from deltacache.chain.results import evaluate_and_show
from deltacache.chain.systems import System, SystemPaths, open_systems
from deltacache.chain.systems_costs import CostPlan, LoadedSystem, Row, backbone_of, cost_rows
from deltacache.chain.systems_shown import BOUNDS, QUALITY, print_table, shown_table
from deltacache.evaluate.inputs import check_patch_world, check_tokenizer, check_world
from deltacache.evaluate.output import SYSTEMS, SYSTEMS_TEXT, read_metrics
from deltacache.evaluate.rows import write_table
from deltacache.evaluate.settings import BenchmarkEvaluation, ClipEvaluation
from deltacache.models.checkpoints import load_tokenizer, load_world
from deltacache.pipeline.datasets.dataset import open_dataset
from deltacache.pipeline.storage.atomic import replacing
from deltacache.schemas.datasets import DatasetCard
from deltacache.schemas.errors import MismatchError, OtherEvaluationError
from deltacache.schemas.images import size_text
from deltacache.schemas.progress import Reporter

_SCORE_COLUMNS = (
    "dataset",
    "aggregation",
    "horizon",
    "horizon_s",
    "n_sequences",
    "value",
    "ci_low",
    "ci_high",
)
_SCHEMA = pa.schema(
    [
        ("system", pa.string()),
        ("method", pa.string()),
        ("world", pa.string()),
        ("quantity", pa.string()),
        ("dataset", pa.string()),
        ("aggregation", pa.string()),
        ("horizon", pa.int32()),
        ("horizon_s", pa.float64()),
        ("n_sequences", pa.int64()),
        ("value", pa.float64()),
        ("ci_low", pa.float64()),
        ("ci_high", pa.float64()),
        ("relative", pa.float64()),
        ("includes_backbone", pa.bool_()),
    ]
)
"""``world`` is the fingerprint of a system's world model, null for bounds, whose name is their method's."""


def load_systems(out: Path) -> list[LoadedSystem]:
    """All systems of ``train_systems``' output, in the order of the table.

    Raises:
        DeltacacheError: there are none, or one is not trained yet.
    """
    config, paths = open_systems(out)
    return [_load(name, system, paths) for name, system in config.systems.items()]


def compare_systems(
    out: Path,
    features: str,
    settings: ClipEvaluation | BenchmarkEvaluation,
    plan: CostPlan,
    reporter: Reporter,
) -> Path:
    """Evaluate all systems of ``out``, write ``systems.parquet`` and ``systems.md``, print them; the latter's path.

    They lie in ``out``; those of another evaluation than ``out/evaluation`` in its own folder. ``features`` is the
    dataset that the systems were trained from.

    Raises:
        MismatchError: the systems were trained on other features, or the plan's backbone is another one.
        OtherEvaluationError: the folder of the evaluation holds another one.
    """
    systems, card = load_systems(out), open_dataset(features, "features").card
    check_trained_on(out, systems, card, features)
    encoder = backbone_of(card.backbone, plan.backbone, reporter)
    try:
        evaluate_and_show(settings, reporter)
    except OtherEvaluationError as error:
        raise OtherEvaluationError(f"{error}, with --evaluation DIR") from error
    rows = [
        *_quality(systems, read_metrics(settings.out).to_pylist()),
        *cost_rows(systems, card, plan, encoder, reporter),
    ]
    usual = settings.out.resolve() == SystemPaths(out).evaluation.resolve()
    return _write(out if usual else settings.out, rows, reporter)


def check_trained_on(out: Path, systems: Sequence[LoadedSystem], card: DatasetCard, features: str) -> None:
    """Refuse features that a system was not trained on: costs are told for their size and clips.

    Raises:
        MismatchError: naming both sides.
    """
    config, paths = open_systems(out)
    for system in systems:
        try:
            _check_tokens(system, config.systems[system.name].tokenizer, paths, card, features)
            _check_clips(system, card, features)
        except MismatchError as error:
            raise MismatchError(
                f"system {system.name}: {error}. compare-systems takes the FEATURES that train-systems was given"
            ) from error


def _check_tokens(
    system: LoadedSystem, tokenizer: str | None, paths: SystemPaths, card: DatasetCard, features: str
) -> None:
    world = paths.world(system.name)
    if tokenizer is None or system.tokenizer is None:
        check_patch_world(system.world, world, card, features)
        return
    place = paths.tokenizer(tokenizer)
    check_tokenizer(system.tokenizer, card, place, features)
    check_world(system.world, world, system.tokenizer, place)


def _check_clips(system: LoadedSystem, card: DatasetCard, features: str) -> None:
    """What is left after the tokens: precision, dtype, and how clips are sampled, whose length a step is told for."""
    trained_on, given = system.world.metadata.get("features_fingerprint"), card.features_fingerprint
    if trained_on in (None, given):
        return
    sampling = card.sampling
    raise MismatchError(
        f"it was trained on features {trained_on}, but {features} is {given} ({size_text(card.image_size)} px, "
        f"{sampling.frames} frames a clip, {sampling.spacing_min_s:g} to {sampling.spacing_max_s:g} s apart, "
        f"{'augmented' if sampling.augment else 'not augmented'}, seed {sampling.seed}, {card.dtype})"
    )


def _load(name: str, system: System, paths: SystemPaths) -> LoadedSystem:
    tokenizer = None if system.tokenizer is None else load_tokenizer(paths.tokenizer(system.tokenizer))
    return LoadedSystem(name, load_world(paths.world(name)), tokenizer, system.world.candidates)


def _quality(systems: Sequence[LoadedSystem], metrics: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """The main metrics of the bounds, then of the systems."""
    shown = [row for row in metrics if row["metric"] in QUALITY]
    for method in BOUNDS:
        yield from (_score(method, row) for row in shown if row["method"] == method and not _is_nothing(row))
    for system in systems:
        yield from (_score(system.name, row) for row in shown if row["world"] == system.world.fingerprint)


def _is_nothing(row: Mapping[str, Any]) -> bool:
    """The distance of the true future to itself, which says nothing; what heads read off it is a bound."""
    return row["method"] == "present" and row["metric"] == "smooth_l1"


def _score(name: str, row: Mapping[str, Any]) -> Row:
    kept = {column: row[column] for column in _SCORE_COLUMNS}
    about = {"system": name, "method": row["method"], "world": row["world"], "quantity": row["metric"]}
    return {**about, **kept, "includes_backbone": None}


def _write(folder: Path, rows: Sequence[Row], reporter: Reporter) -> Path:
    table, text = folder / SYSTEMS, folder / SYSTEMS_TEXT
    write_table(pa.Table.from_pylist(list(rows), schema=_SCHEMA), table)
    shown = shown_table(rows)
    with replacing(text) as temporary:
        temporary.write_text(shown.markdown, encoding="utf-8")
    print_table(shown)
    reporter.line(f"table: {table}, as text: {text}")
    return text
