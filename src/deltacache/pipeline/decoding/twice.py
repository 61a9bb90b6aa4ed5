"""Decode twice in two ways and believe only what agrees: for codecs that hide damage.

FFmpeg's VP8 decoder neither fails nor complains when a damaged file leaves pixels undefined: they are whatever
the recycled memory held. Holding on to frames changes which memory is recycled, and so brings it to light.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence

from deltacache.pipeline.decoding.frame_source import FrameSource, IndexedFrame
from deltacache.schemas.errors import FailureReason, VideoRefusedError

CODECS_THAT_HIDE_DAMAGE = ("vp8",)
_HELD_FRAMES = 4


class TwiceDecodedSource:
    """The frames of a source, once a second one that holds frames has given the same.

    Args:
        make: builds the source; its argument is how many frames it holds on to while decoding.
    """

    def __init__(self, make: Callable[[int], FrameSource]) -> None:
        self._source, self._other = make(0), make(_HELD_FRAMES)
        self.height, self.width = self._source.height, self._source.width
        self.decoder, self.timestamps_s = self._source.decoder, self._source.timestamps_s

    def frames(self, wanted: Sequence[int]) -> Iterator[IndexedFrame]:
        """Upright RGB frames of ``wanted`` (ascending, unique).

        Raises:
            VideoRefusedError: the two disagree.
        """
        expected = {frame.index: zlib.crc32(frame.rgb.tobytes()) for frame in self._other.frames(wanted)}
        for frame in self._source.frames(wanted):
            if zlib.crc32(frame.rgb.tobytes()) != expected.get(frame.index):
                raise VideoRefusedError(
                    FailureReason.CORRUPT_STREAM,
                    f"frame {frame.index} has undefined pixels, two decodings disagree",
                )
            yield frame
