"""Which systems ``flops`` counts: those of a preset, of a list, or one model of a recipe; on the meta device."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from deltacache.chain.systems import CONFIG, SystemsConfig, systems_preset
from deltacache.models.costs.systems import System
from deltacache.models.deltatok import DeltaTok
from deltacache.models.worlds import world_class
from deltacache.schemas.configs import (
    PRESETS,
    TokenizerConfig,
    TokenizerModelConfig,
    WorldConfig,
    WorldModelConfig,
    preset_names,
    tokenizer_preset,
    world_preset,
)
from deltacache.schemas.errors import DeltacacheError, MismatchError
from deltacache.schemas.yaml_files import TOKENIZER, WORLD, kind_of, read_yaml

_TOKENIZERS_OF = {"discriminative": "delta-tokens", "foresight-delta": "foresight"}
"""Presets whose delta tokens are those of another preset's tokenizer."""
_STAND_IN = "released"
"""The other half of a recipe that is one model."""
_HEAD_DIMS = 64
"""Of all released models."""
_WIDTH, _TINY_WIDTH = 768, 64
_WIDTHS = {"foresight": 1152, "foresight-delta": 1152}


@dataclass(frozen=True, slots=True)
class Chosen:
    """What a preset or a YAML file stands for.

    Attributes:
        width: of the tokens that its heads are for; None where the file does not say it.
        notes: what was chosen for the user, in words.
    """

    config: SystemsConfig
    width: int | None
    notes: tuple[str, ...] = ()


def chosen_systems(preset: str, hidden_size: int, heads: int | None = None) -> Chosen:
    """The systems that a preset or file lists, those of Table 2 made of a preset's models, or a recipe's one model.

    Args:
        heads: of all models; None: their own, or 64 dims each where the tokens have another width.

    Raises:
        DeltacacheError: there is no such preset, or the file is none of these.
    """
    if preset.endswith((".yaml", ".yml")):
        return _with_heads(_of_file(Path(preset)), hidden_size, heads)
    width = _TINY_WIDTH if "tiny" in preset.split("-") else _WIDTHS.get(preset, _WIDTH)
    listed = (PRESETS / preset / CONFIG).is_file()
    config = systems_preset(preset) if listed else _of_preset(preset)
    return _with_heads(Chosen(config, width), hidden_size, heads)


def systems_of(
    preset: str, hidden_size: int, candidates: int | None = None, heads: int | None = None
) -> list[System]:
    """``chosen_systems`` on meta; see ``on_meta``."""
    return on_meta(chosen_systems(preset, hidden_size, heads).config, preset, hidden_size, candidates)


def on_meta(
    config: SystemsConfig, preset: str, hidden_size: int, candidates: int | None = None
) -> list[System]:
    """Models without weights.

    Args:
        candidates: K of all, instead of each recipe's own.

    Raises:
        MismatchError: they do not fit tokens of that width.
    """
    systems: list[System] = []
    for name, each in config.systems.items():
        tokenizer = None if each.tokenizer is None else config.tokenizers[each.tokenizer]
        wanted = candidates or each.world.candidates
        try:
            systems.append(_on_meta(name, tokenizer, each.world, hidden_size, wanted))
        except (ValueError, TypeError) as error:
            raise MismatchError(
                f"system {name} of preset {preset!r} does not fit tokens {hidden_size} wide: {error}. Give another "
                "number of --heads, another --backbone (tiny for tiny presets) or --hidden-size"
            ) from error
    return systems


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


def _of_preset(preset: str) -> SystemsConfig:
    world = world_preset(preset)
    named = _TOKENIZERS_OF.get(preset, preset)
    tokenizers = {"delta": tokenizer_preset(named)} if named in preset_names("tokenizer") else {}
    if world.model.architecture == "deltaworld" and tokenizers and named == preset:
        return _of_table_2(world, tokenizers["delta"])
    if _needs_tokenizer(world) and not tokenizers:
        raise DeltacacheError(
            f"preset {preset!r} is a world model of delta tokens and has no tokenizer: give a YAML file that names "
            "one for it (docs/costs.md), or a preset such as released or table2"
        )
    return _single(preset, world, tokenizers)


def _of_table_2(world: WorldConfig, own: TokenizerConfig) -> SystemsConfig:
    learned = _with_model(world, query="learned", architecture="dino_world")
    patches = _with_model(world, query="noise", architecture="dino_world")
    deltas = _with_model(world, query="noise")
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


def _of_file(path: Path) -> Chosen:
    """A list of systems, or one model: the other half of a system is that of ``_STAND_IN``."""
    content = read_yaml(path)
    kind = kind_of(content)
    if kind == TOKENIZER:
        tokenizers = {"delta": tokenizer_preset(str(path))}
        note = f"{path} is a recipe of a tokenizer: the world model is that of preset {_STAND_IN}"
        return Chosen(_single("recipe", world_preset(_STAND_IN), tokenizers), None, (note,))
    if kind != WORLD and not (isinstance(content, Mapping) and "model" in content):
        return Chosen(systems_preset(str(path)), None)
    world = world_preset(str(path))
    if not _needs_tokenizer(world):
        return Chosen(_single("recipe", world, {}), None)
    note = f"{path} is a recipe of a world model of delta tokens: the tokenizer is that of preset {_STAND_IN}"
    return Chosen(_single("recipe", world, {"delta": tokenizer_preset(_STAND_IN)}), None, (note,))


def _needs_tokenizer(world: WorldConfig) -> bool:
    return world_class(world.model.architecture).trains_on == "deltas"


def _single(name: str, world: WorldConfig, tokenizers: dict[str, TokenizerConfig]) -> SystemsConfig:
    needs = _needs_tokenizer(world)
    system = {"tokenizer": "delta" if needs else None, "world": world}
    return SystemsConfig.model_validate(
        {"tokenizers": tokenizers if needs else {}, "systems": {name: system}}
    )


def _with_model(config: Any, **changes: Any) -> dict[str, Any]:
    """A recipe as plain values, its model changed; a learned query has one candidate."""
    content = config.model_dump()
    content["model"].update(changes)
    if changes.get("query") == "learned":
        content["candidates"] = 1
    return content


def _with_heads(chosen: Chosen, hidden_size: int, heads: int | None) -> Chosen:
    """Heads that tokens of this width split into, and a line about those that were chosen for it."""
    before: set[int] = set()

    def fit(model: TokenizerModelConfig | WorldModelConfig) -> int:
        if heads is not None:
            return heads
        found = _heads_for(model, hidden_size, chosen.width)
        if found != model.num_heads:
            before.add(model.num_heads)
        return found

    config = _each_model(chosen.config, lambda model: model.model_copy(update={"num_heads": fit(model)}))
    if not before:
        return replace(chosen, config=config)
    note = (
        f"tokens {hidden_size} wide have {hidden_size // _HEAD_DIMS} attention heads of {_HEAD_DIMS} dims here, as "
        f"released models do, instead of {' or '.join(map(str, sorted(before)))}: --heads takes another number"
    )
    return replace(chosen, config=config, notes=(*chosen.notes, note))


def _heads_for(model: TokenizerModelConfig | WorldModelConfig, hidden_size: int, width: int | None) -> int:
    """The model's own if they are for this width; a model with a width of its own splits that one."""
    own = isinstance(model, WorldModelConfig) and model.options.get("width")
    kept = width in (None, hidden_size) and hidden_size % model.num_heads == 0
    return model.num_heads if own or kept or hidden_size % _HEAD_DIMS else hidden_size // _HEAD_DIMS


def _each_model(config: SystemsConfig, change: Callable[[Any], Any]) -> SystemsConfig:
    tokenizers = {
        name: each.model_copy(update={"model": change(each.model)})
        for name, each in config.tokenizers.items()
    }
    systems = {
        name: each.model_copy(
            update={"world": each.world.model_copy(update={"model": change(each.world.model)})}
        )
        for name, each in config.systems.items()
    }
    return config.model_copy(update={"tokenizers": tokenizers, "systems": systems})
