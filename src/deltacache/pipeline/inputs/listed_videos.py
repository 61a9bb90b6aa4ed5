"""The videos that a list names: files, folders of frames, archives and what lies in them, here and on stores."""

import os
import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from deltacache.pipeline.inputs.archive_parts import looks_like_archive
from deltacache.pipeline.inputs.folders import ListedFile, ListedFolder, folder_at
from deltacache.pipeline.inputs.found_videos import VideoSource, frames_source, source_of, videos_of_archives
from deltacache.pipeline.inputs.lists import Tell, read_list
from deltacache.pipeline.inputs.locations import PlainFile
from deltacache.pipeline.inputs.video_names import frame_seconds
from deltacache.pipeline.storage.remote_files import filesystem_of, is_remote
from deltacache.schemas.errors import DeltacacheError

_INSIDE = re.compile(r"(?P<archive>.+?\.(?:zip|tar))/(?P<inner>.+)", re.IGNORECASE | re.DOTALL)
_FEW = 4  # names under one prefix that are asked for one by one instead of listing the prefix


def listed_videos(place: str, column: str | None = None, tell: Tell | None = None) -> list[VideoSource]:
    """The videos of the list at ``place``, in its order; for ``column`` and ``tell`` see ``read_list``.

    Raises:
        DeltacacheError: the list cannot be read, or nothing that it names exists.
    """
    base = place.rpartition("/")[0]
    folders: dict[str, list[str]] = {}  # entries by the folder that they are in
    for entry in read_list(place, column, tell):
        folders.setdefault(_split(entry, base)[0], []).append(entry)
    videos = [video for parent, entries in folders.items() for video in _in_folder(parent, entries, base)]
    if not any(video.version for video in videos):
        raise DeltacacheError(
            f"none of the {len(videos)} videos in {place} exists, the first is {videos[0].path}: "
            f"paths are relative to the list's folder {base or '.'} or absolute"
        )
    return videos


def _split(entry: str, base: str) -> tuple[str, str]:
    """Folder and name of the file, folder or archive that an entry leads to."""
    inside = _INSIDE.fullmatch(entry)
    place = _absolute(inside["archive"] if inside else entry, base)
    parent, _, name = place.rpartition("/")
    return parent, name


def _absolute(entry: str, base: str) -> str:
    if is_remote(entry):
        return entry.rstrip("/")
    if entry.startswith("/"):
        return os.path.normpath(entry)
    scheme, mark, path = base.rpartition("://")
    return scheme + mark + os.path.normpath(f"{path}/{entry}")


def _in_folder(parent: str, entries: list[str], base: str) -> Iterator[VideoSource]:
    names = {_split(entry, base)[1] for entry in entries}
    is_listed = any(looks_like_archive(name) for name in names) or (is_remote(parent) and len(names) > _FEW)
    try:
        folder = folder_at(parent, "", None if is_listed else names)
    except (FileNotFoundError, NotADirectoryError):
        folder = ListedFolder(parent, "")
    for entry in entries:
        yield from _entry(entry, _split(entry, base)[1], folder)


def _entry(entry: str, name: str, folder: ListedFolder) -> Iterator[VideoSource]:
    uri = entry if is_remote(entry) else PurePosixPath(entry).as_posix()
    inside = _INSIDE.fullmatch(uri)
    if looks_like_archive(name):
        above = (inside["archive"] if inside else uri).rpartition("/")[0]
        videos = list(videos_of_archives(ListedFolder(folder.place, above, folder.files), {name}))
        if inside:
            videos = [video for video in videos if video.video_uri == uri] or _missing(uri)
        yield from videos or _missing(uri)
        return
    place = folder.place_of(name)
    file = folder.files.get(name, ListedFile(0, ""))
    is_file = bool(file.version) if is_remote(place) else os.path.isfile(place)  # noqa: PTH113
    frames = None if is_file else _frames(place, uri)
    yield frames or source_of(uri, PlainFile(place), file)


def _missing(uri: str) -> list[VideoSource]:
    """An archive's video that is not there: kept, so that fetching refuses and counts it."""
    return [source_of(uri, PlainFile(uri), ListedFile(0, ""))]


def _frames(place: str, uri: str) -> VideoSource | None:
    try:
        if is_remote(place):
            fs, path = filesystem_of(place)
            if not fs.isdir(path):
                return None
        folder = folder_at(place, uri, None)
    except (FileNotFoundError, NotADirectoryError):
        return None
    frames = [name for name in folder.files if frame_seconds(name) is not None]
    return frames_source(folder, frames) if frames else None
