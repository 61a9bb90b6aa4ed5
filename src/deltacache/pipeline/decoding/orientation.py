"""How a frame must be turned to be upright."""

import struct
from dataclasses import dataclass

import av.sidedata.sidedata
import numpy as np
from av.video.frame import VideoFrame

_MATRIX = struct.Struct("=9i")


def _unknown_kind(kinds: type[av.sidedata.sidedata.Type], value: int) -> av.sidedata.sidedata.Type:
    """A member for a kind of side data that PyAV has no name for; by itself it would list none of a frame's at all."""
    member = object.__new__(kinds)
    member._name_, member._value_ = f"KIND_{value}", value
    return member


av.sidedata.sidedata.Type._missing_ = classmethod(_unknown_kind)  # pyright: ignore[reportAttributeAccessIssue]


@dataclass(frozen=True, slots=True)
class Orientation:
    """Transpose first, then flip: one of the eight ways to lay a picture on a grid."""

    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    @property
    def is_upright(self) -> bool:
        """Nothing to do."""
        return not (self.transpose or self.flip_rows or self.flip_columns)

    def upright_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the upright frame."""
        return (width, height) if self.transpose else (height, width)

    def upright(self, pixels: np.ndarray) -> np.ndarray:
        """(H, W, 3) as coded to (H', W', 3) upright, contiguous."""
        if self.transpose:
            pixels = pixels.transpose(1, 0, 2)
        pixels = pixels[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]
        return np.ascontiguousarray(pixels)


def orientation_of(frame: VideoFrame) -> Orientation:
    """From the display matrix (ISO 14496-12 section 6.2.2), to the nearest quarter turn.

    The matrix takes column p and row q of the coded frame to x = a p + c q and y = b p + d q.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None or matrix.buffer_size < _MATRIX.size:
        return Orientation()
    a, b, _, c, d, *_ = _MATRIX.unpack_from(bytes(matrix))
    if abs(b) > abs(a):
        return Orientation(True, flip_rows=b < 0, flip_columns=c < 0)
    return Orientation(False, flip_rows=d < 0, flip_columns=a < 0)
