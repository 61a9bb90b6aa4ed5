"""Costs of trained systems: GFLOPs counted from the models on the meta device, training steps measured here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltacache.models.backbone import load_backbone
from deltacache.models.backbones.convention import InputConvention
from deltacache.models.backbones.reading import fetch
from deltacache.models.checkpoints import LoadedModel
from deltacache.models.costs.backbones import NAMES, encoder_on
from deltacache.models.costs.counting import Flops
from deltacache.models.costs.measuring import Cost, training_step_cost
from deltacache.models.costs.systems import Setting, SystemFlops, image_flops, system_flops, totals
from deltacache.models.costs.systems import System as CostedSystem
from deltacache.models.deltatok import DeltaTok
from deltacache.models.devices import choose_device
from deltacache.models.world_model import WorldModel
from deltacache.schemas.datasets import BackboneCard, DatasetCard
from deltacache.schemas.errors import CheckpointError, DeltacacheError, MismatchError
from deltacache.schemas.images import sides
from deltacache.schemas.progress import Reporter

Row = dict[str, Any]
FUTURES = "futures_gflops"


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
        backbone: folder, hub id or ``tiny``; ``None``: what the id in the features' card stands for.
    """

    context: int
    horizon: int
    samples: int
    crops: int
    batch_size: int | None
    device: str
    backbone: str | None = None

    def setting(self, card: DatasetCard) -> Setting:
        """The same on frames and clips of the features."""
        size = sides(card.image_size)
        return Setting(size, self.context, self.horizon, self.samples, self.crops, card.sampling.frames)


def backbone_of(card: BackboneCard, given: str | None, reporter: Reporter) -> InputConvention | None:
    """The encoder that made the features, on meta: ``given``, or what its id alone says; ``None``: unknown.

    An id may be the name of some folder, so nothing is looked for in the current one.

    Raises:
        DeltacacheError: ``given`` is no backbone.
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
        raise CheckpointError(f"a folder {card.id} lies here, and it may be another one")
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
    counted = _flops(systems, card, plan, encoder, reporter)
    measured = _measured(systems, card, plan, reporter)
    rows: list[Row] = []
    for system, flops, cost in zip(systems, counted, measured, strict=True):
        figures = {
            FUTURES: totals(flops, plan.setting(card)).exact / 1e9,
            "step_gflops": flops.step.here / 1e9,
        }
        if cost is not None:
            figures |= {"step_seconds": cost.seconds, "step_gib": cost.peak_bytes / 2**30}
        rows += [_row(system, name, value, encoder is not None) for name, value in figures.items()]
    return _with_ratios(rows, systems[0].name)


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


def _with_ratios(rows: Sequence[Mapping[str, Any]], first: str) -> list[Row]:
    base = {row["quantity"]: row["value"] for row in rows if row["system"] == first}
    return [
        {
            **row,
            "relative": None if row["includes_backbone"] is False else row["value"] / base[row["quantity"]],
        }
        for row in rows
    ]


def _flops(
    systems: Sequence[LoadedSystem],
    card: DatasetCard,
    plan: CostPlan,
    encoder: InputConvention | None,
    reporter: Reporter,
) -> list[SystemFlops]:
    setting = plan.setting(card)
    backbone = Flops(0) if encoder is None else image_flops(encoder, setting)
    found = []
    with reporter.stage("count GFLOPs", len(systems)) as stage:
        for each in systems:
            tokenizer = each.tokenizer.model if each.tokenizer else None
            costed = CostedSystem(each.name, each.world.model, tokenizer, each.candidates)
            found.append(system_flops(costed, card.patch_grid, backbone, setting))
            stage.advance()
    return found


def _measured(
    systems: Sequence[LoadedSystem], card: DatasetCard, plan: CostPlan, reporter: Reporter
) -> list[Cost | None]:
    """A training step of each, one after the other, so that ratios are of one run."""
    if plan.batch_size is None:
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
