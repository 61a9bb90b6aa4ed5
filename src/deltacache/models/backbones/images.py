"""Encoders that take images (B, 3, H, W): ViT, DINOv2, DINOv3, SigLIP, I-JEPA and most others."""

from typing import Self, final

from torch import Tensor, nn

from deltacache.models.backbones.convention import InputConvention, inputs_of, without_pooling


@final
class Images(InputConvention):
    """``model(pixel_values)``. Positions learned for one size are stretched to others by the model itself."""

    @classmethod
    def of(cls, model: nn.Module) -> Self | None:
        """See ``InputConvention``; encoders that take clips of several frames under this name are none."""
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
        """See ``InputConvention``."""
        return self.encoder(pixels, **self._options).last_hidden_state
