"""Look into a video file before decoding it: which stream, which frames, where decoding may start.

Every packet is read once, none but the first few are decoded. Nothing the header claims is believed: frames
are what packets hold.
"""

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from deltacache.pipeline.decoding.container import check_frame, is_mov, open_video, packets_of
from deltacache.pipeline.decoding.frame_source import check_size
from deltacache.pipeline.decoding.orientation import Orientation, orientation_of
from deltacache.pipeline.decoding.packets import PacketFacts, packet_reader
from deltacache.schemas.errors import FailureReason, VideoRefusedError

_LONGEST_S = 1e7

_INDEXED_FORMATS = ("mov", "matroska")  # their packets carry presentation times


@dataclass(frozen=True, slots=True)
class FrameIndex:
    """Which frame is which, read from packets alone. Times are in units of the stream's time base.

    Attributes:
        pts: presentation times of the frames that are shown, ascending, unique.
        starts: presentation times of the frames at which decoding may start with exact results, ascending;
            the first is the first frame.
        every_keyframe_starts: all packets that the container flags as keyframes are ``starts``, and no frame
            is shown before such a packet and decoded after it.
    """

    pts: tuple[int, ...]
    starts: tuple[int, ...]
    every_keyframe_starts: bool


@dataclass(frozen=True, slots=True)
class VideoProbe:
    """One video stream that gave a first frame.

    Attributes:
        container: FFmpeg's name of the format, such as ``mov,mp4,m4a,3gp,3g2,mj2``.
        height: of the upright frame, pixels; likewise ``width``.
        time_base: seconds a unit of presentation time.
        rate: average frames a second, where the container tells.
        index: None where only decoding tells which frames there are.
    """

    path: str
    container: str
    codec: str
    pixel_format: str
    interlaced: bool
    height: int
    width: int
    orientation: Orientation
    time_base: Fraction
    rate: Fraction | None
    has_duration: bool
    index: FrameIndex | None


def probe_video(path: str) -> VideoProbe:
    """Read all packets of the best video stream and decode its first frame.

    Raises:
        VideoRefusedError: nothing to decode, structural damage, frames missing at the end, or too small.
    """
    with open_video(path) as (container, stream):
        scan = _Scan(stream)
        for packet in packets_of(container, stream):
            scan.add(packet)
        first = scan.check(container)
        orientation = orientation_of(first)
        height, width = orientation.upright_size(first.height, first.width)
        probe = VideoProbe(
            path=path,
            container=container.format.name,
            codec=stream.codec_context.codec.canonical_name,
            pixel_format=first.format.name,
            interlaced=first.interlaced_frame,
            height=height,
            width=width,
            orientation=orientation,
            time_base=Fraction(stream.time_base or 0),
            rate=stream.average_rate or stream.guessed_rate,
            has_duration=container.duration is not None,
            index=scan.index(container),
        )
    check_size(height, width)
    return probe


@dataclass(frozen=True, slots=True)
class _Packet:
    pts: int | None
    is_keyframe: bool
    facts: PacketFacts | None


class _Scan:
    """What one pass over the packets collects."""

    def __init__(self, stream: VideoStream) -> None:
        self._stream = stream
        context = stream.codec_context
        self._read = packet_reader(context.codec.canonical_name, bytes(context.extradata or b""))
        self._packets: list[_Packet] = []
        self._first: VideoFrame | None = None
        self._cut = 0
        self._irregular = False  # an edit list or a change of headers: only decoding tells what is shown

    def add(self, packet: "Packet[VideoStream]") -> None:
        """Note one packet; decode until the first frame is out."""
        if packet.is_corrupt:
            self._cut += 1
            return
        if packet.size:
            facts = self._read(bytes(packet)) if self._read else None
            if facts is not None and facts.damage:
                raise VideoRefusedError(
                    FailureReason.CORRUPT_STREAM,
                    f"packet {len(self._packets)} is damaged: {facts.damage}",
                )
            self._irregular |= packet.is_discard or packet.has_sidedata("new_extradata")
            self._packets.append(_Packet(packet.pts, packet.is_keyframe, facts))
        if self._first is None:
            self._first = next(iter(packet.decode()), None)

    def check(self, container: InputContainer) -> VideoFrame:
        """The first frame, once everything that the container's own table names is there."""
        if not self._packets and not self._cut:
            raise VideoRefusedError(
                FailureReason.NO_FRAMES,
                f"its header claims {self._stream.frames} frames, the file holds none",
            )
        missing = self._missing_frames(container)
        if missing:
            message = f"{missing} frames lie past the end of the file"
            raise VideoRefusedError(FailureReason.TRUNCATED, message)
        if self._cut:
            message = f"{self._cut} packets are incomplete"
            raise VideoRefusedError(FailureReason.CORRUPT_STREAM, message)
        if self._first is None:
            raise VideoRefusedError(FailureReason.NO_FRAMES, "no frame can be decoded")
        check_frame(self._first)
        return self._first

    def _missing_frames(self, container: InputContainer) -> int:
        if not is_mov(container):  # only there a table names every packet's place and size
            return 0
        return sum(entry.pos + entry.size > container.size for entry in self._stream.index_entries)

    def index(self, container: InputContainer) -> FrameIndex | None:
        """Frames and starting points, or None when packets do not determine them."""
        if self._irregular or not container.format.name.startswith(_INDEXED_FORMATS):
            return None
        packets = [
            (packet.pts, packet, packet.facts)
            for packet in self._packets
            if packet.pts is not None and packet.facts is not None
        ]
        shown = sorted(pts for pts, _, facts in packets if facts.shown)
        if len(packets) < len(self._packets) or len(set(shown)) < len(shown):
            return None
        ships_headers = any(facts.headers != "none" for _, _, facts in packets)
        starts: list[int] = []
        leads = False
        for pts, packet, facts in packets:
            leads |= bool(starts) and pts < starts[-1]
            if packet.is_keyframe and facts.random_access and (not ships_headers or facts.headers == "all"):
                starts.append(pts)
        if not shown or not starts or starts[0] != shown[0] or packets[0][0] != shown[0]:
            return None
        plain = len(shown) == len(packets) and len(starts) == sum(p.is_keyframe for p in self._packets)
        return FrameIndex(tuple(shown), tuple(sorted(starts)), plain and not leads)


def seconds_of(pts: tuple[int, ...], time_base: Fraction) -> np.ndarray:
    """(frames,) float32 seconds from the first frame.

    Raises:
        VideoRefusedError: the video would last longer than any does.
    """
    if (pts[-1] - pts[0]) * time_base > _LONGEST_S:
        raise VideoRefusedError(
            FailureReason.CORRUPT_STREAM, f"its frames claim to be {pts[-1] - pts[0]} ticks apart"
        )
    numerator, denominator = time_base.as_integer_ratio()  # whole numbers: rounded once, and fast
    return np.array([(value - pts[0]) * numerator / denominator for value in pts], dtype=np.float32)
