"""``compare-systems``: one table of the systems that ``train-systems`` made: how well, and at what cost.

Quality comes from one evaluation of all of them; GFLOPs are counted from the models on the meta device; time and memory
of a training step are measured side by side on this machine.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from deltacache.chain.systems import System, SystemPaths, SystemsConfig, open_systems
from deltacache.evaluate.output import read_metrics
from deltacache.evaluate.rows import write_table
from deltacache.models.checkpoints import LoadedModel, load_tokenizer, load_world
from deltacache.models.costs.backbones import encoder_on
from deltacache.models.costs.counting import Flops
from deltacache.models.costs.measuring import Cost, training_step_cost
from deltacache.models.costs.systems import Setting, SystemFlops, image_flops, system_flops, totals
from deltacache.models.costs.systems import System as CostedSystem
from deltacache.models.deltatok import DeltaTok
from deltacache.models.devices import choose_device
from deltacache.models.world_model import WorldModel
from deltacache.pipeline.datasets.dataset import open_dataset
from deltacache.pipeline.storage.atomic import replacing
from deltacache.schemas.errors import DeltacacheError
from deltacache.schemas.images import sides
from deltacache.schemas.progress import Reporter

TABLE, TEXT = "systems.parquet", "systems.md"
_SHOWN = {"smooth_l1": "loss", "mode_coverage": "coverage", "miou": "mIoU", "rmse": "RMSE"}
_SCHEMA = pa.schema(
    [
        ("system", pa.string()),
        ("quantity", pa.string()),
        ("dataset", pa.string()),
        ("aggregation", pa.string()),
        ("horizon", pa.int32()),
        ("value", pa.float64()),
        ("relative", pa.float64()),
    ]
)


@dataclass(frozen=True, slots=True)
class LoadedSystem:
    """A system's trained models."""

    name: str
    world: LoadedModel[WorldModel]
    tokenizer: LoadedModel[DeltaTok] | None
    candidates: int


@dataclass(frozen=True, slots=True)
class CostPlan:
    """What costs are told for.

    Attributes:
        context: frames that are seen; ``horizon`` steps are predicted, by ``samples`` futures.
        crops: of an image: 2 of the published benchmarks, 1 of clips.
        batch_size: clips of a measured training step; ``None``: nothing is measured.
    """

    context: int
    horizon: int
    samples: int
    crops: int
    batch_size: int | None
    device: str


def load_systems(out: Path) -> list[LoadedSystem]:
    """All systems of ``train_systems``' output, in the order of the table.

    Raises:
        DeltacacheError: there are none, or one is not trained yet.
    """
    config, paths = open_systems(out)
    return [_load(name, system, config, paths) for name, system in config.systems.items()]


def compare_systems(out: Path, evaluation: Path, features: str, plan: CostPlan, reporter: Reporter) -> Path:
    """Write ``systems.parquet`` and ``systems.md`` into ``out`` and print them; returns the latter's path.

    ``evaluation`` is that of all systems, ``features`` the dataset that they were trained from.
    """
    systems = load_systems(out)
    metrics = read_metrics(evaluation).to_pylist()
    counted = _flops(systems, features, plan, reporter)
    measured = _measured(systems, features, plan, reporter)
    rows = [
        *(row for system in systems for row in _quality(system, metrics)),
        *_relative(_cost_rows(systems, counted, measured, plan), systems[0].name),
    ]
    write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), out / TABLE)
    heading, body = _as_table([system.name for system in systems], rows)
    with replacing(out / TEXT) as temporary:
        temporary.write_text(_markdown(heading, body))
    _print(heading, body)
    reporter.line(f"table: {out / TABLE}, as text: {out / TEXT}")
    return out / TEXT


def _load(name: str, system: System, config: SystemsConfig, paths: SystemPaths) -> LoadedSystem:
    del config
    tokenizer = None if system.tokenizer is None else load_tokenizer(paths.tokenizer(system.tokenizer))
    return LoadedSystem(name, load_world(paths.world(name)), tokenizer, system.world.candidates)


def _quality(system: LoadedSystem, metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The main metrics of a system's rows."""
    return [
        {
            "system": system.name,
            "quantity": row["metric"],
            "dataset": row["dataset"],
            "aggregation": row["aggregation"],
            "horizon": row["horizon"],
            "value": row["value"],
            "relative": None,
        }
        for row in metrics
        if row["world"] == system.world.fingerprint and row["metric"] in _SHOWN
    ]


def _flops(
    systems: Sequence[LoadedSystem], features: str, plan: CostPlan, reporter: Reporter
) -> list[SystemFlops]:
    card = open_dataset(features, "features").card
    size = sides(card.image_size)
    setting = _setting(size, card.sampling.frames, plan)
    try:
        backbone = image_flops(encoder_on("meta", card.backbone.id), setting)
    except DeltacacheError as error:
        backbone = Flops(0)
        reporter.line(f"count GFLOPs: the backbone is left out, it is the same for all systems: {error}")
    found = []
    with reporter.stage("count GFLOPs", len(systems)) as stage:
        for each in systems:
            tokenizer = each.tokenizer.model if each.tokenizer else None
            costed = CostedSystem(each.name, each.world.model, tokenizer, each.candidates)
            found.append(system_flops(costed, card.patch_grid, backbone, setting))
            stage.advance()
    return found


def _setting(size: tuple[int, int], frames: int, plan: CostPlan) -> Setting:
    return Setting(size, plan.context, plan.horizon, plan.samples, plan.crops, frames)


def _measured(
    systems: Sequence[LoadedSystem], features: str, plan: CostPlan, reporter: Reporter
) -> list[Cost | None]:
    """A training step of each, one after the other, so that ratios are of one run."""
    if plan.batch_size is None:
        return [None] * len(systems)
    card, device = open_dataset(features, "features").card, choose_device(plan.device)
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


def _cost_rows(
    systems: Sequence[LoadedSystem],
    counted: Sequence[SystemFlops],
    measured: Sequence[Cost | None],
    plan: CostPlan,
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for system, flops, cost in zip(systems, counted, measured, strict=True):
        size = (0, 0)  # totals depend on the plan's counts alone
        figures = {
            "futures_gflops": totals(flops, _setting(size, 0, plan)).exact / 1e9,
            "step_gflops": flops.step.here / 1e9,
        }
        if cost is not None:
            figures |= {"step_seconds": cost.seconds, "step_gib": cost.peak_bytes / 2**30}
        rows.extend(
            {"system": system.name, "quantity": name, "aggregation": "single", "value": value}
            for name, value in figures.items()
        )
    return rows


def _relative(rows: Sequence[Mapping[str, Any]], first: str) -> list[dict[str, Any]]:
    """The same with each value's ratio to the first system's."""
    base = {row["quantity"]: row["value"] for row in rows if row["system"] == first}
    return [{**row, "relative": row["value"] / base[row["quantity"]]} for row in rows]


_COSTS = {
    "futures_gflops": "futures GFLOPs",
    "step_gflops": "step GFLOPs",
    "step_seconds": "step time",
    "step_gib": "step memory",
}


def _as_table(systems: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Heading and a line a system; a quantity of one kind is a column."""
    quality = sorted(
        {(row["dataset"], row["quantity"], row["horizon"]) for row in rows if row.get("horizon")},
        key=lambda column: (column[0], list(_SHOWN).index(column[1]), column[2]),
    )
    costs = [name for name in _COSTS if any(row["quantity"] == name for row in rows)]
    several = len({dataset for dataset, _, _ in quality}) > 1
    heading = ["system"]
    for dataset, quantity, horizon in quality:
        heading.append(
            f"{dataset + ' ' if several else ''}{_SHOWN[quantity]}, {horizon} step{'s' * (horizon > 1)}"
        )
    heading += [_COSTS[name] for name in costs]
    body = []
    for system in systems:
        own = [row for row in rows if row["system"] == system]
        cells = [_quality_text([row for row in own if _column(row) == column]) for column in quality]
        body.append([system, *cells, *(_cost_text(own, name) for name in costs)])
    return heading, body


def _column(row: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    return row.get("dataset"), row["quantity"], row.get("horizon")


def _quality_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Best, with the mean in brackets; the one number of a single future."""
    values = {row["aggregation"]: row["value"] for row in rows}
    if "best" in values:
        return f"{values['best']:.4g} ({values['mean']:.4g})"
    return f"{values['single']:.4g}" if values else "–"


def _cost_text(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    (row,) = [row for row in rows if row["quantity"] == name]
    return f"{row['value']:.3g} ({row['relative']:.3g}x)"


def _markdown(heading: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---", *("---:" for _ in heading[1:])], *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n" + _LEGEND + "\n"


_LEGEND = (
    "Quality: best of the samples, their mean in brackets; one number where there is one future. Loss is smooth-L1 of\n"
    "features (lower is better). Costs: GFLOPs of all futures of one frame from its context, backbone and tokenizer\n"
    "included; GFLOPs (of one clip), seconds and GiB of a training step from cached tokens, with the ratio to\n"
    "the first system."
)


def _print(heading: Sequence[str], body: Sequence[Sequence[str]]) -> None:
    console = Console()
    if console.is_terminal:
        table = Table(*heading, box=box.SIMPLE_HEAD, show_edge=False)
        for line in body:
            table.add_row(*line)
        console.print(table)
        console.print(_LEGEND, style="dim", highlight=False)
    else:
        print(_markdown(heading, body))
