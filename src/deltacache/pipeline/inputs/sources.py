"""Where videos come from: folders, globs, lists, archives and folders of frames, as one sorted list.

The same on local disks and on object stores (``s3://``, ``gs://`` and what else fsspec knows).
"""

import glob
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path, PurePosixPath

from upath import UPath

import deltacache.schemas
from deltacache.pipeline.inputs.archives import looks_like_archive
from deltacache.pipeline.inputs.folders import (
    ListedFolder,
    VideoSource,
    folder_at,
    local_folders,
    remote_folders,
    source_of,
    videos_of,
    videos_of_archives,
)
from deltacache.pipeline.inputs.lerobot import INFO, LeRobotDataset, read_info
from deltacache.pipeline.inputs.listed_videos import listed_videos
from deltacache.pipeline.inputs.lists import LIST_SUFFIXES, Tell
from deltacache.pipeline.inputs.locations import (
    VIDEO_SUFFIXES,
    PlainFile,
    is_video,
    readable_name,
    suffix_of,
    video_id_of,
)
from deltacache.pipeline.storage.storage import (
    client_errors,
    explain,
    filesystem_of,
    info_of,
    is_http,
    is_remote,
    refused_place,
    split_query,
)
from deltacache.pipeline.storage.storage import retried_call as retried
from deltacache.schemas.errors import DeltacacheError, SettingsError
from deltacache.schemas.texts import counted, decoded

__all__ = ["VIDEO_SUFFIXES", "VideoSource", "find_videos", "video_id_of"]

EXCLUDE_LISTS = Path(deltacache.schemas.__path__[0]) / "exclude_lists"
"""Lists that come with deltacache, each known by its name without suffix."""


def find_videos(
    source: str,
    exclude_list: Path | UPath | None,
    column: str | None = None,
    tell: Tell | None = None,
    schemes: Collection[str] = (),
    frames_per_second: float | None = None,
    cameras: Collection[str] = (),
) -> list[VideoSource]:
    """All videos of ``source``, sorted by uri, without the excluded ones.

    ``source`` is a folder (searched recursively), a glob, a list (text, CSV, JSON or Parquet), one video or archive,
    on a local disk, an object store or a web server. A folder may be a LeRobot dataset.

    Args:
        column: of a list, by name or number; None: chosen as ``lists.read_list`` says.
        tell: is given lines about what was chosen and what was left out.
        schemes: of urls, in lists too, that are opened beside the known ones.
        frames_per_second: without it, folders of pictures that are named by numbers alone are not videos, unless a
            list names them.
        cameras: of a LeRobot dataset, by key.

    Raises:
        DeltacacheError: it does not exist or holds no video, or every video is excluded.
    """
    if refused := refused_place(source, schemes):
        raise DeltacacheError(refused)
    found = _find(source, column, tell, schemes, cameras)
    videos = sorted({video.video_uri: video for video in found}.values(), key=lambda video: video.video_uri)
    if frames_per_second is None:
        videos = _without_counted(videos, source, tell)
    kept = videos if exclude_list is None else _without_excluded(videos, source, exclude_list, tell)
    if videos and not kept:
        raise DeltacacheError(
            f"{exclude_list} excludes all {counted(len(videos), 'video')} of {source}: at least one must be left"
        )
    return kept


def _without_counted(videos: list[VideoSource], source: str, tell: Tell | None) -> list[VideoSource]:
    counted = [video.video_uri for video in videos if video.is_counted]
    names = f"{', '.join(counted[:3])}{', ...' if len(counted) > 3 else ''}"
    about = f"{source}: {len(counted)} folders of pictures whose names only count them ({names})"
    way_out = "if they are frames of videos, give --frames-per-second (1000 for milliseconds), or a list of the folders"
    if counted and len(counted) == len(videos):
        raise DeltacacheError(f"{about} and no other video: {way_out} with a column frames_per_second")
    if counted and tell is not None:
        tell(f"{about} are not read: {way_out}")
    return [video for video in videos if not video.is_counted]


def _find(
    source: str, column: str | None, tell: Tell | None, schemes: Collection[str], cameras: Collection[str]
) -> Iterable[VideoSource]:
    if cameras and read_info(source) is None:
        raise SettingsError(
            f"--camera {', '.join(cameras)}: {source} is not a LeRobot dataset (it has no {INFO}), so its videos have "
            "no cameras. Leave --camera out"
        )
    if not is_remote(source):
        return _find_local(source, column, tell, schemes, cameras)
    try:
        return _find_remote(source, column, tell, schemes, cameras)
    except client_errors() as error:
        raise DeltacacheError(
            f"{source} cannot be listed ({explain(error)}): check the address, the credentials and that the bucket "
            "may be listed"
        ) from error
    except (ImportError, ValueError) as error:
        raise DeltacacheError(f"{source} cannot be opened: {error}") from error


def _find_local(
    source: str, column: str | None, tell: Tell | None, schemes: Collection[str], cameras: Collection[str]
) -> list[VideoSource]:
    place = os.path.abspath(source)  # noqa: PTH100 - other machines have other working folders; links stay
    if os.path.isdir(place):  # noqa: PTH112
        return _searched(source, local_folders(place, "", set()), tell, cameras)
    if os.path.isfile(place):  # noqa: PTH113
        return _named(source, place, column, tell, schemes)
    if glob.has_magic(source):
        return _matched(source, _local_matches(place))
    raise _not_there(source)


def _find_remote(
    source: str, column: str | None, tell: Tell | None, schemes: Collection[str], cameras: Collection[str]
) -> list[VideoSource]:
    fs, path = filesystem_of(source)
    try:
        info = retried(lambda: info_of(fs, path))
    except FileNotFoundError:
        if not glob.has_magic(split_query(source)[0]):
            raise _not_there(source) from None
        return retried(lambda: _matched(source, _remote_matches(path, source)))
    if info.get("type") == "file" and not (is_http(path) and path.endswith("/")):
        return _named(source, source, column, tell, schemes)
    found = retried(lambda: fs.find(path, detail=True))
    return retried(lambda: _searched(source, remote_folders(fs, path, found), tell, cameras))


def _not_there(source: str) -> DeltacacheError:
    return DeltacacheError(f"{source} does not exist: give a folder, a glob, a list, an archive or a video")


def _searched(
    source: str, folders: Iterable[ListedFolder], tell: Tell | None, cameras: Collection[str]
) -> list[VideoSource]:
    folders, videos, unread = list(folders), list[VideoSource](), list[str]()
    about, name = INFO.split("/")
    described = [
        folder for folder in folders if name in folder.files and PurePosixPath(folder.uri).name == about
    ]
    places = {folder.uri: folder.place.removesuffix(f"/{about}") for folder in described}
    robots = {uri: place for uri, place in places.items() if read_info(place) is not None}
    if about in robots:
        files = {folder.uri_of(name): file for folder in folders for name, file in folder.files.items()}
        return LeRobotDataset(robots[about]).videos(cameras, files, tell)
    if robots:
        names = ", ".join([*robots.values()][:3]) + (", ..." if len(robots) > 3 else "")
        raise DeltacacheError(
            f"{source} holds LeRobot datasets ({names}), whose files may hold several episodes: give one at a time"
        )
    for folder in folders:
        videos += videos_of(folder)
        unread += [
            readable_name(folder.uri_of(name)) for name in folder.files if suffix_of(name) in (".rar", ".7z")
        ]
    if tell is not None and unread:
        more = ", ..." if len(unread) > 3 else ""
        tell(
            f"{source}: {len(unread)} RAR or 7z archives are not read ({', '.join(unread[:3])}{more}): unpack them"
        )
    if not videos:
        raise DeltacacheError(
            f"{source} holds no video: it must have files such as *.mp4 or *.mkv, folders of frames named "
            "<anything>_<seconds>.jpg, zip and tar archives of these (not RAR or 7z), or Parquet files of videos, at "
            "any depth. Give the folder that holds them"
        )
    return videos


def _named(
    source: str, place: str, column: str | None, tell: Tell | None, schemes: Collection[str]
) -> list[VideoSource]:
    """One file: a video, an archive or a list."""
    path, query = split_query(place)
    parent, _, name = path.rpartition("/")
    suffix = suffix_of(name)
    if suffix in LIST_SUFFIXES:
        return listed_videos(place, column, tell, schemes)
    is_alone = is_video(name) or is_http(place)
    folder = folder_at(parent, "", {name} if is_alone else None, query)
    if is_video(name):
        return [source_of(name, PlainFile(folder.place_of(name)), folder.files[name])]
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
        is_hidden = any(part.startswith(".") for part in path.relative_to(base).parts)
        if is_hidden and "/." not in pattern[len(base) :]:
            continue
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


def _without_excluded(
    videos: list[VideoSource], source: str, exclude_list: Path | UPath, tell: Tell | None
) -> list[VideoSource]:
    """The videos that no line of the list names: by id, uri, file name, stem or path.

    A path that is not a uri is taken as it stands, then from the working directory, then from the list's folder. Lines
    that name nothing are counted and shown.
    """
    packaged = EXCLUDE_LISTS / f"{exclude_list}.txt"
    place = packaged if packaged.is_file() and not exclude_list.exists() else exclude_list
    try:
        lines = [line.strip() for line in decoded(place.read_bytes()).splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DeltacacheError(
            f"exclude list {exclude_list} cannot be read ({error}): it must be text in UTF-8, or UTF-16 with a "
            "byte-order mark, with one id, stem, uri or path per line"
        ) from error
    named: dict[str, list[int]] = {}  # places of videos by all that they are called
    bases = _bases_of(source)
    for place, video in enumerate(videos):
        uri = PurePosixPath(video.video_uri)
        names = {video.video_id, video.video_uri, str(uri), uri.name, uri.stem, video.path}
        for name in names | {f"{base}/{uri}" for base in bases}:
            named.setdefault(name, []).append(place)
    here = [Path.cwd(), Path(str(exclude_list)).absolute().parent]
    excluded, unknown = set[int](), list[str]()
    for line in dict.fromkeys(line for line in lines if line and not line.startswith("#")):
        ways = [line, line.rstrip("/")]
        if not is_remote(line):
            path = os.path.normpath(line.replace("\\", "/"))
            ways += [path, *(os.path.normpath(folder / path) for folder in here), os.path.realpath(path)]
        known = next((named[way] for way in ways if way in named), [])
        excluded.update(known)
        unknown += [] if known else [line]
    if tell is not None and (unknown or excluded):
        names = f": {', '.join(unknown[:3])}{', ...' if len(unknown) > 3 else ''}" if unknown else ""
        tell(
            f"{exclude_list}: leaves out {len(excluded)} of {len(videos)} videos; {len(unknown)} of its entries match "
            f"no video{names}"
        )
    return [video for place, video in enumerate(videos) if place not in excluded]


def _bases_of(source: str) -> set[str]:
    """What the uris of a source's videos are relative to, as it is written and with its links followed."""
    if is_remote(source):
        base = _base_of(source) if glob.has_magic(source) else source.rstrip("/")
        is_file = any(suffix_of(base) in suffixes for suffixes in (VIDEO_SUFFIXES, LIST_SUFFIXES))
        return {base.rpartition("/")[0] if is_file or looks_like_archive(base) else base}
    place = os.path.abspath(source)  # noqa: PTH100
    if os.path.isfile(place):  # noqa: PTH113
        place = os.path.dirname(place)  # noqa: PTH120
    elif not os.path.isdir(place):  # noqa: PTH112
        place = _base_of(place)
    return {place.rstrip("/"), os.path.realpath(place).rstrip("/")}
