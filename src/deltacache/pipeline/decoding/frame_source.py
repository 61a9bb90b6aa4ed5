"""What every way of getting frames offers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from deltacache.schemas.errors import FailureReason, VideoRefusedError

_SMALLEST_SIDE = 16  # pixels: one patch of the backbone; less is an icon, not a video


@dataclass(frozen=True, slots=True)
class IndexedFrame:
    """One upright frame.

    Attributes:
        index: in presentation order, from 0.
        rgb: (H, W, 3) uint8.
    """

    index: int
    rgb: np.ndarray


class FrameSource(Protocol):
    """One opened video. Its frames are numbered in presentation order."""

    height: int
    width: int
    decoder: str
    timestamps_s: np.ndarray  # (frames,) float32 from the first frame, non-decreasing

    def frames(self, wanted: Sequence[int]) -> Iterator[IndexedFrame]:
        """The frames of ``wanted`` (ascending, unique), upright."""
        ...


class SourceFailedError(Exception):
    """This way of decoding does not give what the file holds; a more careful one may."""


def check_size(height: int, width: int) -> None:
    """Raise ``too_small`` when the shorter side of the upright frame is less than 16 pixels."""
    if min(height, width) < _SMALLEST_SIDE:
        raise VideoRefusedError(
            FailureReason.TOO_SMALL,
            f"{width}x{height} pixels, the shorter side must have at least {_SMALLEST_SIDE}",
        )
