"""Where videos come from: folders, globs, lists, archives and folders of frames, as one sorted list.

The same on local disks and on object stores (``s3://``, ``gs://`` and what else fsspec knows).
"""

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from upath import UPath

from deltacache.pipeline.inputs.archive_parts import looks_like_archive
from deltacache.pipeline.inputs.folders import ListedFolder, folder_at, local_folders, remote_folders
from deltacache.pipeline.inputs.found_videos import VideoSource, source_of, videos_of, videos_of_archives
from deltacache.pipeline.inputs.listed_videos import listed_videos
from deltacache.pipeline.inputs.lists import LIST_SUFFIXES
from deltacache.pipeline.inputs.locations import PlainFile
from deltacache.pipeline.inputs.video_names import (
    VIDEO_SUFFIXES,
    frame_seconds,
    is_video,
    suffix_of,
    video_id_of,
)
from deltacache.pipeline.storage.remote_files import client_errors, explain, filesystem_of, is_remote, retried
from deltacache.schemas.errors import DeltacacheError

__all__ = ["VIDEO_SUFFIXES", "VideoSource", "find_videos", "frame_seconds", "video_id_of"]


def find_videos(source: str, exclude_list: Path | UPath | None) -> list[VideoSource]:
    """All videos of ``source``, sorted by uri, without the excluded ones.

    ``source`` is a folder (searched recursively), a glob, a text, CSV or Parquet list, one video or archive, on
    a local disk or an object store.

    Raises:
        DeltacacheError: it does not exist or holds no video, or every video is excluded.
    """
    videos = sorted(_unique(_find(source)), key=lambda video: video.video_uri)
    excluded = set() if exclude_list is None else _read_exclude_list(exclude_list)
    kept = [video for video in videos if not _names_of(video) & excluded] if excluded else videos
    if videos and not kept:
        raise DeltacacheError(
            f"{exclude_list} excludes all {len(videos)} videos of {source}: at least one must be left"
        )
    return kept


def _unique(videos: Iterable[VideoSource]) -> list[VideoSource]:
    return list({video.video_uri: video for video in videos}.values())


def _find(source: str) -> Iterable[VideoSource]:
    if not is_remote(source):
        return _find_local(source)
    try:
        return retried(lambda: _find_remote(source))
    except client_errors() as error:
        raise DeltacacheError(
            f"{source} cannot be listed ({explain(error)}): check the address, the credentials and that the bucket "
            "may be listed"
        ) from error
    except (ImportError, ValueError) as error:
        raise DeltacacheError(f"{source} cannot be opened: {error}") from error


def _find_local(source: str) -> list[VideoSource]:
    place = os.path.abspath(source)  # noqa: PTH100 - other machines have other working folders; links stay
    if os.path.isdir(place):  # noqa: PTH112
        return _searched(source, local_folders(place, "", set()))
    if os.path.isfile(place):  # noqa: PTH113
        return _named(source, place)
    if glob.has_magic(source):
        return _matched(source, _local_matches(place))
    raise _not_there(source)


def _find_remote(source: str) -> list[VideoSource]:
    fs, path = filesystem_of(source)
    fs.invalidate_cache()
    try:
        is_file = fs.info(path).get("type") == "file"
    except FileNotFoundError:
        if not glob.has_magic(source):
            raise _not_there(source) from None
        return _matched(source, _remote_matches(path, source))
    if is_file:
        return _named(source, source)
    return _searched(source, remote_folders(fs, path, fs.find(path, detail=True)))


def _not_there(source: str) -> DeltacacheError:
    return DeltacacheError(f"{source} does not exist: give a folder, a glob, a list, an archive or a video")


def _searched(source: str, folders: Iterable[ListedFolder]) -> list[VideoSource]:
    videos = [video for folder in folders for video in videos_of(folder)]
    if not videos:
        raise DeltacacheError(
            f"{source} holds no video: it must have files such as *.mp4 or *.mkv, folders of frames named "
            "<anything>_<seconds>.jpg, or zip and tar archives of these, at any depth. Give the folder that "
            "holds them"
        )
    return videos


def _named(source: str, place: str) -> list[VideoSource]:
    """One file: a video, an archive or a list."""
    parent, _, name = place.rpartition("/")
    suffix = suffix_of(name)
    if suffix in LIST_SUFFIXES:
        return listed_videos(place)
    folder = folder_at(parent, "", {name} if is_video(name) else None)
    if is_video(name):
        return [source_of(name, PlainFile(place), folder.files[name])]
    if not looks_like_archive(name):
        raise DeltacacheError(
            f"{source} is neither a video, an archive nor a list: a list ends in {', '.join(sorted(LIST_SUFFIXES))}"
        )
    videos = list(videos_of_archives(folder, {name}))
    if not videos:
        raise DeltacacheError(
            f"{source} holds no video: it must have members such as *.mp4, or folders of frames named "
            "<anything>_<seconds>.jpg in a zip archive"
        )
    return videos


def _matched(source: str, folders: Iterator[tuple[ListedFolder, bool]]) -> list[VideoSource]:
    """What a glob matches: folders are searched like any others, of files only videos and archives count."""
    found: list[VideoSource] = []
    for folder, is_whole in folders:
        if is_whole:
            found.extend(videos_of(folder))
            continue
        for name, file in folder.files.items():
            if is_video(name):
                found.append(source_of(folder.uri_of(name), PlainFile(folder.place_of(name)), file))
        archives = {name for name in folder.files if looks_like_archive(name)}
        if archives:  # their other parts need not match
            found.extend(videos_of_archives(folder_at(folder.place, folder.uri, None), archives))
    if not found:
        raise DeltacacheError(
            f"{source} matches no video: it must match files such as *.mp4, or folders that hold some"
        )
    return found


def _local_matches(pattern: str) -> Iterator[tuple[ListedFolder, bool]]:
    base = _base_of(pattern)
    seen: set[tuple[int, int]] = set()
    names: dict[str, set[str]] = {}
    for path in sorted(Path(base).glob(pattern[len(base) :].lstrip("/"))):
        if path.is_dir():
            uri = path.relative_to(base).as_posix()
            for folder in local_folders(str(path), "" if uri == "." else uri, seen):
                yield folder, True
        else:
            names.setdefault(str(path.parent), set()).add(path.name)
    for parent, wanted in names.items():
        uri = Path(parent).relative_to(base).as_posix()
        yield folder_at(parent, "" if uri == "." else uri, wanted), False


def _remote_matches(pattern: str, source: str) -> Iterator[tuple[ListedFolder, bool]]:
    fs, _ = filesystem_of(source)
    base = _base_of(pattern)
    matches = fs.glob(pattern, detail=True)
    files = {path: info for path, info in matches.items() if info.get("type") != "directory"}
    for folder in remote_folders(fs, base, files):
        yield folder, False
    for path in matches.keys() - files.keys():
        for folder in remote_folders(fs, base, fs.find(path, detail=True)):
            yield folder, True


def _base_of(pattern: str) -> str:
    """The leading part of a glob without wildcards."""
    parts = pattern.split("/")
    magic = next(place for place, part in enumerate(parts) if glob.has_magic(part))
    return "/".join(parts[:magic]) or "/"


def _read_exclude_list(path: Path | UPath) -> set[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DeltacacheError(
            f"exclude list {path} cannot be read ({error}): it must be UTF-8 text with an id, stem or uri a line"
        ) from error
    return {line.strip() for line in lines if line.strip() and not line.startswith("#")}


def _names_of(video: VideoSource) -> set[str]:
    uri = PurePosixPath(video.video_uri)
    return {video.video_id, video.video_uri, uri.name, uri.stem}
