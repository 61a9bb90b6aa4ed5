"""``flops``: what the systems of a preset cost, counted and, if asked, measured (the paper's Tables 2 and B)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field, field_validator

from deltacache.chain.systems import CONFIG, SystemsConfig, systems_preset
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
from deltacache.models.deltatok import DeltaTok
from deltacache.models.devices import choose_device
from deltacache.models.worlds import world_class
from deltacache.schemas.configs import (
    PRESETS,
    TokenizerConfig,
    WorldConfig,
    preset_names,
    tokenizer_preset,
    world_preset,
)
from deltacache.schemas.datasets import Frozen
from deltacache.schemas.errors import DeltacacheError, MismatchError


class CostRequest(Frozen):
    """What ``flops`` is asked for."""

    preset: str = "released"
    backbone: str = "vitb16"
    hidden_size: int | None = Field(default=None, ge=1, description="of the tokens, where a PCA changes it")
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
    """Of all systems of a request, in their order."""

    request: CostRequest
    backbone: Flops
    rows: Sequence[SystemCost]


def count_costs(request: CostRequest, measure_on: str | None = None) -> Costs:
    """Count, and measure on a device if one is named.

    Raises:
        DeltacacheError: there is no such preset, backbone or device, or they do not go together.
    """
    device = None if measure_on is None else choose_device(measure_on)
    encoder = encoder_on("meta", request.backbone)
    hidden_size = request.hidden_size or encoder.encoder.config.hidden_size
    systems = systems_of(request.preset, hidden_size, request.candidates)
    setting = request.setting
    backbone = image_flops(encoder, setting)
    rows: list[SystemCost] = []
    for system in systems:
        flops = system_flops(system, grid_of(encoder, setting.image_size), backbone, setting)
        measured = None if device is None else _measured(system, request, device)
        rows.append(SystemCost(system, flops, totals(flops, setting), measured))
    return Costs(request, backbone, rows)


def systems_of(preset: str, hidden_size: int, candidates: int | None = None) -> list[System]:
    """The systems of a preset, on meta: its own list, or the four of Table 2 in the sizes of its models.

    Args:
        candidates: K of all, instead of each recipe's own.

    Raises:
        DeltacacheError: there is no such preset, or it does not fit tokens of that width.
    """
    config = systems_config(preset)
    systems: list[System] = []
    for name, each in config.systems.items():
        tokenizer = None if each.tokenizer is None else config.tokenizers[each.tokenizer]
        wanted = candidates or each.world.candidates
        try:
            systems.append(_on_meta(name, tokenizer, each.world, hidden_size, wanted))
        except (ValueError, TypeError) as error:
            raise MismatchError(
                f"system {name} of preset {preset!r} does not fit tokens {hidden_size} wide: {error}. Give another "
                "backbone (--backbone tiny for tiny presets) or --hidden-size"
            ) from error
    return systems


_TOKENIZERS_OF = {"discriminative": "delta-tokens", "foresight-delta": "foresight"}
"""Presets whose delta tokens are those of another preset's tokenizer."""


def systems_config(preset: str) -> SystemsConfig:
    """The systems that a preset or YAML file lists, or those of Table 2 made of its tokenizer and world model."""
    if preset.endswith((".yaml", ".yml")) or (PRESETS / preset / CONFIG).is_file():
        return systems_preset(preset)
    world = world_preset(preset)
    named = _TOKENIZERS_OF.get(preset, preset)
    tokenizers = {"delta": tokenizer_preset(named)} if named in preset_names("tokenizer") else {}
    if world.model.architecture != "deltaworld" or not tokenizers or named != preset:
        return _single(preset, world, tokenizers)
    learned = _with_model(world, query="learned", architecture="dino_world")
    patches = _with_model(world, query="noise", architecture="dino_world")
    deltas = _with_model(world, query="noise")
    own = tokenizers["delta"]
    of_frames = own.model.frame_compression != "off"
    frame = own if of_frames else _with_model(own, frame_compression="learned")
    delta = _with_model(own, frame_compression="off") if of_frames else own
    return SystemsConfig.model_validate(
        {
            "tokenizers": {"frame": frame, "delta": delta},
            "systems": {
                "dino-world": {"world": learned},
                "best-of-many": {"world": patches},
                "frame-tokens": {"tokenizer": "frame", "world": deltas},
                "delta-tokens": {"tokenizer": "delta", "world": deltas},
            },
        }
    )


def _single(preset: str, world: WorldConfig, tokenizers: dict[str, TokenizerConfig]) -> SystemsConfig:
    needs = world_class(world.model.architecture).trains_on == "deltas"
    if needs and not tokenizers:
        raise DeltacacheError(
            f"preset {preset!r} is a world model of delta tokens and has no tokenizer: give a YAML file that names "
            "one for it (docs/costs.md), or a preset such as released or table2"
        )
    system = {"tokenizer": "delta" if needs else None, "world": world}
    return SystemsConfig.model_validate(
        {"tokenizers": tokenizers if needs else {}, "systems": {preset: system}}
    )


def _with_model(config: Any, **changes: Any) -> dict[str, Any]:
    """A recipe as plain values, its model changed; a learned query has one candidate."""
    content = config.model_dump()
    content["model"].update(changes)
    if changes.get("query") == "learned":
        content["candidates"] = 1
    return content


def _on_meta(
    name: str, tokenizer: TokenizerConfig | None, world: WorldConfig, hidden_size: int, candidates: int
) -> System:
    arguments = dict(world.model.arguments)
    with torch.device("meta"):
        made = None if tokenizer is None else DeltaTok(hidden_size, **tokenizer.model.model_dump())
        if made is not None and made.tokens_per_frame > 1:
            arguments["tokens_per_frame"] = made.tokens_per_frame
        model: Any = world_class(world.model.architecture)
        predictor = model(hidden_size, **arguments)
    return System(name, predictor, made, candidates if predictor.stochastic else 1)


def _measured(system: System, request: CostRequest, device: torch.device) -> Measured:
    encoder = encoder_on(device, request.backbone)
    grid = grid_of(encoder, request.image_size)
    futures = futures_cost(system, encoder, request.setting, device)
    del encoder
    step = training_step_cost(
        system.world, request.frames, grid, system.candidates, request.batch_size, device
    )
    return Measured(futures, step)
