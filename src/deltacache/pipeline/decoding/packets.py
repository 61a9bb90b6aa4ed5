"""What the compressed bytes of one packet tell without decoding them.

Containers flag "keyframes" that are no safe place to start (open groups of pictures, recovery points) and hold
packets that show nothing. Pixels are exact after a seek only to a packet that resets the decoder, so that is
read from the bitstream: H.264 and HEVC (ITU-T H.264/H.265 section 7.4), VP8 (RFC 6386 section 9.1), VP9
(bitstream specification section 6.2), AV1 (section 5.9.2), MPEG-4 part 2 (section 6.2.5).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

_H264_SLICES, _H264_IDR, _H264_HEADERS = frozenset({1, 2, 5}), frozenset({5}), frozenset({7, 8})
_HEVC_SLICES, _HEVC_IDR, _HEVC_HEADERS = frozenset(range(32)), frozenset({19, 20}), frozenset({33, 34})
_AV1_SEQUENCE_HEADER, _AV1_FRAME_HEADER, _AV1_FRAME = 1, 3, 6


@dataclass(frozen=True, slots=True)
class PacketFacts:
    """One packet.

    Attributes:
        random_access: decoding may start here: the packet resets every reference.
        shown: it gives a frame to look at.
        headers: parameter sets it brings itself: none of them, some, or all.
        damage: what is wrong with its structure, if anything.
    """

    random_access: bool
    shown: bool = True
    headers: Literal["none", "some", "all"] = "none"
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


def _units(data: bytes, length_size: int) -> Iterator[int]:
    """Offsets of the length-prefixed NAL units of a packet."""
    position, end = 0, len(data)
    while position + length_size <= end:
        length = int.from_bytes(data[position : position + length_size], "big")
        position += length_size
        if length > end - position:
            raise _BrokenUnitError(f"a unit of {length} bytes where {end - position} are left")
        if length:
            if data[position] & 0x80:
                raise _BrokenUnitError("a unit's forbidden bit is set")
            yield position
        position += length
    if any(data[position:]):
        raise _BrokenUnitError(f"{end - position} stray bytes after the last unit")


def _read_h264(data: bytes, *, length_size: int) -> PacketFacts:
    try:
        types = {data[offset] & 31 for offset in _units(data, length_size)}
    except _BrokenUnitError as error:
        return PacketFacts(False, damage=str(error))
    return PacketFacts(bool(types & _H264_IDR), bool(types & _H264_SLICES), _which(types, _H264_HEADERS))


def _read_hevc(data: bytes, *, length_size: int) -> PacketFacts:
    try:
        types = {data[offset] >> 1 & 63 for offset in _units(data, length_size)}
    except _BrokenUnitError as error:
        return PacketFacts(False, damage=str(error))
    return PacketFacts(bool(types & _HEVC_IDR), bool(types & _HEVC_SLICES), _which(types, _HEVC_HEADERS))


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
