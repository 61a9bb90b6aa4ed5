"""Look into a video file before decoding it: which stream, which frames, where decoding may start.

Every packet is read once, none but the first few are decoded. Nothing the header claims is believed: frames
are what packets hold.
"""

from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import PictureType, VideoFrame
from av.video.stream import VideoStream

from deltacache.pipeline.decoding.container import frames_of, is_mov, open_video, packets_of
from deltacache.pipeline.decoding.frame_source import check_size
from deltacache.pipeline.decoding.orientation import Orientation, orientation_of
from deltacache.pipeline.decoding.packets import (
    PacketFacts,
    h264_sequences,
    lost_h264_reference,
    packet_reader,
    parse_h264_sequence,
)
from deltacache.schemas.errors import FailureReason, VideoRefusedError

_LONGEST_S = 1e7

_SEEKABLE_FORMATS = ("mov", "matroska")
_UNKNOWN = PacketFacts(random_access=False)
# Decoders that drop frames until one of which all is known; the others show grey, or what memory holds.
_FIND_THEIR_START = frozenset({"h264", "hevc", "vvc", "vp8", "vp9", "av1"})
_DEPENDENT = frozenset({PictureType.P, PictureType.B, PictureType.S})


@dataclass(frozen=True, slots=True)
class FrameIndex:
    """Which frame is which, read from packets alone. Times are in units of the stream's time base.

    Attributes:
        pts: presentation times of the frames that are shown, not descending; a time may be there twice.
        starts: presentation times of the frames at which decoding may start with exact results, ascending;
            the first is the first frame, the only one where no seek is known to be exact.
        every_keyframe_starts: all packets that the container flags as keyframes are ``starts``, no frame is shown
            before such a packet and decoded after it, and no time is there twice.
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
        interlaced: some frame is, or may be as far as packets tell.
        frames: at most this many, a packet each.
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
    frames: int
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
            interlaced=first.interlaced_frame or scan.may_be_interlaced,
            height=height,
            width=width,
            orientation=orientation,
            time_base=Fraction(stream.time_base or 0),
            rate=stream.average_rate or stream.guessed_rate,
            has_duration=container.duration is not None,
            frames=len(scan.packets),
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
        self._codec, extradata = context.codec.canonical_name, bytes(context.extradata or b"")
        self._read = packet_reader(self._codec, extradata)
        self.packets: list[_Packet] = []
        self._first: VideoFrame | None = None
        self._cut = 0
        self._irregular = False  # an edit list or a change of headers: only decoding tells what is shown
        is_avc = self._codec == "h264" and self._read is not None
        self._sequences = set(h264_sequences(extradata)) if is_avc else set[bytes]()
        self._tells_fields = False

    def add(self, packet: "Packet[VideoStream]") -> None:
        """Note one packet; decode until the first frame is out."""
        if packet.is_corrupt:
            self._cut += 1
            return
        if packet.size:
            facts = self._read(bytes(packet)) if self._read else None
            if facts is not None:
                if facts.damage:
                    raise VideoRefusedError(
                        FailureReason.CORRUPT_STREAM,
                        f"packet {len(self.packets)} is damaged: {facts.damage}",
                    )
                self._sequences.update(facts.sequences)
                self._tells_fields |= facts.tells_fields
            self._irregular |= packet.is_discard or packet.has_sidedata("new_extradata")
            self.packets.append(_Packet(packet.pts, packet.is_keyframe, facts))
        if self._first is None:
            self._first = next(iter(frames_of(packet)), None)

    @property
    def may_be_interlaced(self) -> bool:
        """Whether H.264 parameter sets or picture timing allow a later frame to be."""
        parsed = [parse_h264_sequence(unit) for unit in self._sequences]
        return self._tells_fields or any(each is None or not each.frames_only for each in parsed)

    def check(self, container: InputContainer) -> VideoFrame:
        """The first frame, once everything that the container's own table names is there."""
        if not self.packets and not self._cut:
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
        if (lost := self._lost_reference()) is not None:
            message = f"a frame before frame {lost} (in decoding order), which others depend on, is lost"
            raise VideoRefusedError(FailureReason.CORRUPT_STREAM, message)
        if self._codec not in _FIND_THEIR_START and self._first.pict_type in _DEPENDENT:
            raise VideoRefusedError(
                FailureReason.CORRUPT_STREAM,
                "its first frame is no keyframe, so what it shows until the first one cannot be decoded",
            )
        return self._first

    def _lost_reference(self) -> int | None:
        parsed = {parse_h264_sequence(unit) for unit in self._sequences}
        sequence = next(iter(parsed)) if len(parsed) == 1 else None
        if sequence is None or sequence.skips_numbers or not sequence.frames_only:
            return None
        heads = [packet.facts.slice_head for packet in self.packets if packet.facts and packet.facts.shown]
        return lost_h264_reference(heads, sequence)

    def _missing_frames(self, container: InputContainer) -> int:
        if not is_mov(container):  # only there a table names every packet's place and size
            return 0
        return sum(entry.pos + entry.size > container.size for entry in self._stream.index_entries)

    def index(self, container: InputContainer) -> FrameIndex | None:
        """Frames and starting points, or None when packets do not determine them."""
        sizes = {each.macroblocks for unit in self._sequences if (each := parse_h264_sequence(unit))}
        # AVI numbers packets in decoding order: which frame bears which number is a guess where they differ.
        guessed = container.format.name == "avi" and self._stream.codec_context.has_b_frames
        if self._irregular or len(sizes) > 1 or guessed:
            return None
        packets = [
            (packet.pts, packet, packet.facts or _UNKNOWN)
            for packet in self.packets
            if packet.pts is not None
        ]
        shown = Counter(pts for pts, _, facts in packets if facts.shown)
        if len(packets) < len(self.packets) or not shown or packets[0][0] != min(shown):
            return None
        pts = tuple(sorted(shown.elements()))
        if self._read is None or not container.format.name.startswith(_SEEKABLE_FORMATS):
            return FrameIndex(pts, pts[:1], every_keyframe_starts=False)
        ships_headers = any(facts.headers != "none" for _, _, facts in packets)
        starts: list[int] = []
        leads = False
        for time, packet, facts in packets:
            leads |= bool(starts) and time < starts[-1]
            if packet.is_keyframe and facts.random_access and (not ships_headers or facts.headers == "all"):
                starts.append(time)
        if not starts or starts[0] != pts[0]:
            return None
        # Of two frames of one time nobody could say which one a seek leads to.
        safe = [start for start in starts[1:] if shown[start] == 1 and start > pts[0]]
        plain = len(shown) == len(packets) and len(starts) == sum(p.is_keyframe for p in self.packets)
        return FrameIndex(pts, (pts[0], *sorted(safe)), plain and not leads)


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
