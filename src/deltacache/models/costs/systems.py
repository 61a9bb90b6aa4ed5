"""FLOP of whole systems: futures of an image, and training from videos or from a cache (the paper's Table 2)."""

# C context, H horizon, S samples, T frames of a clip, K candidates

from collections.abc import Mapping
from dataclasses import dataclass

from deltacache.models.backbones.convention import InputConvention
from deltacache.models.costs.counting import Flops
from deltacache.models.costs.parts import (
    backbone_flops,
    decoder_flops,
    encoder_flops,
    predictor_flops,
    rollout_flops,
)
from deltacache.models.costs.training import StepFlops, training_step_flops
from deltacache.models.deltatok import DeltaTok
from deltacache.models.world_model import Grid, WorldModel
from deltacache.schemas.errors import MismatchError

_NOTHING = Flops(0)


@dataclass(frozen=True, slots=True)
class System:
    """A world model and, where it predicts delta tokens, their tokenizer; on any device.

    Attributes:
        candidates: K of its training.
    """

    name: str
    world: WorldModel
    tokenizer: DeltaTok | None
    candidates: int


@dataclass(frozen=True, slots=True)
class Setting:
    """What is asked of all systems alike.

    Attributes:
        image_size: rows and columns of pixels of a crop.
        crops: of an image.
        frames: of a training clip.
    """

    image_size: tuple[int, int]
    context: int
    horizon: int
    samples: int
    crops: int
    frames: int


@dataclass(frozen=True, slots=True)
class SystemFlops:
    """Of one crop, in the setting.

    Attributes:
        encoder: one token, or tokens, of a frame; nothing where patch tokens are predicted.
        decoder: one frame.
        predictor: one frame of one future, by frames of context.
        rollout: all futures as this package rolls them out, without the other parts.
        samples: S, 1 where nothing is random.
        step: one training step of one clip, from cached tokens.
        frozen_step: what the online trainer does before it: the backbone of the clip's frames, the encoder of each.
            With delta compression a black frame goes before them.
    """

    backbone: Flops
    encoder: Flops
    decoder: Flops
    predictor: Mapping[int, Flops]
    rollout: Flops
    samples: int
    step: StepFlops
    frozen_step: Flops


@dataclass(frozen=True, slots=True)
class Totals:
    """FLOP of all futures of one image, its crops together.

    Attributes:
        paper: by its convention: every future predicted from its whole context at every step, the predictor's
            attention counted twice.
        exact: the same passes, attention once.
        here: what this package multiplies: keys and values of a frame are computed once and kept.
    """

    paper: int
    exact: int
    here: int


def system_flops(system: System, grid: Grid, backbone: Flops, setting: Setting) -> SystemFlops:
    """Count every part of ``system`` on patches of ``grid``; ``backbone`` is what a frame needs."""
    tokenizer, world = system.tokenizer, system.world
    encoding = encoder_flops(tokenizer, grid) if tokenizer else _NOTHING
    samples = setting.samples if world.stochastic else 1
    black = tokenizer is not None and tokenizer.frame_compression == "off"
    contexts = range(setting.context, setting.context + setting.horizon)
    return SystemFlops(
        backbone=backbone,
        encoder=encoding,
        decoder=decoder_flops(tokenizer, grid) if tokenizer else _NOTHING,
        predictor={context: predictor_flops(world, context, grid) for context in contexts},
        rollout=rollout_flops(world, setting.context, setting.horizon, samples, grid),
        samples=samples,
        step=training_step_flops(world, setting.frames, grid, system.candidates),
        frozen_step=backbone * (setting.frames + black) + encoding * setting.frames,
    )


def totals(flops: SystemFlops, setting: Setting) -> Totals:
    """Of one image."""
    seen = (flops.backbone + flops.encoder) * setting.context
    decoded = flops.decoder * (flops.samples * setting.horizon)
    predicted = sum(flops.predictor.values(), _NOTHING) * flops.samples
    around = seen.total + decoded.total
    return Totals(
        paper=setting.crops * (around + predicted.attention_twice),
        exact=setting.crops * (around + predicted.total),
        here=setting.crops * (around + flops.rollout.total),
    )


def image_flops(encoder: InputConvention, setting: Setting) -> Flops:
    """One frame through the backbone.

    Raises:
        MismatchError: as ``grid_of``.
    """
    grid_of(encoder, setting.image_size)
    return backbone_flops(encoder, setting.image_size)


def grid_of(encoder: InputConvention, image_size: tuple[int, int]) -> Grid:
    """Rows and columns of patches.

    Raises:
        MismatchError: the sides are no multiples of the patch size.
    """
    size = encoder.patch_size
    rows, columns = image_size
    if rows % size or columns % size or not (rows and columns):
        nearest = [max(1, round(side / size)) * size for side in image_size]
        raise MismatchError(
            f"image size {rows} x {columns} is not a multiple of the backbone's patch size {size}: take for example "
            f"{nearest[0]} x {nearest[1]}"
        )
    return rows // size, columns // size
