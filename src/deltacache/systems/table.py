"""``compare-systems``: one table of the systems that ``train-systems`` made: how well, and at what cost.

Quality comes from one evaluation of all of them; GFLOPs are counted from the models; time and memory of a training step
are measured side by side on this machine.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from pydantic import Field
from rich import box
from rich.console import Console
from rich.table import Table

from deltacache.evaluate.inputs import check_patch_world, check_tokenizer, check_world
from deltacache.evaluate.output import SYSTEMS, SYSTEMS_TEXT, read_metrics, write_table
from deltacache.evaluate.report.panels import METHOD_LABELS, PERCENT
from deltacache.evaluate.report.panels import Column as Horizon
from deltacache.evaluate.results import evaluate_and_show
from deltacache.evaluate.settings import BenchmarkEvaluation, ClipEvaluation, evaluation
from deltacache.models.backbone import fetch, load_backbone
from deltacache.models.checkpoints import LoadedModel, load_tokenizer, load_world
from deltacache.models.deltatok import DeltaTok
from deltacache.models.devices import choose_device
from deltacache.models.encoders import InputConvention
from deltacache.models.flops import (
    NAMES,
    Cost,
    CountedSystem,
    Flops,
    Setting,
    SystemFlops,
    encoder_on,
    image_flops,
    system_flops,
    totals,
    training_step_cost,
)
from deltacache.models.world_model import WorldModel
from deltacache.pipeline.datasets.dataset import open_dataset
from deltacache.pipeline.storage.files import replacing
from deltacache.schemas.arguments import fields_of, taken
from deltacache.schemas.datasets import BackboneCard, DatasetCard, Frozen, sides, size_text
from deltacache.schemas.errors import CheckpointError, DeltacacheError, MismatchError, OtherEvaluationError
from deltacache.schemas.jobs import ComparisonSettings
from deltacache.schemas.progress import Reporter
from deltacache.schemas.texts import counted
from deltacache.systems.training import System, SystemPaths, open_systems

# ----------------------------------------------------------------------------------------------------
# Costs of trained systems: GFLOPs counted from the models on the meta device, training steps measured here.
# ----------------------------------------------------------------------------------------------------


Row = dict[str, Any]
FUTURES = "futures_gflops"


@dataclass(frozen=True, slots=True)
class LoadedSystem:
    """A system's trained models."""

    name: str
    world: LoadedModel[WorldModel]
    tokenizer: LoadedModel[DeltaTok] | None
    candidates: int


class CostPlan(Frozen):
    """What costs are counted for, and whether a training step of ``batch_size`` clips is measured."""

    context: int
    horizon: int
    samples: int
    crops: int = Field(description="of an image: 2 of the published benchmarks, 1 of clips")
    measure: bool
    batch_size: int
    device: str
    backbone: str | None = Field(
        default=None, description="null: what the id in the card of the features stands for"
    )

    def setting(self, card: DatasetCard) -> Setting:
        """The same on frames and clips of the features."""
        size = sides(card.image_size)
        return Setting(size, self.context, self.horizon, self.samples, self.crops, card.sampling.frames)


def backbone_of(card: BackboneCard, given: str | None, reporter: Reporter) -> InputConvention | None:
    """The encoder that made the features, on meta: ``given``, or what its id alone says; ``None``: unknown.

    An id may be the name of some folder, so nothing is looked for in the current one.

    Raises:
        DeltacacheError: ``given`` is not a backbone.
        MismatchError: ``given`` is another one.
    """
    if given is not None:
        return _given_backbone(card, given)
    try:
        return _named_backbone(card)
    except DeltacacheError as error:
        reporter.line(
            f"count GFLOPs: backbone {card.id!r} is left out of those of the futures, which then have no ratios: "
            f"{error}. To count it, give its folder or hub id as --backbone"
        )
        return None


def _given_backbone(card: BackboneCard, given: str) -> InputConvention:
    place = _place_of(given)
    encoder = encoder_on("meta", place)
    _check_sizes(card, encoder, given)
    if place == "tiny" or any(Path(place).expanduser().glob("model*.safetensors")):
        _check_weights(card, place)
    return encoder


def _place_of(given: str) -> str:
    """Folder of a hub id as far as it can be had; sizes of some are known without it."""
    if given in NAMES or Path(given).expanduser().is_dir():
        return given
    try:
        return str(fetch(given))
    except CheckpointError:
        return given


def _named_backbone(card: BackboneCard) -> InputConvention:
    if Path(card.id, "config.json").is_file():
        raise CheckpointError(f"there is a folder {card.id} here, which may be another backbone")
    encoder = encoder_on("meta", card.id)
    _check_sizes(card, encoder, card.id)
    if card.id == "tiny":
        _check_weights(card, card.id)
    return encoder


def _check_sizes(card: BackboneCard, encoder: InputConvention, source: str) -> None:
    found = encoder.encoder.config.hidden_size, encoder.patch_size
    if found != (card.hidden_size, card.patch_size):
        raise MismatchError(
            f"backbone {source} is {found[0]} wide with {found[1]}-px patches, but the features were made with "
            f"{card.id}, {card.hidden_size} wide with {card.patch_size}-px patches: give the backbone of the features"
        )


def _check_weights(card: BackboneCard, source: str) -> None:
    found = load_backbone(source).weights_sha256
    if found != card.weights_sha256:
        raise MismatchError(
            f"backbone {source} has the weights {found[:16]}, but the features were made with "
            f"{card.weights_sha256[:16]} ({card.id}): give the backbone of the features"
        )


def cost_rows(
    systems: Sequence[LoadedSystem],
    card: DatasetCard,
    plan: CostPlan,
    encoder: InputConvention | None,
    reporter: Reporter,
) -> list[Row]:
    """A row a system and quantity, with its ratio to the first system's.

    Futures have none where the backbone, which all systems share, is not counted.
    """
    setting = plan.setting(card)
    backbone = Flops(0) if encoder is None else image_flops(encoder, setting)
    flops_of_systems: list[SystemFlops] = []
    with reporter.stage("count GFLOPs", len(systems)) as stage:
        for each in systems:
            tokenizer = each.tokenizer.model if each.tokenizer else None
            costed = CountedSystem(each.name, each.world.model, tokenizer, each.candidates)
            flops_of_systems.append(system_flops(costed, card.patch_grid, backbone, setting))
            stage.advance()
    measured = _measured(systems, card, plan, reporter)
    rows: list[Row] = []
    for system, flops, cost in zip(systems, flops_of_systems, measured, strict=True):
        figures = {
            FUTURES: totals(flops, plan.setting(card)).exact / 1e9,
            "step_gflops": flops.step.here / 1e9,
        }
        if cost is not None:
            figures |= {"step_seconds": cost.seconds, "step_gib": cost.peak_bytes / 2**30}
        rows += [_row(system, name, value, encoder is not None) for name, value in figures.items()]
    base = {row["quantity"]: row["value"] for row in rows if row["system"] == systems[0].name}
    for row in rows:
        row["relative"] = None if row["includes_backbone"] is False else row["value"] / base[row["quantity"]]
    return rows


def _row(system: LoadedSystem, quantity: str, value: float, with_backbone: bool) -> Row:
    return {
        "system": system.name,
        "method": system.world.model.label,
        "world": system.world.fingerprint,
        "quantity": quantity,
        "aggregation": "single",
        "value": value,
        "includes_backbone": with_backbone if quantity == FUTURES else None,
    }


def _measured(
    systems: Sequence[LoadedSystem], card: DatasetCard, plan: CostPlan, reporter: Reporter
) -> list[Cost | None]:
    """A training step of each, one after the other, so that ratios are of one run."""
    if not plan.measure:
        return [None] * len(systems)
    device = choose_device(plan.device)
    found: list[Cost | None] = []
    with reporter.stage("measure training steps", len(systems)) as stage:
        for each in systems:
            frames, grid = card.sampling.frames, card.patch_grid
            found.append(
                training_step_cost(each.world.model, frames, grid, each.candidates, plan.batch_size, device)
            )
            stage.advance()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


# ----------------------------------------------------------------------------------------------------
# The table of ``compare-systems`` as text: a line a bound or system, a column a quantity.
# ----------------------------------------------------------------------------------------------------


Rows = Sequence[Mapping[str, Any]]
Column = tuple[str, str, int]
BOUNDS = ("copy_last", "present")
QUALITY = {
    "smooth_l1": "loss",
    "mode_coverage": "coverage",
    "odds_error": "odds error",
    "miou": "mIoU (%)",
    "rmse": "RMSE (m)",
    "delta1": "δ1 (%)",
}
_COSTS = {
    FUTURES: "futures (GFLOP)",
    "step_gflops": "step (GFLOP)",
    "step_seconds": "step (s)",
    "step_gib": "step (GiB)",
}
_NONE = "–"


@dataclass(frozen=True, slots=True)
class ShownTable:
    """Heading, a line a bound or system, and what is said below."""

    heading: list[str]
    body: list[list[str]]
    notes: list[str]

    @property
    def markdown(self) -> str:
        """The whole as Markdown."""
        lines = [self.heading, ["---", *("---:" for _ in self.heading[1:])], *self.body]
        table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        return table + "\n" + "\n".join(self.notes) + "\n"


def shown_table(rows: Rows) -> ShownTable:
    """Arrange the rows of ``systems.parquet``; lines keep the order that they have there."""
    quality = sorted(
        {_column(row) for row in _scores(rows)},
        key=lambda column: (column[0], list(QUALITY).index(column[1]), column[2]),
    )
    costs = [name for name in _COSTS if any(row["quantity"] == name for row in rows)]
    lines: dict[tuple[str, str | None], list[Mapping[str, Any]]] = {}
    for row in rows:
        lines.setdefault((row["system"], row["world"]), []).append(row)
    several = len({dataset for dataset, _, _ in quality}) > 1
    heading = ["system"]
    for column in quality:
        dataset, quantity, horizon = column
        seconds = next(row["horizon_s"] for row in _scores(rows) if _column(row) == column)
        prefix = f"{dataset} " if several else ""
        heading.append(f"{prefix}{QUALITY[quantity]}, {Horizon(horizon, seconds).heading}")
    for name in costs:
        lacks = "futures without backbone" if _lacks(name, rows) else "futures"
        heading.append(_COSTS[name].replace("futures", lacks))
    body = [_line(own, quality, costs) for own in lines.values()]
    # Which model is which: tables and pictures of the evaluation know fingerprints only.
    systems = [
        f"- {own[0]['system']}: {METHOD_LABELS.get(own[0]['method'], own[0]['method'])}, world model {own[0]['world']}"
        for own in lines.values()
        if own[0]["world"]
    ]
    notes = [_legend(rows), "", _counts(quality, rows), "", *systems]
    return ShownTable(heading, body, notes)


def print_table(table: ShownTable) -> None:
    """On a terminal with lines as wide as it is, Markdown elsewhere."""
    console = Console()
    if not console.is_terminal:
        print(table.markdown)
        return
    shown = Table(*table.heading, box=box.SIMPLE_HEAD, show_edge=False)
    for line in table.body:
        shown.add_row(*line)
    console.print(shown)
    console.print("\n".join(table.notes), style="dim", highlight=False, markup=False)


def _scores(rows: Rows) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["quantity"] in QUALITY]


def _column(row: Mapping[str, Any]) -> Column:
    return row["dataset"], row["quantity"], row["horizon"]


def _lacks(name: str, rows: Rows) -> bool:
    """Whether the column is without the backbone."""
    return any(row["quantity"] == name and row["includes_backbone"] is False for row in rows)


def _line(own: Rows, quality: Sequence[Column], costs: Sequence[str]) -> list[str]:
    scored = _scores(own)
    name = own[0]["system"] if own[0]["world"] else METHOD_LABELS[own[0]["method"]]
    line = [name]
    for column in quality:  # best, with the mean in brackets; the one number of a single future
        form = "{:.1f}" if column[1] in PERCENT else "{:.4g}"
        scale = 100 if column[1] in PERCENT else 1
        values = {
            row["aggregation"]: form.format(scale * row["value"]) for row in scored if _column(row) == column
        }
        best = (
            f"{values['best']} ({values['mean']})"
            if {"best", "mean"} <= values.keys()
            else values.get("best")
        )
        line.append(best or values.get("single", _NONE))
    for cost in costs:  # with the ratio to the first system in brackets
        found = next((row for row in own if row["quantity"] == cost), None)
        ratio = "" if found is None or found["relative"] is None else f" ({found['relative']:.3g}x)"
        line.append(_NONE if found is None else f"{found['value']:.3g}{ratio}")
    return line


def _legend(rows: Rows) -> str:
    without = _lacks(FUTURES, rows)
    counted = (
        "tokenizer included, backbone left out: it is not known"
        if without
        else "backbone and tokenizer included"
    )
    ratios = (
        "of a training step the ratio to the first system" if without else "the ratio to the first system"
    )
    return (
        "Quality: best of the samples, their mean in brackets; one number where there is one future. Loss is smooth-L1 "
        f"of features (lower is better).\nCosts: GFLOP of all futures of one image from its context, {counted}; GFLOP "
        f"(of one clip), seconds and GiB of a training step from cached tokens. In brackets {ratios}."
    )


def _counts(columns: Sequence[Column], rows: Rows) -> str:
    """Over how many sequences the columns are; of scenes with several futures over these."""
    found: dict[str, dict[str, list[str]]] = {}
    for column in columns:
        dataset, quantity, horizon = column
        count = max(row["n_sequences"] for row in _scores(rows) if _column(row) == column)
        items = "scenes" if quantity in ("mode_coverage", "odds_error") else "sequences"
        name = QUALITY[quantity].split(" (")[0]
        found.setdefault(f"{count} {items} of {dataset}", {}).setdefault(name, []).append(str(horizon))
    texts = []
    for text, names in found.items():
        at = "; ".join(f"{name} at {', '.join(horizons)} steps" for name, horizons in names.items())
        texts.append(f"{text} ({at})")
    return f"Over {' and '.join(texts)}."


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


class SystemsComparison(Frozen):
    """What ``compare-systems`` is asked for, resolved."""

    evaluation: ClipEvaluation | BenchmarkEvaluation
    costs: CostPlan


def comparison(out: Path, features: str, flags: Mapping[str, Any]) -> SystemsComparison:
    """The evaluation of all systems of ``out`` and the plan of their costs, from the flags of ``compare-systems``.

    Raises:
        DeltacacheError: ``out`` holds no systems, an unknown name, or flags that do not go together.
    """
    config, paths = open_systems(out)
    card = open_dataset(features, "features").card
    asked, rest = taken(ComparisonSettings, flags)
    size = card.image_size if isinstance(card.image_size, int) else None
    settings = evaluation(
        rest.pop("data"),
        heads=rest.pop("head"),
        out=asked.evaluation or paths.evaluation,
        **paths.models(config),
        futures=rest.pop("futures"),
        **fields_of(BenchmarkEvaluation, {"backbone": card.backbone.id, "image_size": size or 512})
        | fields_of(BenchmarkEvaluation, rest),
    )
    plan = CostPlan(
        context=settings.context,
        horizon=max(settings.horizons),
        samples=settings.samples,
        crops=2 if isinstance(settings, BenchmarkEvaluation) else 1,
        measure=asked.measure,
        batch_size=asked.batch_size,
        device=settings.device,
        backbone=flags["backbone"],
    )
    return SystemsComparison(evaluation=settings, costs=plan)


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
        f"{counted(sampling.frames, 'frame')} per clip, {sampling.spacing_min_s:g} to "
        f"{sampling.spacing_max_s:g} s apart, "
        f"{'augmented' if sampling.augment else 'not augmented'}, seed {sampling.seed}, {card.dtype})"
    )


def _load(name: str, system: System, paths: SystemPaths) -> LoadedSystem:
    tokenizer = None if system.tokenizer is None else load_tokenizer(paths.tokenizer(system.tokenizer))
    return LoadedSystem(name, load_world(paths.world(name)), tokenizer, system.world.candidates)


def _quality(systems: Sequence[LoadedSystem], metrics: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """The main metrics of the bounds, then of the systems."""
    shown = [row for row in metrics if row["metric"] in QUALITY]
    for method in BOUNDS:
        # The distance of the true future to itself, which says nothing; what heads read off it is a bound.
        yield from (
            _score(method, row)
            for row in shown
            if row["method"] == method and not (row["method"] == "present" and row["metric"] == "smooth_l1")
        )
    for system in systems:
        yield from (_score(system.name, row) for row in shown if row["world"] == system.world.fingerprint)


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
