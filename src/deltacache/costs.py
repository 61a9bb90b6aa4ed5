"""Costs as tables of plain text."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tabulate import tabulate

from deltacache.models.deltatok import DeltaTok
from deltacache.models.devices import choose_device, shapes_only
from deltacache.models.flops import (
    Cost,
    CountedSystem,
    Flops,
    Setting,
    SystemFlops,
    Totals,
    encoder_on,
    futures_cost,
    grid_of,
    image_flops,
    short_name,
    system_flops,
    totals,
    training_step_cost,
)
from deltacache.models.worlds import world_class
from deltacache.schemas.arguments import changed_by
from deltacache.schemas.configs import (
    PRESETS,
    TOKENIZER,
    WORLD,
    TokenizerConfig,
    TokenizerModelConfig,
    WorldConfig,
    WorldModelConfig,
    kind_of,
    preset_names,
    read_yaml,
    tokenizer_preset,
    world_preset,
)
from deltacache.schemas.errors import DeltacacheError, MismatchError
from deltacache.schemas.jobs import CostRequest
from deltacache.schemas.progress import Reporter, SilentReporter
from deltacache.schemas.texts import bytes_text, counted
from deltacache.systems.training import CONFIG, SystemsConfig, systems_preset

# ----------------------------------------------------------------------------------------------------
# Which systems ``flops`` counts: those of a preset, of a list, or one model of a recipe; on the meta device.
# ----------------------------------------------------------------------------------------------------


_TOKENIZERS_OF = {
    "discriminative": "delta-tokens",
    "foresight-delta": "foresight",
    "energy": "released",
    "flow": "released",
    "energy-tiny": "tiny",
    "flow-tiny": "tiny",
}
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
        DeltacacheError: there is no such preset, or the file is something else.
    """
    if preset.endswith((".yaml", ".yml")):
        return _with_heads(_of_file(Path(preset)), hidden_size, heads)
    width = _TINY_WIDTH if "tiny" in preset.split("-") else _WIDTHS.get(preset, _WIDTH)
    listed = (PRESETS / preset / CONFIG).is_file()
    config = systems_preset(preset) if listed else _of_preset(preset)
    return _with_heads(Chosen(config, width), hidden_size, heads)


def on_meta(
    config: SystemsConfig, preset: str, hidden_size: int, candidates: int | None = None
) -> list[CountedSystem]:
    """Models without weights.

    Args:
        candidates: K of all, instead of each recipe's own.

    Raises:
        MismatchError: they do not fit tokens of that width.
    """
    systems: list[CountedSystem] = []
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
) -> CountedSystem:
    arguments = dict(world.model.arguments)
    with shapes_only():
        made = None if tokenizer is None else DeltaTok(hidden_size, **tokenizer.model.model_dump())
        if made is not None and made.tokens_per_frame > 1:
            arguments["tokens_per_frame"] = made.tokens_per_frame
        model: Any = world_class(world.model.architecture)
        predictor = model(hidden_size, **arguments)
    return CountedSystem(name, predictor, made, candidates if predictor.stochastic else 1)


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
        # The model's own heads if they are for this width; a model with a width of its own splits that one.
        own = isinstance(model, WorldModelConfig) and model.options.get("width")
        kept = chosen.width in (None, hidden_size) and hidden_size % model.num_heads == 0
        if own or kept or hidden_size % _HEAD_DIMS or hidden_size // _HEAD_DIMS == model.num_heads:
            return model.num_heads
        before.add(model.num_heads)
        return hidden_size // _HEAD_DIMS

    config = _each_model(chosen.config, lambda model: model.model_copy(update={"num_heads": fit(model)}))
    if not before:
        return replace(chosen, config=config)
    note = (
        f"tokens {hidden_size} wide have {hidden_size // _HEAD_DIMS} attention heads of {_HEAD_DIMS} dims here, as "
        f"released models do, instead of {' or '.join(map(str, sorted(before)))}: --heads takes another number"
    )
    return replace(chosen, config=config, notes=(*chosen.notes, note))


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


# ----------------------------------------------------------------------------------------------------
# ``flops``: what the systems of a preset cost, counted and, if asked, measured (the paper's Tables 2 and B).
# ----------------------------------------------------------------------------------------------------


def setting_of(request: CostRequest) -> Setting:
    """What all systems are asked alike."""
    asked = request.context, request.horizon, request.samples, request.crops, request.frames
    return Setting(request.image_size, *asked)


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

    system: CountedSystem
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
    config = changed_by(chosen.config, request.assignments)
    systems = on_meta(config, request.preset, hidden_size, request.candidates)
    setting = setting_of(request)
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


def _measured(system: CountedSystem, request: CostRequest, device: torch.device) -> Measured:
    encoder = encoder_on(device, request.backbone)
    grid = grid_of(encoder, request.image_size)
    futures = futures_cost(system, encoder, setting_of(request), device)
    del encoder
    step = training_step_cost(
        system.world, request.frames, grid, system.candidates, request.batch_size, device
    )
    return Measured(futures, step)


# ----------------------------------------------------------------------------------------------------
# The paper's numbers, to stand beside those that are counted: Table B for a part, Table 2 for all futures.
# ----------------------------------------------------------------------------------------------------


# GFLOPs with the digits that were published: of one crop of 256 px, ViT-B/16.
_BACKBONE, _ENCODER, _DECODER = "47.185", "96.930", "46.12"
_OF_DELTAS = {4: "0.26", 5: "0.28", 6: "0.31"}
_OF_PATCHES = {4: "84.88", 5: "96.96", 6: "109.04"}
# Of two crops, context 4, three steps, 20 samples.
_TOTALS = {"dino-world": "959", "best-of-many": "12,013", "frame-tokens": "6,315", "delta-tokens": "6,721"}
_PRESETS = {"released", "paper", "table2", *_TOTALS}


def published_backbone(request: CostRequest) -> str | None:
    """Of a frame."""
    return _BACKBONE if _in_table_b(request) else None


def published_encoder(request: CostRequest, system: CountedSystem) -> str | None:
    """Of a frame, by delta compression."""
    delta = system.tokenizer is not None and system.tokenizer.frame_compression == "off"
    return _ENCODER if _in_table_b(request) and delta else None


def published_decoder(request: CostRequest) -> str | None:
    """Of a frame."""
    return _DECODER if _in_table_b(request) else None


def published_predictor(request: CostRequest, system: CountedSystem, context: int) -> str | None:
    """Of one predicted frame."""
    if not _in_table_b(request):
        return None
    return (_OF_PATCHES if system.tokenizer is None else _OF_DELTAS).get(context)


def published_total(request: CostRequest, system: CountedSystem) -> str | None:
    """Of all futures of an image."""
    asked = request.context, request.horizon, request.samples, request.crops
    return _TOTALS.get(system.name) if _in_table_b(request) and asked == (4, 3, 20, 2) else None


def difference(flop: int, published: str | None) -> str:
    """Of the counted number from the published one, in per cent."""
    return "" if published is None else f"{100 * (flop / 1e9 / float(published.replace(',', '')) - 1):+.2f} %"


def _in_table_b(request: CostRequest) -> bool:
    """The models of the paper, on its crops. K and frames of a clip do not matter for futures."""
    return (
        request.preset in _PRESETS
        and short_name(request.backbone) == "vitb16"
        and request.hidden_size in (None, 768)
        and request.heads in (None, 12)
        and request.image_size == (256, 256)
    )


Rows = list[Sequence[str]]
Against = Sequence[tuple[int, str | None]]
"""By the paper's convention, with what was published."""
_PARTS = ("encoder", "decoder", "predictor")


def costs_text(costs: Costs) -> str:
    """Parts, futures of an image, training steps, what was measured, and where the conventions differ."""
    blocks = ["\n".join(costs.notes)] if costs.notes else []
    blocks += [_parts(costs), _futures(costs), _training(costs)]
    if all(row.measured for row in costs.rows):
        blocks.append(_measured_table(costs))
    return "\n\n".join([*blocks, "\n".join(_differences(costs))])


def _parts(costs: Costs) -> str:
    asked = costs.request
    size = f"{asked.image_size[0]} x {asked.image_size[1]}"
    title = f"GFLOPs of one crop of {size} px ({asked.backbone}); a multiplication and an addition are 2"
    rows: Rows = [("part", "of", "paper's convention", "exact")]
    total = costs.backbone.total
    rows.append(("backbone, a frame", "all", _giga(total), _giga(total)))
    against: list[tuple[int, str | None]] = [(total, published_backbone(asked))]
    merged: dict[_Part, list[str]] = {}
    for row in costs.rows:
        for part in _parts_of(row, asked):
            merged.setdefault(part, []).append(row.system.name)
    for part, names in sorted(merged.items(), key=lambda each: _PARTS.index(each[0].name.split(",")[0])):
        rows.append((part.name, ", ".join(names), _giga(part.paper), _giga(part.exact)))
        against.append((part.paper, part.published))
    return _table(title, _beside_published(rows, against), texts=2)


class _Part(NamedTuple):
    name: str
    paper: int
    exact: int
    published: str | None


def _parts_of(row: SystemCost, asked: CostRequest) -> Iterator[_Part]:
    flops, system = row.flops, row.system
    if flops.encoder != Flops(0):
        total = flops.encoder.total
        yield _Part("encoder, a frame", total, total, published_encoder(asked, system))
    if flops.decoder != Flops(0):
        total = flops.decoder.total
        yield _Part("decoder, a frame", total, total, published_decoder(asked))
    for context, each in flops.predictor.items():
        published = published_predictor(asked, system, context)
        yield _Part(f"predictor, context {context}", each.attention_twice, each.total, published)


def _beside_published(rows: Rows, against: Against) -> Rows:
    """The rows with the paper's numbers, if there are any for them."""
    if not any(published for _, published in against):
        return rows
    cells = [(published or "", difference(flop, published)) for flop, published in against]
    return [(*row, *more) for row, more in zip(rows, [("published", "difference"), *cells], strict=True)]


def _futures(costs: Costs) -> str:
    asked = costs.request
    title = (
        f"GFLOPs of all futures of one image: {counted(asked.crops, 'crop')}, context {asked.context}, "
        f"horizon {asked.horizon}, "
        f"{counted(asked.samples, 'sample')} (1 where nothing is random)"
    )
    rows: Rows = [("system", "paper's convention", "exact", "this package")]
    for row in costs.rows:
        found = row.totals
        rows.append((row.system.name, _giga(found.paper), _giga(found.exact), _giga(found.here)))
    against = [(row.totals.paper, published_total(asked, row.system)) for row in costs.rows]
    return _table(title, _beside_published(rows, against))


def _training(costs: Costs) -> str:
    title = (
        f"GFLOPs of a training step of one clip of {counted(costs.request.frames, 'frame')}, from cached "
        "tokens; frozen: backbone "
        "and encoder, which the cache saves"
    )
    rows: Rows = [
        ("system", "K", "definition", "this package", "relative", "frozen, if online", "cache saves")
    ]
    first = costs.rows[0].flops.step.here
    for row in costs.rows:
        step, frozen = row.flops.step, row.flops.frozen_step.total
        saved = 100 * frozen / (frozen + step.plain)
        numbers = _giga(step.plain), _giga(step.here), f"{step.here / first:.3g}x", _giga(frozen)
        rows.append((row.system.name, str(row.system.candidates), *numbers, f"{saved:.1f} %"))
    return _table(title, rows)


def _measured_table(costs: Costs) -> str:
    clips = costs.request.batch_size
    step_of = f"a training step of {counted(clips, 'clip')} from cached tokens"
    title = f"Measured here: all futures of one crop from its pixels; {step_of}"
    rows: Rows = [("system", "futures", "memory", "step", "memory", "relative time", "relative memory")]
    first = costs.rows[0].measured
    for row in costs.rows:
        if row.measured is None or first is None:
            continue
        futures, step = row.measured.futures, row.measured.step
        time, memory = step.seconds / first.step.seconds, step.peak_bytes / first.step.peak_bytes
        measured = (
            f"{futures.seconds:.3g} s",
            bytes_text(futures.peak_bytes),
            f"{step.seconds:.3g} s",
            bytes_text(step.peak_bytes),
        )
        rows.append((row.system.name, *measured, f"{time:.2g}x", f"{memory:.2g}x"))
    return _table(title, rows)


def _differences(costs: Costs) -> Iterator[str]:
    yield "Where they differ"
    if published_backbone(costs.request) is not None:
        yield (
            "- published: Tables B and 2 of the paper (two digits of DeltaWorld's predictor); difference: of what is "
            "counted by its convention"
        )
    for row in costs.rows:
        context, flops = next(iter(row.flops.predictor.items()))
        if flops.attention > 0.01 * flops.total:
            added = f"+{_giga(flops.attention)} at context {context} of {row.system.name}"
            yield f"- the paper's convention counts the attention of predictors twice: {added}"
            break
    yield (
        "- both let each step of each future see its whole context again; this package keeps keys and values, and "
        "those of the context serve all samples"
    )
    if any(row.flops.step.here < row.flops.step.plain for row in costs.rows):
        yield (
            "- definition: every candidate goes through the whole predictor; this package folds the attention around "
            "the candidates of a frame"
        )
    if any(row.flops.encoder != Flops(0) for row in costs.rows):
        yield (
            "- the black frame before a clip is encoded for every training clip, as the online trainer does, and "
            "for no future: its tokens are a constant"
        )


def _giga(flop: int) -> str:
    """Four digits that count, none behind the point from 1,000 on."""
    value = flop / 1e9
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{4 - len(str(int(value)))}f}" if value >= 0.1 else f"{value:.3g}"


def _table(title: str, rows: Rows, texts: int = 1) -> str:
    """Aligned columns, the first ``texts`` to the left."""
    sides = ["left" if column < texts else "right" for column in range(len(rows[0]))]
    table = tabulate(rows, tablefmt="plain", colalign=sides, disable_numparse=True)
    return "\n".join([title, *(f"  {line.rstrip()}" for line in table.splitlines())])
