"""The presets are section 2 of the method, stage by stage; what they do to weights is computed by hand."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deltacache.models.deltatok import DeltaTok
from deltacache.models.worlds.deltaworld import DeltaWorld
from deltacache.schemas.configs import (
    PRESETS,
    Stage,
    TokenizerConfig,
    WorldConfig,
    preset_names,
    preset_stages,
    tokenizer_preset,
    world_preset,
)
from deltacache.schemas.errors import DeltacacheError
from deltacache.train.optimizer import clip_gradients, make_optimizer, set_rate, warmup_constant

RELEASED = {"qk_norm": True, "gated_attention": True, "mlp": "swiglu", "rope_rescale": 2.0}
PAPER = {"qk_norm": False, "gated_attention": False, "mlp": "gelu", "rope_rescale": None}
# preset, stage, start, steps at its end, rate
TOKENIZERS: list[tuple[str, str, str, int, float]] = [
    ("released", "256px", "random", 1_000_000, 1e-3),
    ("released", "512px", "weights", 500_000, 1e-4),
    ("released", "cooldown1", "everything", 550_000, 1e-5),
    ("released", "cooldown2", "everything", 600_000, 1e-6),
    ("paper", "256px", "random", 50_000, 1e-3),
    ("paper", "512px", "weights", 50_000, 1e-3),
]
WORLDS: list[tuple[str, str, int, float]] = [
    ("main", "random", 300_000, 1e-4),
    ("cooldown", "everything", 305_000, 1e-5),
]


@pytest.mark.parametrize(("preset", "stage", "start", "steps", "rate"), TOKENIZERS)
def test_tokenizer_stages(preset: str, stage: str, start: str, steps: int, rate: float) -> None:
    config = tokenizer_preset(preset, stage)
    model, training = config.model, config.training
    assert (config.loss, training.weight_decay) == (
        ("log_cosh", 1e-2) if preset == "released" else ("mse", 1e-4)
    )
    assert {name: getattr(model, name) for name in RELEASED} == (RELEASED if preset == "released" else PAPER)
    assert (model.num_heads, model.encoder_layers, model.decoder_layers) == (12, 12, 12)
    assert (model.layer_scale_init, model.frame_compression, config.black_first_fraction) == (1e-5, "off", 0)
    assert (training.start, training.steps, training.learning_rate) == (start, steps, rate)
    assert (training.warmup_steps, training.gradient_clip) == (5000, 1e-2)
    assert (training.batch_size, training.accumulation) == (1024, None)


@pytest.mark.parametrize("preset", ["released", "paper"])
@pytest.mark.parametrize(("stage", "start", "steps", "rate"), WORLDS)
def test_world_stages(preset: str, stage: str, start: str, steps: int, rate: float) -> None:
    config = world_preset(preset, stage)
    model, training = config.model, config.training
    assert (model.num_heads, model.num_layers, model.mlp_ratio, model.layer_scale_init) == (12, 12, 4.0, 1e-5)
    assert (model.query, model.noise_std, config.candidates, config.smooth_l1_beta) == (
        "noise",
        0.02,
        256,
        0.1,
    )
    assert (training.start, training.steps, training.learning_rate) == (start, steps, rate)
    assert (training.warmup_steps, training.gradient_clip, training.weight_decay) == (5000, None, 0.4)
    assert (training.batch_size, training.accumulation) == (1024, None)


KINDS: list[tuple[Stage, Callable[[str, str], TokenizerConfig | WorldConfig]]] = [
    ("tokenizer", tokenizer_preset),
    ("world", world_preset),
]


@pytest.mark.parametrize(("kind", "load"), KINDS)
def test_every_preset_file_is_a_stage_that_loads(kind: Stage, load: Callable[..., Any]) -> None:
    files = {path for path in PRESETS.rglob("*.yaml") if path.stem.startswith(f"{kind}-")}
    stages = {(name, stage) for name in preset_names(kind) for stage in preset_stages(kind, name)}
    assert files == {PRESETS / name / f"{kind}-{stage}.yaml" for name, stage in stages}
    for name, stage in stages:
        load(name, stage)
    for name in preset_names(kind):
        assert load(name) == load(name, preset_stages(kind, name)[0])


def test_no_other_files_lie_between_the_presets() -> None:
    others = {path.stem for path in PRESETS.glob("*/*.yaml")} - {"chain", "systems"}
    assert all(stem.startswith(("tokenizer-", "world-", "head-")) for stem in others)
    heads = {
        f"{name}/head-{recipe}"
        for name in ("released", "tiny")
        for recipe in ("segmentation", "depth", "rgb")
    }
    assert {f"{path.parent.name}/{path.stem}" for path in PRESETS.glob("*/head-*.yaml")} == heads


def test_stages_are_in_their_order() -> None:
    assert preset_stages("tokenizer", "released") == ["256px", "512px", "cooldown1", "cooldown2"]
    assert preset_stages("world", "paper") == ["main", "cooldown"]


def test_an_unknown_stage_is_refused_with_the_known_ones() -> None:
    with pytest.raises(DeltacacheError, match=r"stage '1024px' .*preset 'paper': give one of 256px, 512px"):
        tokenizer_preset("paper", "1024px")


@pytest.mark.parametrize(
    ("stage", "done", "rate"),
    [
        *(("256px", 0, 0.0), ("256px", 1, 2e-7), ("256px", 4999, 9.998e-4), ("256px", 5000, 1e-3)),
        *(("256px", 999_999, 1e-3), ("512px", 0, 0.0), ("512px", 2500, 5e-5), ("512px", 499_999, 1e-4)),
        *(("cooldown1", 500_000, 1e-5), ("cooldown1", 549_999, 1e-5), ("cooldown2", 550_000, 1e-6)),
    ],
)
def test_rates_of_the_released_tokenizer(stage: str, done: int, rate: float) -> None:
    training = tokenizer_preset("released", stage).training
    assert warmup_constant(done, training.learning_rate, training.warmup_steps) == pytest.approx(
        rate, rel=1e-12
    )


@pytest.mark.parametrize(
    ("stage", "done", "rate"),
    [("main", 0, 0.0), ("main", 1000, 2e-5), ("main", 5000, 1e-4), ("cooldown", 300_000, 1e-5)],
)
def test_rates_of_the_world_model(stage: str, done: int, rate: float) -> None:
    training = world_preset("released", stage).training
    assert warmup_constant(done, training.learning_rate, training.warmup_steps) == pytest.approx(
        rate, rel=1e-12
    )


def adamw_by_hand(weight: float, gradients: list[float], rates: list[float], decay: float) -> float:
    """AdamW as its paper has it: decay by rate x decay, then the bias-corrected moments."""
    first = second = 0.0
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        weight -= rate * decay * weight
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        weight -= rate * (first / (1 - 0.9**t)) / (math.sqrt(second / (1 - 0.999**t)) + 1e-8)
    return weight


@pytest.mark.parametrize("preset", ["released", "paper"])
@pytest.mark.parametrize("kind", ["tokenizer", "world"])
def test_updates_are_those_computed_by_hand(preset: str, kind: str) -> None:
    """Two weights with gradients (3, 4) x 10^-2: a norm of 5e-2, which the tokenizer clips to 1e-2."""
    training = (tokenizer_preset if kind == "tokenizer" else world_preset)(preset).training
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.LayerNorm(1, bias=False))
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.5)
    optimizer, parameters, rates = make_optimizer(model, training), list(model.parameters()), []
    for step in (0, 100, 2500, 6000):
        for parameter, gradient in zip(parameters, (3e-2, 4e-2), strict=True):
            parameter.grad = torch.full_like(parameter, gradient * (1 + step % 7))
        norm = clip_gradients(parameters, training.gradient_clip)
        assert norm.item() == pytest.approx(5e-2 * (1 + step % 7))
        rates.append(
            set_rate(optimizer, warmup_constant(step, training.learning_rate, training.warmup_steps))
        )
        optimizer.step()
    top = training.learning_rate
    assert rates == pytest.approx([0, top / 50, top / 2, top])
    scales = [0.2 / (1 + step % 7) if kind == "tokenizer" else 1 for step in (0, 100, 2500, 6000)]
    for parameter, gradient, decays in zip(parameters, (3e-2, 4e-2), (True, False), strict=True):
        seen = [
            gradient * (1 + step % 7) * scale
            for step, scale in zip((0, 100, 2500, 6000), scales, strict=True)
        ]
        expected = adamw_by_hand(0.5, seen, rates, training.weight_decay if decays else 0.0)
        assert parameter.item() == pytest.approx(expected, rel=1e-6)
        assert abs(parameter.item() - 0.5) > 1e-5


@pytest.mark.parametrize("kind", ["deltatok", "deltaworld"])
def test_groups_of_the_released_presets_are_the_golden_ones(golden: Path, kind: str) -> None:
    expected = json.loads((golden / "tiny" / "optimizer_groups.json").read_text())[kind]
    meta = json.loads((golden / "tiny" / "meta.json").read_text())
    layers = len({name.split(".")[2] for name in expected["decay"] if ".blocks." in name}) or 2
    sizes: dict[str, Any] = {"num_heads": meta["heads"]}
    if kind == "deltatok":
        config = tokenizer_preset("released")
        arguments = config.model.model_dump() | sizes | {"encoder_layers": layers, "decoder_layers": layers}
        model: nn.Module = DeltaTok(meta["hidden"], **arguments)
    else:
        config = world_preset("released")
        model = DeltaWorld(meta["hidden"], **(config.model.arguments | sizes | {"num_layers": layers}))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, others = make_optimizer(model, config.training).param_groups
    assert sorted(names[id(p)] for p in decayed["params"]) == sorted(expected["decay"])
    assert sorted(names[id(p)] for p in others["params"]) == sorted(expected["no_decay"])
    assert decayed["weight_decay"] == config.training.weight_decay
    assert others["weight_decay"] == 0
    for group in (decayed, others):
        assert (group["betas"], group["eps"], group["fused"]) == ((0.9, 0.999), 1e-8, True)


@pytest.mark.parametrize(
    ("workers", "accumulation", "expected"),
    [(1, None, (1024, None)), (8, 4, (32, 4)), (16, None, (64, None))],
)
def test_workers_and_passes_share_the_recipes_batch(
    workers: int, accumulation: int | None, expected: tuple[int, int | None]
) -> None:
    training = world_preset("released").training.shared_by(workers, accumulation)
    assert (training.batch_size, training.accumulation) == expected
    assert training.steps == world_preset("released").training.steps


def test_a_batch_that_does_not_split_is_refused() -> None:
    with pytest.raises(DeltacacheError, match=r"1024 does not split.*3 workers x 1 passes.*--batch-size"):
        world_preset("released").training.shared_by(3)
