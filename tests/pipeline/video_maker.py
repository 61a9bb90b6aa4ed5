"""Synthetic videos whose pixels carry the frame number, so that decoding is checked exactly.

A frame is a 4x4 grid of black and white cells: eight for the number's bits, eight for their complement, so
that a picture mixed from two frames, or one that lies on its side, reads as no number at all.
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

_BITS = 8
_TICKS = 1000  # a second


def number_picture(number: int, size: int) -> np.ndarray:
    """(size, size, 3) uint8 that ``read_number`` reads as ``number`` (0..255)."""
    bits = [number >> bit & 1 for bit in range(_BITS)]
    cells = np.array([*bits, *(1 - bit for bit in bits)], np.uint8).reshape(4, 4)
    picture = np.kron(cells * 219 + 16, np.ones((size // 4, size // 4), np.uint8))
    return np.repeat(picture[..., None], 3, axis=2)


def read_number(rgb: np.ndarray) -> int:
    """The number that a decoded frame shows.

    Raises:
        ValueError: it shows none.
    """
    height, width, _ = rgb.shape
    cells = rgb[height // 8 :: height // 4, width // 8 :: width // 4, 1].reshape(-1) > 127
    bits, complement = cells[:_BITS], cells[_BITS:]
    if (bits == complement).any():
        raise ValueError(f"no number: bits {bits.astype(int)}, complement {complement.astype(int)}")
    return sum(int(bit) << place for place, bit in enumerate(bits))


def write_video(
    path: Path,
    *,
    codec: str = "libx264",
    frames: int = 40,
    size: int = 64,
    milliseconds: Sequence[int] | None = None,
    pixel_format: str = "yuv420p",
    options: Mapping[str, str] | None = None,
    rotation: int = 0,
) -> Path:
    """Write a square video of ``frames`` numbered frames, in the container that the suffix names.

    Args:
        milliseconds: presentation times, ascending; 25 frames per second when left out.
        rotation: degrees counter-clockwise that a player must turn the coded frames by.
    """
    times = milliseconds or range(0, 40 * frames, 40)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=dict(options or {}))
        stream.width = stream.height = size
        stream.pix_fmt = pixel_format
        stream.codec_context.time_base = Fraction(1, _TICKS if milliseconds else 25)
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(number_picture(number, size), format="rgb24")
            frame = frame.reformat(format=pixel_format)
            frame.pts = times[number] if milliseconds else number
            frame.time_base = stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path
