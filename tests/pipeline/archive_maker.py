"""Archives for tests: zips whole, cut and spanned, and tars."""

import io
import struct
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path


def zip_bytes(members: Mapping[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, compression)
    return buffer.getvalue()


def write_cut(folder: Path, name: str, data: bytes, part_bytes: int) -> list[Path]:
    """``name.001, name.002, ...``: plain pieces."""
    pieces = [data[at : at + part_bytes] for at in range(0, len(data), part_bytes)]
    paths = [folder / f"{name}.{number:03d}" for number in range(1, len(pieces) + 1)]
    for path, piece in zip(paths, pieces, strict=True):
        path.write_bytes(piece)
    return paths


def write_spanned(folder: Path, stem: str, members: Mapping[str, bytes], part_bytes: int) -> list[Path]:
    """``stem.z01, stem.z02, ..., stem.zip`` as ``zip -s`` makes them: offsets count from each part's start.

    Made from a plain archive by rewriting part numbers and offsets in its directory (APPNOTE 4.3.12, 4.3.16).
    """
    mark = b"PK\x07\x08"
    data = bytearray(mark + _directory_moved(zip_bytes(members), len(mark)))
    end = data.rindex(b"PK\x05\x06")
    entries, _, directory = struct.unpack_from("<HLL", data, end + 10)
    cuts = [*range(0, directory, part_bytes), directory]  # the directory starts the last part
    parts = len(cuts)
    at = directory
    for _ in range(entries):
        name, extra, comment = struct.unpack_from("<3H", data, at + 28)
        offset = struct.unpack_from("<L", data, at + 42)[0]
        disk = max(place for place, start in enumerate(cuts) if start <= offset)
        struct.pack_into("<H", data, at + 34, disk)
        struct.pack_into("<L", data, at + 42, offset - cuts[disk])
        at += 46 + name + extra + comment
    struct.pack_into("<2H", data, end + 4, parts - 1, parts - 1)
    struct.pack_into("<L", data, end + 16, 0)
    names = [*(f"{stem}.z{number:02d}" for number in range(1, parts)), f"{stem}.zip"]
    paths = [folder / name for name in names]
    for path, start, stop in zip(paths, cuts, [*cuts[1:], len(data)], strict=True):
        path.write_bytes(data[start:stop])
    return paths


def _directory_moved(data: bytes, by: int) -> bytearray:
    """A plain archive whose offsets count from ``by`` bytes before its start."""
    moved = bytearray(data)
    end = moved.rindex(b"PK\x05\x06")
    entries, _, at = struct.unpack_from("<HLL", moved, end + 10)
    struct.pack_into("<L", moved, end + 16, at + by)
    for _ in range(entries):
        name, extra, comment = struct.unpack_from("<3H", moved, at + 28)
        struct.pack_into("<L", moved, at + 42, struct.unpack_from("<L", moved, at + 42)[0] + by)
        at += 46 + name + extra + comment
    return moved


def tar_bytes(members: Mapping[str, bytes | tarfile.TarInfo], format: int = tarfile.PAX_FORMAT) -> bytes:
    """An uncompressed tar; a ``TarInfo`` is added as it is, without content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()
