"""``flops``: what the systems of a preset cost, counted and, if asked, measured (the paper's Tables 2 and B)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field, field_validator

from deltacache.chain.costs_systems import chosen_systems, on_meta
from deltacache.models.costs.backbones import encoder_on
from deltacache.models.costs.counting import Flops
from deltacache.models.costs.measuring import Cost, futures_cost, training_step_cost
from deltacache.models.costs.systems import (
    Setting,
    System,
    SystemFlops,
    Totals,
    grid_of,
    image_flops,
    system_flops,
    totals,
)
from deltacache.models.devices import choose_device
from deltacache.schemas.datasets import Frozen
from deltacache.schemas.progress import Reporter, SilentReporter


class CostRequest(Frozen):
    """What ``flops`` is asked for."""

    preset: str = "released"
    backbone: str = "vitb16"
    hidden_size: int | None = Field(default=None, ge=1, description="of the tokens, where a PCA changes it")
    heads: int | None = Field(default=None, ge=1, description="of all models; null: see chosen_systems")
    image_size: tuple[int, int] = (256, 256)
    context: int = Field(default=4, ge=1)
    horizon: int = Field(default=3, ge=1)
    samples: int = Field(default=20, ge=1)
    crops: int = Field(default=2, ge=1, description="of an image; the evaluation protocol's are two")
    frames: int = Field(default=8, ge=2, description="of a training clip")
    candidates: int | None = Field(default=None, ge=1, description="K; null: each recipe's own")
    batch_size: int = Field(default=1, ge=1, description="clips of a measured step")

    @field_validator("image_size", mode="before")
    @classmethod
    def _as_text(cls, size: Any) -> Any:
        """``256`` or ``448x896``."""
        if not isinstance(size, str):
            return size
        sides = size.split("x")
        return sides * 2 if len(sides) == 1 else sides

    @property
    def setting(self) -> Setting:
        """What all systems are asked alike."""
        return Setting(self.image_size, self.context, self.horizon, self.samples, self.crops, self.frames)


@dataclass(frozen=True, slots=True)
class Measured:
    """On this machine: all futures of one crop, and a training step."""

    futures: Cost
    step: Cost


@dataclass(frozen=True, slots=True)
class SystemCost:
    """What one system costs.

    Attributes:
        totals: of all futures of an image.
        measured: if that was asked for.
    """

    system: System
    flops: SystemFlops
    totals: Totals
    measured: Measured | None


@dataclass(frozen=True, slots=True)
class Costs:
    """Of all systems of a request, in their order; ``notes`` say what was chosen for the user."""

    request: CostRequest
    backbone: Flops
    rows: Sequence[SystemCost]
    notes: Sequence[str] = ()


def count_costs(
    request: CostRequest, measure_on: str | None = None, reporter: Reporter | None = None
) -> Costs:
    """Count, and measure on a device if one is named.

    Raises:
        DeltacacheError: there is no such preset, backbone or device, or they do not go together.
    """
    device = None if measure_on is None else choose_device(measure_on)
    encoder = encoder_on("meta", request.backbone)
    hidden_size = request.hidden_size or encoder.encoder.config.hidden_size
    chosen = chosen_systems(request.preset, hidden_size, request.heads)
    systems = on_meta(chosen.config, request.preset, hidden_size, request.candidates)
    setting = request.setting
    backbone = image_flops(encoder, setting)
    rows: list[SystemCost] = []
    name = "counting" if device is None else "counting and measuring"
    with (reporter or SilentReporter()).stage(name, len(systems)) as stage:
        for system in systems:
            flops = system_flops(system, grid_of(encoder, setting.image_size), backbone, setting)
            measured = None if device is None else _measured(system, request, device)
            rows.append(SystemCost(system, flops, totals(flops, setting), measured))
            stage.advance()
    return Costs(request, backbone, rows, chosen.notes)


def _measured(system: System, request: CostRequest, device: torch.device) -> Measured:
    encoder = encoder_on(device, request.backbone)
    grid = grid_of(encoder, request.image_size)
    futures = futures_cost(system, encoder, request.setting, device)
    del encoder
    step = training_step_cost(
        system.world, request.frames, grid, system.candidates, request.batch_size, device
    )
    return Measured(futures, step)
