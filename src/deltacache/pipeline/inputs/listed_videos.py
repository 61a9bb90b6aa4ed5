"""The videos that a list names: files, folders of frames, archives and what lies in them, here and on stores."""

import os
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import TypeVar

from deltacache.pipeline.inputs.archives import INSIDE_ARCHIVE, looks_like_archive
from deltacache.pipeline.inputs.fetching import archive_stamp
from deltacache.pipeline.inputs.folders import (
    ListedFile,
    ListedFolder,
    VideoSource,
    folder_at,
    frames_source,
    source_of,
    videos_of_archives,
)
from deltacache.pipeline.inputs.lists import Entry, Tell, read_list
from deltacache.pipeline.inputs.locations import (
    FrameObjects,
    ParquetVideo,
    PlainFile,
    RatedFrames,
    Refused,
    ZipFrames,
    frames_among,
    location_text,
    parse_location,
    rated_version,
)
from deltacache.pipeline.storage.storage import (
    client_errors,
    filesystem_of,
    host_of,
    in_threads,
    is_answer,
    is_http,
    is_remote,
    may_pass,
    refusal_of,
    refused_place,
    split_query,
)
from deltacache.pipeline.storage.storage import retried_call as retried
from deltacache.schemas.errors import DeltacacheError, FailureReason, VideoRefusedError
from deltacache.schemas.secrets import without_secrets

_T = TypeVar("_T")

_SIGNED = re.compile(r"(signature|[?&]sig)=|://[^/?#]*@", re.IGNORECASE)
_FEW = 4  # names under one prefix that are asked for one by one instead of listing the prefix
_THREADS = 32  # ask stores and servers at once


@dataclass(frozen=True, slots=True)
class _Entry:
    """What a line of a list leads to.

    Attributes:
        uri: as in the list, without credentials; the video's, if it is one.
        parent, name, query: place of the file, folder or archive.
        refused: why it is not opened, or "".
        frames_per_second: that the list tells of its frames.
        rows: of a Parquet file that holds the videos themselves.
    """

    uri: str
    parent: str
    name: str
    query: str = ""
    refused: str = ""
    frames_per_second: float | None = None
    rows: ParquetVideo | None = None

    @property
    def place(self) -> str:
        return f"{self.parent}/{self.name}{self.query}"


def listed_videos(
    place: str, column: str | None = None, tell: Tell | None = None, schemes: Collection[str] = ()
) -> list[VideoSource]:
    """The videos of the list at ``place``, by the folders that they are in.

    What cannot be looked at, whatever the reason, is kept as a video that fetching refuses.

    Args:
        column, tell: see ``read_list``.
        schemes: of urls, that are opened beside the known ones.

    Raises:
        DeltacacheError: the list cannot be read, or nothing that it names can.
    """
    base, _ = split_query(place)
    base = base.rpartition("/")[0]
    entries = [_entry(line, base, schemes) for line in read_list(place, column, tell)]
    _refuse_confusion(entries)
    groups: dict[tuple[str, ...], list[_Entry]] = {}
    for entry in entries:
        alone = (entry.name, entry.query) if is_http(entry.parent) else ()  # servers list no folders
        groups.setdefault((entry.parent, *alone), []).append(entry)
    looking = _Looking()
    if any(is_remote(parent) for parent, *_ in groups):
        found = in_threads(looking.videos_of, groups.values(), threads=_THREADS)
    else:
        found = map(looking.videos_of, groups.values())
    videos = [video for group in found for video in group]
    if len(looking.missing) == len(videos):
        first = looking.missing[0]
        raise DeltacacheError(
            f"none of the {len(videos)} videos in {place} exists, the first is {first}: "
            f"paths are relative to the list's folder {base or '.'} or absolute"
        )
    return videos


def _entry(line: str, base: str, schemes: Collection[str]) -> _Entry:
    if isinstance(line, Entry) and line.rows is not None:
        return _Entry(str(line), base, line.rows.file, rows=line.rows)
    if refused := refused_place(line, schemes):
        return _Entry(without_secrets(line), "", line, refused=refused)
    remote = is_remote(line)
    place, query = split_query(line) if remote else (line, "")
    if is_http(base) and not remote:
        place, query = split_query(f"http://{line}")
        place = place.removeprefix("http://")
    inside = INSIDE_ARCHIVE.fullmatch(place)
    whole = _absolute(inside["archive"] if inside else place, base)
    parent, _, name = whole.rpartition("/")
    plain = is_remote(base) and "//" in line  # there another name than the one with a single slash
    uri = PurePosixPath(place).as_posix() if not remote and not plain else place
    uri = without_secrets(uri + query) if remote or query else uri
    if query and inside:  # the query belongs to the archive, the name to what is in it
        uri = without_secrets(place)
    rate = line.frames_per_second if isinstance(line, Entry) else None
    return _Entry(uri, parent, name, query, frames_per_second=rate)


def _refuse_confusion(entries: Iterable[_Entry]) -> None:
    """Two entries that differ in nothing but what is taken for credentials, and are not signed, are two videos.

    So are two that differ in nothing but the frame rate.
    """
    known: dict[str, str] = {}
    rates: dict[str, float | None] = {}
    for entry in entries:
        if rates.setdefault(entry.uri, entry.frames_per_second) != entry.frames_per_second:
            raise DeltacacheError(
                f"{entry.uri} is listed with {rates[entry.uri]} and with {entry.frames_per_second} frames per second: "
                "a video has one frame rate, so list it once"
            )
        place = known.setdefault(entry.uri, entry.place)
        if place != entry.place and not (_SIGNED.search(place) and _SIGNED.search(entry.place)):
            raise DeltacacheError(
                f"two entries are {entry.uri} when what looks like credentials is taken out of their urls, so one "
                "cannot be told from the other: give urls that differ in their paths"
            )


def _absolute(entry: str, base: str) -> str:
    if is_remote(entry):
        return entry.rstrip("/")
    if entry.startswith("/") and not is_remote(base):
        return os.path.normpath(entry)
    if not is_remote(base):
        return os.path.normpath(f"{base}/{entry}")
    parts: list[str] = []  # names on stores may be empty, so normpath is not for them
    scheme, mark, path = base.rpartition("://")
    for part in [*path.split("/"), *entry.rstrip("/").split("/")]:
        if part == ".." and len(parts) > 1:
            parts.pop()
        elif part not in (".", ".."):
            parts.append(part)
    return scheme + mark + "/".join(parts)


class _Looking:
    """Looks at the entries of a list, from several threads.

    Attributes:
        missing: descriptions of entries that lead nowhere or cannot be read.
    """

    def __init__(self) -> None:
        self.missing: list[str] = []
        self._away: dict[str, VideoRefusedError] = {}  # hosts that do not answer: not waited for twice

    def videos_of(self, entries: Sequence[_Entry]) -> list[VideoSource]:
        """The videos of entries in one folder, each of which may be refused."""
        first = entries[0]
        if first.rows is not None:
            return self._in_rows(entries, first)
        if first.refused:
            return [self._refused(entry, FailureReason.UNREADABLE, entry.refused) for entry in entries]
        names = {entry.name for entry in entries}
        is_listed = any(looks_like_archive(name) for name in names) and not first.query
        is_listed = is_listed or (is_remote(first.parent) and len(names) > _FEW)
        try:
            folder = self._asked(first, lambda: _folder(first, names, is_listed=is_listed))
        except VideoRefusedError as error:
            return [self._refused(entry, error.reason, error.message) for entry in entries]
        videos: list[VideoSource] = []
        for entry in entries:
            try:
                found = self._asked(entry, lambda entry=entry: self._videos(entry, folder))
                videos += [_with_rate(video, entry.frames_per_second) for video in found]
            except VideoRefusedError as error:
                videos.append(self._refused(entry, error.reason, error.message))
        return videos

    def _asked(self, entry: _Entry, ask: Callable[[], _T]) -> _T:
        """What ``ask`` gives; a host that was tried for long enough is not tried for its other entries.

        Raises:
            VideoRefusedError: it cannot be asked.
        """
        host = host_of(entry.parent)
        if host in self._away:
            raise self._away[host]
        try:
            return ask()
        except (*client_errors(), ImportError, ValueError) as error:
            refused = refusal_of(error)
            if host and refused.reason is FailureReason.UNAVAILABLE and not is_answer(error):
                self._away[host] = refused
            raise refused from error

    def _refused(self, entry: _Entry, reason: FailureReason, message: str) -> VideoSource:
        self.missing.append(f"{entry.uri} ({message})")
        return source_of(entry.uri, Refused(reason.value, message), ListedFile(0, ""))

    def _videos(self, entry: _Entry, folder: ListedFolder) -> list[VideoSource]:
        if looks_like_archive(entry.name):
            inside = INSIDE_ARCHIVE.fullmatch(entry.uri)
            above = (inside["archive"] if inside else entry.uri.partition("?")[0]).rpartition("/")[0]
            at = ListedFolder(folder.place, above, folder.files, folder.query)
            videos = list(videos_of_archives(at, {entry.name}))
            if inside:
                videos = [
                    replace(video, is_counted=False) for video in videos if video.video_uri == entry.uri
                ]
            if not videos:  # kept, so that fetching refuses and counts it
                self.missing.append(entry.place)
                message = "its archive is not there, or does not hold it"
                reason = FailureReason.UNREADABLE.value
                return [source_of(entry.uri, Refused(reason, message), ListedFile(0, ""))]
            return videos
        is_file = entry.name in folder.files if is_remote(entry.place) else os.path.isfile(entry.place)  # noqa: PTH113
        frames = None if is_file else _frames(entry.place, entry.uri)
        if frames is None and not is_file:
            self.missing.append(entry.place)
        file = folder.files.get(entry.name, ListedFile(0, ""))
        return [frames or source_of(entry.uri, PlainFile(entry.place), file)]

    def _in_rows(self, entries: Sequence[_Entry], first: _Entry) -> list[VideoSource]:
        """The rows of one Parquet file; its stamp and their places are their versions."""
        stamp = self._asked(first, lambda: archive_stamp(first.name))
        return [
            source_of(
                entry.uri,
                entry.rows,
                ListedFile(entry.rows.size, f"{stamp}@{entry.rows.group}.{entry.rows.row}"),
            )
            for entry in entries
            if entry.rows is not None
        ]


def _folder(entry: _Entry, names: set[str], *, is_listed: bool) -> ListedFolder:
    """The folder that entries lie in; where it cannot be listed, or by name only, what is there of ``names``."""
    try:
        if not is_listed:
            return folder_at(entry.parent, "", names, entry.query)
        try:
            return folder_at(entry.parent, "", None, entry.query)
        except client_errors() as error:
            if not is_remote(entry.parent) or may_pass(error):
                raise
            return folder_at(entry.parent, "", names, entry.query)
    except (FileNotFoundError, NotADirectoryError):
        return ListedFolder(entry.parent, "", query=entry.query)


def _with_rate(video: VideoSource, rate: float | None) -> VideoSource:
    """Frames with the rate that the list tells; a video has times of its own."""
    if rate is None or not video.version or not _is_frames(video.path):
        return video
    location = location_text(RatedFrames(video.path, rate))
    return replace(video, path=location, version=rated_version(video.version, rate), is_counted=False)


def _is_frames(path: str) -> bool:
    """By what lies there: folders of frames may be named ``clip.mp4``."""
    location = parse_location(path)
    if isinstance(location, PlainFile):
        return not is_remote(location.place) and os.path.isdir(location.place)  # noqa: PTH112
    return isinstance(location, FrameObjects | ZipFrames)


def _frames(place: str, uri: str) -> VideoSource | None:
    if is_http(place):
        return None
    try:
        if is_remote(place):
            fs, path = filesystem_of(place)
            if not retried(lambda: fs.isdir(path)):
                return None
        folder = folder_at(place, uri, None)
    except OSError as error:
        if is_remote(place) and not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise
        return None  # fetching says what is wrong with it
    frames = frames_among(folder.files)
    return replace(frames_source(folder, frames), is_counted=False) if frames else None
