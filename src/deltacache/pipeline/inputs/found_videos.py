"""One video as it was found, and what the files of one folder are: videos, frames, archives."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from deltacache.pipeline.inputs.archive_parts import archives_among, looks_like_archive
from deltacache.pipeline.inputs.archives import videos_in_archive
from deltacache.pipeline.inputs.folders import ListedFile, ListedFolder
from deltacache.pipeline.inputs.locations import FrameObjects, Location, PlainFile, Refused, location_text
from deltacache.pipeline.inputs.video_names import (
    are_numbers_alone,
    frames_among,
    is_video,
    readable_name,
    video_id_of,
)
from deltacache.pipeline.storage.remote_files import frames_version, is_remote
from deltacache.schemas.errors import FailureReason
from deltacache.schemas.secrets import without_secrets


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
