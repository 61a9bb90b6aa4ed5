"""What a page shows of an example: strips of pictures over time, in groups."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from deltacache.evaluate.report.map_colours import KeyEntry
from deltacache.evaluate.report.pictures import gap_of

PixelLookup = Callable[[str], np.ndarray | None]
"""From a clip id to its frames (T, H, W, 3) uint8, or ``None`` where they are not known."""


@dataclass(frozen=True, slots=True)
class Detail:
    """How much is shown, so that a page keeps within its size.

    Attributes:
        samples: strips a world model.
        futures: moments after the context.
        side: of the largest pictures, in pixels.
    """

    samples: int = 8
    futures: int = 8
    side: int = 192


@dataclass(frozen=True, slots=True)
class Strip:
    """Pictures of one line of time inside one image of ``size`` (width, height).

    ``kind`` is its style: true, rebuilt, predicted or mean.
    """

    kind: str
    label: str
    mark: str
    uri: str
    alt: str
    size: tuple[int, int]
    pixelated: bool

    def _width(self, pictures: int) -> int:
        """Of one of the pictures, without the gap behind it."""
        share = self.size[0] // pictures
        return next(width for width in range(share, 0, -1) if width + gap_of(width) <= share)

    def stretch(self, pictures: int) -> float:
        """Width of the strip over that of one picture."""
        return self.size[0] / self._width(pictures)

    def ratio(self, pictures: int) -> float:
        """Width of a picture over its height."""
        return self._width(pictures) / self.size[1]


@dataclass(frozen=True, slots=True)
class StripGroup:
    """Strips of one way of looking, and what its colours mean."""

    title: str
    note: str
    key: tuple[KeyEntry, ...]
    strips: tuple[Strip, ...]


@dataclass(frozen=True, slots=True)
class ExampleView:
    """One sequence, or a scene with several futures.

    Attributes:
        moments: what is said of each picture of a strip: its time from the last seen frame, and seen or future.
        seen: how many of them belong to the context.
        wide: whether pictures are wider than high, and so want more room side by side.
    """

    title: str
    moments: tuple[str, ...]
    seen: int
    wide: bool
    note: str
    groups: tuple[StripGroup, ...]
