"""Files that carry a checksum of themselves, so that one flipped bit anywhere in them is noticed on reading.

JSON files end with a field that holds the CRC-32C of all before it. Parquet files hold theirs in the key-value
metadata of the footer, computed with its own eight digits as zeros; any reader of Parquet reads them.
"""

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq
from crc32c import crc32c

from deltacache.pipeline.storage.atomic import replacing, spool_folder
from deltacache.pipeline.storage.errors import fetch_file
from deltacache.pipeline.storage.storage import AnyPath, is_local

Content: TypeAlias = bytes | bytearray | memoryview
PARQUET_KEY = "deltacache.crc32c"
_ZEROS = b"00000000"
# In the footer (Thrift's compact protocol): the key, the header of the next field (text), its length, its digits.
_PARQUET_SEAL = re.compile(re.escape(PARQUET_KEY.encode()) + rb"\x18\x08(?P<digits>[0-9a-f]{8})")
_FOOTER_BYTES = 1 << 16
_CHUNK_BYTES = 1 << 23
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

    def __init__(self, sink: Path | io.BytesIO, schema: pa.Schema, *, page_checksums: bool) -> None:
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


def parquet_of(table: pa.Table) -> bytes:
    """``table`` as a sealed Parquet file in memory: equal tables give equal bytes."""
    stream = io.BytesIO()
    written = SealedTable(stream, table.schema, page_checksums=False)
    written.add(table)
    written.close()
    content = bytearray(stream.getbuffer())
    start, stop = _seal_of(content)
    content[start:stop] = f"{crc32c(content):08x}".encode()
    return bytes(content)


def check_parquet(content: Content) -> None:
    """Check a sealed Parquet file.

    Raises:
        ValueError: a byte of it was changed, or it has no checksum.
    """
    start, stop = _seal_of(content)
    view = memoryview(content)
    crc = crc32c(view[stop:], crc32c(_ZEROS, crc32c(view[:start])))
    if bytes(view[start:stop]) != f"{crc:08x}".encode():
        raise ValueError("its checksum does not match")


def _seal_of(content: Content) -> tuple[int, int]:
    begin = max(0, len(content) - _FOOTER_BYTES)
    start, stop = _digits_in(bytes(memoryview(content)[begin:]))
    return begin + start, begin + stop


def _digits_in(footer: bytes) -> tuple[int, int]:
    seals = list(_PARQUET_SEAL.finditer(footer))
    if not seals:
        raise ValueError(f"its footer holds no {PARQUET_KEY}")
    return seals[-1].span("digits")


def read_parquet(content: bytes, schema: pa.Schema, columns: list[str] | None = None) -> pa.Table:
    """The table in a sealed Parquet file, or some of its columns.

    Raises:
        ValueError: a byte of it was changed, or it has other columns than ``schema``.
    """
    check_parquet(content)
    return read_columns(_opened(pa.BufferReader(content), schema), schema, columns)


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
    start, stop = _seal_in(file)
    file.seek(start)
    if file.read(stop - start) != f"{_crc_of(file):08x}".encode():
        raise ValueError("its checksum does not match")
    return _opened(file, schema)


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
        chunk = file.read(_CHUNK_BYTES if left is None else min(left, _CHUNK_BYTES))
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
