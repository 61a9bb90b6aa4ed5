"""What names say: which files are videos, which are frames and of what time, and ids made from uris."""

import hashlib
import re
from pathlib import PurePosixPath

# fmt: off
VIDEO_SUFFIXES = frozenset({
    ".3gp", ".asf", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4",
    ".mpeg", ".mpg", ".mts", ".mxf", ".ogv", ".ts", ".vob", ".webm", ".wmv",
})
# fmt: on
PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".avif"})
_FRAME = re.compile(
    r"(?!\.).*_(?P<number>[0-9]+(?:\.[0-9]+)?)(?P<suffix>\.(?:jpe?g|png|webp|bmp|avif))",
    re.IGNORECASE | re.DOTALL,
)


def video_id_of(video_uri: str) -> str:
    """A slug of the stem (at most 40 characters) and ten hex digits of the SHA-256 of the uri."""
    slug = re.sub(r"[^A-Za-z0-9]+", "-", PurePosixPath(video_uri).stem).strip("-")[:40].strip("-")
    digest = hashlib.sha256(video_uri.encode()).hexdigest()[:10]
    return f"{slug or 'video'}-{digest}"


def suffix_of(name: str) -> str:
    """The suffix in lower case, with its dot; "" for a name without one or that is all suffix."""
    stem, dot, suffix = name.rpartition(".")
    return f".{suffix.lower()}" if dot and stem and not stem.endswith("/") else ""


def is_video(name: str) -> bool:
    """Whether the name ends as a video's does."""
    return suffix_of(name) in VIDEO_SUFFIXES


def frame_number(name: str) -> str | None:
    """The number at the end of a frame's name, ``<anything>_<number>.jpg``; None for any other file.

    Hidden files are none: macOS writes ``._img_1.jpg`` beside ``img_1.jpg``.
    """
    match = _FRAME.fullmatch(name)
    return None if match is None else match["number"]


def frame_seconds(name: str) -> float | None:
    """The number in the name of a frame; None for any other file. In a folder without a decimal point it counts."""
    number = frame_number(name)
    return None if number is None else float(number)


def spooled_frame_name(number: int, name: str) -> str:
    """A name of our own for a frame of an archive: its place, and of its own name only number and suffix.

    Raises:
        ValueError: it is no name of a frame.
    """
    match = _FRAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is not named <anything>_<seconds>.jpg or .png")
    return f"{number:07d}_{match['number']}{match['suffix'].lower()}"
