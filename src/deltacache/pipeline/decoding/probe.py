"""Look into a video file before decoding it: which stream, which frames, where decoding may start.

Every packet is read once, none but the first few are decoded. Nothing the header claims is believed: frames
are what packets hold.
"""

import logging
import math
import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Literal, cast

import av
import av.logging
import av.sidedata.sidedata
import numpy as np
from av.container import InputContainer
from av.error import DecoderNotFoundError, FFmpegError, InvalidDataError, PatchWelcomeError
from av.packet import Packet
from av.video.frame import PictureType, VideoFrame
from av.video.stream import VideoStream

from deltacache.pipeline.decoding.frame_source import Span, check_size
from deltacache.schemas.errors import FailureReason, VideoRefusedError
from deltacache.schemas.texts import counted

# ----------------------------------------------------------------------------------------------------
# What the compressed bytes of one packet tell without decoding them.
#
# Containers flag "keyframes" that are no safe place to start (open groups of pictures, recovery points) and
# hold packets that show nothing. Pixels are exact after a seek only to a packet that resets the decoder, so
# that is read from the bitstream: H.264 and HEVC (ITU-T H.264/H.265 section 7.4), VP8 (RFC 6386 section 9.1),
# VP9 (bitstream specification section 6.2), AV1 (section 5.9.2), MPEG-4 part 2 (section 6.2.5).
# ----------------------------------------------------------------------------------------------------


_H264_SLICES, _H264_IDR, _H264_HEADERS = frozenset({1, 2, 5}), frozenset({5}), frozenset({7, 8})
_H264_SEI, _H264_SEQUENCE, _PICTURE_TIMING = 6, 7, 1
_H264_HIGH_PROFILES = frozenset({44, 83, 86, 100, 110, 118, 122, 128, 134, 135, 138, 139, 244})
_SLICE_HEAD = 24  # bytes: four codes of a few bits each
_INTRA_SLICES = frozenset({2, 4})
_HEVC_SLICES, _HEVC_IDR, _HEVC_HEADERS = frozenset(range(32)), frozenset({19, 20}), frozenset({33, 34})
_HEVC_UNREFERENCED = frozenset(range(0, 16, 2))  # by pictures of the same temporal layer
_AV1_SEQUENCE_HEADER, _AV1_FRAME_HEADER, _AV1_FRAME = 1, 3, 6


@dataclass(frozen=True, slots=True)
class PacketFacts:
    """One packet.

    Attributes:
        random_access: decoding may start here: the packet resets every reference.
        shown: it gives a frame to look at.
        headers: parameter sets it brings itself: none of them, some, or all.
        sequences: H.264 sequence parameter sets among them, as they are.
        tells_fields: H.264 picture timing is there, which can call a picture interlaced.
        slice_head: the first bytes of its first H.264 slice.
        unreferenced: no other picture of its temporal layer or below is decoded from it.
        layer: its temporal layer, 0 the lowest.
        damage: what is wrong with its structure, if anything.
    """

    random_access: bool
    shown: bool = True
    headers: Literal["none", "some", "all"] = "none"
    sequences: tuple[bytes, ...] = ()
    tells_fields: bool = False
    slice_head: bytes = b""
    unreferenced: bool = False
    layer: int = 0
    damage: str | None = None


PacketReader = Callable[[bytes], PacketFacts]


def packet_reader(codec: str, extradata: bytes) -> PacketReader | None:
    """How to read packets of ``codec``, or None when nothing is known about them.

    Args:
        codec: FFmpeg's canonical codec name.
        extradata: the container's codec configuration, such as ``avcC``.
    """
    if codec == "h264" and len(extradata) > 6 and extradata[0] == 1:
        return partial(_read_h264, length_size=(extradata[4] & 3) + 1)
    if codec == "hevc" and len(extradata) > 22 and extradata[0] == 1:
        return partial(_read_hevc, length_size=(extradata[21] & 3) + 1)
    return {"vp8": _read_vp8, "vp9": _read_vp9, "av1": _read_av1, "mpeg4": _read_mpeg4}.get(codec)


class _BrokenUnitError(Exception):
    """A length field points outside its packet."""


def _units(data: bytes, length_size: int) -> Iterator[tuple[int, int]]:
    """Start and end of the length-prefixed NAL units of a packet, at least one."""
    position, end, units = 0, len(data), 0
    while position + length_size <= end:
        length = int.from_bytes(data[position : position + length_size], "big")
        position += length_size
        if length > end - position:
            raise _BrokenUnitError(f"a unit of {length} bytes where {end - position} are left")
        if length:
            if data[position] & 0x80:
                raise _BrokenUnitError("a unit's forbidden bit is set")
            yield position, position + length
            units += 1
        position += length
    if any(data[position:]):
        raise _BrokenUnitError(f"{end - position} stray bytes after the last unit")
    if not units:
        raise _BrokenUnitError(f"{end} bytes without a unit")


def _read_h264(data: bytes, *, length_size: int) -> PacketFacts:
    types, sequences, tells_fields, slice_head = set[int](), list[bytes](), False, b""
    referenced = False
    try:
        for start, end in _units(data, length_size):
            kind = data[start] & 31
            types.add(kind)
            if kind == _H264_SEQUENCE:
                sequences.append(data[start:end])
            elif kind == _H264_SEI:
                tells_fields |= _PICTURE_TIMING in _sei_types(data[start + 1 : end])
            elif kind in _H264_SLICES:
                referenced |= bool(data[start] >> 5)
                slice_head = slice_head or data[start : min(end, start + _SLICE_HEAD)]
    except _BrokenUnitError as error:
        return PacketFacts(False, damage=str(error))
    return PacketFacts(
        bool(types & _H264_IDR),
        bool(types & _H264_SLICES),
        _which(types, _H264_HEADERS),
        tuple(sequences),
        tells_fields,
        slice_head,
        unreferenced=bool(slice_head) and not referenced,
    )


def _sei_types(data: bytes) -> Iterator[int]:
    """Payload types of a unit of supplemental information. Escapes are left in: they lie inside payloads."""
    position = 0
    while position + 1 < len(data):
        values = [0, 0]  # type and size
        for place in range(2):
            while position < len(data) and data[position] == 255:
                values[place] += 255
                position += 1
            values[place] += data[position] if position < len(data) else 0
            position += 1
        yield values[0]
        position += values[1]


@dataclass(frozen=True, slots=True)
class H264Sequence:
    """What an H.264 sequence parameter set says (ITU-T H.264 section 7.3.2.1.1).

    Attributes:
        macroblocks: columns, and rows of a frame.
        frames_only: no picture is a field, and no macroblock is one.
        number_bits: of the number that counts reference frames.
        skips_numbers: numbers may be missing though no frame is.
        separate_planes: slices say which colour they are of.
    """

    macroblocks: tuple[int, int]
    frames_only: bool
    number_bits: int
    skips_numbers: bool
    separate_planes: bool


def h264_sequences(extradata: bytes) -> Iterator[bytes]:
    """The sequence parameter sets of an ``avcC`` (ISO 14496-15 section 5.3.3.1); ends early where it is damaged."""
    position = 6
    for _ in range(extradata[5] & 31 if len(extradata) > position else 0):
        start = position + 2
        position = start + int.from_bytes(extradata[position:start], "big")
        yield extradata[start:position]


def parse_h264_sequence(unit: bytes) -> H264Sequence | None:
    """Read a sequence parameter set; None when it is damaged."""
    bits = _Bits(unit[1:].replace(b"\0\0\3", b"\0\0"))
    try:
        profile, separate_planes = bits.take(8), 0
        bits.take(16)
        bits.golomb()  # its number
        if profile in _H264_HIGH_PROFILES:
            chroma = bits.golomb()
            separate_planes = bits.take(1 if chroma == 3 else 0)
            for _ in range(2):
                bits.golomb()  # bit depths
            bits.take(1)
            if bits.take(1):
                for place in range(12 if chroma == 3 else 8):
                    if bits.take(1):
                        _skip_scaling_list(bits, 16 if place < 6 else 64)
        number_bits, order = bits.golomb() + 4, bits.golomb()
        if order == 0:
            bits.golomb()
        elif order == 1:
            bits.take(1)
            for _ in range(2):
                bits.golomb()
            for _ in range(bits.golomb() & 255):
                bits.golomb()
        bits.golomb()
        skips_numbers = bits.take(1)
        columns, rows, frames_only = bits.golomb() + 1, bits.golomb() + 1, bits.take(1)
    except IndexError:
        return None
    size = (columns, rows * (2 - frames_only))
    return H264Sequence(size, bool(frames_only), number_bits, bool(skips_numbers), bool(separate_planes))


def lost_h264_reference(heads: Sequence[bytes], sequence: H264Sequence) -> int | None:
    """The first picture before which a reference frame is missing, by the numbers that count them.

    FFmpeg fills such a gap with a copy of another frame, and says nothing. A gap before an intra picture, or a count
    that starts again at 0 or 1, is not a sign of a loss: streams are joined there.

    Args:
        heads: ``slice_head`` of every picture, in decoding order.
    """
    before = 0
    for place, head in enumerate(heads):
        bits = _Bits(head[1:].replace(b"\0\0\3", b"\0\0"))
        try:
            bits.golomb()  # first macroblock
            kind = bits.golomb() % 5
            bits.golomb()  # picture parameter set
            bits.take(2 if sequence.separate_planes else 0)
            number = bits.take(sequence.number_bits)
        except IndexError:
            return None
        is_next = (number - before) % (1 << sequence.number_bits) <= 1
        if not is_next and number > 1 and kind not in _INTRA_SLICES and place:
            return place
        if head[0] >> 5:  # a reference itself
            before = number
    return None


def _skip_scaling_list(bits: "_Bits", size: int) -> None:
    last = following = 8
    for _ in range(size):
        if following:
            code = bits.golomb()
            following = (last + ((code + 1) // 2 if code & 1 else -(code // 2))) % 256
        last = following or last


class _Bits:
    """Bits of a parameter set, from the front. Raises IndexError past the end."""

    def __init__(self, data: bytes) -> None:
        self._bits = "".join(f"{byte:08b}" for byte in data)
        self._position = 0

    def take(self, count: int) -> int:
        """An unsigned number of ``count`` bits."""
        start, self._position = self._position, self._position + count
        if self._position > len(self._bits):
            raise IndexError("a parameter set ends early")
        return int(self._bits[start : self._position] or "0", 2)

    def golomb(self) -> int:
        """An unsigned exponential Golomb code."""
        zeros = self._bits.find("1", self._position) - self._position
        if zeros < 0:
            raise IndexError("a parameter set ends early")
        self._position += zeros
        return self.take(zeros + 1) - 1


def _read_hevc(data: bytes, *, length_size: int) -> PacketFacts:
    try:
        units = [(data[start] >> 1 & 63, data[start + 1] & 7) for start, _ in _units(data, length_size)]
    except _BrokenUnitError as error:
        return PacketFacts(False, damage=str(error))
    except IndexError:
        return PacketFacts(False, damage="a unit without its header")
    types = {kind for kind, _ in units}
    slices = types & _HEVC_SLICES
    return PacketFacts(
        bool(types & _HEVC_IDR),
        bool(slices),
        _which(types, _HEVC_HEADERS),
        unreferenced=bool(slices) and slices <= _HEVC_UNREFERENCED,
        layer=max(layer for kind, layer in units if kind in slices) - 1 if slices else 0,
    )


def _which(types: set[int], headers: frozenset[int]) -> Literal["none", "some", "all"]:
    if headers <= types:
        return "all"
    return "some" if types & headers else "none"


def _read_vp8(data: bytes) -> PacketFacts:
    if len(data) < 3:
        return PacketFacts(False, shown=False, damage=f"a frame of {len(data)} bytes")
    return PacketFacts(not data[0] & 1, shown=bool(data[0] & 0x10))


def _read_vp9(data: bytes) -> PacketFacts:
    # Hidden frames travel in the packet of the frame that is shown next, so a packet is taken as shown;
    # one that is not is met when its frame does not come out.
    if not data or data[0] >> 6 != 2:
        return PacketFacts(False, damage="no VP9 frame marker")
    shift = 2 if data[0] >> 4 & 3 == 3 else 3  # profile 3 has one reserved bit more
    shows_existing, inter = data[0] >> shift & 1, data[0] >> shift - 1 & 1
    return PacketFacts(not shows_existing and not inter)


def _read_mpeg4(data: bytes) -> PacketFacts:
    start = data.find(b"\x00\x00\x01\xb6")
    if start < 0 or start + 4 >= len(data):
        return PacketFacts(False, shown=False)
    return PacketFacts(data[start + 4] >> 6 == 0)


def _read_av1(data: bytes) -> PacketFacts:
    has_sequence_header = False
    try:
        for kind, payload in _av1_units(data):
            if kind == _AV1_SEQUENCE_HEADER:
                has_sequence_header = True
            elif kind in (_AV1_FRAME_HEADER, _AV1_FRAME):
                shows_existing, frame_type, shown = payload >> 7, payload >> 5 & 3, payload >> 4 & 1
                is_key = has_sequence_header and not shows_existing and frame_type == 0 and shown
                return PacketFacts(bool(is_key))
    except IndexError:
        return PacketFacts(False, damage="an AV1 unit runs past its packet")
    return PacketFacts(False, shown=False)


def _av1_units(data: bytes) -> Iterator[tuple[int, int]]:
    """Type and first payload byte of each AV1 unit."""
    position = 0
    while position < len(data):
        header = data[position]
        position += 1 + (header >> 2 & 1)
        length = len(data) - position
        if header >> 1 & 1:
            length, position = _leb128(data, position)
        if length:
            yield header >> 3 & 15, data[position]
        position += length


def _leb128(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for index in range(8):
        byte = data[position + index]
        value |= (byte & 127) << 7 * index
        if not byte & 128:
            return value, position + index + 1
    raise IndexError("a length of more than 8 bytes")


# ----------------------------------------------------------------------------------------------------
# Opening an untrusted file, and FFmpeg's errors as refusals.
# ----------------------------------------------------------------------------------------------------


_ATTACHED_PICTURE = 0x400
# Formats that hold other files' names (playlists, concatenations, image sequences) are left out: a video
# must not make us open anything but itself.
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpegts,mpeg,mpegvideo,h264,hevc,m4v,flv,asf,ogg,ivf,nut,"
    "mxf,rm,dv,mp3,wav,flac,aac"
)

_PROTECTED = "protected by DRM: get an unprotected copy"
_HEADERS = 1 << 20  # bytes at either end of a file that are searched for signs of DRM
_ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_ASF_PROTECTED = (  # its objects of content encryption, extended and not
    bytes.fromhex("fbb3112223bdd211b4b700a0c955fc6e"),
    bytes.fromhex("14e68a292226174cb935dae07ee9289c"),
)
_MATROSKA_ENCRYPTION = b"\x47\xe1\x81\x05"  # ContentEncAlgo: AES
# Errors about what lies beside the pixels.
_HARMLESS = re.compile(r"\bSEI\b|(?i:exif|\bicc|\bAPP\d*\b|\bdovi\b|\bRPU\b|user data|caption|timecode)")


class _ErrorLog(logging.Handler):
    """What FFmpeg logs as an error: decoders that conceal damage often say so nowhere else."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._messages: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append((record.name.removeprefix("libav."), record.getMessage()))

    def take(self) -> list[tuple[str, str]]:
        """(who, message) of each error since the last call, without the harmless ones."""
        messages, self._messages = self._messages, []
        return [(name, message) for name, message in messages if not _HARMLESS.search(message)]


_errors = _ErrorLog()
logging.getLogger("libav").addHandler(_errors)
logging.getLogger("libav").propagate = False
av.logging.set_level(av.logging.ERROR)
av.logging.set_skip_repeated(False)


@contextmanager
def open_video(path: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its best video stream (FFmpeg's choice, as decord's), decoding with one thread.

    Raises:
        VideoRefusedError: there is nothing in it to decode, or decoding inside the context fails.
    """
    with refusing_damage(path), _open_container(path) as container:
        if not len(container.streams):
            raise _unopened(path)
        stream = container.streams.best("video")
        if stream is None and container.streams.video:
            raise VideoRefusedError(FailureReason.UNSUPPORTED_CODEC, "no decoder for its video")
        if not isinstance(stream, VideoStream) or stream.disposition & _ATTACHED_PICTURE:
            kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "none"
            raise VideoRefusedError(FailureReason.NO_VIDEO_STREAM, f"only streams of type {kinds}")
        if stream.codec_context is None:  # a codec that this FFmpeg has no name for
            raise VideoRefusedError(FailureReason.UNSUPPORTED_CODEC, "its video codec is unknown")
        stream.thread_type = "NONE"
        stream.thread_count = 1
        yield container, stream


def packets_of(container: InputContainer, stream: VideoStream) -> "Iterator[Packet[VideoStream]]":
    """The packets of ``stream`` in decoding order, then an empty one that drains the decoder.

    Raises:
        VideoRefusedError: FFmpeg's demuxer complained between two packets: what lay there is lost.
    """
    is_first = True
    _errors.take()
    try:
        for packet in container.demux(stream):
            if packet.has_sidedata("encryption_info"):  # before FFmpeg decodes it to garbage or errors
                raise VideoRefusedError(FailureReason.ENCRYPTED, _PROTECTED)
            complaints = [text for name, text in _errors.take() if name == container.format.name]
            if complaints and packet.size and not is_first:
                raise VideoRefusedError(
                    FailureReason.CORRUPT_STREAM, f"the file is damaged between two frames: {complaints[0]}"
                )
            is_first = False
            yield packet
    except IndexError as error:  # PyAV's, when a packet belongs to a stream that opening did not find
        message = "a stream appears in the middle of the file"
        raise VideoRefusedError(FailureReason.CORRUPT_STREAM, message) from error


def _open_container(path: str) -> InputContainer:
    try:
        with Path(path).open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        raise VideoRefusedError(FailureReason.UNREADABLE, f"{error.strerror or error}") from error
    if empty:
        raise VideoRefusedError(FailureReason.EMPTY_FILE, "the file has zero bytes")
    try:
        # Metadata is often not UTF-8; none of it is used. An absolute path never reads as a protocol.
        return av.open(
            str(Path(path).absolute()), options={"format_whitelist": _FORMATS}, metadata_errors="ignore"
        )
    except ValueError as error:  # InvalidDataError, ArgumentError
        raise _unopened(path) from error


def _unopened(path: str) -> VideoRefusedError:
    """A file that begins like a video but has no index was cut off before it; the rest is not a video."""
    with Path(path).open("rb") as file:
        head = file.read(12)
    if head[4:8] == b"ftyp" or head[:4] == b"\x1a\x45\xdf\xa3":
        return VideoRefusedError(
            FailureReason.TRUNCATED, "begins as a video, its index is missing or damaged"
        )
    return VideoRefusedError(FailureReason.NOT_A_VIDEO, "no demuxer recognises its content")


@contextmanager
def refusing_damage(path: str) -> Iterator[None]:
    """Turn FFmpeg's errors into the refusal of this video."""
    try:
        yield
    except (FFmpegError, VideoRefusedError) as error:
        if _is_protected(path):
            raise VideoRefusedError(FailureReason.ENCRYPTED, _PROTECTED) from error
        if isinstance(error, VideoRefusedError):
            raise
        raise VideoRefusedError(_reason_of(path, error), f"{error.strerror or error}") from error


def _is_protected(path: str) -> bool:
    """Whether an MP4, an ASF or a WebM that could not be read says at its beginning or end that it has DRM."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(_HEADERS)
            file.seek(max(len(data), file.seek(0, os.SEEK_END) - _HEADERS))
            data += file.read(_HEADERS)
    except OSError:
        return False
    if data[4:8] == b"ftyp":
        return (
            b"sinf" in data and b"schm" in data and any(name in data for name in (b"encv", b"drmi", b"drmv"))
        )
    if data.startswith(_ASF):
        return any(name in data for name in _ASF_PROTECTED)
    return data.startswith(b"\x1a\x45\xdf\xa3") and _MATROSKA_ENCRYPTION in data


def _reason_of(path: str, error: FFmpegError) -> FailureReason:
    if isinstance(error, MemoryError):
        return FailureReason.OUT_OF_MEMORY
    if isinstance(error, OSError) and not _is_readable(path):  # FFmpeg says "I/O error" of bad data too
        return FailureReason.UNREADABLE
    if isinstance(error, DecoderNotFoundError | PatchWelcomeError):
        return FailureReason.UNSUPPORTED_CODEC
    return FailureReason.CORRUPT_STREAM


def _is_readable(path: str) -> bool:
    try:
        with Path(path).open("rb") as file:
            while file.read(1 << 20):
                pass
    except OSError:
        return False
    return True


def frames_of(packet: "Packet[VideoStream]") -> list[VideoFrame]:
    """The frames that come out of the decoder with this packet.

    A packet without a picture (parameter sets, supplemental information) may be refused by the decoder.

    Raises:
        VideoRefusedError: the decoder calls a frame damaged or logs an error: pixels are made up from other frames.
    """
    _errors.take()
    try:
        frames = packet.decode()
    except InvalidDataError:
        if _holds_picture(packet):
            raise
        frames = []
    if (errors := _errors.take()) and _holds_picture(packet):
        name, message = errors[0]
        raise VideoRefusedError(FailureReason.CORRUPT_STREAM, f"the decoder {name} says: {message}")
    for frame in frames:
        if frame.is_corrupt:
            raise VideoRefusedError(FailureReason.CORRUPT_STREAM, f"the frame at pts {frame.pts} is damaged")
    return frames


def last_frames_of(stream: VideoStream) -> list[VideoFrame]:
    """The frames that the decoder still holds back; before the next packet it needs a seek or ``flush_buffers``."""
    end = cast("Packet[VideoStream]", Packet(0))
    end.stream = stream
    return frames_of(end)


def _holds_picture(packet: "Packet[VideoStream]") -> bool:
    context = packet.stream.codec_context
    read = packet_reader(context.codec.canonical_name, bytes(context.extradata or b""))
    if read is None or not packet.size:
        return True
    facts = read(bytes(packet))
    return facts.shown or facts.damage is not None


def is_mov(container: InputContainer) -> bool:
    """MP4, MOV and their kin: they hold a table of every packet's place and size."""
    return container.format.name.startswith("mov")


# ----------------------------------------------------------------------------------------------------
# How a frame must be turned to be upright.
# ----------------------------------------------------------------------------------------------------


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
        order: the times of all packets, in decoding order.
        unreferenced: times of frames that no other frame is decoded from; none if two packets have one time.
    """

    pts: tuple[int, ...]
    starts: tuple[int, ...]
    every_keyframe_starts: bool
    order: tuple[int, ...]
    unreferenced: frozenset[int]


@dataclass(frozen=True, slots=True)
class VideoProbe:
    """One video stream that gave a first frame.

    Attributes:
        container: FFmpeg's name of the format, such as ``mov,mp4,m4a,3gp,3g2,mj2``.
        height: of the upright frame, pixels; likewise ``width``.
        time_base: seconds a unit of presentation time.
        rate: average frames per second, where the container tells.
        interlaced: some frame is, or may be as far as packets tell.
        frames: at most this many, a packet each.
        index: None where only decoding tells which frames there are.
        begins_s: when the first frame of ``index`` is shown, seconds from the first frame of the file: 0 unless only
            the packets around a span were read.
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
    begins_s: float = 0.0


def probe_video(path: str, span: Span | None = None) -> VideoProbe:
    """Read all packets of the best video stream and decode its first frame.

    With ``span`` only the packets around it are read, where they tell from which one on decoding is exact.

    Raises:
        VideoRefusedError: nothing to decode, structural damage, frames missing at the end, or too small.
    """
    with open_video(path) as (container, stream):
        scan, begins_s = _Scan(stream), 0.0
        if span is None:
            for packet in packets_of(container, stream):
                scan.add(packet)
        else:
            begins = _scan_around(span, container, stream, scan)
            if begins is None:
                return probe_video(path)
            begins_s = begins
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
            begins_s=begins_s,
        )
    check_size(height, width)
    return probe


def _scan_around(span: Span, container: InputContainer, stream: VideoStream, scan: "_Scan") -> float | None:
    """Read the packets from the last start before a span to the first one behind it.

    Returns:
        When the first frame is shown, seconds from the first frame of the file; None where the packets do not tell
        where decoding may start.
    """
    if not stream.time_base or not container.format.name.startswith(_SEEKABLE_FORMATS):
        return None
    origin = stream.start_time or 0
    first, behind = (origin + math.ceil(Fraction(time) / stream.time_base) for time in span)
    if first > origin:
        container.seek(first, stream=stream)
    for packet in packets_of(container, stream):
        is_start = packet.is_keyframe and scan.is_start(packet)
        if not scan.packets and not is_start:
            return None
        scan.add(packet)
        if (
            is_start and packet.pts is not None and packet.pts >= behind
        ):  # nothing behind it is shown before it
            break
    index = scan.index(container) if scan.packets else None
    if index is None or index.starts[0] > max(first, origin):
        return None
    return float((index.starts[0] - origin) * stream.time_base)


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
        facts = None
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
            frames = frames_of(packet)
            if not frames and facts is not None and facts.random_access:  # need not wait for what follows
                frames = last_frames_of(self._stream)
                self._stream.codec_context.flush_buffers()
            self._first = next(iter(frames), None)

    def is_start(self, packet: "Packet[VideoStream]") -> bool:
        """Whether the packet tells that decoding may start at it."""
        return self._read is not None and packet.size > 0 and self._read(bytes(packet)).random_access

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
                f"its header claims {counted(self._stream.frames, 'frame')}, the file holds none",
            )
        missing = self._missing_frames(container)
        if missing:
            message = f"{counted(missing, 'frame lies', 'frames lie')} past the end of the file"
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
                "its first frame is not a keyframe, so what it shows until the first one cannot be decoded",
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
        order = tuple(time for time, _, _ in packets)
        top = max(facts.layer for _, _, facts in packets)
        unreferenced = frozenset(
            time for time, _, facts in packets if facts.unreferenced and facts.layer == top
        )
        if len(set(order)) < len(order):
            unreferenced = frozenset()
        if self._read is None or not container.format.name.startswith(_SEEKABLE_FORMATS):
            return FrameIndex(pts, pts[:1], False, order, unreferenced)
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
        return FrameIndex(pts, (pts[0], *sorted(safe)), plain and not leads, order, unreferenced)


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
