"""What the compressed bytes of one packet tell without decoding them.

Containers flag "keyframes" that are no safe place to start (open groups of pictures, recovery points) and hold
packets that show nothing. Pixels are exact after a seek only to a packet that resets the decoder, so that is
read from the bitstream: H.264 and HEVC (ITU-T H.264/H.265 section 7.4), VP8 (RFC 6386 section 9.1), VP9
(bitstream specification section 6.2), AV1 (section 5.9.2), MPEG-4 part 2 (section 6.2.5).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

_H264_SLICES, _H264_IDR, _H264_HEADERS = frozenset({1, 2, 5}), frozenset({5}), frozenset({7, 8})
_H264_SEI, _H264_SEQUENCE, _PICTURE_TIMING = 6, 7, 1
_H264_HIGH_PROFILES = frozenset({44, 83, 86, 100, 110, 118, 122, 128, 134, 135, 138, 139, 244})
_SLICE_HEAD = 24  # bytes: four codes of a few bits each
_INTRA_SLICES = frozenset({2, 4})
_HEVC_SLICES, _HEVC_IDR, _HEVC_HEADERS = frozenset(range(32)), frozenset({19, 20}), frozenset({33, 34})
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
        damage: what is wrong with its structure, if anything.
    """

    random_access: bool
    shown: bool = True
    headers: Literal["none", "some", "all"] = "none"
    sequences: tuple[bytes, ...] = ()
    tells_fields: bool = False
    slice_head: bytes = b""
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
    try:
        for start, end in _units(data, length_size):
            kind = data[start] & 31
            types.add(kind)
            if kind == _H264_SEQUENCE:
                sequences.append(data[start:end])
            elif kind == _H264_SEI:
                tells_fields |= _PICTURE_TIMING in _sei_types(data[start + 1 : end])
            elif kind in _H264_SLICES and not slice_head:
                slice_head = data[start : min(end, start + _SLICE_HEAD)]
    except _BrokenUnitError as error:
        return PacketFacts(False, damage=str(error))
    return PacketFacts(
        bool(types & _H264_IDR),
        bool(types & _H264_SLICES),
        _which(types, _H264_HEADERS),
        tuple(sequences),
        tells_fields,
        slice_head,
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
    that starts again at 0 or 1, is no sign of a loss: streams are joined there.

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
        types = {data[start] >> 1 & 63 for start, _ in _units(data, length_size)}
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
