"""Where a video's bytes lie, as one string that travels in task descriptions.

A path or a url says it for most. What lies inside an archive, and a folder of frames on an object store, is a
compact JSON object with the field ``kind``.
"""

import hashlib
import json
import re
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import TypeAlias

from deltacache.schemas.errors import FailureReason


@dataclass(frozen=True, slots=True)
class PlainFile:
    """A local file, a local folder of frames, or an object: a path or a url."""

    place: str


@dataclass(frozen=True, slots=True)
class FrameObjects:
    """The frames directly below a url."""

    folder: str


@dataclass(frozen=True, slots=True)
class ZipVideo:
    """A member of a zip archive.

    Attributes:
        archive: path or url; of an archive in parts the first (``.zip.001``) or the last (``.zip``) one.
        parts: how many there are.
    """

    archive: str
    parts: int
    member: str


@dataclass(frozen=True, slots=True)
class ZipFrames:
    """The frames directly in one folder of a zip archive; ``folder`` is "" at its top."""

    archive: str
    parts: int
    folder: str


@dataclass(frozen=True, slots=True)
class TarVideo:
    """``size`` bytes from ``offset`` on, all in an uncompressed tar; ``suffix`` is that of a video."""

    archive: str
    offset: int
    size: int
    suffix: str


@dataclass(frozen=True, slots=True)
class ParquetVideo:
    """Bytes in a row of a Parquet file.

    Attributes:
        column: dotted path of the bytes, such as ``video.bytes``.
        group, row: the row group, and the place in it.
        size: the mean of the rows of this group, as the file takes it; what each has itself is not known before it is
            read.
        suffix: that of the video's name, if it has one.
    """

    file: str
    column: str
    group: int
    row: int
    size: int
    suffix: str


@dataclass(frozen=True, slots=True)
class RatedFrames:
    """Frames that a list gives a rate: ``location`` is the text of where they lie."""

    location: str
    frames_per_second: float


@dataclass(frozen=True, slots=True)
class Episode:
    """One episode of a LeRobot dataset as one camera saw it.

    Attributes:
        file: path or url of the video file.
        rows: of the Parquet file with what is known of its frames; they are part of its content.
        about: what its metadata says of it, as a short digest.
        start_s, end_s: where in the file it lies, from a time up to but without a later one; None: all of it.
    """

    file: str
    rows: str
    about: str
    start_s: float | None = None
    end_s: float | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    """Something that cannot be read at all: fetching it gives this failure, so that it is counted."""

    reason: str
    message: str

    @property
    def failure(self) -> FailureReason:
        """The reason as one of the closed list."""
        return FailureReason(self.reason)


_Inside: TypeAlias = (
    FrameObjects | ZipVideo | ZipFrames | TarVideo | ParquetVideo | RatedFrames | Episode | Refused
)
Location: TypeAlias = PlainFile | _Inside

_KINDS: dict[str, type[_Inside]] = {
    "frames": FrameObjects,
    "zip-video": ZipVideo,
    "zip-frames": ZipFrames,
    "tar": TarVideo,
    "parquet": ParquetVideo,
    "rated": RatedFrames,
    "episode": Episode,
    "refused": Refused,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}
_HEAD = '{"kind":'


def rated_version(version: str, frames_per_second: float) -> str:
    """The version of frames that a list gives a rate: another rate makes other clips."""
    return f"{version}@{frames_per_second!r}/s" if version else ""


def episode_version(video: str, rows: str, location: Episode) -> str:
    """From the versions of its two files: it changes with either, and with where it lies and what is said of it."""
    span = "" if location.start_s is None else f"@{location.start_s!r}-{location.end_s!r}"
    return f"{video}+{rows}{span}/{location.about}" if video and rows else ""


def location_text(location: Location) -> str:
    """The string that ``parse_location`` reads."""
    if isinstance(location, PlainFile):
        return f"./{location.place}" if location.place.startswith(_HEAD) else location.place
    values = {"kind": _NAMES[type(location)], **asdict(location)}
    return json.dumps(values, separators=(",", ":"), ensure_ascii=False)


def parse_location(text: str) -> Location:
    """The inverse of ``location_text``; any string that it did not make is a path."""
    if not text.startswith(_HEAD):
        return PlainFile(text)
    values = json.loads(text)
    return _KINDS[values.pop("kind")](**values)


# ----------------------------------------------------------------------------------------------------
# What names say: which files are videos, which are frames and of what time, and ids made from uris.
# ----------------------------------------------------------------------------------------------------


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
    there are several: a few pictures are not a video.

    Hidden files do not count: macOS writes ``._img_1.jpg`` beside ``img_1.jpg``.
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
        ValueError: it is not a name of a frame.
    """
    match = _FRAME.fullmatch(name) or _COUNTER.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is not named <anything>_<number>.jpg or <number>.jpg")
    return f"{number:07d}_{match['number']}{match['suffix'].lower()}"
