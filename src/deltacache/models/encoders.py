"""The interface between ``Backbone`` and encoders of all origins, and its implementations by kind of input."""

import inspect
from abc import ABC, abstractmethod
from typing import Any, Self, final

import torch
from torch import Tensor, nn

from deltacache.models.outside import imported
from deltacache.schemas.errors import CheckpointError, MismatchError

# ----------------------------------------------------------------------------------------------------
# What an encoder from outside of the package is.
# ----------------------------------------------------------------------------------------------------


class PatchEncoder(nn.Module, ABC):
    """A frozen image encoder that is no model of transformers, for ``--backbone package.module:factory``.

    ``factory()`` gives it with its weights. It is used in eval mode and never trained; all it computes with must be
    parameters or buffers, for their bytes are its identity.

    Attributes:
        patch_size: side of a square patch in pixels; sides of frames are multiples of it.
        hidden_size: D, the width of a token.
        image_mean, image_std: of each channel, for pixels in [0, 1]; what ``patch_tokens`` gets is normalised by them.
    """

    patch_size: int
    hidden_size: int
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    image_std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    @abstractmethod
    def patch_tokens(self, pixels: Tensor) -> Tensor:
        """Tokens (B, N, D) of normalised ``pixels`` (B, 3, H, W) float32: one a patch, row by row, no others.

        An image's tokens must not depend on the other images of the batch.
        """


# ----------------------------------------------------------------------------------------------------
# The seam between ``Backbone`` and encoders.
#
# Shapes: B images, H x W pixels, P prefix tokens, N patches, D hidden size.
# ----------------------------------------------------------------------------------------------------


class InputConvention(ABC):
    """How one kind of encoder is given images.

    Attributes:
        encoder: the part of the model that encodes images, without its pooling.
        patch_size: side of a patch in pixels.
        width: D of its tokens.
        most_prefix_tokens: how many tokens there may be before those of the patches.

    Raises:
        CheckpointError: patches are not square.
    """

    def __init__(self, encoder: nn.Module) -> None:
        self.encoder: Any = encoder
        size = self.encoder.config.patch_size  # of a square patch a number or a pair
        sides = {int(side) for side in (size if isinstance(size, list | tuple) else [size])}
        if len(sides) != 1:
            raise CheckpointError(f"patch size {size} is not square: take a ViT with square patches")
        self.patch_size = sides.pop()
        self.width: int = self.encoder.config.hidden_size
        self.most_prefix_tokens = 2 + getattr(
            self.encoder.config, "num_register_tokens", 0
        )  # CLS, distillation

    @classmethod
    @abstractmethod
    def of(cls, model: nn.Module) -> Self | None:
        """The convention with ``model``'s encoder, or ``None`` if that takes something else."""

    @abstractmethod
    def hidden_states(self, pixels: Tensor) -> Tensor:
        """Last hidden state (B, P + N, D) of normalised ``pixels`` (B, 3, H, W), after the final norm.

        The patch tokens go row by row.
        """


def inputs_of(model: nn.Module) -> tuple[set[str], set[str]]:
    """Names of what the model's forward needs, and of all it takes."""
    parameters = inspect.signature(model.forward).parameters.values()
    needed = {one.name for one in parameters if one.default is one.empty and one.kind is not one.VAR_KEYWORD}
    return needed, {one.name for one in parameters}


def without_pooling(model: Any) -> Any:
    """Drop the pooling layer: it never reaches the patch tokens, and its weights may be random."""
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    if getattr(model, "use_head", False):  # SigLIP's attention pooling
        model.use_head, model.head = False, None
    return model


# ----------------------------------------------------------------------------------------------------
# Encoders that take patches with the grid they come from: SigLIP 2 of any resolution (NaFlex).
# ----------------------------------------------------------------------------------------------------


@final
class FlatPatches(InputConvention):
    """``model(pixel_values, mask, spatial_shapes)`` with flattened patches (B, N, P x P x 3).

    All images of a batch have the same size: nothing is padded, so there is no mask. The model stretches its
    positions to the grid.
    """

    @classmethod
    def of(cls, model: nn.Module) -> Self | None:
        _, taken = inputs_of(model)
        return cls(without_pooling(model)) if {"pixel_values", "spatial_shapes"} <= taken else None

    def hidden_states(self, pixels: Tensor) -> Tensor:
        patches, (rows, columns) = flattened(pixels, self.patch_size)
        grids = torch.tensor([[rows, columns]]).expand(
            len(pixels), 2
        )  # on the CPU: the model reads the numbers
        return self.encoder(patches, None, grids).last_hidden_state


def flattened(pixels: Tensor, patch_size: int) -> tuple[Tensor, tuple[int, int]]:
    """Patches (B, N, P x P x 3) of images (B, 3, H, W), row by row with channels last, and their grid."""
    rows, columns = pixels.shape[-2] // patch_size, pixels.shape[-1] // patch_size
    split = pixels.unflatten(3, (columns, patch_size)).unflatten(2, (rows, patch_size))
    return split.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2), (rows, columns)


# ----------------------------------------------------------------------------------------------------
# Encoders that take images (B, 3, H, W): ViT, DINOv2, DINOv3, SigLIP, I-JEPA and most others.
# ----------------------------------------------------------------------------------------------------


@final
class Images(InputConvention):
    """``model(pixel_values)``. Positions learned for one size are stretched to others by the model itself."""

    @classmethod
    def of(cls, model: nn.Module) -> Self | None:
        """Takes models of images, not models under the same name that take clips of several frames."""
        takes_clips = hasattr(model.config, "tubelet_size") or hasattr(model.config, "num_frames")
        needed, _ = inputs_of(model)
        return cls(without_pooling(model)) if needed <= {"pixel_values"} and not takes_clips else None

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__(encoder)
        asked = (
            "interpolate_pos_encoding" in inputs_of(encoder)[1]
        )  # some stretch positions only when asked to
        self._options = {"interpolate_pos_encoding": True} if asked else {}

    def hidden_states(self, pixels: Tensor) -> Tensor:
        return self.encoder(pixels, **self._options).last_hidden_state


# ----------------------------------------------------------------------------------------------------
# Encoders of video that take short clips: V-JEPA 2.
# ----------------------------------------------------------------------------------------------------


_ROW = 4096
"""Place of a patch = row x _ROW + column: more columns than any image has patches."""


@final
class Tubelets(InputConvention):
    """An image is one tubelet: the same frame as often as the encoder merges frames into a patch.

    transformers counts positions on the grid of the trained size, which gives patches of other sizes the place
    of another row. Meta's code counts them on the image's own grid, and so does this: equal at the trained size,
    and further rows and columns beyond it.
    """

    @classmethod
    def of(cls, model: nn.Module) -> Self | None:
        """Only the encoder is kept: the predictor fills in masked patches."""
        encoder = getattr(model, "encoder", model)
        if "pixel_values_videos" not in inputs_of(model)[1] or not hasattr(encoder, "embeddings"):
            return None
        return cls(encoder)

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__(encoder)
        for layer in self.encoder.layer:
            layer.attention.grid_size = _ROW

    def hidden_states(self, pixels: Tensor) -> Tensor:
        """Without prefix tokens."""
        clips = pixels.unsqueeze(1).expand(-1, self.encoder.config.tubelet_size, -1, -1, -1)
        hidden = self.encoder.embeddings(clips).float()  # the residual stream, also under autocast
        places = _places(*(side // self.patch_size for side in pixels.shape[-2:])).to(pixels.device)
        for layer in self.encoder.layer:
            hidden = layer(hidden, places)[0]
        return self.encoder.layernorm(hidden)


def _places(rows: int, columns: int) -> Tensor:
    """(1, N) for the patches of a grid, row by row."""
    return (torch.arange(rows)[:, None] * _ROW + torch.arange(columns)).flatten()[None]


# ----------------------------------------------------------------------------------------------------
# Encoders from outside of the package.
# ----------------------------------------------------------------------------------------------------


@final
class Outside(InputConvention):
    """``model.patch_tokens(pixels)`` of a ``PatchEncoder``."""

    def __init__(self, encoder: PatchEncoder) -> None:
        self.encoder = encoder
        self.patch_size, self.width, self.most_prefix_tokens = encoder.patch_size, encoder.hidden_size, 0

    @classmethod
    def of(cls, model: nn.Module) -> Self | None:
        return cls(model) if isinstance(model, PatchEncoder) else None

    def hidden_states(self, pixels: Tensor) -> Tensor:
        """Raises ``MismatchError`` for tokens of another shape than the encoder says."""
        tokens = self.encoder.patch_tokens(pixels)
        patches = (pixels.shape[-2] // self.patch_size) * (pixels.shape[-1] // self.patch_size)
        if tuple(tokens.shape) != (len(pixels), patches, self.width):
            raise MismatchError(
                f"{type(self.encoder).__name__}.patch_tokens gives {tuple(tokens.shape)} for pixels "
                f"{tuple(pixels.shape)}: must be {(len(pixels), patches, self.width)}, one token of "
                f"hidden_size a patch of patch_size"
            )
        return tokens


def outside_encoder(path: str) -> PatchEncoder:
    """What the factory ``package.module:factory`` gives.

    Raises:
        DeltacacheError: it cannot be imported, or gives something else.
    """
    encoder = imported(path, "backbone")()
    lacking = [
        name for name in ("patch_size", "hidden_size") if not isinstance(getattr(encoder, name, None), int)
    ]
    if not isinstance(encoder, PatchEncoder) or lacking:
        what = (
            f"has no number {lacking[0]}"
            if isinstance(encoder, PatchEncoder)
            else "is no deltacache.PatchEncoder"
        )
        raise CheckpointError(
            f"backbone {path} gives a {type(encoder).__name__}, which {what}: let the factory return a subclass of "
            "deltacache.PatchEncoder with patch_size and hidden_size (docs/backbones.md)"
        )
    if not encoder.state_dict():
        raise CheckpointError(
            f"backbone {path} gives a {type(encoder).__name__} without a parameter or buffer: its identity is the "
            "bytes of these, so put what decides its tokens into one"
        )
    return encoder


# ----------------------------------------------------------------------------------------------------
# The input conventions of encoders, and which one an encoder has.
# ----------------------------------------------------------------------------------------------------


_CONVENTIONS: tuple[type[InputConvention], ...] = (Images, FlatPatches, Tubelets)


def convention_of(model: nn.Module, name: str) -> InputConvention:
    """How ``model`` is given images, with the part of it that encodes them.

    Raises:
        CheckpointError: it is not an encoder that turns an image into patch tokens.
    """
    if isinstance(model, PatchEncoder):
        return Outside(model)
    image_side: Any = getattr(model, "vision_model", model)  # two-tower models: only the image side is needed
    lacking = [field for field in ("patch_size", "hidden_size") if not hasattr(image_side.config, field)]
    found = (one.of(image_side) for one in _CONVENTIONS if not lacking)
    convention = next((one for one in found if one is not None), None)
    if convention is None:
        why = f" (its config has no {' and no '.join(lacking)})" if lacking else ""
        raise CheckpointError(
            f"backbone {name!r} is a {type(model).__name__}, which does not turn an image into patch tokens{why}: "
            "take a vision transformer such as DINOv3 ViT-B/16, facebook/dinov3-vitb16-pretrain-lvd1689m"
        )
    return convention
