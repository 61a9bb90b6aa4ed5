"""The input conventions of encoders, and which one an encoder has."""

from typing import Any

from torch import nn

from deltacache.models.backbones.convention import InputConvention
from deltacache.models.backbones.flat_patches import FlatPatches
from deltacache.models.backbones.images import Images
from deltacache.models.backbones.tubelets import Tubelets
from deltacache.schemas.errors import CheckpointError

_CONVENTIONS: tuple[type[InputConvention], ...] = (Images, FlatPatches, Tubelets)


def convention_of(model: nn.Module, name: str) -> InputConvention:
    """How ``model`` is given images, with the part of it that encodes them.

    Raises:
        CheckpointError: it is no encoder that turns an image into patch tokens.
    """
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
