"""Frames through decord: the fast way, taken where it is known to be exact.

decord says nothing of damaged frames, counts packets as frames, and seeks to frames that are not keyframes; so it is
given only files for which none of that matters, and what FFmpeg printed meanwhile is looked at.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

if "decord" in sys.modules and "av" not in sys.modules:
    raise ImportError(
        "decord was imported before av: decord opens its FFmpeg to the whole process, PyAV would then run on "
        "that copy and silence the messages by which damage is seen. Import av, or deltacache, first"
    )
import av  # noqa: F401  # before decord, see above
import decord
import numpy as np

from deltacache.pipeline.decoding.frame_source import IndexedFrame, SourceFailedError
from deltacache.pipeline.decoding.native_log import NativeLog
from deltacache.pipeline.decoding.probe import FrameIndex, VideoProbe, seconds_of
from deltacache.pipeline.decoding.pyav_frames import IndexedPyavSource
from deltacache.schemas.texts import counted

_PIXEL_FORMATS = ("yuv420p", "yuvj420p")
_FILTER_LINE = re.compile(r"\[(in|out|swscaler|Parsed_\w+|auto_\w+) @ 0x")
_SMALLEST_WIDTH = 128  # below, the padding of a line can pass for a fourth colour
_THREADS = 1  # several videos are decoded side by side; more threads also broke VP9 1920x800


def decord_is_exact(probe: VideoProbe) -> bool:
    """Whether decord gives this file's frames bit for bit as decoding in sequence does. See docs/decoding.md."""
    return (
        probe.codec == "h264"
        and probe.pixel_format in _PIXEL_FORMATS
        and not probe.interlaced
        and probe.height % 2 == probe.width % 2 == 0
        and probe.width >= _SMALLEST_WIDTH
        and probe.orientation.is_upright
        and probe.has_duration
        and probe.index is not None
        and probe.index.every_keyframe_starts
    )


def complaints(text: str) -> list[str]:
    """Lines of FFmpeg's log, without those of the filters that convert pixels: they remark on mere colour tags."""
    return [line for line in text.splitlines() if not _FILTER_LINE.match(line)]


class DecordSource:
    """Frames by their number; a seek goes to the keyframe before."""

    def __init__(self, probe: VideoProbe, index: FrameIndex, log: NativeLog) -> None:
        self._probe, self._index, self._log = probe, index, log
        self.height, self.width = probe.height, probe.width
        self.decoder = "decord-seek" if len(index.starts) > 1 else "decord-sequential"
        self.timestamps_s = seconds_of(index.pts, probe.time_base)

    def frames(self, wanted: Sequence[int]) -> Iterator[IndexedFrame]:
        """Upright RGB frames of ``wanted`` (ascending, unique).

        Raises:
            SourceFailedError: decord cannot open the file, or sees another number or size of frames.
            VideoRefusedError: FFmpeg complained, and a second look found damage.
        """
        decord.logging.set_level(decord.logging.INFO)  # "concealing errors" is no more than information
        mark = self._log.size
        try:
            for index, rgb in self._decode(wanted):
                yield IndexedFrame(index, rgb)
        except (decord.DECORDError, RuntimeError) as error:
            raise SourceFailedError(f"decord: {error}") from error
        if complaints(self._log.text(mark)):
            IndexedPyavSource(self._probe, self._index).verify(wanted)

    def _decode(self, wanted: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        reader = decord.VideoReader(str(Path(self._probe.path).absolute()), num_threads=_THREADS)
        if len(reader) != len(self._index.pts):
            raise SourceFailedError(
                f"decord counts {counted(len(reader), 'frame')}, there are {len(self._index.pts)}"
            )
        for index in wanted:
            rgb = reader[index].asnumpy()
            if rgb.shape != (self.height, self.width, 3):
                raise SourceFailedError(f"decord gives frames of shape {rgb.shape}")
            yield index, rgb
