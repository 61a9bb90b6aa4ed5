"""Lists of videos as people have them: lines of text, CSV, JSON and Parquet, and which column names the videos.

A list is read as columns. A text file gives several: the whole line, the fields between commas, semicolons, tabs or
bars, and the words of a line without the labels at its end. The column taken is ``--column``, or ``video_uri``, or the
one of those with a usual name whose entries exist, or the one whose entries exist.
"""

import csv
import io
import json
import math
import os
import re
import shlex
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow as pa

from deltacache.pipeline.inputs.archives import (
    INSIDE_ARCHIVE,
    PARQUET_SUFFIXES,
    has_bytes,
    looks_like_archive,
    open_rows,
    rows_of,
)
from deltacache.pipeline.inputs.folders import local_folders, remote_folders
from deltacache.pipeline.inputs.locations import PICTURE_SUFFIXES, ParquetVideo, is_video, suffix_of
from deltacache.pipeline.storage.storage import client_errors, filesystem_of, is_remote, split_query
from deltacache.pipeline.storage.storage import retried_call as retried
from deltacache.schemas.errors import DeltacacheError
from deltacache.schemas.texts import counted, decoded

_JSON = frozenset({".json", ".jsonl", ".ndjson"})
LIST_SUFFIXES = PARQUET_SUFFIXES | _JSON | {".txt", ".csv", ".tsv"}
_OURS = "video_uri"
_KINETICS = ("youtube_id", "time_start", "time_end")
_USUAL = (
    _OURS, "_".join(_KINETICS), "path", "video_path", "filepath", "file_path", "filename", "file_name", "file",
    "video_file", "video", "videos", "clip_path", "clip", "uri", "video_url", "url", "contenturl", "s3_path",
    "video_name", "name", "video_id", "videoid", "video_uid", "youtube_id", "id",
)  # fmt: skip
_PATHS_OF_STRUCTS = ("path", *(name for name in _USUAL if name != "path"))
_SEPARATORS = (",", ";", "\t", "|")
_RATES = frozenset({"frames_per_second", "fps", "frame_rate"})
_SAMPLE = 16
# Lists of FFmpeg's concat demuxer
_CONCAT_FILE = re.compile(r"\s*file\s+\S")
_CONCAT = re.compile(
    r"\s*(?:#|(?:ffconcat|file|duration|inpoint|outpoint|option|stream|exact_stream_id|chapter|file_packet_\w+)\s)"
)
_URL = 0.5

Tell = Callable[[str], None]
"""Shows a line to the user."""


class Entry(str):
    """An entry of a list, with the frame rate that another column of its row tells, if one does.

    Of a Parquet file that holds the videos themselves: ``rows`` says where, and the entry is the row's place and name.
    """

    frames_per_second: float | None = None
    rows: ParquetVideo | None = None


@dataclass(frozen=True, slots=True)
class ListColumn:
    """One way to read the videos out of a list.

    Attributes:
        name: of its header; of one without: "column 2", "the whole line".
        entries: as they stand there, without empty ones.
        labels: of Kinetics' annotations the class of each entry, else empty.
        paths: where the videos themselves lie beside their paths, those of all rows.
    """

    name: str
    entries: list[str]
    labels: tuple[str, ...] = ()
    paths: tuple[str | None, ...] = ()

    def share(self, measure: Callable[[str], float]) -> float:
        """Mean of ``measure`` over a few entries that are spread over the list."""
        sample = self.entries[:: max(1, len(self.entries) // _SAMPLE)][:_SAMPLE]
        return sum(map(measure, sample)) / len(sample) if sample else 0.0


def read_list(path: str, column: str | None = None, tell: Tell | None = None) -> list[str]:
    """The entries of a list (path or url), in its order; empty ones are left out.

    Entries of a column that are not there themselves but are the names of files below the list's folder, with or
    without their suffix, become the paths of these.

    Args:
        column: its name, or its number from 1; None: see the module.
        tell: is given a line that says which column was taken, where there are several.

    Raises:
        DeltacacheError: the list cannot be read or is empty, or has no such column.
    """
    base = split_query(path)[0].rpartition("/")[0]
    there = _There(base)
    columns = list[ListColumn]()
    chosen: tuple[float, ListColumn] | None = None
    try:
        for group in _groups(path, column):
            columns += [each for each in group if each.entries or each.paths]
            if group and not columns:
                break  # a header and nothing else
            chosen = _choose(columns, there, column)
            if chosen is not None and (column is not None or chosen[0] > _URL):
                break  # else another way to read the lines may give videos that exist
    except (*client_errors(), UnicodeDecodeError, csv.Error, ValueError, pa.ArrowException) as error:
        raise DeltacacheError(
            f"{path} cannot be read as a list of videos ({error}): it must be text in UTF-8 (or UTF-16 with a "
            "byte-order mark), CSV, JSON or Parquet"
        ) from error
    if not columns:
        raise DeltacacheError(f"{path} names no video: write one path or uri per line")
    names = list(dict.fromkeys(each.name for each in columns))
    if chosen is None:
        raise DeltacacheError(
            f"{path} has no column {column!r}: give --column one of {', '.join(names)}, or a number from 1"
        )
    share, taken = chosen
    entries, how = taken.entries, ""
    if share <= _URL and _key(taken.name) != _OURS:
        candidates = columns if column is None else [taken]
        named = _named_files(base, [each for each in candidates if each.share(is_remote) < 0.5], share)
        if named is not None:
            taken, entries, how = named
    held = taken if column is not None else next((each for each in columns if each.paths), taken)
    if held.paths and not how and (share <= 0.1 or (held is taken and None in held.paths)):
        taken, entries, how = held, _rows_of(path, held), ", which holds the videos themselves"
    others = [name for name in names if name != taken.name]
    if tell is not None and (others or how):
        also = f"; not taken: {', '.join(others[:_SAMPLE])} (--column NAME)" if others else ""
        tell(f"{path}: {counted(len(entries), 'entry', 'entries')} of {_shown(taken.name)}{how}{also}")
    return entries


def _rows_of(path: str, column: ListColumn) -> list[str]:
    """The rows of a Parquet file as videos, named ``<file>/<row>`` or ``<file>/<row>/<name>``."""
    entries, own = list[str](), split_query(path)[0].rpartition("/")[2]
    with open_rows(path) as file:
        for inner, rows in rows_of(file, path, column.name, column.paths):
            entries.append(entry := Entry(f"{own}/{inner}"))
            entry.rows = rows
    return entries


def _content(path: str) -> bytes:
    if not is_remote(path):
        return Path(path).read_bytes()
    fs, place = filesystem_of(path)
    return retried(lambda: fs.cat_file(place))


def _choose(
    columns: Sequence[ListColumn], there: "_There", forced: str | None
) -> tuple[float, ListColumn] | None:
    """The column to take and how much of it is there."""
    measure = there.measure
    if there.is_remote and any(each.share(_named_like_a_video) > _URL for each in columns):
        measure = _named_like_a_video  # not a request an entry
    shares = [(each.share(measure), each) for each in columns]
    if forced is not None:
        wanted = [each for each in shares if each[1].name in (forced, f"column {forced}")]
        wanted += [each for each in shares if _key(each[1].name) == _key(forced)]
        return wanted[0] if wanted else None
    if ours := [each for each in shares if _key(each[1].name) == _OURS]:
        return ours[0]
    best = max((share for share, _ in shares), default=0.0)
    usual = {name: place for place, name in enumerate(_USUAL)}
    good = [each for each in shares if each[0] >= best / 2]
    good.sort(key=lambda each: (usual.get(_key(each[1].name), len(usual)), -each[0]))
    return good[0] if good else None


def _key(name: str) -> str:
    return name.strip().lstrip("#").strip().casefold().replace(" ", "_").replace("-", "_")


def _shown(name: str) -> str:
    return name if " " in name else f"column {name!r}"


def _named_like_a_video(entry: str) -> float:
    return float(is_video(entry) or looks_like_archive(entry))


class _There:
    """How far entries of a list are videos that are there; each is looked at once."""

    def __init__(self, base: str) -> None:
        self._base, self.is_remote = base, is_remote(base)
        self._known: dict[str, float] = {}

    def measure(self, entry: str) -> float:
        """1 for a video or a folder of frames, 0.6 for another file, 0.5 for a url, which is not asked for; 0.1 for
        what is only named like one of these, 0 for anything else.
        """
        if entry not in self._known:
            self._known[entry] = self._measure(entry)
        return self._known[entry]

    def _measure(self, entry: str) -> float:
        by_name = bool(_named_like_a_video(split_query(entry)[0] if is_remote(entry) else entry))
        if is_remote(entry):
            return _URL if by_name else 0.1
        inside = INSIDE_ARCHIVE.fullmatch(entry)
        place = inside["archive"] if inside else entry
        place = place if place.startswith("/") or not self._base else f"{self._base}/{place}"
        try:
            names = self._names_in(place)
        except (OSError, ValueError):  # ValueError: a null byte
            return 0.1 if by_name else 0.0
        if names is not None:
            return 1.0 if any(suffix_of(name) in PICTURE_SUFFIXES for name in names) else 0.0
        if suffix_of(entry) in PICTURE_SUFFIXES:
            return 0.2  # a thumbnail beside its video
        return 1.0 if by_name or inside else 0.6

    def _names_in(self, place: str) -> Iterator[str] | None:
        """Names in a folder; None for a file. Raises an OSError where there is nothing."""
        if is_remote(place):
            fs, path = filesystem_of(place)
            if retried(lambda: fs.info(path)).get("type") != "directory":
                return None
            return iter([str(each).rpartition("/")[2] for each in retried(lambda: fs.ls(path, detail=False))])
        if not stat.S_ISDIR(os.stat(place).st_mode):  # noqa: PTH116
            return None
        with os.scandir(place) as entries:
            return iter([entry.name for entry, _ in zip(entries, range(100), strict=False)])


def _named_files(
    base: str, columns: Sequence[ListColumn], least: float
) -> tuple[ListColumn, list[str], str] | None:
    """The column whose entries are names of videos below ``base``, if more of it are than ``least``; its paths."""
    if not columns:
        return None
    files: dict[str, list[str]] = {}  # paths by name, and by name without suffix
    try:
        if is_remote(base):
            fs, path = filesystem_of(base)
            folders = remote_folders(fs, path, retried(lambda: fs.find(path, detail=True)))
        else:
            folders = local_folders(base or ".", "", set())
        for folder in folders:
            for name in folder.files:
                if is_video(name):
                    for key in (name, name.rpartition(".")[0]):
                        files.setdefault(key, []).append(folder.uri_of(name))
    except (*client_errors(), NotImplementedError):
        return None  # a server that lists nothing

    def path_of(entry: str) -> str | None:
        """The only file of this name, below the folders that the entry names."""
        parent, slash, name = entry.replace("\\", "/").removeprefix("./").rpartition("/")
        stem = name.rpartition(".")[0] if is_video(name) else name
        paths = files.get(name) or files.get(stem) or []
        paths = [path for path in paths if f"/{path}".rpartition("/")[0].endswith(slash + parent)]
        return paths[0] if len(paths) == 1 else None

    shares = [(each.share(lambda entry: float(path_of(entry) is not None)), each) for each in columns]
    share, column = max(shares, key=lambda each: (each[0], bool(each[1].labels)))
    if share <= least / 2:
        return None
    found = [path_of(entry) for entry in column.entries]
    if column.labels:  # of those that are not there, what would be their path beside the others
        pairs = zip(found, column.labels, strict=True)
        parents = Counter(_parent(path, label) for path, label in pairs if path is not None)
        folder, named = parents.most_common(1)[0][0]
        labels = [label.replace(" ", "_") if named == "_" else label for label in column.labels]
        gone = [f"{folder}{label}/" if named else folder for label in labels]
        paths = [
            path or f"{place}{entry}.mp4"
            for path, place, entry in zip(found, gone, column.entries, strict=True)
        ]
    else:
        paths = [path or entry for path, entry in zip(found, column.entries, strict=True)]
    return column, paths, ", which name files below the list's folder"


def _parent(path: str, label: str) -> tuple[str, str]:
    """The folder of a file above that of its class, and how that is named: "" for no such folder, " " as the class is,
    "_" with underscores.
    """
    parent, _, name = path.rpartition("/")[0].rpartition("/")
    for separator in (" ", "_"):
        if label and name == label.replace(" ", separator):
            return (f"{parent}/" if parent else ""), separator
    return path[: path.rfind("/") + 1], ""


# --- kinds of files -----------------------------------------------------------------------------------------


def _groups(path: str, forced: str | None) -> Iterator[list[ListColumn]]:
    suffix = suffix_of(split_query(path)[0])
    if suffix in PARQUET_SUFFIXES:
        yield _of_parquet(path, forced)
        return
    text = decoded(_content(path))
    if suffix in _JSON:
        yield _of_json(text)
        return
    lines = [
        line for line in text.splitlines() if line.strip() and not (suffix == ".txt" and line.startswith("#"))
    ]
    if any(_CONCAT_FILE.match(line) for line in lines) and all(map(_CONCAT.match, lines)):
        files = [shlex.split(line)[1] for line in lines if _CONCAT_FILE.match(line)]
        yield [ListColumn("file", files)]
        return
    first = {".csv": ",", ".tsv": "\t"}.get(suffix)
    separators = [first, *(each for each in _SEPARATORS if each != first)] if first else list(_SEPARATORS)
    fields = [each for each in separators if each and any(each in line for line in lines[:_SAMPLE])]
    whole = _without_header([[line.strip()] for line in lines], "the whole line", guess=suffix != ".txt")
    if first is None or first not in fields:
        yield whole
    for separator in fields:
        rows = [row for row in csv.reader(io.StringIO(text), delimiter=separator) if row]
        if suffix == ".txt":
            rows = [row for row in rows if not row[0].startswith("#")]
        yield _without_header(rows, "", guess=True)
    words = [line.split() for line in lines]
    if any(len(row) > 1 for row in words[:_SAMPLE]):
        without_labels = [
            ListColumn(
                f"the line without its last {count} words",
                [line.strip().rsplit(maxsplit=count)[0] for line in long],
            )
            for count in (1, 2)
            if (long := [line for line, row in zip(lines, words, strict=True) if len(row) > count])
        ]
        yield _without_header(words, "", guess=True) + without_labels
    if first in fields:
        yield whole


def _without_header(rows: list[list[str]], only: str, *, guess: bool) -> list[ListColumn]:
    """The columns of rows whose first may be a header.

    It is one if it holds a usual name (of a rate too), or (``guess``) if nothing in it is named like a video while
    what follows is.
    """
    if not rows:
        return []
    first = [cell.strip() for cell in rows[0]]
    is_header = any(_key(cell) in _USUAL or _key(cell) in _RATES for cell in first) or (
        guess
        and not any(_named_like_a_video(cell) or "/" in cell for cell in first)
        and any(column.share(_named_like_a_video) > _URL for column in _columns(rows[1:], only, None))
    )
    return _columns(rows[1:], only, first) if is_header else _columns(rows, only, None)


def _columns(rows: Sequence[Sequence[str]], only: str, header: Sequence[str] | None) -> list[ListColumn]:
    count = len(header) if header else max(map(len, rows[:_SAMPLE]), default=0)
    columns = list[ListColumn]()
    rate = next((place for place, name in enumerate(header or ()) if _key(name) in _RATES), None)
    for place in range(count):
        if place == rate:
            continue
        entries = [
            _rated(row[place].strip(), row[rate] if rate is not None and len(row) > rate else None)
            for row in rows
            if len(row) > place and row[place].strip()
        ]
        name = header[place] if header and header[place] else only or f"column {place + 1}"
        columns.append(ListColumn(name, entries))
    if header and (kinetics := _kinetics([_key(each) for each in header], rows)) is not None:
        columns.append(kinetics)
    return columns


def _rated(entry: str, rate: Any) -> str:
    """The entry with its frame rate, where that is a number above 0, or a fraction such as 30000/1001."""
    try:
        value = float(Fraction(str(rate)))
    except (ValueError, ZeroDivisionError, OverflowError):
        return entry
    if not 0 < value < math.inf:
        return entry
    rated = Entry(entry)
    rated.frames_per_second = value
    return rated


def _kinetics(names: Sequence[str], rows: Sequence[Sequence[str]]) -> ListColumn | None:
    """Kinetics' annotations: ``<youtube_id>_<start>_<end>`` in six digits, by the names of its CSV's columns."""
    if not set(_KINETICS) <= set(names):
        return None
    video, start, end = (names.index(name) for name in _KINETICS)
    label = names.index("label") if "label" in names else None
    entries, labels = list[str](), list[str]()
    for row in rows:
        try:
            entries.append(f"{row[video]}_{round(float(row[start])):06d}_{round(float(row[end])):06d}")
        except (ValueError, IndexError, TypeError):
            continue
        labels.append(str(row[label] or "") if label is not None and len(row) > label else "")
    return ListColumn("_".join(_KINETICS), entries, tuple(labels)) if entries else None


def _of_json(text: str) -> list[ListColumn]:
    """An array or lines of objects or strings; of an object its lists, or its keys and what they hold.

    Columns of lists that are not the longest have the lists' names in front, so that what is not taken is shown.
    """
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if not error.msg.startswith("Extra data"):
            raise
        content = [json.loads(line) for line in text.splitlines() if line.strip()]
    if isinstance(content, dict):
        held = [(len(each), key, each) for key, each in content.items() if isinstance(each, list) and each]
        several = [each for each in content.values() if isinstance(each, dict)]
        if held and not several:
            held.sort(key=lambda each: -each[0])
            columns = list[ListColumn]()
            for place, (_, key, rows) in enumerate(held):
                for column in _of_rows(rows):
                    own = f"{key}.{column.name}" if place else column.name
                    columns.append(replace(column, name=key if column.name == "column 1" else own))
            return columns
        elif len(several) == 1 and any(isinstance(each, dict) for each in several[0].values()):
            content = _keyed(several[0])  # ActivityNet's "database"
        else:
            content = _keyed(content) if several else [content]
    if not isinstance(content, list):
        raise ValueError("it holds no list")
    return _of_rows(content)


def _of_rows(content: Sequence[Any]) -> list[ListColumn]:
    rows = [each if isinstance(each, dict) else {"": each} for each in content]
    header = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_text(row.get(name)) for name in header] for row in rows]
    return _columns(cells, "", header)


def _keyed(held: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of an object's keys and what they hold; of Kinetics-700 also label and stretch, as its CSV has them."""
    rows = list[dict[str, Any]]()
    for key, value in held.items():
        rows.append({"id": key, **(value if isinstance(value, dict) else {})})
        about = rows[-1].get("annotations")
        if isinstance(about, dict) and len(segment := about.get("segment") or ()) == 2:
            rows[-1] |= {"label": about.get("label"), **dict(zip(_KINETICS, (key, *segment), strict=True))}
    return rows


def _text(value: Any) -> str:
    """A path in JSON; of the pair of path and bytes that Hugging Face datasets write, the path."""
    if isinstance(value, dict):
        return next((value[name] for name in _PATHS_OF_STRUCTS if isinstance(value.get(name), str)), "")
    return str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else ""


def _of_parquet(path: str, forced: str | None) -> list[ListColumn]:
    """Columns of strings, also dictionary-encoded, large and view ones, and the paths of structs of path and bytes."""
    with open_rows(path) as file:
        schema: Any = file.schema_arrow
        leaves = {name: leaf for name in schema.names if (leaf := _leaf(name, schema.field(name).type))}
        if not leaves or (forced in schema.names and forced not in leaves):
            name = forced or (schema.names[0] if schema.names else "")
            kind = schema.field(name).type if name else "nothing"
            raise pa.ArrowTypeError(
                f"column {name} holds {kind}, must be strings, or structs with a string 'path'"
            )
        rate = next((name for name in schema.names if _key(name) in _RATES), None)
        rates = file.read([rate]).column(0).to_pylist() if rate else []
        columns = [
            ListColumn(name, *_strings(file, name, leaf, rates))
            for name, leaf in leaves.items()
            if name != rate
        ]
        if set(_KINETICS) <= {_key(name) for name in schema.names}:
            names = [name for name in schema.names if _key(name) in (*_KINETICS, "label")]
            table = file.read(names)
            rows = list(zip(*(table.column(name).to_pylist() for name in names), strict=True))
            kinetics = _kinetics([_key(name) for name in names], rows)
            columns += [kinetics] if kinetics else []
        return columns


def _leaf(name: str, kind: Any) -> str | None:
    """The dotted place of the strings of a column, or None if it holds none."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return name
    if not pa.types.is_struct(kind):
        return None
    held = {kind.field(place).name: kind.field(place).type for place in range(kind.num_fields)}
    inner = next((each for each in _PATHS_OF_STRUCTS if each in held and _leaf(each, held[each])), None)
    return None if inner is None else f"{name}.{inner}"


def _strings(
    file: Any, name: str, leaf: str, rates: Sequence[Any]
) -> tuple[list[str], tuple[str, ...], tuple[str | None, ...]]:
    """Entries of a column of strings, no labels, and the paths of all rows where it holds bytes too."""
    values = [
        value if not isinstance(value, dict) else next(iter(value.values()))
        for value in file.read([leaf]).column(0).to_pylist()
    ]
    entries = [
        _rated(value.strip(), rates[place] if rates else None)
        for place, value in enumerate(values)
        if value and value.strip()
    ]
    kind = file.schema_arrow.field(name).type
    embeds = leaf == f"{name}.path" and kind.get_field_index("bytes") >= 0
    return entries, (), tuple(values) if embeds and has_bytes(file, name) else ()
