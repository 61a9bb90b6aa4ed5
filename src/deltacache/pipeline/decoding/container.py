"""Opening an untrusted file, and FFmpeg's errors as refusals."""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import av.logging
from av.container import InputContainer
from av.error import DecoderNotFoundError, FFmpegError, InvalidDataError, PatchWelcomeError
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from deltacache.pipeline.decoding.packets import packet_reader
from deltacache.schemas.errors import FailureReason, VideoRefusedError

_ATTACHED_PICTURE = 0x400
# Formats that hold other files' names (playlists, concatenations, image sequences) are left out: a video
# must not make us open anything but itself.
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpegts,mpeg,mpegvideo,h264,hevc,m4v,flv,asf,ogg,ivf,nut,"
    "mxf,rm,dv,mp3,wav,flac,aac"
)

_PROTECTED = "protected by DRM: get it without"
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
    _check_file(path)
    try:
        # Metadata is often not UTF-8; none of it is used. An absolute path never reads as a protocol.
        return av.open(
            str(Path(path).absolute()), options={"format_whitelist": _FORMATS}, metadata_errors="ignore"
        )
    except ValueError as error:  # InvalidDataError, ArgumentError
        raise _unopened(path) from error


def _check_file(path: str) -> None:
    try:
        with Path(path).open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        raise VideoRefusedError(FailureReason.UNREADABLE, f"{error.strerror or error}") from error
    if empty:
        raise VideoRefusedError(FailureReason.EMPTY_FILE, "the file has zero bytes")


def _unopened(path: str) -> VideoRefusedError:
    """A file that begins like a video but has no index was cut off before it; the rest is no video."""
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
