"""What every way of getting frames offers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np

from deltacache.schemas.errors import FailureReason, VideoRefusedError

_SMALLEST_SIDE = 16  # pixels: one patch of the backbone; less is an icon, not a video


Span: TypeAlias = tuple[float, float]
"""From a time up to but without a later one: seconds from the first frame of a file that holds several videos."""


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


class SpanSource:
    """The frames of a source that lie within a span, numbered from the first of them: one video of a file of many.

    Args:
        begins_s: when the source's first frame is shown, seconds from the first frame of the file.
    """

    def __init__(self, source: FrameSource, span: Span, begins_s: float = 0.0) -> None:
        times = source.timestamps_s.astype(np.float64) + begins_s
        self._source = source
        self._first, end = np.searchsorted(times, span).tolist()
        if self._first == end:
            raise VideoRefusedError(
                FailureReason.NO_FRAMES,
                f"no frame of its file lies between {span[0]:.3f} and {span[1]:.3f} s",
            )
        self.height, self.width, self.decoder = source.height, source.width, source.decoder
        self.timestamps_s = source.timestamps_s[self._first : end] - source.timestamps_s[self._first]

    def frames(self, wanted: Sequence[int]) -> Iterator[IndexedFrame]:
        """The frames of ``wanted`` (ascending, unique), upright."""
        for frame in self._source.frames([self._first + index for index in wanted]):
            yield IndexedFrame(frame.index - self._first, frame.rgb)


class SourceFailedError(Exception):
    """This way of decoding does not give what the file holds; a more careful one may."""


def check_size(height: int, width: int) -> None:
    """Raise ``too_small`` when the shorter side of the upright frame is less than 16 pixels."""
    if min(height, width) < _SMALLEST_SIDE:
        raise VideoRefusedError(
            FailureReason.TOO_SMALL,
            f"{width}x{height} pixels, the shorter side must have at least {_SMALLEST_SIDE}",
        )
