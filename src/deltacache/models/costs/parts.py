"""FLOP of the parts of a system, each counted from the model itself on the meta device.

Models are given as they are, on any device; what is counted is their copy without weights.
"""

# C context, H horizon, S samples, T frames, M tokens of a frame, D hidden, Z noise

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from deltacache.models.backbones.convention import InputConvention
from deltacache.models.costs.counting import Flops, count_flops
from deltacache.models.deltatok import DeltaTok
from deltacache.models.world_model import Grid, WorldModel

META = torch.device("meta")
ModelT = TypeVar("ModelT", bound=DeltaTok | WorldModel)


def rebuilt(model: ModelT, device: torch.device = META, **changes: Any) -> ModelT:
    """A new model of the same class and arguments, but for ``changes``; on meta it holds no numbers."""
    build = cast(Callable[..., ModelT], type(model))
    with torch.device(device):
        return build(**{**model.arguments, **changes}).eval()


def backbone_flops(encoder: InputConvention, image_size: tuple[int, int]) -> Flops:
    """One frame of rows x columns of pixels, through an encoder on meta."""
    pixels = torch.empty(1, 3, *image_size, device=META)
    with torch.no_grad():
        return count_flops(lambda: encoder.hidden_states(pixels))


@torch.no_grad()
def encoder_flops(tokenizer: DeltaTok, grid: Grid) -> Flops:
    """The delta token, or tokens, of one frame."""
    frame = _patches(tokenizer, grid)
    model = rebuilt(tokenizer)
    return count_flops(lambda: model.encode(frame, frame, grid))


@torch.no_grad()
def decoder_flops(tokenizer: DeltaTok, grid: Grid) -> Flops:
    """One frame from its delta token, or tokens."""
    frame, model = _patches(tokenizer, grid), rebuilt(tokenizer)
    tokens = model.encode(frame, frame, grid)
    return count_flops(lambda: model.decode(tokens, frame, grid))


def predictor_flops(world: WorldModel, context: int, grid: Grid) -> Flops:
    """One frame of one future after ``context`` frames, nothing known of them but their tokens."""
    return rollout_flops(world, context, 1, 1, grid)


def rollout_flops(world: WorldModel, context: int, horizon: int, samples: int, grid: Grid) -> Flops:
    """``samples`` futures of one context at once, as the model rolls them out; 1 where nothing is random."""
    model = rebuilt(world)
    tokens = torch.empty(tokens_shape(model, 1, context, grid), device=META)
    seconds = torch.empty(1, context + horizon, device=META)
    noise = None
    if model.stochastic:
        noise = torch.empty(1, samples, horizon, model.noise_size, device=META)
    return count_flops(lambda: model.rollout(tokens, seconds, noise, grid=grid))


def tokens_shape(world: WorldModel, batch: int, frames: int, grid: Grid) -> tuple[int, ...]:
    """Of the clips that a world model is given: (B, T, D) or (B, T, M, D)."""
    if world.trains_on == "features":
        return batch, frames, grid[0] * grid[1], world.hidden_size
    count = world.arguments.get("tokens_per_frame", 1)
    return (batch, frames, *([count] if count > 1 else []), world.hidden_size)


def _patches(tokenizer: DeltaTok, grid: Grid) -> Tensor:
    return torch.empty(1, grid[0] * grid[1], tokenizer.hidden_size, device=META)
