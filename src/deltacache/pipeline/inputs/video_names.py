"""What names say: which files are videos, which are frames and of what time, and ids made from uris."""

import hashlib
import re
from collections.abc import Collection, Iterable
from pathlib import PurePosixPath

# fmt: off
VIDEO_SUFFIXES = frozenset({
    ".3gp", ".asf", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4",
    ".mpeg", ".mpg", ".mts", ".mxf", ".ogv", ".ts", ".vob", ".webm", ".wmv",
})
# fmt: on
PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".avif"})
_FRAME = re.compile(
    r"(?!\.)(?P<before>.*_)?(?P<number>[0-9]+(?:\.[0-9]+)?)(?P<suffix>\.(?:jpe?g|png|webp|bmp|avif))",
    re.IGNORECASE | re.DOTALL,
)
_COUNTER = re.compile(
    r"(?!\.)(?P<before>.*[^0-9_.])(?P<number>[0-9]+)(?P<suffix>\.(?:jpe?g|png|webp|bmp|avif))",
    re.IGNORECASE | re.DOTALL,
)


def readable_name(name: str) -> str:
    r"""A name of a file with what is not UTF-8 as ``\xff``."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


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


def frames_among(names: Collection[str]) -> dict[str, str]:
    """The frames among the files of one folder, by name, and the number of each as it stands in its name.

    They are named ``<anything>_<number>.jpg``. Where none is, they are named by a whole number alone
    (``00001.jpg``), or behind the same beginning (``frame00001.jpg``, ``img-00001.jpg``), if every picture is, and
    there are several: a few pictures are no video.

    Hidden files are none: macOS writes ``._img_1.jpg`` beside ``img_1.jpg``.
    """
    matches = {name: match for name in names if (match := _FRAME.fullmatch(name))}
    if named := {name: match["number"] for name, match in matches.items() if match["before"]}:
        return named
    pictures = sum(suffix_of(name) in PICTURE_SUFFIXES and not name.startswith(".") for name in names)
    counted = {name: match["number"] for name, match in matches.items() if "." not in match["number"]}
    if not counted:
        behind = {name: match for name in names if (match := _COUNTER.fullmatch(name))}
        if len({match["before"] for match in behind.values()}) == 1:
            counted = {name: match["number"] for name, match in behind.items()}
    return counted if len(counted) == pictures > 1 else {}


def are_numbers_alone(frames: Iterable[str]) -> bool:
    """Whether frames have no ``_`` before their numbers: pictures of any kind are named so, too."""
    return not any((match := _FRAME.fullmatch(name)) and match["before"] for name in frames)


def spooled_frame_name(number: int, name: str) -> str:
    """A name of our own for a frame of an archive: its place, and of its own name only number and suffix.

    Raises:
        ValueError: it is no name of a frame.
    """
    match = _FRAME.fullmatch(name) or _COUNTER.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is not named <anything>_<number>.jpg or <number>.jpg")
    return f"{number:07d}_{match['number']}{match['suffix'].lower()}"
