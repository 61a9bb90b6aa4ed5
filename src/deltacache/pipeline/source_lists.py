"""Lists of videos: text (one a line), CSV and Parquet (a column of paths)."""

import csv
import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from deltacache.schemas.errors import DeltacacheError

LIST_SUFFIXES = frozenset({".txt", ".csv", ".tsv", ".parquet"})
_COLUMNS = ("video_uri", "path")


def read_list(path: Path) -> list[str]:
    """The entries of a list, in its order; empty ones are left out.

    CSV and Parquet: column ``video_uri``, else ``path``, else the first. A CSV file without one of these names
    in its first row has no header. In text files, lines that begin with ``#`` are comments.

    Raises:
        DeltacacheError: the list cannot be read or is empty.
    """
    try:
        entries = _read(path)
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        raise DeltacacheError(
            f"{path} cannot be read as a list of videos ({error}): it must be UTF-8 text, CSV or Parquet"
        ) from error
    entries = [entry.strip() for entry in entries if entry.strip()]
    if not entries:
        raise DeltacacheError(f"{path} names no video: write one path or uri a line")
    return entries


def _read(path: Path) -> list[str]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _column_of(path)
    text = path.read_text(encoding="utf-8-sig")
    if suffix == ".txt":
        return [line for line in text.splitlines() if not line.startswith("#")]
    rows = [row for row in csv.reader(io.StringIO(text), delimiter="\t" if suffix == ".tsv" else ",") if row]
    named = next((name for name in _COLUMNS if rows and name in rows[0]), None)
    if named is None:
        return [row[0] for row in rows]
    column = rows[0].index(named)
    return [row[column] for row in rows[1:] if len(row) > column]


def _column_of(path: Path) -> list[str]:
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        name = next((name for name in _COLUMNS if name in names), names[0] if names else "")
        column = file.read([name]).column(name)
    if not pa.types.is_string(column.type) and not pa.types.is_large_string(column.type):
        raise pa.ArrowTypeError(f"column {name} holds {column.type}, must be strings")
    return [entry for entry in column.to_pylist() if entry is not None]
