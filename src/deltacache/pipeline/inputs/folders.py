"""Folders of files as they are listed, on local disks and object stores: names, sizes and versions."""

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any, TypeAlias

from fsspec import AbstractFileSystem

from deltacache.pipeline.inputs.archives import (
    archives_among,
    looks_like_archive,
    parts_beside,
    videos_in_archive,
)
from deltacache.pipeline.inputs.locations import (
    FrameObjects,
    Location,
    PlainFile,
    Refused,
    are_numbers_alone,
    frames_among,
    is_video,
    location_text,
    readable_name,
    video_id_of,
)
from deltacache.pipeline.storage.storage import (
    client_errors,
    filesystem_of,
    frames_version,
    host_of,
    info_of,
    is_http,
    is_remote,
    may_pass,
    url_of,
    version_of,
)
from deltacache.pipeline.storage.storage import retried_call as retried
from deltacache.schemas.errors import DeltacacheError, FailureReason
from deltacache.schemas.secrets import without_secrets

_Inode: TypeAlias = tuple[int, int]


@dataclass(frozen=True, slots=True)
class ListedFile:
    """A file's size and version (see ``VideoSource``); 0 and "" for a link that leads nowhere."""

    size_bytes: int
    version: str


@dataclass(frozen=True, slots=True)
class ListedFolder:
    """The files directly in one folder.

    Attributes:
        place: path or url.
        uri: relative to the folder searched, "" for that itself.
        files: by name.
        query: what the urls of its files end with, such as a signature; it is not part of a name.
        is_below: whether it lies below the folder searched; names on stores may be empty (``a//b``).
    """

    place: str
    uri: str
    files: dict[str, ListedFile] = field(default_factory=dict)
    query: str = ""
    is_below: bool = False

    def place_of(self, name: str) -> str:
        """Path or url of a file in it."""
        if is_remote(self.place):
            return f"{self.place}/{name}{self.query}"
        return f"{self.place.rstrip('/')}/{name}" if self.place else name

    def uri_of(self, name: str) -> str:
        """Uri of a file in it."""
        return f"{self.uri}/{name}" if self.uri or self.is_below else name


def listed_file(path: str) -> ListedFile:
    """A local file; one that cannot be looked at is not an error of the whole source: fetching refuses it."""
    try:
        return _listed(os.stat(path))  # noqa: PTH116 - 100,000 of them
    except OSError:
        return ListedFile(0, "")


def _listed(about: os.stat_result) -> ListedFile:
    return ListedFile(about.st_size, str(about.st_mtime_ns))


def folder_at(place: str, uri: str, names: set[str] | None, query: str = "") -> ListedFolder:
    """The files directly in one folder, or only those of ``names`` without listing it; hidden ones too.

    A name that is not there is left out on a store and has no version on a local disk.
    """
    folder = ListedFolder(place, uri, query=query)
    if not is_remote(place):
        if names is None:
            with os.scandir(place) as entries:
                names = {entry.name for entry in entries if not entry.is_dir()}
        folder.files.update({name: listed_file(folder.place_of(name)) for name in names})
        return folder
    if names is None:
        fs, path = filesystem_of(place)
        for info in retried(lambda: fs.ls(path, detail=True), host_of(place)):
            if info.get("type") != "directory":
                folder.files[info["name"].rpartition("/")[2]] = _of_info(info)
        return folder
    for name in sorted(names):
        _look_at(folder, name)
        if is_http(place) and not query:  # a signature is that of one file
            for parts in parts_beside(name):
                _ = all(part in folder.files or _is_part(folder, part) for part in parts)
    return folder


def _is_part(folder: ListedFolder, name: str) -> bool:
    try:
        return _look_at(folder, name)
    except client_errors() as error:
        if may_pass(error):
            raise
        return False  # servers that list nothing may refuse what is not there


def _look_at(folder: ListedFolder, name: str) -> bool:
    """Whether a store or server has a file; it is in the folder's then."""
    fs, path = filesystem_of(folder.place_of(name))
    with suppress(FileNotFoundError):
        info = retried(lambda: info_of(fs, path), host_of(folder.place))
        if info.get("type") != "directory":
            folder.files[name] = _of_info(info)
    return name in folder.files


def _of_info(info: Mapping[str, Any]) -> ListedFile:
    return ListedFile(int(info.get("size") or 0), version_of(info))


def local_folders(place: str, uri: str, seen: set[_Inode]) -> Iterator[ListedFolder]:
    """``place`` and all folders below it, without hidden ones.

    Each is visited once, by its real place if it has one below ``place``, so that links cannot loop.

    Raises:
        DeltacacheError: a folder cannot be listed.
    """
    real, links = [(place, uri)], list[tuple[str, str]]()
    while real or links:
        current, current_uri = real.pop() if real else links.pop()
        folder = ListedFolder(current, current_uri)
        try:
            about = retried(lambda current=current: os.stat(current))  # noqa: PTH116
            if (about.st_dev, about.st_ino) in seen:
                continue
            seen.add((about.st_dev, about.st_ino))
            below = retried(lambda folder=folder: _scanned(folder))
        except OSError as error:
            raise DeltacacheError(
                f"{current} cannot be listed ({error.strerror}): make it readable, or move it out of the source"
            ) from error
        yield folder
        for name, is_link in below:
            (links if is_link else real).append((folder.place_of(name), folder.uri_of(name)))


def _scanned(folder: ListedFolder) -> list[tuple[str, bool]]:
    folder.files.clear()
    with os.scandir(folder.place) as entries:
        return sorted(_sort(entries, folder), reverse=True)


def _sort(entries: Iterable[os.DirEntry[str]], folder: ListedFolder) -> Iterator[tuple[str, bool]]:
    """Put files into ``folder``; yield the folders' names and whether they are links."""
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield entry.name, entry.is_symlink()
            continue
        try:
            folder.files[entry.name] = _listed(entry.stat())
        except OSError:
            folder.files[entry.name] = ListedFile(0, "")


def remote_folders(
    fs: AbstractFileSystem, base: str, found: dict[str, dict[str, Any]]
) -> Iterator[ListedFolder]:
    """The objects of one listing, by the prefixes that they lie under; uris are relative to ``base``."""
    base = base.rstrip("/")
    folders: dict[str, ListedFolder] = {}
    for path in sorted(found):
        info = found[path]
        prefix, _, name = path.rpartition("/")
        uri = prefix[len(base) + 1 :]
        hidden = any(part.startswith(".") for part in [*uri.split("/"), name])
        if info.get("type") == "directory" or not name or hidden:
            continue
        if prefix not in folders:
            folders[prefix] = ListedFolder(url_of(fs, prefix), uri, is_below=prefix != base)
        folders[prefix].files[name] = _of_info(info)
    yield from folders.values()


# ----------------------------------------------------------------------------------------------------
# One video as it was found, and what the files of one folder are: videos, frames, archives.
# ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class VideoSource:
    """One video as it was found.

    Attributes:
        video_id: readable and unique, safe in file names; from ``video_uri`` alone.
        video_uri: relative to the folder searched (posix), or as it stands in the list, without credentials; inside
            an archive the archive's and the member's (``a.zip/inner/folder``).
        path: its location, for ``fetching.fetched``: a path, a url, or a place inside an archive. It may have
            credentials in it: it is stored and shown nowhere.
        size_bytes: of the file, or of all frames together; 0 for a link or a list's entry that leads nowhere.
        version: a cheap token that changes when the video is replaced: mtime_ns (of frames the newest), ETag,
            checksums of a zip's directory; "" unknown.
        is_counted: pictures that were found, not named by a list, and whose names are numbers alone: they are a video
            if a frame rate is given.
    """

    video_id: str
    video_uri: str
    path: str
    size_bytes: int
    version: str = ""
    is_counted: bool = False


def videos_of(folder: ListedFolder) -> Iterator[VideoSource]:
    """The videos directly in a folder: files, archives' content, or the folder itself when it holds frames."""
    videos = [name for name in folder.files if is_video(name)]
    frames = [] if videos else frames_among(folder.files)
    if frames:
        yield frames_source(folder, frames)
    for name in videos:
        file = folder.files[name]
        yield source_of(folder.uri_of(name), PlainFile(folder.place_of(name)), file)
    if any(looks_like_archive(name) for name in folder.files):
        yield from videos_of_archives(folder, None)


def frames_source(folder: ListedFolder, frames: Collection[str]) -> VideoSource:
    """A folder of frames as a video; the folder searched goes by its own name."""
    files = [folder.files[name] for name in sorted(frames)]
    size = sum(file.size_bytes for file in files)
    uri = folder.uri or PurePosixPath(folder.place).name
    if not is_remote(folder.place):
        newest = max(int(file.version or 0) for file in files)
        video = source_of(uri, PlainFile(folder.place), ListedFile(size, str(newest)))
    else:
        versions = ((name, folder.files[name].version) for name in sorted(frames))
        video = source_of(uri, FrameObjects(folder.place), ListedFile(size, frames_version(versions)))
    return replace(video, is_counted=are_numbers_alone(frames))


def videos_of_archives(folder: ListedFolder, wanted: set[str] | None) -> Iterator[VideoSource]:
    """What the archives of a folder hold, or those of them whose file or name is ``wanted``."""
    for archive in archives_among(folder.files):
        if wanted is not None and not wanted & {archive.first, archive.name}:
            continue
        version = folder.files.get(archive.first, ListedFile(0, "")).version
        uri = folder.uri_of(archive.name)
        for video in videos_in_archive(archive, folder.place_of, version):
            inner = f"{uri}/{video.inner}" if video.inner else uri
            source = source_of(inner, video.location, ListedFile(video.size_bytes, video.version))
            yield replace(source, is_counted=video.is_counted)


def source_of(uri: str, location: Location, file: ListedFile) -> VideoSource:
    """One video, its uri without credentials; one whose name is not UTF-8, which tables need, is refused."""
    uri = without_secrets(uri) if is_remote(uri) else uri
    try:
        return VideoSource(video_id_of(uri), uri, location_text(location), file.size_bytes, file.version)
    except UnicodeEncodeError:
        uri = readable_name(uri)
        refused = Refused(
            FailureReason.UNREADABLE.value, "its name is not UTF-8, which tables need: rename it"
        )
        return VideoSource(video_id_of(uri), uri, location_text(refused), 0, "")
