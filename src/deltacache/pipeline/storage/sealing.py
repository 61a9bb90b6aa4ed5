"""Files that carry a checksum of themselves, so that one flipped bit anywhere in them is noticed on reading.

JSON files end with a field that holds the CRC-32C of all before it. Parquet files hold theirs in the key-value
metadata of the footer, computed with its own eight digits as zeros; any reader of Parquet reads them.
"""

import io
import mmap
import re
from typing import TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq
from crc32c import crc32c

from deltacache.pipeline.storage.errors import read_file
from deltacache.pipeline.storage.storage import AnyPath, is_local

Content: TypeAlias = bytes | bytearray | memoryview | mmap.mmap
PARQUET_KEY = "deltacache.crc32c"
_ZEROS = b"00000000"
# In the footer (Thrift's compact protocol): the key, the header of the next field (text), its length, its digits.
_PARQUET_SEAL = re.compile(re.escape(PARQUET_KEY.encode()) + rb"\x18\x08(?P<digits>[0-9a-f]{8})")
_FOOTER_BYTES = 1 << 16


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


def sealed_parquet(stream: io.BytesIO, writer: pq.ParquetWriter) -> bytes:
    """Close ``writer``, which writes to ``stream``; the file with its checksum."""
    writer.add_key_value_metadata({PARQUET_KEY: _ZEROS.decode()})
    writer.close()
    content = bytearray(stream.getbuffer())
    start, stop = _seal_of(content)
    content[start:stop] = f"{crc32c(content):08x}".encode()
    return bytes(content)


def parquet_of(table: pa.Table) -> bytes:
    """``table`` as a sealed Parquet file of one write: equal tables give equal bytes."""
    stream = io.BytesIO()
    return sealed_parquet(stream, _writing(stream, table))


def _writing(stream: io.BytesIO, table: pa.Table) -> pq.ParquetWriter:
    writer = pq.ParquetWriter(stream, table.schema)
    writer.write_table(table)
    return writer


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
    seals = list(_PARQUET_SEAL.finditer(bytes(memoryview(content)[begin:])))
    if not seals:
        raise ValueError(f"its footer holds no {PARQUET_KEY}")
    start, stop = seals[-1].span("digits")
    return begin + start, begin + stop


def read_parquet(content: bytes, schema: pa.Schema, columns: list[str] | None = None) -> pa.Table:
    """The table in a sealed Parquet file, or some of its columns.

    Raises:
        ValueError: a byte of it was changed, or it has other columns than ``schema``.
    """
    with _opened(content, schema) as file:
        try:
            table = file.read(columns)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(str(error)) from error
    # Reading adds metadata to the fields, with which the table would be written as other bytes.
    return table.cast(pa.schema([schema.field(name) for name in table.column_names]))


def open_parquet(path: AnyPath, schema: pa.Schema) -> pq.ParquetFile:
    """Open a sealed Parquet file for reading bit by bit, once its checksum was compared. Local ones are mapped.

    Raises:
        OSError: it cannot be read.
        ValueError: a byte of it was changed, or it has other columns than ``schema``.
    """
    if not is_local(path) or path.stat().st_size == 0:
        return _opened(read_file(path), schema)
    with path.open("rb") as file:
        return _opened(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), schema)


def _opened(content: bytes | mmap.mmap, schema: pa.Schema) -> pq.ParquetFile:
    check_parquet(content)
    try:
        file = pq.ParquetFile(pa.BufferReader(pa.py_buffer(content)))
        held = file.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise ValueError(str(error)) from error
    if not held.equals(schema):
        raise ValueError(f"its columns are {held.names}, must be {schema.names}")
    return file
