"""Videos inside archives: zip archives of frames or videos, in parts too, WebDataset tars and Parquet files of videos.

Compressed tars are looked into, and refused if they hold videos: they can only be read from their beginning.

Nothing is ever extracted under a name of the archive's, no link in it is followed, and what its directory
claims is believed only as far as limits allow.
"""

import atexit
import hashlib
import io
import json
import lzma
import os
import re
import stat
import struct
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from deltacache.pipeline.inputs.locations import (
    Location,
    ParquetVideo,
    Refused,
    TarVideo,
    ZipFrames,
    ZipVideo,
    are_numbers_alone,
    frames_among,
    is_video,
    suffix_of,
)
from deltacache.pipeline.storage.storage import (
    client_errors,
    filesystem_of,
    host_of,
    info_of,
    is_remote,
    may_pass,
    refusal_of,
)
from deltacache.pipeline.storage.storage import retried_call as retried
from deltacache.schemas.errors import FailureReason, VideoRefusedError

# ----------------------------------------------------------------------------------------------------
# Archives among files: which there are, which files make up one, and reading its parts as one file.
# ----------------------------------------------------------------------------------------------------


_NUMBERED = re.compile(r"(?P<name>.+\.zip)\.(?P<number>[0-9]{3,5})", re.IGNORECASE | re.DOTALL)
_SPANNED = re.compile(r"(?P<name>.+)\.z(?P<number>[0-9]{2,5})", re.IGNORECASE | re.DOTALL)
_BLOCK_BYTES = 1 << 20
_TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")


PARQUET_SUFFIXES = frozenset({".parquet", ".pq"})
INSIDE_ARCHIVE = re.compile(
    r"(?P<archive>.+?\.(?:zip|tar)|.+\.(?:parquet|pq)(?=/[0-9]+(?:/[^/]+)?\Z))/(?P<inner>.+)",
    re.IGNORECASE | re.DOTALL,
)
"""A video in an archive as it is called in tables and lists."""


@dataclass(frozen=True, slots=True)
class ArchiveFile:
    """One archive among the files of a folder.

    Attributes:
        name: as people call it, without the numbers of parts: ``a.zip``.
        first: the file that names it in locations: ``a.zip``, or ``a.zip.001`` of a numbered one.
        parts: files that it consists of.
        missing: the part that ought to be there and is not, or "".
    """

    name: str
    first: str
    parts: int = 1
    missing: str = ""


def is_tar(name: str) -> bool:
    """Whether a file is named like a tar, compressed ones included."""
    return name.lower().endswith(_TARS)


def looks_like_archive(name: str) -> bool:
    """Whether a file of this name is an archive or one of its parts."""
    return _is_whole(name) or any(pattern.fullmatch(name) for pattern in (_NUMBERED, _SPANNED))


def _is_whole(name: str) -> bool:
    return is_tar(name) or name.lower().endswith(".zip") or suffix_of(name) in PARQUET_SUFFIXES


def archives_among(names: Iterable[str]) -> list[ArchiveFile]:
    """The archives that the files of one folder make up."""
    whole: set[str] = set()
    numbered: dict[str, dict[int, str]] = {}
    spanned: dict[str, dict[int, str]] = {}
    for name in names:
        if _is_whole(name):
            whole.add(name)
        elif match := _NUMBERED.fullmatch(name):
            numbered.setdefault(match["name"], {})[int(match["number"])] = name
        elif match := _SPANNED.fullmatch(name):
            suffix = ".zip" if name[match.end("name") + 1] == "z" else ".ZIP"
            spanned.setdefault(match["name"] + suffix, {})[int(match["number"])] = name
    found = [_numbered(name, parts) for name, parts in numbered.items()]
    for name, parts in spanned.items():
        names = part_names(name, max(parts) + 1)
        found.append(ArchiveFile(name, name, len(names), _first_missing(names, {*parts.values(), *whole})))
    found += [ArchiveFile(name, name) for name in whole - spanned.keys()]
    return sorted(found, key=lambda archive: archive.first)


def _numbered(name: str, parts: dict[int, str]) -> ArchiveFile:
    names = [f"{name}.{number:03d}" for number in range(1, max(parts) + 1)]
    return ArchiveFile(name, names[0], len(names), _first_missing(names, parts.values()))


def _first_missing(names: Sequence[str], there: Iterable[str]) -> str:
    present = set(there)
    return next((name for name in names if name not in present), "")


def part_names(archive: str, parts: int) -> list[str]:
    """The parts in the order of their bytes: ``a.zip.001, a.zip.002`` or ``a.z01, a.zip``."""
    if parts == 1 and not _NUMBERED.fullmatch(archive):
        return [archive]
    if match := _NUMBERED.fullmatch(archive):
        return [f"{match['name']}.{number:03d}" for number in range(1, parts + 1)]
    stem, letter = archive[:-4], archive[-3]
    return [*(f"{stem}.{letter}{number:02d}" for number in range(1, parts)), archive]


def parts_beside(archive: str) -> Iterator[list[str]]:
    """What the other parts of an archive may be called, one after the other, in each way that parts are named."""
    if match := _NUMBERED.fullmatch(archive):
        archive = match["name"]
    if archive.lower().endswith(".zip"):
        yield [f"{archive}.{number:03d}" for number in range(1, 1000)]
        yield [f"{archive[:-4]}.{archive[-3]}{number:02d}" for number in range(1, 1000)]


def open_parts(paths: Sequence[str], block_bytes: int = _BLOCK_BYTES) -> "JoinedFile":
    """Files or objects, one after the other, as one seekable file. Close it.

    Raises:
        OSError: one of them cannot be opened.
    """
    return JoinedFile(paths, block_bytes)


class JoinedFile(io.BufferedReader):
    """Several files read as one.

    Attributes:
        starts: where each part begins.
        size: bytes of all parts.
    """

    def __init__(self, paths: Sequence[str], block_bytes: int) -> None:
        raw = _Joined([_open(path, block_bytes) for path in paths])
        self.starts, self.size = raw.starts, raw.size
        super().__init__(raw, 1 << 16)


def _open(path: str, block_bytes: int) -> io.IOBase:
    if not is_remote(path):
        return io.FileIO(path)
    fs, place = filesystem_of(path)
    size = info_of(fs, place).get("size")  # fsspec's own asking takes every error for a missing file
    if size is None:
        raise VideoRefusedError(FailureReason.UNREADABLE, "its server does not say how long its archive is")
    return fs.open(place, "rb", block_size=block_bytes, cache_type="readahead", size=size)


class _Joined(io.RawIOBase):
    def __init__(self, files: Sequence[io.IOBase]) -> None:
        self._files, self._at = files, 0
        self.starts, self.size = [], 0
        for file in files:
            self.starts.append(self.size)
            self.size += file.seek(0, os.SEEK_END)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence]
        if base + offset < 0:
            raise OSError(22, "negative seek position")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self._at >= self.size:
            return 0
        part = max(place for place, start in enumerate(self.starts) if start <= self._at)
        file = self._files[part]
        file.seek(self._at - self.starts[part])
        data = file.read(len(buffer))  # pyright: ignore[reportAttributeAccessIssue]
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        for file in self._files:
            file.close()
        super().close()


MAX_VIDEO_BYTES = 16 << 30  # of one video taken out of an archive: more is a bomb, not a video
NO_RANGES = "its server does not support range requests, which reading an archive needs"
_ZIP_ERRORS = (
    zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError, EOFError, ValueError, RuntimeError,
    IndexError, OverflowError, lzma.LZMAError,
)  # fmt: skip
_TAR_ERRORS = (tarfile.TarError, ValueError, OverflowError, EOFError)
_UNIX = 3
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd"}
_LOOKED_THROUGH = 1 << 30  # of a compressed tar, until its first video
_TAR_BLOCK = 512
_TAR_READ_BYTES = 1 << 16  # headers lie far apart
_LONGEST_HEADER = 1 << 20


@dataclass(frozen=True, slots=True)
class ArchivedVideo:
    """One video of an archive.

    Attributes:
        inner: its name in the archive, "" for the archive itself.
        version, is_counted: see ``VideoSource``.
    """

    inner: str
    location: Location
    size_bytes: int
    version: str
    is_counted: bool = False


def videos_in_archive(
    archive: ArchiveFile, place_of: Callable[[str], str], version: str
) -> list[ArchivedVideo]:
    """What an archive holds; one refused entry for an archive, or its rest, that cannot be read.

    Args:
        place_of: path or url of a file of the archive's folder.
        version: of the archive's file.
    """
    if archive.missing:
        message = f"{archive.missing} is missing, a part of {archive.name}"
        return [_refused(FailureReason.UNREADABLE, message, version)]
    first = place_of(archive.first)
    try:
        if is_tar(archive.first):
            return retried(lambda: list(_tar_videos(first, version)), host_of(first))
        if suffix_of(archive.first) in PARQUET_SUFFIXES:
            return retried(lambda: _parquet_videos(first, version), host_of(first))
        return retried(lambda: _zip_videos(first, archive.parts), host_of(first))
    except VideoRefusedError as error:
        return [_refused(error.reason, error.message, version)]
    except client_errors() as error:
        error = refusal_of(error)
        return [_refused(error.reason, error.message, version)]


def _refused(reason: FailureReason, message: str, version: str) -> ArchivedVideo:
    return ArchivedVideo("", Refused(reason.value, message), 0, version)


# --- zip ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ZipDirectory:
    """An opened zip archive.

    Attributes:
        members: by name; files only.
        folders: frames by the folder that they lie in, "" for the top; in the order of their names.
    """

    file: JoinedFile
    zip: zipfile.ZipFile
    members: dict[str, zipfile.ZipInfo]
    folders: dict[str, list[zipfile.ZipInfo]]

    def close(self) -> None:
        """Close the archive and its parts."""
        self.zip.close()
        self.file.close()


def open_zip(archive: str, parts: int) -> ZipDirectory:
    """Read the directory of a zip archive.

    Raises:
        VideoRefusedError: it cannot be understood.
        OSError: its files cannot be read.
    """
    names = part_names(archive, parts)
    file = open_parts(names)
    try:
        if not file.size:
            raise VideoRefusedError(FailureReason.EMPTY_FILE, "the archive has zero bytes")
        opened = zipfile.ZipFile(file)
        _correct_separators(opened.infolist())
        members = {
            info.filename: info
            for info in opened.infolist()
            if not (_is_hidden(info.filename) or info.is_dir())
        }
        if parts > 1 and not names[0].lower().endswith(".001"):
            _correct_offsets(opened, file)
    except _ZIP_ERRORS as error:
        file.close()
        if "range requests" in str(error):
            raise VideoRefusedError(FailureReason.UNREADABLE, NO_RANGES) from error
        hint = (
            "" if parts == 1 else f" (parts {names[0].rpartition('/')[2]} to {names[-1].rpartition('/')[2]})"
        )
        message = f"the archive's directory cannot be read{hint}, a part is missing or damaged: {error}"
        raise VideoRefusedError(FailureReason.CORRUPT_STREAM, message) from error
    except BaseException:
        file.close()
        raise
    files: dict[str, dict[str, zipfile.ZipInfo]] = {}  # by folder and name
    for name, info in sorted(members.items()):
        folder, _, own = name.rpartition("/")
        files.setdefault(folder, {})[own] = info
    folders = {
        folder: [held[name] for name in frames]
        for folder, held in files.items()
        if not any(map(is_video, held)) and (frames := frames_among(held))
    }
    return ZipDirectory(file, opened, members, folders)


def _is_hidden(name: str) -> bool:
    """As in folders: anything under a name that starts with a dot; and what macOS adds to archives."""
    return any(part == "__MACOSX" or (part.startswith(".") and part.strip(".")) for part in name.split("/"))


def _correct_separators(members: list[zipfile.ZipInfo]) -> None:
    """Some programs of Windows write backslashes between folders, which zipfile keeps outside of Windows.

    On Unix a backslash is a character of a name: there it is kept where other members have slashes.
    """
    has_slashes = any("/" in info.filename for info in members)
    names = {info.filename for info in members}
    for info in members:
        name = info.filename.replace("\\", "/")
        if name not in names and (info.create_system != _UNIX or not has_slashes):
            names.add(name)
            info.filename = name  # what opening a member compares is orig_filename


def _correct_offsets(opened: zipfile.ZipFile, file: JoinedFile) -> None:
    """Offsets of a spanned archive count from the start of their own part; zipfile took all for the last's."""
    claimed = opened.start_dir - _directory_offset(file)
    for info in opened.infolist():
        if info.volume >= len(file.starts):
            raise zipfile.BadZipFile(f"a member lies in part {info.volume + 1} of {len(file.starts)}")
        info.header_offset += file.starts[info.volume] - claimed
    bounds = sorted({opened.start_dir, *(info.header_offset for info in opened.infolist())})
    following = dict(pairwise(bounds))
    for info in opened.infolist():
        if hasattr(info, "_end_offset"):  # newer zipfile checks by it that members do not overlap
            info._end_offset = following.get(info.header_offset)  # pyright: ignore[reportAttributeAccessIssue]


def _directory_offset(file: JoinedFile) -> int:
    """Where the directory starts in its own part, from the record at the archive's end."""
    tail = min(file.size, 22 + (1 << 16))
    file.seek(file.size - tail)
    data = file.read(tail)
    disks, _, _, _, _, offset = struct.unpack_from("<4H2L", data, data.rindex(b"PK\x05\x06") + 4)
    if disks + 1 != len(file.starts):
        raise zipfile.BadZipFile(f"it was made of {disks + 1} parts, {len(file.starts)} are there")
    return offset


def _zip_videos(archive: str, parts: int) -> list[ArchivedVideo]:
    directory = open_zip(archive, parts)
    try:
        videos = [
            ArchivedVideo(name, ZipVideo(archive, parts, name), info.file_size, zip_version([info]))
            for name, info in directory.members.items()
            if is_video(name)
        ]
        for folder, frames in directory.folders.items():
            size = sum(frame.file_size for frame in frames)
            location = ZipFrames(archive, parts, folder)
            counted = are_numbers_alone(frame.filename.rpartition("/")[2] for frame in frames)
            videos.append(ArchivedVideo(folder, location, size, zip_version(frames), counted))
        return videos
    finally:
        directory.close()


def zip_version(members: list[zipfile.ZipInfo]) -> str:
    """From the checksums that the directory has."""
    about = "".join(f"{m.filename}\0{m.CRC:08x}\0{m.file_size}\n" for m in members)
    return f"crc-{hashlib.sha256(about.encode()).hexdigest()[:16]}"


def read_member(directory: ZipDirectory, info: zipfile.ZipInfo, chunk: int = 1 << 20) -> Iterator[bytes]:
    """The bytes of a member, never more than its directory entry says.

    Raises:
        VideoRefusedError: it is damaged, encrypted, or packed in a way that zipfile does not know.
    """
    if stat.S_ISLNK(info.external_attr >> 16):
        raise VideoRefusedError(FailureReason.UNREADABLE, "a link inside an archive, which is not followed")
    if info.flag_bits & 1:
        raise VideoRefusedError(
            FailureReason.ENCRYPTED, "encrypted inside its archive: unpack it with its password"
        )
    try:
        with directory.zip.open(info) as member:
            while data := member.read(chunk):
                yield data
    except NotImplementedError as error:
        raise VideoRefusedError(FailureReason.UNREADABLE, f"packed in an unknown way: {error}") from error
    except _ZIP_ERRORS as error:
        message = "damaged inside its archive: its bytes are not those that the archive's directory promises"
        raise VideoRefusedError(FailureReason.CORRUPT_STREAM, message) from error


class OpenZips:
    """Archives kept open from video to video: reading a directory of 100,000 members takes a second."""

    def __init__(self, most: int = 2) -> None:
        self._most = most
        self._lock = threading.RLock()
        self._opened: dict[Any, ZipDirectory] = {}

    def get(self, archive: str, parts: int, stamp: str) -> ZipDirectory:
        """The archive, opened again when ``stamp`` (its version) has changed. Raises as ``open_zip`` does."""
        key = (archive, parts, stamp)
        with self._lock:
            directory = self._opened.pop(key, None) or open_zip(archive, parts)
            self._opened[key] = directory
            while len(self._opened) > self._most:
                self._opened.pop(next(iter(self._opened))).close()
            return directory

    def close(self) -> None:
        """Close all."""
        with self._lock:
            for directory in self._opened.values():
                directory.close()
            self._opened.clear()


# --- tar ----------------------------------------------------------------------------------------------------


class _Header(tarfile.TarInfo):
    """A tar header that cannot lead into an endless loop or claim all memory."""

    def _block(self, count: int) -> int:
        if count < 0:
            raise tarfile.HeaderError("negative size")
        return super()._block(count)  # pyright: ignore[reportAttributeAccessIssue]

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        extends = self.type in b"LKxgX"
        if self.size < 0 or (extends and self.size > _LONGEST_HEADER):
            raise tarfile.HeaderError("a header of absurd size")
        return super()._proc_member(archive)  # pyright: ignore[reportAttributeAccessIssue]


def _tar_videos(archive: str, version: str) -> Iterator[ArchivedVideo]:
    """One video a member; a damaged header ends it with a refused entry, so that no loss goes unseen."""
    end = 0
    with open_parts([archive], _TAR_READ_BYTES) as file:
        if not file.size:
            raise VideoRefusedError(FailureReason.EMPTY_FILE, "the archive has zero bytes")
        head = file.read(6)
        file.seek(0)
        if how := next((how for magic, how in _COMPRESSIONS.items() if head.startswith(magic)), ""):
            yield from _refused_compressed(file, how, version)
            return
        try:
            with tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue] - or memory grows
                    end = tar.offset
                    if is_video(member.name) and not _is_hidden(member.name):
                        yield _tar_video(archive, member, file.size, version)
        except _TAR_ERRORS as error:
            if "range requests" in str(error):
                raise VideoRefusedError(FailureReason.UNREADABLE, NO_RANGES) from error
            message = f"the archive cannot be read from byte {end} on: {error}"
            yield _refused(FailureReason.CORRUPT_STREAM, message, version)
            return
        file.seek(end)
        if file.read(_TAR_BLOCK).strip(b"\0"):  # tarfile takes a damaged header for the archive's end
            message = f"the archive cannot be read from byte {end} on: no header is there"
            yield _refused(FailureReason.CORRUPT_STREAM, message, version)


def _refused_compressed(file: JoinedFile, how: str, version: str) -> Iterator[ArchivedVideo]:
    """One refused entry, unless no video is found in it."""
    try:
        # pyarrow's annotations do not know Python's files
        stream: Any = pa.CompressedInputStream(pa.PythonFile(file), "zstd") if how == "zstd" else file  # pyright: ignore
        with tarfile.open(fileobj=stream, mode="r|" if how == "zstd" else "r|*", tarinfo=_Header) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
                if (is_video(member.name) and not _is_hidden(member.name)) or tar.offset > _LOOKED_THROUGH:
                    message = (
                        f"a tar compressed with {how} can only be read from its beginning: unpack it first"
                    )
                    yield _refused(FailureReason.COMPRESSED_ARCHIVE, message, version)
                    return
    except (*_TAR_ERRORS, zlib.error, lzma.LZMAError, pa.ArrowException, OSError) as error:
        if not isinstance(error, pa.ArrowException | tarfile.TarError) and may_pass(error):
            raise
        message = f"a file compressed with {how} that is not a tar or is damaged: unpack it to see what it is"
        yield _refused(FailureReason.CORRUPT_STREAM, message, version)


def _tar_video(archive: str, member: tarfile.TarInfo, archive_size: int, version: str) -> ArchivedVideo:
    name = member.name.encode("utf-8", "backslashreplace").decode()
    version = f"{version}@{member.offset_data}"
    location: Location = TarVideo(archive, member.offset_data, member.size, suffix_of(name))
    if member.issparse():
        message = "stored as a sparse file, not in one piece: make its archive again without tar's --sparse"
        location = Refused(FailureReason.UNREADABLE.value, message)
    elif not member.isreg():
        location = Refused(FailureReason.UNREADABLE.value, "a link or special file inside an archive")
    elif member.offset_data + member.size > archive_size:
        location = Refused(FailureReason.TRUNCATED.value, "its archive ends before it does")
    return ArchivedVideo(name, location, member.size, version)


open_zips = OpenZips()
atexit.register(open_zips.close)


# --- Parquet ------------------------------------------------------------------------------------------------


@contextmanager
def open_rows(path: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file here or on a store, for reading parts of it."""
    with ExitStack() as stack:
        source: Any = path
        if is_remote(path):
            fs, place = filesystem_of(path)
            source = stack.enter_context(retried(lambda: fs.open(place, "rb")))
        yield stack.enter_context(pq.ParquetFile(source, pre_buffer=False, buffer_size=1 << 20))


def rows_of(
    file: pq.ParquetFile, path: str, column: str, paths: Iterable[str | None]
) -> Iterator[tuple[str, ParquetVideo]]:
    """All rows of a column of ``bytes`` and ``path``, each with its name: ``<row>`` or ``<row>/<name in path>``."""
    names, place = iter(paths), 0
    for group in range(file.metadata.num_row_groups):
        held = file.metadata.row_group(group)
        chunks = [held.column(number) for number in range(held.num_columns)]
        size = sum(each.total_compressed_size for each in chunks if each.path_in_schema == f"{column}.bytes")
        for row in range(held.num_rows):
            name = PurePosixPath((next(names) or "").replace("\\", "/")).name
            video = ParquetVideo(path, f"{column}.bytes", group, row, size // held.num_rows, suffix_of(name))
            yield (f"{place}/{name}" if name else f"{place}"), video
            place += 1


def has_bytes(file: pq.ParquetFile, column: str) -> bool:
    """Whether a row of a column of ``bytes`` and ``path`` has some, by the statistics of its row groups."""
    kind: Any = file.schema_arrow.field(column).type.field("bytes").type
    if pa.types.is_null(kind):
        return False
    for group in range(file.metadata.num_row_groups):
        held = file.metadata.row_group(group)
        for place in range(held.num_columns):
            chunk = held.column(place)
            if chunk.path_in_schema == f"{column}.bytes":
                known = chunk.statistics
                empty = known.null_count if known is not None and known.has_null_count else 0
                if chunk.num_values > empty:
                    return True
    return False


def _parquet_videos(path: str, version: str) -> list[ArchivedVideo]:
    """The rows of a file whose bytes are videos; none of another table, such as of annotations or pictures.

    They are if Hugging Face's description in the file says so, if the column is called ``video``, or if a path in it is
    that of a video.
    """
    try:
        with open_rows(path) as file:
            schema: Any = file.schema_arrow
            told = _described(schema.metadata or {})
            for field in schema:
                held = {each.name: each.type for each in field.type} if pa.types.is_struct(field.type) else {}
                is_text = "path" in held and str(held["path"]) in (
                    "string",
                    "large_string",
                    "string_view",
                    "null",
                )
                if not is_text or "bytes" not in held or not has_bytes(file, field.name):
                    continue
                rows = file.read([f"{field.name}.path"]).column(0).to_pylist()
                paths = [row["path"] if row else None for row in rows]
                kind = told.get(field.name, "Video" if field.name.casefold() == "video" else "")
                if kind == "Video" or any(is_video(each) for each in paths if each):
                    return [
                        ArchivedVideo(inner, row, row.size, f"{version}@{row.group}.{row.row}")
                        for inner, row in rows_of(file, path, field.name, paths)
                    ]
            return []
    except (pa.ArrowException, ValueError, KeyError) as error:
        message = f"a Parquet file that cannot be read: {error}"
        raise VideoRefusedError(FailureReason.CORRUPT_STREAM, message) from error


def _described(metadata: Mapping[bytes, bytes]) -> dict[str, str]:
    """What the columns of a Hugging Face dataset hold, such as ``Video``, as far as its files say so."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"].items()
        return {
            name: str(about["_type"])
            for name, about in features
            if isinstance(about, dict) and "_type" in about
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
