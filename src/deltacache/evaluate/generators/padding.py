"""Frames as a generator wants them, and back (method section 3, external generators).

Shapes: H x W a frame as the evaluation sees it (of KITTI the KB crop), P x Q padded.
"""

from typing import Literal

import cv2
import numpy as np

from deltacache.schemas.benchmarks import BenchmarkName
from deltacache.schemas.datasets import Frozen

Padding = Literal["plain", "cosmos"]

_COSMOS_HEIGHT, _COSMOS_WIDTH = 640, 1024
_PICTURE_HEIGHT = 512


class Placement(Frozen):
    """Where the picture lies in a frame for the generator: all of it for ``plain``.

    Attributes:
        height, width: of the frame.
        top, left, rows, columns: of the picture in it.
    """

    height: int
    width: int
    top: int
    left: int
    rows: int
    columns: int


def placement_of(height: int, width: int, padding: Padding, benchmark: BenchmarkName) -> Placement:
    """Where frames of ``height`` x ``width`` go: as they are, or 512 high in 640 x 1024.

    The aspect is kept, but for KITTI and what would be wider than 1024: squashed to that width.
    """
    if padding == "plain":
        return Placement(height=height, width=width, top=0, left=0, rows=height, columns=width)
    columns = min(round(width * _PICTURE_HEIGHT / height), _COSMOS_WIDTH)
    columns = _COSMOS_WIDTH if benchmark == "kitti" else columns
    return Placement(
        height=_COSMOS_HEIGHT,
        width=_COSMOS_WIDTH,
        top=(_COSMOS_HEIGHT - _PICTURE_HEIGHT) // 2,
        left=(_COSMOS_WIDTH - columns) // 2,
        rows=_PICTURE_HEIGHT,
        columns=columns,
    )


def padded(frame: np.ndarray, place: Placement) -> np.ndarray:
    """(H, W, 3) uint8 to (P, Q, 3): resized bilinearly, its mirrored edges around it."""
    if frame.shape[:2] != (place.rows, place.columns):
        frame = cv2.resize(frame, (place.columns, place.rows), interpolation=cv2.INTER_LINEAR)
    bottom, right = place.height - place.top - place.rows, place.width - place.left - place.columns
    if not any((place.top, place.left, bottom, right)):
        return frame
    return cv2.copyMakeBorder(frame, place.top, bottom, place.left, right, cv2.BORDER_REFLECT_101)


def unpadded(frame: np.ndarray, place: Placement) -> np.ndarray:
    """(P, Q, 3) to the picture in it, (rows, columns, 3)."""
    return frame[place.top : place.top + place.rows, place.left : place.left + place.columns]
