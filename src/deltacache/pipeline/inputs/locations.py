"""Where a video's bytes lie, as one string that travels in task descriptions.

A path or a url says it for most. What lies inside an archive, and a folder of frames on an object store, is a
compact JSON object with the field ``kind``.
"""

import json
from dataclasses import asdict, dataclass
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
class Refused:
    """Something that cannot be read at all: fetching it gives this failure, so that it is counted."""

    reason: str
    message: str

    @property
    def failure(self) -> FailureReason:
        """The reason as one of the closed list."""
        return FailureReason(self.reason)


_Inside: TypeAlias = FrameObjects | ZipVideo | ZipFrames | TarVideo | ParquetVideo | RatedFrames | Refused
Location: TypeAlias = PlainFile | _Inside

_KINDS: dict[str, type[_Inside]] = {
    "frames": FrameObjects,
    "zip-video": ZipVideo,
    "zip-frames": ZipFrames,
    "tar": TarVideo,
    "parquet": ParquetVideo,
    "rated": RatedFrames,
    "refused": Refused,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}
_HEAD = '{"kind":'


def rated_version(version: str, frames_per_second: float) -> str:
    """The version of frames that a list gives a rate: another rate makes other clips."""
    return f"{version}@{frames_per_second!r}/s" if version else ""


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
