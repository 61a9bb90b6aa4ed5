"""Files that are whole or not there, and that say when a byte of them is damaged: atomic writes, CRC-32C, seals."""

import errno
import filecmp
import io
import math
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from crc32c import crc32c
from numpy.lib import format as npy_format
from upath import UPath

from deltacache.pipeline.storage.errors import fetch_file, is_refusal, read_file, readable_errors
from deltacache.pipeline.storage.storage import (
    AnyPath,
    copy_object,
    is_local,
    make_folder,
    objects_below,
    put,
    remove_object,
    retried,
    size_of,
    upload,
)

# ----------------------------------------------------------------------------------------------------
# CRC-32C (Castagnoli) of buffers, arrays and files: the checksum of every byte that a dataset keeps.
#
# CRC-32C finds accidents, not forgery; processors compute it in hardware, faster than memory is copied.
# ----------------------------------------------------------------------------------------------------


_CHUNK_BYTES = 1 << 22


class ChecksummedFile:
    """A file being written, with the size and CRC-32C of what it holds so far."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.bytes = 0
        self.crc32c = 0

    def write(self, buffer: bytes | memoryview) -> None:
        """Append bytes; a memoryview must be of bytes (format ``B``)."""
        self._file.write(buffer)
        self.crc32c = crc32c(buffer, self.crc32c)
        self.bytes += len(buffer)


def byte_view(array: np.ndarray) -> memoryview:
    """The values of a C-contiguous array as bytes, without a copy."""
    return array.reshape(-1).view(np.uint8).data


def crc32c_of_array(array: np.ndarray) -> int:
    """CRC-32C of the values in C order; of an array whose rows lie apart no more than a row is copied."""
    if array.flags.c_contiguous:
        return crc32c(byte_view(array))
    value = 0
    for row in array:
        value = crc32c(byte_view(np.ascontiguousarray(row)), value)
    return value


def crc32c_of_npy(array: np.ndarray) -> int:
    """CRC-32C of the ``.npy`` file that ``array`` makes."""
    return crc32c(npy_bytes(array))


def crc32c_of_text(text: str) -> int:
    """CRC-32C of the UTF-8 bytes of ``text``."""
    return crc32c(text.encode())


def crc32c_of_file(path: Path | UPath) -> int:
    """CRC-32C of a file's content, read in pieces.

    Raises:
        OSError: the file cannot be read.
    """
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            value = crc32c(chunk, value)
    return value


def npy_header(array: np.ndarray) -> bytes:
    """The bytes before the values in the ``.npy`` file of a C-contiguous array; a multiple of 64."""
    stream = io.BytesIO()
    npy_format.write_array_header_1_0(stream, npy_format.header_data_from_array_1_0(array))
    return stream.getvalue()


def npy_bytes(array: np.ndarray) -> bytes:
    """The whole ``.npy`` file of ``array``: equal arrays give equal bytes."""
    values = np.ascontiguousarray(array)
    return npy_header(values) + values.tobytes()


def npy_view(buffer: memoryview) -> np.ndarray:
    """The array in the bytes of a ``.npy`` file, as a view; never unpickles.

    Raises:
        ValueError: not a plain version-1 ``.npy`` file of exactly this length.
    """
    stream = io.BytesIO(buffer[: 1 << 12])
    version = npy_format.read_magic(stream)
    if version != (1, 0):
        raise ValueError(f"npy version {version}, must be (1, 0)")
    shape, fortran_order, dtype = npy_format.read_array_header_1_0(stream)
    if fortran_order or dtype.hasobject:
        raise ValueError(
            f"npy of {dtype} with fortran_order={fortran_order}, must be plain numbers in C order"
        )
    count = math.prod(shape)
    if stream.tell() + count * dtype.itemsize != len(buffer):
        raise ValueError(f"npy header says {dtype}{shape}, but the file has {len(buffer)} bytes")
    return np.frombuffer(buffer, dtype, count, stream.tell()).reshape(shape)


# ----------------------------------------------------------------------------------------------------
# Files that are there whole or not at all: on local disks written aside in the same folder, flushed, renamed;
# in object stores uploaded under their names when they are complete.
#
# Temporary names carry the host and process of the attempt, so that leftovers of dead ones can be told from
# what somebody is writing now; nothing of that gets into a file.
# ----------------------------------------------------------------------------------------------------


__all__ = [
    "is_alive",
    "is_temporary",
    "move",
    "readable_errors",
    "remove",
    "remove_leftovers",
    "replacing",
    "replacing_folder",
    "sync",
    "temporary_path",
    "this_host",
    "write_bytes",
    "write_if_changed",
    "write_new",
]

_TEMPORARY = re.compile(r"\.tmp-(?P<host>[0-9a-f]{8})-(?P<pid>[0-9]+)-[0-9a-f]{8}-.+", re.DOTALL)
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK, errno.EACCES, errno.EINVAL)
_ABANDONED_AFTER_S = 24 * 3600.0


def temporary_path(final: Path) -> Path:
    """A name beside ``final`` that no other attempt has."""
    return final.with_name(f".tmp-{this_host()}-{os.getpid()}-{secrets.token_hex(4)}-{final.name}")


def is_temporary(name: str) -> bool:
    """Whether ``name`` was made by ``temporary_path``."""
    return _TEMPORARY.fullmatch(name) is not None


def this_host() -> str:
    """Eight hex digits for this machine and process namespace, within which process ids mean something."""
    namespace = Path("/proc/self/ns/pid")
    inside = str(namespace.readlink()) if namespace.is_symlink() else ""
    return f"{crc32c_of_text(socket.gethostname() + inside):08x}"


def sync(path: Path) -> None:
    """Make a file's content, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: AnyPath) -> None:
    """Remove a file, or a folder with all it holds, if it is there."""
    if not is_local(path):
        for held in objects_below(path):
            remove_object(held)
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        retried(path.unlink, missing_ok=True)


@contextmanager
def replacing(final: AnyPath, *, keep_equal: bool = False) -> Iterator[Path]:
    """Yield a local path to write a file to; it becomes ``final`` when the block ends without error.

    The block must close the file; this syncs it and its folder, or uploads it. With ``keep_equal``, a local
    ``final`` of the same content stays as it is.
    """
    if not is_local(final):
        with spool_folder() as folder:
            yield folder / final.name
            upload(folder / final.name, final)
        return
    temporary = temporary_path(final)
    try:
        yield temporary
        if keep_equal and final.is_file() and filecmp.cmp(temporary, final, shallow=False):
            return
        sync(temporary)
        temporary.replace(final)
    finally:
        remove(temporary)
    sync(final.parent)


@contextmanager
def replacing_folder(final: AnyPath) -> Iterator[Path]:
    """Yield an empty local folder to write files to; it becomes ``final`` when the block ends without error.

    In an object store the files appear one by one, and what was below ``final`` and is not among them goes
    last: who reads must know by something written later that all are there.
    """
    if not is_local(final):
        with spool_folder() as folder:
            yield folder
            files = {final / path.relative_to(folder).as_posix(): path for path in _files(folder)}
            for target, path in files.items():
                upload(path, target)
            for stranger in set(objects_below(final)) - files.keys():
                remove_object(stranger)
        return
    temporary = temporary_path(final)
    try:
        temporary.mkdir()
        yield temporary
        for parent, _, names in os.walk(temporary, topdown=False):
            for name in names:
                sync(Path(parent, name))
            sync(Path(parent))
        _put_in_place(temporary, final)
    finally:
        remove(temporary)
    sync(final.parent)


@contextmanager
def spool_folder() -> Iterator[Path]:
    """A folder on a local disk for uploads and fetched videos; what dead processes left there is removed."""
    place = Path(tempfile.gettempdir())
    with suppress(OSError):  # somebody else's
        remove_leftovers(place)
    folder = temporary_path(place / "deltacache")
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        remove(folder)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _put_in_place(temporary: Path, final: Path) -> None:
    """Rename a folder to its name. An equal one that another attempt left there may be in use: it stays."""
    try:
        temporary.rename(final)
    except OSError:
        if not final.is_dir():
            raise
        if _equal(temporary, final):
            return
        aside = temporary_path(final)
        final.rename(aside)
        try:
            temporary.rename(final)
        finally:
            remove(aside)


def _equal(one: Path, other: Path) -> bool:
    names = [path.relative_to(one) for path in _files(one)]
    if names != [path.relative_to(other) for path in _files(other)]:
        return False
    return all(filecmp.cmp(one / name, other / name, shallow=False) for name in names)


def write_bytes(final: AnyPath, content: bytes) -> None:
    """Write ``final`` whole or not at all."""
    if not is_local(final):
        put(final, content)
        return
    retried(_replace_bytes, final, content)  # as a whole: what was not synced may be lost


def _replace_bytes(final: Path, content: bytes) -> None:
    with replacing(final) as temporary:
        temporary.write_bytes(content)


def write_new(final: AnyPath, content: bytes) -> bool:
    """Write ``final`` unless something is there; whether it holds ``content`` then.

    On a local disk without hard links, who reads it while it is written, or after a crash, may find the beginning of
    ``content``.
    """
    if is_local(final):
        return retried(_created, final, content)
    try:
        put(final, content, exclusive=True)
    except Exception as error:
        if not is_refusal(error):
            raise
        try:
            return (
                read_file(final) == content
            )  # stores say in several ways that it is there, and answers get lost
        except FileNotFoundError:
            if isinstance(error, FileExistsError):
                return False  # and is gone again
            raise error from None
    return True


def _created(final: Path, content: bytes) -> bool:
    """Make a local file unless something is there; whether it holds ``content`` then."""
    temporary = temporary_path(final)
    try:
        temporary.write_bytes(content)
        sync(temporary)
        final.hardlink_to(temporary)
    except FileExistsError:
        return final.read_bytes() == content  # an earlier try made it, and failed then
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        try:
            with final.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except FileExistsError:
            return False
    finally:
        remove(temporary)
    sync(final.parent)
    return True


def move(source: AnyPath, final: AnyPath) -> None:
    """Give a file, flushed, another name in the same place, whatever had it; nothing if ``source`` is not there.

    In an object store it is copied within the store, then removed.
    """
    with suppress(FileNotFoundError):
        if is_local(source):
            make_folder(final.parent)
            retried(source.replace, str(final))
            retried(sync, Path(str(final)).parent)
        elif not is_local(final):
            copy_object(source, final)
            remove_object(source)


def write_if_changed(final: AnyPath, content: bytes) -> None:
    """Write ``final`` whole or not at all, unless it holds ``content`` already."""
    if size_of(final) != len(content) or read_file(final) != content:
        write_bytes(final, content)


def remove_leftovers(folder: AnyPath) -> None:
    """Remove what dead attempts left in ``folder``; what a living process may be writing stays.

    An object store has none: an upload that was broken off is not an object.

    An attempt on another host is taken for dead after a day. Being wrong costs that attempt an error, never
    data: its rename finds nothing.
    """
    if not is_local(folder):
        return
    here = this_host()
    for entry in os.scandir(folder):
        match = _TEMPORARY.fullmatch(entry.name)
        if match is None:
            continue
        if match["host"] == here:
            dead = not is_alive(int(match["pid"]))
        else:
            dead = time.time() - entry.stat(follow_symlinks=False).st_mtime > _ABANDONED_AFTER_S
        if dead:
            remove(Path(entry.path))


def left_by_the_dead(name: str) -> bool:
    """Whether a temporary name is that of a process of this machine which has ended."""
    match = _TEMPORARY.fullmatch(name)
    return match is not None and match["host"] == this_host() and not is_alive(int(match["pid"]))


def is_alive(pid: int) -> bool:
    """Whether this machine has a process of this id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's process has this id
        return True
    return True


# ----------------------------------------------------------------------------------------------------
# Files that carry a checksum of themselves, so that one flipped bit anywhere in them is noticed on reading.
#
# JSON files end with a field that holds the CRC-32C of all before it. Parquet files hold theirs in the
# key-value metadata of the footer, computed with its own eight digits as zeros; any reader of Parquet reads
# them. Parquet's own page checksums leave out the footer and the headers of pages (docs/log.md).
#
# Where the digits lie is found by their pattern. A place counts only if Arrow, which knows the format, reads
# the same digits as the value of the key: the writer checks that, and every reader once the checksum matched.
# ----------------------------------------------------------------------------------------------------


Content: TypeAlias = bytes | bytearray | memoryview
PARQUET_KEY = "deltacache.crc32c"
_ZEROS = b"00000000"
# In the footer (Thrift's compact protocol): the key, the header of the next field (text), its length, its digits.
_PARQUET_SEAL = re.compile(re.escape(PARQUET_KEY.encode()) + rb"\x18\x08(?P<digits>[0-9a-f]{8})")
_FOOTER_BYTES = 1 << 16
_SEALED_CHUNK_BYTES = 1 << 23
_ROWS_A_GROUP = 1 << 16


def seal_json(body: bytes, field: str) -> bytes:
    """Append ``field`` with the CRC-32C of ``body``, a JSON object that is not empty, and a line break."""
    bare = body[:-1].rstrip()
    gap = body[len(bare) : -1].decode()  # of indented JSON: the line break before the last bracket
    comma = f",{gap}  " if gap else ","
    space = " " if gap else ""
    return bare + f'{comma}"{field}":{space}{crc32c(body)}{gap}}}\n'.encode()


def unseal_json(content: bytes, field: str) -> bytes:
    """The inverse of ``seal_json``.

    Raises:
        ValueError: ``content`` is not what ``seal_json`` gave.
    """
    bare, _, _ = content.rpartition(f'"{field}":'.encode())
    bare = bare.rstrip().removesuffix(b",")
    for body in (bare + b"}", bare + b"\n}"):
        if seal_json(body, field) == content:
            return body
    raise ValueError("its checksum does not match")


class SealedTable:
    """A Parquet file being written from tables as they come: its row groups do not depend on how they came.

    No more than a row group is held, so that memory does not grow with the file.

    Attributes:
        bytes, seal: size and checksum of the file, once it is written.
    """

    def __init__(self, sink: Path, schema: pa.Schema, *, page_checksums: bool) -> None:
        self._schema = schema
        self._writer = pq.ParquetWriter(sink, schema, write_page_checksum=page_checksums)
        self._waiting: list[pa.Table] = []
        self._rows = self.bytes = 0
        self.seal = ""

    def add(self, table: pa.Table) -> None:
        """Append rows."""
        self._waiting.append(table.cast(self._schema))
        self._rows += table.num_rows
        while self._rows >= _ROWS_A_GROUP:
            self._flush()

    def close(self) -> None:
        """Write what waits, and the footer with zeros for a checksum."""
        if self._rows:
            self._flush()
        self._writer.add_key_value_metadata({PARQUET_KEY: _ZEROS.decode()})
        self._writer.close()

    def _flush(self) -> None:
        table = pa.concat_tables(self._waiting)
        self._writer.write_table(table.slice(0, _ROWS_A_GROUP).combine_chunks())
        self._waiting = [table.slice(_ROWS_A_GROUP)]
        self._rows = self._waiting[0].num_rows


@contextmanager
def sealed_table(final: AnyPath, schema: pa.Schema, *, page_checksums: bool = True) -> Iterator[SealedTable]:
    """Write a sealed Parquet file whole or not at all; one that holds the same already stays untouched."""
    with replacing(final, keep_equal=True) as path:
        table = SealedTable(path, schema, page_checksums=page_checksums)
        try:
            yield table
        finally:
            table.close()
        with path.open("r+b") as file:
            start, _ = _seal_in(file)
            table.seal = f"{_crc_of(file):08x}"
            file.seek(start)
            file.write(table.seal.encode())
            table.bytes = file.seek(0, os.SEEK_END)
        _check_seal(pq.read_metadata(path), table.seal.encode())


def _check_seal(metadata: pq.FileMetaData, digits: bytes) -> None:
    if (metadata.metadata or {}).get(PARQUET_KEY.encode()) != digits:
        raise ValueError(f"its footer holds no {PARQUET_KEY} of its own")


def _digits_in(footer: bytes) -> tuple[int, int]:
    seals = list(_PARQUET_SEAL.finditer(footer))
    if not seals:
        raise ValueError(f"its footer holds no {PARQUET_KEY}")
    return seals[-1].span("digits")


def read_columns(file: pq.ParquetFile, schema: pa.Schema, columns: list[str] | None = None) -> pa.Table:
    """All rows of an open file, with these columns.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        table = file.read(columns)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(str(error)) from error
    # Reading adds metadata to the fields, with which the table would be written as other bytes.
    return table.cast(pa.schema([schema.field(name) for name in table.column_names]))


def open_parquet(path: AnyPath, schema: pa.Schema) -> pq.ParquetFile:
    """Open a sealed Parquet file for reading bit by bit, once its checksum was compared.

    What is read later is of the very file that was compared, also when another takes its name. One in an object
    store is fetched, by one request, to a file without a name in the temporary folder.

    Raises:
        OSError: it cannot be read.
        ValueError: a byte of it was changed, or it has other columns than ``schema``.
    """
    if is_local(path):
        file = pa.OSFile(str(path))
    else:
        with spool_folder() as folder:  # what a killed process leaves there, the next one removes
            fetch_file(path, folder / "fetched.parquet")
            file = pa.OSFile(str(folder / "fetched.parquet"))
    return open_sealed(file, schema)


def open_sealed(file: pa.NativeFile, schema: pa.Schema) -> pq.ParquetFile:
    """``open_parquet`` of a file that is open already.

    Raises:
        ValueError: a byte of it was changed, it has no checksum, or other columns than ``schema``.
    """
    start, stop = _seal_in(file)
    file.seek(start)
    seal = file.read(stop - start)
    if seal != f"{_crc_of(file):08x}".encode():
        raise ValueError("its checksum does not match")
    opened = _opened(file, schema)
    _check_seal(opened.metadata, seal)
    return opened


def seal_of(file: pq.ParquetFile) -> str:
    """The checksum in the footer of an open file: equal for equal files, and hardly ever for others."""
    return (file.metadata.metadata or {})[PARQUET_KEY.encode()].decode()


def _seal_in(file: BinaryIO | pa.NativeFile) -> tuple[int, int]:
    """Where in a file its digits lie."""
    begin = max(0, file.seek(0, os.SEEK_END) - _FOOTER_BYTES)
    file.seek(begin)
    start, stop = _digits_in(file.read())
    return begin + start, begin + stop


def _crc_of(file: BinaryIO | pa.NativeFile) -> int:
    """CRC-32C of a file as it would be with zeros for digits, read in pieces."""
    start, stop = _seal_in(file)
    file.seek(0)
    crc = _crc_of_next(file, start, 0)
    file.seek(stop)
    return _crc_of_next(file, None, crc32c(_ZEROS, crc))


def _crc_of_next(file: BinaryIO | pa.NativeFile, count: int | None, crc: int) -> int:
    left = count
    while left is None or left:
        chunk = file.read(_SEALED_CHUNK_BYTES if left is None else min(left, _SEALED_CHUNK_BYTES))
        if not chunk:
            break
        crc = crc32c(chunk, crc)
        left = None if left is None else left - len(chunk)
    return crc


def _opened(source: pa.NativeFile, schema: pa.Schema) -> pq.ParquetFile:
    source.seek(0)
    try:
        file = pq.ParquetFile(source)
        held = file.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise ValueError(str(error)) from error
    if not held.equals(schema):
        raise ValueError(f"its columns are {held.names}, must be {schema.names}")
    return file
