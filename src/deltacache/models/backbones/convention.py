"""The seam between ``Backbone`` and the encoders of transformers.

Shapes: B images, H x W pixels, P prefix tokens, N patches, D hidden size.
"""

import inspect
from abc import ABC, abstractmethod
from typing import Any, Self

from torch import Tensor, nn

from deltacache.schemas.errors import CheckpointError


class InputConvention(ABC):
    """How one kind of encoder is given images.

    Attributes:
        encoder: the part of the model that encodes images, without its pooling.
        patch_size: side of a patch in pixels.

    Raises:
        CheckpointError: patches are not square.
    """

    def __init__(self, encoder: nn.Module) -> None:
        self.encoder: Any = encoder
        self.patch_size = _one_number(self.encoder.config.patch_size)

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


def _one_number(patch_size: Any) -> int:
    """Configs write a square patch as a number or a pair."""
    sides = {int(side) for side in (patch_size if isinstance(patch_size, list | tuple) else [patch_size])}
    if len(sides) != 1:
        raise CheckpointError(f"patch size {patch_size} is not square: take a ViT with square patches")
    return sides.pop()
