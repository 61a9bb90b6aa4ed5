"""Encoders that take patches with the grid they come from: SigLIP 2 of any resolution (NaFlex)."""

from typing import Self, final

import torch
from torch import Tensor, nn

from deltacache.models.backbones.convention import InputConvention, inputs_of, without_pooling


@final
class FlatPatches(InputConvention):
    """``model(pixel_values, mask, spatial_shapes)`` with flattened patches (B, N, P x P x 3).

    All images of a batch have the same size: nothing is padded, so there is no mask. The model stretches its
    positions to the grid.
    """

    @classmethod
    def of(cls, model: nn.Module) -> Self | None:
        """See ``InputConvention``."""
        _, taken = inputs_of(model)
        return cls(without_pooling(model)) if {"pixel_values", "spatial_shapes"} <= taken else None

    def hidden_states(self, pixels: Tensor) -> Tensor:
        """See ``InputConvention``."""
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
