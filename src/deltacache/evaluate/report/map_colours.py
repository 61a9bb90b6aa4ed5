"""Class ids and metres as colours, with the key that says which colour means what."""

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps

from deltacache.evaluate.report.labels import class_name
from deltacache.schemas.benchmarks import IGNORE, MAX_DEPTH_M

_KEY_CLASSES = 12
_GOLDEN_ANGLE = 0.61803398875
_NEAREST_M = 1.0
_DEPTH_TICKS_M = (2, 5, 10, 20, 40, 80)
_NOTHING = (0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class KeyEntry:
    """A colour (``#rrggbb``) and what it means."""

    colour: str
    text: str


def class_palette(classes: int) -> np.ndarray:
    """(256, 4) uint8: a colour a class, far apart for ids that are near; the ignored one is transparent."""
    palette = np.zeros((256, 4), np.uint8)
    for label in range(min(classes, IGNORE)):
        hue = (0.58 + label * _GOLDEN_ANGLE) % 1
        lightness = (0.42, 0.66, 0.54)[label % 3]
        palette[label, :3] = np.round(255 * np.array(colorsys.hls_to_rgb(hue, lightness, 0.62)))
        palette[label, 3] = 255
    return palette


def class_colours(labels: np.ndarray) -> np.ndarray:
    """(..., 4) uint8 of class ids; ids keep their colour in all pictures."""
    return class_palette(IGNORE)[labels]


def class_key(dataset: str, maps: Sequence[np.ndarray]) -> list[KeyEntry]:
    """The classes that cover most pixels of ``maps``."""
    counts = sum(np.bincount(each.ravel(), minlength=256)[:IGNORE] for each in maps)
    order = [int(label) for label in np.argsort(-np.asarray(counts)) if np.asarray(counts)[label]]
    palette = class_palette(IGNORE)
    return [KeyEntry(_hex(palette[label]), class_name(dataset, label)) for label in order[:_KEY_CLASSES]]


def depth_colours(metres: np.ndarray) -> np.ndarray:
    """(..., 4) uint8: bright is near; equal steps are equal ratios. Depth 0 is unknown and transparent."""
    depth = np.asarray(metres, np.float32)
    colours = colormaps["viridis"](1 - _position(depth), bytes=True)
    return np.where((depth > 0)[..., None], colours, np.array(_NOTHING, np.uint8))


def nearness_colours(values: np.ndarray) -> np.ndarray:
    """(..., 4) uint8 of relative inverse depth: bright is near. 0 is unknown and transparent."""
    colours = colormaps["viridis"](np.asarray(values, np.float32) / MAX_DEPTH_M, bytes=True)
    return np.where((np.asarray(values) > 0)[..., None], colours, np.array(_NOTHING, np.uint8))


def nearness_key() -> list[KeyEntry]:
    """Both ends and the middle: such depth has no unit."""
    places = {"near": 1.0, "half as near": 0.5, "far": 0.02}
    return [
        KeyEntry(_hex(nearness_colours(np.array(share * MAX_DEPTH_M))), text)
        for text, share in places.items()
    ]


def depth_key() -> list[KeyEntry]:
    """Some depths and their colours."""
    return [KeyEntry(_hex(depth_colours(np.array(metres))), f"{metres} m") for metres in _DEPTH_TICKS_M]


def _position(metres: np.ndarray) -> np.ndarray:
    limits = np.log([_NEAREST_M, MAX_DEPTH_M])
    return (np.log(np.maximum(metres, _NEAREST_M)) - limits[0]) / (limits[1] - limits[0])


def _hex(colour: np.ndarray) -> str:
    return "#" + "".join(f"{int(each):02x}" for each in colour[:3])
