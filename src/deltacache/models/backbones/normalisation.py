"""How pixels are scaled before an encoder sees them, as its folder says or as its family has it."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from deltacache.models.backbones.reading import SETTINGS_FILES, quiet_transformers
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

_PIXELS = 255.0
_UNSUPPORTED = ("do_flip_channel_order", "do_grayscale", "do_color_quantize", "offset", "rescale_offset")
"""Settings of single processors that change pixels in other ways than scaling each channel."""


def read_normalisation(folder: Path, model_type: str) -> Normalisation:
    """What the processor of transformers computes with the settings in ``folder``; without any, the family's.

    ``(pixel * rescale_factor - image_mean) / image_std``, either step left out by ``do_rescale`` or ``do_normalize``,
    is written here for pixels in [0, 1]. A setting that the file lacks is the default of the processor class.

    Args:
        model_type: of the model's config; families that are not SigLIP or CLIP have ImageNet's numbers.

    Raises:
        CheckpointError: the file holds something else, or a setting that is not followed here.
    """
    family = model_type.removesuffix("_vision_model")
    usual = _OF_FAMILY.get(family, IMAGENET)
    for path, settings in _sections(folder):
        defaults = {"image_mean": usual.mean, "image_std": usual.std, "rescale_factor": 1 / _PIXELS}
        defaults |= {"do_rescale": True, "do_normalize": True} | _class_defaults(settings, family)
        chosen = {**defaults, **settings}
        if followed := next((name for name in _UNSUPPORTED if chosen.get(name)), None):
            raise CheckpointError(
                f"{path} sets {followed} to {chosen[followed]}, which changes pixels in a way that is not followed "
                "here: take an encoder whose processor only rescales and normalises"
            )
        try:
            return _folded(chosen)
        except (ValueError, TypeError, OverflowError) as error:
            raise CheckpointError(
                f"{path} does not hold image_mean and image_std of three numbers each and a rescale_factor "
                f"({error}): fetch it again"
            ) from error
    return usual


def _sections(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Settings about pixels in the order in which transformers looks for them; those of videos come last."""
    found: dict[str, dict[str, Any]] = {}
    for path in (folder / name for name in SETTINGS_FILES if (folder / name).exists()):
        try:
            content = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path} cannot be read as JSON settings ({error}): fetch it again"
            ) from error
        if not isinstance(content, dict):
            raise CheckpointError(f"{path} holds no settings by name: fetch it again")
        found[path.name] = content
    images, videos, all_kinds = SETTINGS_FILES
    several = found.get(all_kinds, {})
    if isinstance(several.get("image_processor"), dict):
        yield folder / all_kinds, several["image_processor"]
    for name in (images, videos):
        if name in found:
            nested = found[name].get("image_processor") or found[name].get("video_processor")
            yield folder / name, nested if isinstance(nested, dict) else found[name]
    if isinstance(several.get("video_processor"), dict):
        yield folder / all_kinds, several["video_processor"]
    if {"image_mean", "image_std", "do_rescale", "rescale_factor", "do_normalize"} & several.keys():
        yield folder / all_kinds, several


def _class_defaults(settings: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Of the processor class that the settings name, else of the family's; nothing where it cannot be imported.

    The classes without torchvision ("...Pil") have the same defaults. Those that exist with torchvision only, such
    as DINOv3's, have ImageNet's numbers, which are the family's here too.
    """
    import transformers
    from transformers.models.auto import image_processing_auto

    named = (
        settings.get(key)
        for key in ("image_processor_type", "video_processor_type", "feature_extractor_type")
    )
    names: Any = image_processing_auto.IMAGE_PROCESSOR_MAPPING_NAMES  # pyright: ignore[reportPrivateImportUsage]
    of_family = names.get(family, {})
    name = str(next((each for each in named if each), of_family.get("torchvision") or ""))
    name = name.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
    wanted = ("image_mean", "image_std", "do_rescale", "rescale_factor", "do_normalize", *_UNSUPPORTED)
    with quiet_transformers():
        for each in (f"{name}Pil", name):
            try:
                kind = getattr(transformers, each)
                return {key: getattr(kind, key) for key in wanted if getattr(kind, key, None) is not None}
            except (AttributeError, ImportError):
                continue
    return {}


def _folded(settings: Mapping[str, Any]) -> Normalisation:
    """Rescaling and normalising as one mean and one deviation a channel, for pixels in [0, 1]."""
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if settings["do_normalize"]:
        mean, std = _three(settings["image_mean"]), _three(settings["image_std"])
    factor = float(settings["rescale_factor"]) if settings["do_rescale"] else 1.0
    if not (math.isfinite(factor) and factor > 0 and all(each > 0 for each in std)):
        raise ValueError(f"rescale_factor {factor} and image_std {std} must be positive")
    scale = _PIXELS * factor
    if math.isclose(scale, 1.0, rel_tol=1e-6):
        return Normalisation(mean, std)
    return Normalisation(_three([each / scale for each in mean]), _three([each / scale for each in std]))


def _three(values: Any) -> RGB:
    """One number stands for three equal ones, as in transformers."""
    red, green, blue = (
        float(value) for value in ([values] * 3 if isinstance(values, int | float) else values)
    )
    if not all(math.isfinite(value) for value in (red, green, blue)):
        raise ValueError(f"{values} must be finite")
    return red, green, blue
