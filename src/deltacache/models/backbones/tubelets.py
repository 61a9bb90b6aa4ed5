"""Encoders of video that take short clips: V-JEPA 2."""

from typing import Self, final

import torch
from torch import Tensor, nn

from deltacache.models.backbones.convention import InputConvention, inputs_of

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
        """See ``InputConvention``. Only the encoder is kept: the predictor fills in masked patches."""
        encoder = getattr(model, "encoder", model)
        if "pixel_values_videos" not in inputs_of(model)[1] or not hasattr(encoder, "embeddings"):
            return None
        return cls(encoder)

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__(encoder)
        for layer in self.encoder.layer:
            layer.attention.grid_size = _ROW

    def hidden_states(self, pixels: Tensor) -> Tensor:
        """See ``InputConvention``; without prefix tokens."""
        clips = pixels.unsqueeze(1).expand(-1, self.encoder.config.tubelet_size, -1, -1, -1)
        hidden = self.encoder.embeddings(clips).float()  # the residual stream, also under autocast
        places = _places(*(side // self.patch_size for side in pixels.shape[-2:])).to(pixels.device)
        for layer in self.encoder.layer:
            hidden = layer(hidden, places)[0]
        return self.encoder.layernorm(hidden)


def _places(rows: int, columns: int) -> Tensor:
    """(1, N) for the patches of a grid, row by row."""
    return (torch.arange(rows)[:, None] * _ROW + torch.arange(columns)).flatten()[None]
