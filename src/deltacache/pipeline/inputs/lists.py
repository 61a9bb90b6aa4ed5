"""Lists of videos: text (one a line), CSV and Parquet (a column of paths)."""

import csv
import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from deltacache.pipeline.inputs.video_names import suffix_of
from deltacache.pipeline.storage.remote_files import client_errors, filesystem_of, is_remote, retried
from deltacache.schemas.errors import DeltacacheError

LIST_SUFFIXES = frozenset({".txt", ".csv", ".tsv", ".parquet"})
_COLUMNS = ("video_uri", "path")


def read_list(path: str) -> list[str]:
    """The entries of a list (path or url), in its order; empty ones are left out.

    CSV and Parquet: column ``video_uri``, else ``path``, else the first. A CSV file without one of these names
    in its first row has no header. In text files, lines that begin with ``#`` are comments.

    Raises:
        DeltacacheError: the list cannot be read or is empty.
    """
    try:
        entries = _read(suffix_of(path), _content(path))
    except (*client_errors(), UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        raise DeltacacheError(
            f"{path} cannot be read as a list of videos ({error}): it must be UTF-8 text, CSV or Parquet"
        ) from error
    entries = [entry.strip() for entry in entries if entry.strip()]
    if not entries:
        raise DeltacacheError(f"{path} names no video: write one path or uri a line")
    return entries


def _content(path: str) -> bytes:
    if not is_remote(path):
        return Path(path).read_bytes()
    fs, place = filesystem_of(path)
    return retried(lambda: fs.cat_file(place))


def _read(suffix: str, content: bytes) -> list[str]:
    if suffix == ".parquet":
        return _column_of(content)
    text = content.decode("utf-8-sig")
    if suffix == ".txt":
        return [line for line in text.splitlines() if not line.startswith("#")]
    rows = [row for row in csv.reader(io.StringIO(text), delimiter="\t" if suffix == ".tsv" else ",") if row]
    named = next((name for name in _COLUMNS if rows and name in rows[0]), None)
    if named is None:
        return [row[0] for row in rows]
    column = rows[0].index(named)
    return [row[column] for row in rows[1:] if len(row) > column]


def _column_of(content: bytes) -> list[str]:
    with pq.ParquetFile(pa.BufferReader(content)) as file:
        names = file.schema_arrow.names
        name = next((name for name in _COLUMNS if name in names), names[0] if names else "")
        column = file.read([name]).column(name)
    if not pa.types.is_string(column.type) and not pa.types.is_large_string(column.type):
        raise pa.ArrowTypeError(f"column {name} holds {column.type}, must be strings")
    return [entry for entry in column.to_pylist() if entry is not None]
