"""Mean and standard deviation that an encoder expects, as its folder says or as its family has them."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from deltacache.schemas.errors import CheckpointError

RGB = tuple[float, float, float]


class Normalisation(NamedTuple):
    """Mean and standard deviation of each channel, for pixels in [0, 1]."""

    mean: RGB
    std: RGB


IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_CLIP = Normalisation((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_OF_FAMILY: Mapping[str, Normalisation] = MappingProxyType({"siglip": _HALF, "siglip2": _HALF, "clip": _CLIP})

SETTINGS_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
"""Where transformers writes how pixels are prepared; the last holds a section for each kind of input."""


def read_normalisation(folder: Path, model_type: str) -> Normalisation:
    """What the first of ``SETTINGS_FILES`` in ``folder`` says; what it does not say is the family's.

    Args:
        model_type: of the model's config; families that are not SigLIP or CLIP have ImageNet's numbers.

    Raises:
        CheckpointError: the file holds something else.
    """
    usual = _OF_FAMILY.get(model_type.removesuffix("_vision_model"), IMAGENET)
    path = next((folder / name for name in SETTINGS_FILES if (folder / name).exists()), None)
    if path is None:
        return usual
    try:
        settings = _of_images(json.loads(path.read_text()))
        if not settings.get("do_normalize", True):
            return Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        return Normalisation(
            _three(settings.get("image_mean", usual.mean)), _three(settings.get("image_std", usual.std))
        )
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} does not hold image_mean and image_std of three numbers each ({error}): fetch it again"
        ) from error


def _of_images(settings: Any) -> Any:
    """The section about pixels of a file for several kinds of input, else the whole file."""
    return settings.get("image_processor") or settings.get("video_processor") or settings


def _three(values: Any) -> RGB:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
