"""A local path for the decoder, wherever a video lies, and the identity of what was read.

==================  =============================================  =======================
the video is        the path is                                    version
==================  =============================================  =======================
a local file        the file itself                                its mtime_ns
a local folder      the folder itself                              newest mtime_ns of a frame
an object           a copy in the spool folder                     its ETag
frames on a store   copies in a folder in the spool folder         a hash of their ETags
in a zip archive    unpacked in the spool folder                   a hash of the checksums in its directory
in a tar archive    a copy in the spool folder                     the archive's, and the place in it
a LeRobot episode   its video file as it is, or one copy of it     those of its two files, and the place in it
                    for all episodes that lie in it
==================  =============================================  =======================

Names in the spool folder are ours. Errors that may pass (I/O, connections, HTTP 429 and 5xx) are tried again for as
long as ``DecodeLimits.retry_s`` says. A video takes at most a share of the space that is free there.
"""

import atexit
import errno
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any, TypeAlias

from deltacache.pipeline.inputs.archives import (
    MAX_VIDEO_BYTES,
    NO_RANGES,
    open_rows,
    open_zips,
    read_member,
    zip_version,
)
from deltacache.pipeline.inputs.locations import (
    VIDEO_SUFFIXES,
    Episode,
    FrameObjects,
    Location,
    ParquetVideo,
    PlainFile,
    RatedFrames,
    Refused,
    TarVideo,
    ZipFrames,
    ZipVideo,
    episode_version,
    frames_among,
    parse_location,
    rated_version,
    spooled_frame_name,
    suffix_of,
)
from deltacache.pipeline.storage.files import spool_folder
from deltacache.pipeline.storage.storage import (
    client_errors,
    filesystem_of,
    frames_version,
    host_of,
    info_of,
    is_http,
    is_remote,
    refusal_of,
    split_query,
    version_of,
)
from deltacache.pipeline.storage.storage import retried_call as retried
from deltacache.schemas.datasets import SamplingSettings
from deltacache.schemas.errors import DeltacacheError, FailureReason, VideoRefusedError
from deltacache.schemas.jobs import DecodeLimits
from deltacache.schemas.texts import bytes_text

_CHUNK_BYTES = 8 << 20  # one request of an object store
_LOCAL_CHUNK_BYTES = 1 << 20
_BLOCK_BYTES = 4096  # that even an empty file takes


@dataclass(frozen=True, slots=True)
class FetchedVideo:
    """One video on this machine.

    Attributes:
        path: a file, or a folder of frames.
        size_bytes: of the file or of all frames.
        version: changes when the source is replaced; see the module's table.
        sha256: of the file; of frames, over their sorted names and contents, wherever they lie.
        frames_per_second: of frames, where a list tells it; part of their version and sha256.
        span: where in the file the video lies, if other videos are in it too; part of its version and sha256.
    """

    path: str
    size_bytes: int
    version: str
    sha256: str
    frames_per_second: float | None = None
    span: tuple[float, float] | None = None

    def sampling_of(self, settings: SamplingSettings) -> SamplingSettings:
        """The settings with the rate that a list tells of these frames, if it does."""
        if self.frames_per_second is None:
            return settings
        return settings.model_copy(update={"frames_per_second": self.frames_per_second})


@contextmanager
def fetched(
    location: str, spool: Path, share: float = DecodeLimits().temporary_share
) -> Iterator[FetchedVideo]:
    """A local path to the video, valid inside the context; copies lie below ``spool`` and are removed afterwards.

    Args:
        share: of the space that is free in ``spool``, that the copies may take.

    Raises:
        VideoRefusedError: it cannot be read, is damaged inside its archive, or takes too much space.
    """
    with _refusing():
        parsed = parse_location(location)
    if isinstance(parsed, Episode):
        with _refusing():
            video = retried(lambda: _episode(parsed, share), _host(parsed))
        yield video
        return
    folder = None if _is_local(parsed) else tempfile.mkdtemp(prefix="video-", dir=spool)
    try:
        with _refusing():
            video = retried(lambda: _fetch(parsed, _Copies(folder, share) if folder else None), _host(parsed))
        yield video
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def content_sha256(location: str) -> str:
    """The ``sha256`` that ``fetched`` would give, without writing anything. Raises as it does."""
    with _refusing():
        parsed = parse_location(location)
        return retried(lambda: _fetch(parsed, None), _host(parsed)).sha256


@contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except (*client_errors(), ImportError, ValueError) as error:  # no such protocol, or no package for it
        raise refusal_of(error) from error


def _host(location: Location) -> str:
    match location:
        case PlainFile(place) | FrameObjects(place) | ZipVideo(place) | ZipFrames(place) | TarVideo(place):
            return host_of(place)
        case ParquetVideo(place) | Episode(place):
            return host_of(place)
        case RatedFrames(inner):
            return _host(parse_location(inner))
        case Refused():
            return ""


def _is_local(location: Location) -> bool:
    if isinstance(location, RatedFrames):
        return _is_local(parse_location(location.location))
    return isinstance(location, PlainFile) and not is_remote(location.place)


class _Copies:
    """Where the copies of one video go, and how much they may take.

    However many videos are copied at once, each at most ``share`` of what is free and what it has itself, they
    never fill the disk: n of them end at n * share / (1 + (n - 1) * share) of it.
    """

    def __init__(self, folder: str, share: float) -> None:
        self.folder, self._share = folder, share
        for left in os.scandir(folder):  # of an attempt before
            os.unlink(left)  # noqa: PTH108
        self._files = self._bytes = 0

    def file(self, name: str) -> str:
        """The path of the next file."""
        self._files += 1
        return os.path.join(self.folder, name)  # noqa: PTH118 - 100,000 frames

    def adding(self, size: int) -> None:
        """Count bytes before they are written.

        Raises:
            VideoRefusedError: they are too many.
        """
        free = shutil.disk_usage(self.folder).free + self._bytes
        self._bytes += size
        taken = self._bytes + self._files * _BLOCK_BYTES
        if taken > self._share * free:
            raise VideoRefusedError(
                FailureReason.TOO_LARGE,
                f"it needs more than {self._share:.0%} of the temporary space that is free: make room in TMPDIR, or "
                "raise --temporary-share",
            )


def _fetch(location: Location, copies: _Copies | None) -> FetchedVideo:  # noqa: PLR0911 - one a kind
    """Read all of it once, into ``copies`` unless that is None."""
    match location:
        case PlainFile(place):
            return _object(place, copies) if is_remote(place) else _local(place)
        case FrameObjects(url):
            return _frames(*_frame_objects(url), copies)
        case ZipVideo() | ZipFrames():
            return _zip_member(location, copies)
        case TarVideo():
            return _tar_member(location, copies)
        case ParquetVideo():
            return _parquet_row(location, copies)
        case RatedFrames(inner, rate):
            video = _fetch(parse_location(inner), copies)
            sha256 = hashlib.sha256(f"{video.sha256} at {rate!r} frames/s".encode()).hexdigest()
            return replace(
                video, version=rated_version(video.version, rate), sha256=sha256, frames_per_second=rate
            )
        case Episode():
            return _episode(location, None)
        case Refused(_, message):
            raise VideoRefusedError(location.failure, message)


# --- files and objects --------------------------------------------------------------------------------------


def _local(path: str) -> FetchedVideo:
    about = os.stat(path)  # noqa: PTH116 - one call for kind, size and time
    if stat.S_ISDIR(about.st_mode):
        with os.scandir(path) as entries:
            files = {entry.name: entry for entry in entries}
        frames = {name: files[name].stat() for name in frames_among(files)}
        version = str(max((frame.st_mtime_ns for frame in frames.values()), default=about.st_mtime_ns))
        readers = {name: _local_chunks(f"{path}/{name}", frame) for name, frame in frames.items()}
        return _frames(readers, version, None, path)
    if not stat.S_ISREG(about.st_mode):  # reading a pipe or a device may never end
        raise VideoRefusedError(FailureReason.UNREADABLE, "not a regular file")
    digest, size = _copy(_local_chunks(path, about), None, None)
    _check_unchanged(about.st_mtime_ns, os.stat(path).st_mtime_ns)  # noqa: PTH116
    return FetchedVideo(path, size, str(about.st_mtime_ns), digest)


def _check_unchanged(before: object, after: object) -> None:
    if before != after:
        raise OSError(errno.ESTALE, "replaced while it was read")


def _local_chunks(path: str, about: os.stat_result) -> Iterator[bytes]:
    if not stat.S_ISREG(about.st_mode):
        raise VideoRefusedError(FailureReason.UNREADABLE, "not a regular file")
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - a Path costs more than a small frame's hash
        while data := file.read(_LOCAL_CHUNK_BYTES):
            yield data


def _object(url: str, copies: _Copies | None) -> FetchedVideo:
    fs, path = filesystem_of(url)
    info = info_of(fs, path)
    if info.get("type") == "directory":
        raise VideoRefusedError(FailureReason.UNREADABLE, "a folder, not a video")
    target = _target(copies, suffix_of(split_query(url)[0]))
    digest, size = _copy(_object_chunks(url, 0, info.get("size")), target, copies)
    if size > _CHUNK_BYTES:
        _check_unchanged(version_of(info), version_of(info_of(fs, path)))
    return FetchedVideo(target or url, size, version_of(info), digest)


def _object_chunks(url: str, start: int, size: int | None) -> Iterator[bytes]:
    """One request a chunk, each tried again by itself; one for all where a server gives no parts or no size.

    Raises:
        VideoRefusedError: there are fewer bytes.
    """
    fs, path = filesystem_of(url)
    if size is None:
        yield from _streamed(fs, path, 0)
        return
    for begin in range(start, start + size, _CHUNK_BYTES):
        end = min(begin + _CHUNK_BYTES, start + size)
        try:
            data = retried(lambda begin=begin, end=end: _range(fs, path, begin, end), host_of(url))
        except client_errors() as error:  # tried often enough: not all of it once more
            raise refusal_of(error) from error
        except ValueError as error:
            if "range requests" not in str(error):
                raise
            if start:
                raise VideoRefusedError(FailureReason.UNREADABLE, NO_RANGES) from error
            yield from _streamed(fs, path, begin)
            return
        if len(data) != end - begin:
            raise VideoRefusedError(
                FailureReason.TRUNCATED, f"its store gave {len(data)} of {end - begin} bytes"
            )
        yield data


def _range(fs: Any, path: str, begin: int, end: int) -> bytes:
    if not is_http(path):
        return fs.cat_file(path, start=begin, end=end)
    # cat_file would read all of a file into memory where the server knows no ranges
    with fs.open(path, "rb", block_size=_CHUNK_BYTES, cache_type="none", size=end) as file:
        return file._fetch_range(begin, end)


def _streamed(fs: Any, path: str, start: int) -> Iterator[bytes]:
    """All bytes from ``start`` on by one request without a range."""
    with fs.open(path, "rb", block_size=0, size=1) as file:
        while start and (data := file.read(min(start, _LOCAL_CHUNK_BYTES))):
            start -= len(data)
        while data := file.read(_LOCAL_CHUNK_BYTES):
            yield data


def _frame_objects(url: str) -> tuple[dict[str, Iterator[bytes]], str]:
    fs, path = filesystem_of(url)
    found = fs.find(path, maxdepth=1, detail=True)
    infos = {place.rpartition("/")[2]: info for place, info in sorted(found.items())}
    infos = {name: infos[name] for name in frames_among(infos)}
    readers = {name: _object_chunks(f"{url}/{name}", 0, info.get("size")) for name, info in infos.items()}
    return readers, frames_version((name, version_of(info)) for name, info in infos.items())


# --- archives -----------------------------------------------------------------------------------------------


def archive_stamp(archive: str) -> str:
    """A version of an archive's file: of one in parts, the file that names it."""
    if is_remote(archive):
        return version_of(info_of(*filesystem_of(archive)))
    return str(os.stat(archive).st_mtime_ns)  # noqa: PTH116


def _zip_member(location: ZipVideo | ZipFrames, copies: _Copies | None) -> FetchedVideo:
    directory = open_zips.get(location.archive, location.parts, archive_stamp(location.archive))
    if isinstance(location, ZipFrames):
        frames = directory.folders.get(location.folder, [])
        _check_size(sum(frame.file_size for frame in frames))
        readers = {frame.filename.rpartition("/")[2]: read_member(directory, frame) for frame in frames}
        return _frames(readers, zip_version(frames), copies)
    member = directory.members.get(location.member)
    if member is None:
        raise VideoRefusedError(FailureReason.UNREADABLE, "it is no longer in its archive")
    _check_size(member.file_size)
    target = _target(copies, suffix_of(location.member))
    digest, size = _copy(read_member(directory, member), target, copies)
    return FetchedVideo(target or location.archive, size, zip_version([member]), digest)


def _tar_member(location: TarVideo, copies: _Copies | None) -> FetchedVideo:
    _check_size(location.size)
    version = f"{archive_stamp(location.archive)}@{location.offset}"
    target = _target(copies, location.suffix)
    digest, size = _copy(_tar_chunks(location), target, copies)
    return FetchedVideo(target or location.archive, size, version, digest)


def _tar_chunks(location: TarVideo) -> Iterator[bytes]:
    if is_remote(location.archive):
        yield from _object_chunks(location.archive, location.offset, location.size)
        return
    left = location.size
    with open(location.archive, "rb", buffering=0) as file:  # noqa: PTH123
        file.seek(location.offset)
        while left:
            data = file.read(min(left, _LOCAL_CHUNK_BYTES))
            if not data:
                raise VideoRefusedError(FailureReason.TRUNCATED, "its archive ends before it does")
            left -= len(data)
            yield data


def _parquet_row(location: ParquetVideo, copies: _Copies | None) -> FetchedVideo:
    """Rows of its group are passed over one by one, so that no more than a page of them is held."""
    version = f"{archive_stamp(location.file)}@{location.group}.{location.row}"
    with open_rows(location.file) as file:
        if location.group >= file.metadata.num_row_groups:
            raise VideoRefusedError(FailureReason.UNREADABLE, "its Parquet file has fewer rows now")
        rows = file.iter_batches(1, row_groups=[location.group], columns=[location.column])
        batch = next(islice(rows, location.row, None), None)
        value = None if batch is None else batch.column(0)[0].as_py()
    for _ in location.column.split(".")[1:]:
        value = next(iter(value.values()), None) if isinstance(value, dict) else None
    if not isinstance(value, bytes) or not value:
        raise VideoRefusedError(FailureReason.EMPTY_FILE, "its row holds no bytes")
    _check_size(len(value))
    target = _target(copies, location.suffix)
    chunks = (value[start : start + _LOCAL_CHUNK_BYTES] for start in range(0, len(value), _LOCAL_CHUNK_BYTES))
    digest, _ = _copy(chunks, target, copies)
    return FetchedVideo(target or location.file, location.size, version, digest)


def _check_size(size: int) -> None:
    if size > MAX_VIDEO_BYTES:
        raise VideoRefusedError(
            FailureReason.TOO_LARGE,
            f"its archive claims {bytes_text(size)} for it, and at most {bytes_text(MAX_VIDEO_BYTES)} are unpacked",
        )


# --- episodes of LeRobot datasets ----------------------------------------------------------------------------


class _KeptFiles:
    """The last video file and the last file of rows, read once for all episodes that lie in them."""

    def __init__(self) -> None:
        self._lock, self._copy = Lock(), ExitStack()
        self._held: dict[str, tuple[tuple[object, ...], FetchedVideo]] = {}
        atexit.register(self._copy.close)

    def get(self, what: str, place: str, share: float | None) -> FetchedVideo:
        """The file as it is now; a remote one is copied unless ``share`` (see ``fetched``) is None."""
        with self._lock:
            copied = is_remote(place) and share is not None
            stamp = archive_stamp(place)
            key = (place, stamp, copied)
            known = self._held.get(what)
            if known is not None and known[0] == key and stamp and Path(known[1].path).exists() >= copied:
                return known[1]
            if share is not None and copied:
                self._copy.close()
                self._held.clear()
                folder = self._copy.enter_context(spool_folder())
                video = _object(place, _Copies(str(folder), share))
            else:
                video = _object(place, None) if is_remote(place) else _local(place)
            self._held[what] = key, video
            return video


_kept = _KeptFiles()


def _episode(location: Episode, share: float | None) -> FetchedVideo:
    video, rows = _kept.get("video", location.file, share), _kept.get("rows", location.rows, None)
    span = None
    if location.start_s is not None and location.end_s is not None:
        span = location.start_s, location.end_s
    sha256 = hashlib.sha256(f"{video.sha256} at {span} with {rows.sha256} {location.about}".encode())
    version = episode_version(video.version, rows.version, location)
    return replace(video, version=version, sha256=sha256.hexdigest(), span=span)


# --- copies and hashes --------------------------------------------------------------------------------------

_Readers: TypeAlias = dict[str, Iterator[bytes]]


def _frames(readers: _Readers, version: str, copies: _Copies | None, path: str = "") -> FetchedVideo:
    """Frames by name, each read once, in the order of names."""
    digest, total = hashlib.sha256(), 0
    for number, name in enumerate(sorted(readers)):
        target = None if copies is None else copies.file(spooled_frame_name(number, name))
        content, size = _copy(readers[name], target, copies)
        encoded = os.fsencode(name)
        digest.update(f"{len(encoded)}:".encode() + encoded + f" {content}\n".encode())
        total += size
    return FetchedVideo(path or (copies.folder if copies else ""), total, version, digest.hexdigest())


def _target(copies: _Copies | None, suffix: str) -> str | None:
    known = suffix if suffix in VIDEO_SUFFIXES else ""
    return None if copies is None else copies.file(f"video{known}")


def _copy(chunks: Iterator[bytes], target: str | None, copies: _Copies | None) -> tuple[str, int]:
    """SHA-256 and size of ``chunks``, written to ``target`` unless that is None."""
    digest, size = hashlib.sha256(), 0
    with open(target or os.devnull, "wb", buffering=0) as file:  # noqa: PTH123
        for data in chunks:
            digest.update(data)
            size += len(data)
            if copies is not None:
                copies.adding(len(data))
                _write_all(file.fileno(), data)
    return digest.hexdigest(), size


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(descriptor, view) :]
    except OSError as error:  # ours, not the video's
        raise DeltacacheError(
            f"a copy of {len(data)} bytes cannot be written to the spool folder ({error.strerror}): it needs space "
            "for a few videos, set TMPDIR to a folder on a larger disk"
        ) from error
