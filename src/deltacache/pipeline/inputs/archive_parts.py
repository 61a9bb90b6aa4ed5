"""Archives among files: which there are, which files make up one, and reading its parts as one file."""

import io
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from deltacache.pipeline.storage.remote_files import filesystem_of, info_of, is_remote
from deltacache.schemas.errors import FailureReason, VideoRefusedError

_NUMBERED = re.compile(r"(?P<name>.+\.zip)\.(?P<number>[0-9]{3,5})", re.IGNORECASE | re.DOTALL)
_SPANNED = re.compile(r"(?P<name>.+)\.z(?P<number>[0-9]{2,5})", re.IGNORECASE | re.DOTALL)
_BLOCK_BYTES = 1 << 20
_TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")


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
    return (
        is_tar(name) or name.lower().endswith(".zip") or any(p.fullmatch(name) for p in (_NUMBERED, _SPANNED))
    )


def archives_among(names: Iterable[str]) -> list[ArchiveFile]:
    """The archives that the files of one folder make up."""
    whole: set[str] = set()
    numbered: dict[str, dict[int, str]] = {}
    spanned: dict[str, dict[int, str]] = {}
    for name in names:
        if is_tar(name) or name.lower().endswith(".zip"):
            whole.add(name)
        elif match := _NUMBERED.fullmatch(name):
            numbered.setdefault(match["name"], {})[int(match["number"])] = name
        elif match := _SPANNED.fullmatch(name):
            suffix = ".zip" if name[match.end("name") + 1] == "z" else ".ZIP"
            spanned.setdefault(match["name"] + suffix, {})[int(match["number"])] = name
    found = [_numbered(name, parts) for name, parts in numbered.items()]
    found += [_spanned(name, parts, whole) for name, parts in spanned.items()]
    found += [ArchiveFile(name, name) for name in whole - spanned.keys()]
    return sorted(found, key=lambda archive: archive.first)


def _numbered(name: str, parts: dict[int, str]) -> ArchiveFile:
    names = [f"{name}.{number:03d}" for number in range(1, max(parts) + 1)]
    return ArchiveFile(name, names[0], len(names), _first_missing(names, parts.values()))


def _spanned(name: str, parts: dict[int, str], whole: set[str]) -> ArchiveFile:
    names = part_names(name, max(parts) + 1)
    return ArchiveFile(name, name, len(names), _first_missing(names, {*parts.values(), *whole}))


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
