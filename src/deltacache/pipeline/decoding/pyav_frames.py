"""Frames through PyAV: in sequence or after a seek, with every sign of damage looked at.

Decoders reuse the memory of frames that nobody holds, and some show it where a damaged file leaves pixels
undefined (VP8 does, without a word). So a frame is let go before the next is decoded, as a plain loop does:
then even those pixels are the ones that decoding in sequence gives.
"""

import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence, Set
from fractions import Fraction

import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from deltacache.pipeline.decoding.frame_source import FrameSource, IndexedFrame, SourceFailedError
from deltacache.pipeline.decoding.probe import (
    FrameIndex,
    VideoProbe,
    frames_of,
    last_frames_of,
    open_video,
    packets_of,
    seconds_of,
)
from deltacache.schemas.errors import FailureReason, VideoRefusedError
from deltacache.schemas.texts import counted


class IndexedPyavSource:
    """Frames by their presentation time, from the nearest exact starting point.

    Args:
        held_frames: how many of the last frames not to let go; changes no pixel of a sound file.
    """

    def __init__(self, probe: VideoProbe, index: FrameIndex, *, held_frames: int = 0) -> None:
        self._probe, self._index, self._held_frames = probe, index, held_frames
        self.height, self.width = probe.height, probe.width
        self.decoder = "pyav-seek" if len(index.starts) > 1 else "pyav-sequential"
        self.timestamps_s = seconds_of(index.pts, probe.time_base)

    def frames(self, wanted: Sequence[int]) -> Iterator[IndexedFrame]:
        """Upright RGB frames of ``wanted`` (ascending, unique).

        Raises:
            VideoRefusedError: damage anywhere between a starting point and the last frame wanted of it.
            SourceFailedError: the decoder's frames are not those that the packets promised.
        """
        convert = _RgbConverter(self._probe)
        for index, frame in self._decode(wanted):
            rgb = convert(frame)
            del frame  # see the module's docstring
            yield IndexedFrame(index, rgb)

    def verify(self, wanted: Sequence[int]) -> None:
        """Decode what ``frames`` would, without converting it. Raises as it does."""
        for _ in self._decode(wanted):
            pass

    def _decode(self, wanted: Sequence[int]) -> Iterator[tuple[int, VideoFrame]]:
        with open_video(self._probe.path) as (container, stream):
            is_first = True
            for start, indices in self._runs(wanted):
                if self._probe.begins_s or not (is_first and start == self._index.starts[0]):
                    container.seek(start, stream=stream)
                is_first = False
                yield from self._run(container, stream, start, indices)

    def _runs(self, wanted: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        """Group the wanted frames by the latest starting point not after them."""
        firsts = np.array(self._index.starts)
        pts = np.array([self._index.pts[index] for index in wanted])
        positions = np.searchsorted(firsts, pts, side="right") - 1
        for position in sorted(set(positions.tolist())):
            run = np.flatnonzero(positions == position).tolist()
            yield self._index.starts[position], [wanted[place] for place in run]

    def _run(
        self, container: InputContainer, stream: VideoStream, start: int, indices: list[int]
    ) -> Iterator[tuple[int, VideoFrame]]:
        """Decode from ``start`` to the last packet wanted, but for frames that are neither wanted nor referenced."""
        index = self._index
        coming, skipped, last = list(range(index.pts.index(start), len(index.pts))), set[int](), None
        if len(set(index.order)) == len(index.order):  # else a time does not tell a packet
            wanted = {index.pts[each] for each in indices}
            decoded = index.order[index.order.index(start) :]
            last = max(wanted, key=decoded.index)
            decoded = set(decoded[: decoded.index(last) + 1])
            skipped = index.unreferenced - wanted
            coming = [each for each in coming if index.pts[each] in decoded - skipped]
        left, held = set(indices), deque[VideoFrame](maxlen=self._held_frames)
        for frame in self._frames_from(container, stream, start, skipped, last):
            _check_size(frame, self._probe)
            held.append(frame)
            if frame.pts is not None and frame.pts < start:
                continue  # shown before the starting point, decoded after it
            if not coming or frame.pts != index.pts[coming[0]]:
                break
            at = coming.pop(0)
            if at in left:
                left.remove(at)
                yield at, frame
            if not left:
                return
        raise SourceFailedError(f"{counted(len(left), 'frame')} did not come out at their times")

    def _frames_from(
        self,
        container: InputContainer,
        stream: VideoStream,
        start: int,
        skipped: Set[int],
        last: int | None,
    ) -> Iterator[VideoFrame]:
        """Decode from where the demuxer stands, which must not be after ``start``, to the packet of time ``last``."""
        is_first = True
        for packet in packets_of(container, stream):
            if is_first and (packet.pts is None or packet.pts > start):
                raise SourceFailedError(f"a seek to pts {start} led to {packet.pts}")
            is_first = False
            if packet.size and packet.pts in skipped:
                continue
            yield from frames_of(packet)
            if packet.size and packet.pts == last:
                yield from last_frames_of(stream)
                return


_MOST_REORDERED = 16  # frames: what H.264 and HEVC decoders hold back at most


class SequentialPyavSource:
    """Frames by their order of coming out: for files whose packets do not tell which frames there are.

    Everything is decoded once on creation: that alone tells how many frames there are, when, and whole.
    """

    def __init__(self, probe: VideoProbe, *, held_frames: int = 0) -> None:
        self._probe, self._held_frames = probe, held_frames
        self.height, self.width = probe.height, probe.width
        pts = [frame.pts for _, frame in self._decode()]
        if not pts:
            raise VideoRefusedError(FailureReason.NO_FRAMES, "no frame can be decoded")
        times = _times_in_order(pts)
        self.decoder = "pyav-sequential" if times else "pyav-sequential-constant-rate"
        if times:
            self.timestamps_s = seconds_of(times, probe.time_base)
        elif probe.rate:
            self.timestamps_s = seconds_of(tuple(range(len(pts))), 1 / Fraction(probe.rate))
        else:
            raise VideoRefusedError(FailureReason.CORRUPT_STREAM, "neither frame times nor a frame rate")

    def frames(self, wanted: Sequence[int]) -> Iterator[IndexedFrame]:
        """Upright RGB frames of ``wanted`` (ascending, unique), decoding from the first frame on."""
        convert, left = _RgbConverter(self._probe), set(wanted)
        for index, frame in self._decode():
            if index in left:
                left.remove(index)
                rgb = convert(frame)
                del frame  # see the module's docstring
                yield IndexedFrame(index, rgb)
            if not left:
                return

    def _decode(self) -> Iterator[tuple[int, VideoFrame]]:
        with open_video(self._probe.path) as (container, stream):
            index, held = 0, deque[VideoFrame](maxlen=self._held_frames)
            for packet in packets_of(container, stream):
                for frame in frames_of(packet):
                    _check_size(frame, self._probe)
                    held.append(frame)
                    yield index, frame
                    index += 1


def _times_in_order(pts: list[int | None]) -> tuple[int, ...] | None:
    """The times of frames in the order of coming out, which is that of presentation; None where there are none.

    AVI numbers its packets, and FFmpeg's guess of which frame a number belongs to is off by a few frames when there
    are B-frames. The numbers themselves are right, so they are put in order. A clock that jumps back by more tells
    no times.
    """
    known = [value for value in pts if value is not None]
    if len(known) < len(pts):
        return None
    order = np.argsort(np.array(known, dtype=np.int64), kind="stable")
    if (np.abs(order - np.arange(len(known))) > _MOST_REORDERED).any():
        return None
    return tuple(known[place] for place in order)


def _check_size(frame: VideoFrame, probe: VideoProbe) -> None:
    size = probe.orientation.upright_size(frame.height, frame.width)
    if size != (probe.height, probe.width):
        raise VideoRefusedError(
            FailureReason.CORRUPT_STREAM,
            f"frames change size from {probe.width}x{probe.height} to {size[1]}x{size[0]}",
        )


class _RgbConverter:
    """To upright RGB; one conversion context for all frames."""

    def __init__(self, probe: VideoProbe) -> None:
        self._probe = probe
        self._reformatter = VideoReformatter()

    def __call__(self, frame: VideoFrame) -> np.ndarray:
        try:
            rgb = self._reformatter.reformat(frame, format="rgb24", threads=1)
        except MemoryError:
            raise
        except (FFmpegError, ValueError) as error:
            raise VideoRefusedError(
                FailureReason.UNSUPPORTED_CODEC,
                f"no conversion of {frame.format.name} to RGB: {error}",
            ) from error
        return self._probe.orientation.upright(rgb.to_ndarray())


# ----------------------------------------------------------------------------------------------------
# Decode twice in two ways and believe only what agrees: for codecs that hide damage.
#
# FFmpeg's VP8 decoder neither fails nor complains when a damaged file leaves pixels undefined: they are
# whatever the recycled memory held. Holding on to frames changes which memory is recycled, and so brings it
# to light.
# ----------------------------------------------------------------------------------------------------


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
