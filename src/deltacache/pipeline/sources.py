"""Where videos come from: folders, globs, lists and folders of frames, as one sorted list."""

import glob
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeAlias

from deltacache.pipeline.source_lists import LIST_SUFFIXES, read_list
from deltacache.schemas.errors import DeltacacheError

# fmt: off
VIDEO_SUFFIXES = frozenset({
    ".3gp", ".asf", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4",
    ".mpeg", ".mpg", ".mts", ".mxf", ".ogv", ".ts", ".vob", ".webm", ".wmv",
})
# fmt: on
_FRAME = re.compile(r".*_(?P<seconds>[0-9]+(?:\.[0-9]+)?)\.(?:jpe?g|png)", re.IGNORECASE | re.DOTALL)
_Inode: TypeAlias = tuple[int, int]
_REMOTE = re.compile(r"(?P<scheme>[a-z][a-z0-9+]+)://", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class VideoSource:
    """One video as it was found.

    Attributes:
        video_id: readable and unique, safe in file names; from ``video_uri`` alone.
        video_uri: relative to the folder searched (posix), or as it stands in the list.
        path: where to read it: a file, or a folder of frames.
        size_bytes: of the file, or of all frames together; 0 for a link or a list's entry that leads nowhere.
    """

    video_id: str
    video_uri: str
    path: str
    size_bytes: int


def video_id_of(video_uri: str) -> str:
    """A slug of the stem (at most 40 characters) and ten hex digits of the SHA-256 of the uri."""
    slug = re.sub(r"[^A-Za-z0-9]+", "-", PurePosixPath(video_uri).stem).strip("-")[:40].strip("-")
    digest = hashlib.sha256(video_uri.encode()).hexdigest()[:10]
    return f"{slug or 'video'}-{digest}"


def frame_seconds(name: str) -> float | None:
    """The time in the name of a frame, ``<anything>_<seconds>.jpg|png``; None for any other file."""
    match = _FRAME.fullmatch(name)
    return None if match is None else float(match["seconds"])


def find_videos(source: str, exclude_list: Path | None) -> list[VideoSource]:
    """All videos of ``source``, sorted by uri, without the excluded ones.

    ``source`` is a folder (searched recursively), a glob, a text, CSV or Parquet list, or one video.

    Raises:
        DeltacacheError: it does not exist or holds no video, or every video is excluded.
    """
    videos = sorted(_unique(_find(source)), key=lambda video: video.video_uri)
    excluded = set() if exclude_list is None else _read_exclude_list(exclude_list)
    kept = [video for video in videos if not _names_of(video) & excluded]
    if videos and not kept:
        raise DeltacacheError(
            f"{exclude_list} excludes all {len(videos)} videos of {source}: at least one must be left"
        )
    return kept


def _unique(videos: Iterable[VideoSource]) -> list[VideoSource]:
    return list({video.video_uri: video for video in videos}.values())


def _find(source: str) -> list[VideoSource]:
    _refuse_remote(source)
    path = Path(source)
    if path.is_dir():
        return _videos_in(path)
    if path.is_file():
        return _videos_named_by(path)
    if glob.has_magic(source):
        return _matches(source)
    raise DeltacacheError(f"{source} does not exist: give a folder, a glob, a list or a video")


def _refuse_remote(source: str) -> None:
    match = _REMOTE.match(source)
    if match is not None:
        raise DeltacacheError(
            f"{source}: sources on {match['scheme']} need remote storage, which this version cannot read: "
            "copy the videos to a local disk and give that path"
        )


def _videos_in(folder: Path) -> list[VideoSource]:
    videos = list(_walk(folder, folder, set()))
    if not videos:
        raise DeltacacheError(
            f"{folder} holds no video: it must have files such as *.mp4 or *.mkv, or folders of frames named "
            "<anything>_<seconds>.jpg, at any depth. Give the folder that holds them"
        )
    return videos


def _videos_named_by(path: Path) -> list[VideoSource]:
    suffix = path.suffix.lower()
    if suffix in VIDEO_SUFFIXES:
        return [_source(path.name, path)]
    if suffix not in LIST_SUFFIXES:
        raise DeltacacheError(
            f"{path} is neither a video nor a list: a list ends in {', '.join(sorted(LIST_SUFFIXES))}"
        )
    videos = [_listed(entry, path) for entry in read_list(path)]
    if not any(Path(video.path).exists() for video in videos):
        raise DeltacacheError(
            f"none of the {len(videos)} videos in {path} exists, the first is {videos[0].path}: "
            f"paths are relative to the list's folder {path.parent} or absolute"
        )
    return videos


def _listed(entry: str, path: Path) -> VideoSource:
    _refuse_remote(entry)
    return _source(PurePosixPath(entry).as_posix(), path.parent / entry)


def _matches(pattern: str) -> list[VideoSource]:
    """What a glob matches; a folder that it matches is searched like any other."""
    parts = Path(pattern).parts
    magic = next(place for place, part in enumerate(parts) if glob.has_magic(part))
    base = Path(*parts[:magic])
    found: list[VideoSource] = []
    seen: set[_Inode] = set()
    for path in sorted(base.glob(str(Path(*parts[magic:])))):
        if path.is_dir():
            found.extend(_walk(path, base, seen))
        elif path.suffix.lower() in VIDEO_SUFFIXES:
            found.append(_source(path.relative_to(base).as_posix(), path))
    if not found:
        raise DeltacacheError(
            f"{pattern} matches no video: it must match files such as *.mp4, or folders that hold some"
        )
    return found


def _walk(folder: Path, base: Path, seen: set[_Inode]) -> Iterator[VideoSource]:
    """Videos and folders of frames under ``folder``; uris are relative to ``base``.

    Each folder is visited once, by its real place if it has one below ``folder``, so that links cannot loop.
    """
    real, links = [folder], list[Path]()
    while real or links:
        current = real.pop() if real else links.pop()
        stat = current.stat()
        if (stat.st_dev, stat.st_ino) in seen:
            continue
        seen.add((stat.st_dev, stat.st_ino))
        files, folders = _entries(current)
        yield from _videos_of(current, files, base)
        for path in reversed(folders):
            (links if path.is_symlink() else real).append(path)


def _videos_of(folder: Path, files: list[str], base: Path) -> Iterator[VideoSource]:
    videos = [name for name in files if PurePosixPath(name).suffix.lower() in VIDEO_SUFFIXES]
    if not videos and any(frame_seconds(name) is not None for name in files):
        uri = folder.relative_to(base).as_posix()
        yield _source(folder.resolve().name if uri == "." else uri, folder)
    for name in videos:
        path = folder / name
        yield _source(path.relative_to(base).as_posix(), path)


def _entries(folder: Path) -> tuple[list[str], list[Path]]:
    """Names of the files and paths of the folders in ``folder``; hidden ones are left out."""
    files: list[str] = []
    folders: list[Path] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    folders.append(folder / entry.name)
                else:
                    files.append(entry.name)
    except OSError as error:
        raise DeltacacheError(
            f"{folder} cannot be listed ({error.strerror}): make it readable, or move it out of the source"
        ) from error
    return sorted(files), sorted(folders)


def _source(uri: str, path: Path) -> VideoSource:
    try:
        uri.encode()
    except UnicodeEncodeError:
        raise DeltacacheError(f"the name {uri!r} is not UTF-8, which tables need: rename it") from None
    return VideoSource(video_id_of(uri), uri, str(path), _size_bytes(path))


def _size_bytes(path: Path) -> int:
    try:
        if not path.is_dir():
            return path.stat().st_size
        frames = (entry for entry in os.scandir(path) if frame_seconds(entry.name) is not None)
        return sum(frame.stat().st_size for frame in frames)
    except OSError:  # not an error of the whole source: decoding refuses this one and says why
        return 0


def _read_exclude_list(path: Path) -> set[str]:
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
