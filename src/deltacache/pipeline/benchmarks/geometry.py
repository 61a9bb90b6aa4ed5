"""Two square crops of a frame and two halves of its label (method section 3).

Shapes: T frames, H x W a frame as it is, h x w resized, S input size, C crops (2, or 1 of square frames).
"""

from dataclasses import dataclass

import cv2
import numpy as np

from deltacache.schemas.clips import CropBox

_MOST_ASPECT = 2


@dataclass(frozen=True, slots=True)
class Split:
    """How a frame of one size is cut.

    Attributes:
        resized: h, w; the shorter is the input size, the longer at most twice that.
        wide: whether the crops lie side by side (else one above the other).
    """

    resized: tuple[int, int]
    wide: bool

    @property
    def size(self) -> int:
        """Side of a crop."""
        return min(self.resized)

    @property
    def crops(self) -> int:
        """Number of crops."""
        return 1 if self.resized[0] == self.resized[1] else 2

    @property
    def overlap(self) -> bool:
        """Whether the crops share pixels; the halves of the label never do."""
        return self.crops == 2 and max(self.resized) < _MOST_ASPECT * self.size

    @property
    def corners(self) -> tuple[tuple[int, int], ...]:
        """Top and left of each crop in the resized frame."""
        height, width = self.resized
        return ((0, 0), (height - self.size, width - self.size))[: self.crops]

    def box(self, crop: int, height: int, width: int) -> CropBox:
        """Where a crop lies in the frame of ``height`` x ``width`` pixels before it was resized."""
        (top, left), (rows, columns) = self.corners[crop], self.resized
        down, across = height / rows, width / columns
        size = (round(self.size * down), round(self.size * across))
        return CropBox(round(top * down), round(left * across), *size)


def split_of(height: int, width: int, size: int) -> Split:
    """The split of frames of ``height`` x ``width`` for an input size: aspect clamped to 1:2."""
    short = min(height, width)
    long = min(round(size * max(height, width) / short), _MOST_ASPECT * size)
    return Split((size, long) if width >= height else (long, size), wide=width > height)


def resize_frame(frame: np.ndarray, split: Split) -> np.ndarray:
    """(H, W, 3) uint8 to (h, w, 3), bilinear."""
    height, width = split.resized
    if frame.shape[:2] == (height, width):
        return frame
    return cv2.resize(frame, (width, height), interpolation=cv2.INTER_LINEAR)


def crop_frames(frames: np.ndarray, split: Split) -> np.ndarray:
    """(T, h, w, 3) resized frames to (C, T, S, S, 3): the crops at both ends."""
    size = split.size
    return np.stack([frames[:, top : top + size, left : left + size] for top, left in split.corners])


def label_halves(label: np.ndarray, split: Split, ignore: int) -> np.ndarray:
    """(..., H, W) to (C, ..., H', W'): halves that do not overlap.

    Of an odd side the second half gets the larger part, and the first one row or column of ``ignore`` behind it.
    """
    if split.crops == 1:
        return label[None]
    axis = label.ndim - 1 if split.wide else label.ndim - 2
    middle = label.shape[axis] // 2
    first, second = np.split(label, [middle], axis)
    padding = [(0, 0)] * label.ndim
    padding[axis] = (0, second.shape[axis] - middle)
    return np.stack([np.pad(first, padding, constant_values=ignore), second])
