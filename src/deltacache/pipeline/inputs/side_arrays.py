"""Numbers and texts that are known of a video at certain times, and what they are at the frames of a clip.

A CSV or Parquet file has a row for each video and time: ``video_uri``, ``time_s`` (seconds from the first frame of the
video) and any other columns. R rows of a video, T frames, W numbers of a row.
"""

import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from io import BytesIO
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from deltacache.pipeline.storage.errors import read_file
from deltacache.pipeline.storage.storage import dataset_root
from deltacache.schemas.datasets import SideArray, SideRule
from deltacache.schemas.errors import DatasetError, SettingsError
from deltacache.schemas.tables import INDEX_SCHEMA

_KEYS = ("video_uri", "time_s")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_PART = re.compile(r"(?P<name>.+)\.(?P<place>\d+)")
_TAKEN = frozenset(
    (*INDEX_SCHEMA.names, "tokens", "patch_tokens", "delta_tokens", "patch_tokens_scale", "json", "c")
)
_CLOSE_S = 1e-4
"""A row counts as one at a frame's time if it is at most this much later: times of frames are float32."""

SideValues = dict[str, np.ndarray | list[str]]
"""By name: (T,) or (T, W) float32, or a text for each frame."""


class SideSource(Protocol):
    """A seam: where side arrays come from. It is pickled to the workers."""

    @property
    def arrays(self) -> dict[str, SideArray]:
        """What a dataset's card says of them."""
        ...

    def lacking(self, video_uris: Iterable[str]) -> list[str]:
        """Those of the videos that have no row."""
        ...

    def at(self, video_uri: str, times_s: np.ndarray) -> SideValues:
        """What is known at the times (T,) of a clip's frames; NaN, or an empty text, where nothing is."""
        ...


class SideTable:
    """The rows of a file, by video. It is read where it is first needed: a worker gets the path alone.

    Args:
        rules: of columns, by name; the others take the previous row.
    """

    def __init__(self, path: str, rules: Mapping[str, SideRule]) -> None:
        self.path, self._rules = path, dict(rules)

    def __reduce__(self) -> tuple[type["SideTable"], tuple[str, dict[str, SideRule]]]:
        return SideTable, (self.path, self._rules)

    @cached_property
    def _rows(self) -> tuple[dict[str, slice], np.ndarray, dict[str, np.ndarray | list[str]]]:
        """Which rows each video has, their times in order, and the values by name."""
        table = _read(self.path)
        missing = [name for name in _KEYS if name not in table.column_names]
        if missing:
            raise DatasetError(
                f"{self.path} has no column {missing[0]}: side arrays need video_uri (as in index.parquet) and time_s "
                f"(seconds from the first frame of the video); it has {', '.join(table.column_names)}"
            )
        if not pa.types.is_floating(table["time_s"].type) and not pa.types.is_integer(table["time_s"].type):
            raise DatasetError(
                f"time_s of {self.path} must be numbers of seconds, not {table['time_s'].type}"
            )
        times = table["time_s"].cast(pa.float64()).to_numpy()
        uris = table["video_uri"].cast(pa.string()).combine_chunks().dictionary_encode()
        if uris.null_count or not np.isfinite(times).all():
            raise DatasetError(
                f"{self.path} has a row without a video_uri or without a finite time_s: remove it"
            )
        codes = uris.indices.to_numpy(zero_copy_only=False)
        order = np.lexsort((times, codes))
        bounds = np.searchsorted(codes[order], np.arange(len(uris.dictionary) + 1))
        videos = {
            uri: slice(int(bounds[code]), int(bounds[code + 1]))
            for code, uri in enumerate(uris.dictionary.to_pylist())
        }
        return (
            videos,
            times[order],
            {name: _taken(each, order) for name, each in _columns(self.path, table).items()},
        )

    @property
    def arrays(self) -> dict[str, SideArray]:
        """What a dataset's card says of them.

        Raises:
            DatasetError: the file cannot be read, or has a column that cannot be used.
            SettingsError: a rule for a column that is not there, or one that texts cannot have.
        """
        found: dict[str, SideArray] = {}
        for name, each in self._rows[2].items():
            width = each.shape[1] if isinstance(each, np.ndarray) and each.ndim == 2 else None
            found[name] = SideArray(kind="text" if isinstance(each, list) else "numbers", width=width)
        return with_rules(self.path, found, self._rules, "previous")

    def lacking(self, video_uris: Iterable[str]) -> list[str]:
        """Those of the videos that have no row."""
        return [uri for uri in video_uris if uri not in self._rows[0]]

    def at(self, video_uri: str, times_s: np.ndarray) -> SideValues:
        """What is known at the times (T,) of a clip's frames; NaN, or an empty text, where nothing is."""
        videos, times, values = self._rows
        rows = videos.get(video_uri, slice(0, 0))
        return {
            name: resampled(times[rows], each[rows], times_s.astype(np.float64), array.rule)
            for name, array, each in ((name, array, values[name]) for name, array in self.arrays.items())
        }


def with_rules(
    path: str, arrays: Mapping[str, SideArray], rules: Mapping[str, SideRule], default: SideRule
) -> dict[str, SideArray]:
    """The arrays of ``path`` in the order of their names, each with its rule.

    Raises:
        SettingsError: a rule for a column that is not there, or one that texts cannot have.
    """
    stray = sorted(rules.keys() - arrays.keys())
    if stray:
        raise SettingsError(f"side_rule: {path} has no column {stray[0]}: it has {', '.join(arrays)}")
    for name, rule in rules.items():
        if arrays[name].kind == "text" and rule == "linear":
            raise SettingsError(
                f"side_rule {name}=linear: {name} of {path} is text, which has no mean: give previous or nearest"
            )
    return {
        name: array.model_copy(update={"rule": rules.get(name, default)})
        for name, array in sorted(arrays.items())
    }


def is_array_name(name: str) -> bool:
    """Whether a side array may have this name: letters, digits and '_', and none of the index or of the tokens."""
    return _NAME.fullmatch(name) is not None and name not in _TAKEN


def resampled(
    times: np.ndarray, values: np.ndarray | list[str], frames: np.ndarray, rule: SideRule
) -> np.ndarray | list[str]:
    """Values at the times of ``frames``, from those at increasing ``times``.

    ::

        rows      a-----b--------c          previous  nearest  linear
        frame        ^                      a         b        between a and b
        before a, or without rows           nothing   a        nothing
        after c                             c         c        nothing
    """
    close = _CLOSE_S + np.spacing(frames.astype(np.float32)).astype(np.float64)
    before = np.searchsorted(times, frames + close, side="right") - 1  # -1: none
    if rule == "linear":
        assert isinstance(values, np.ndarray)
        return _linear(times, values, frames, close)
    chosen = before
    if rule == "nearest" and len(times):
        after = np.minimum(before + 1, len(times) - 1)
        nearer = (before < 0) | (
            np.abs(times[after] - frames) < np.abs(frames - times[np.maximum(before, 0)])
        )
        chosen = np.where(nearer, after, before)
    if isinstance(values, list):
        return [values[row] if row >= 0 else "" for row in chosen.tolist()]
    found = np.full((len(frames), *values.shape[1:]), np.nan, np.float32)
    found[chosen >= 0] = values[chosen[chosen >= 0]]
    return found


def _linear(times: np.ndarray, values: np.ndarray, frames: np.ndarray, close: np.ndarray) -> np.ndarray:
    found = np.full((len(frames), *values.shape[1:]), np.nan, np.float32)
    if len(times) == 0:
        return found
    inside = (frames >= times[0] - close) & (frames <= times[-1] + close)
    columns = values.reshape(len(values), -1).T
    between = [np.interp(frames[inside], times, column.astype(np.float64)) for column in columns]
    found[inside] = np.stack(between, -1).reshape(-1, *values.shape[1:])
    return found


def _read(path: str) -> pa.Table:
    try:
        content = read_file(dataset_root(path))
        if path.lower().endswith((".parquet", ".pq")):
            return pq.read_table(BytesIO(content))
        return pyarrow.csv.read_csv(BytesIO(content))
    except (OSError, pa.ArrowException) as error:
        raise DatasetError(
            f"the side arrays {path} cannot be read ({error}): give a CSV or Parquet file with the columns video_uri, "
            "time_s and others"
        ) from error


def _columns(path: str, table: pa.Table) -> dict[str, np.ndarray | list[str]]:
    """All columns but the keys; ``action.0``, ``action.1``, … are one array."""
    found: dict[str, np.ndarray | list[str]] = {}
    parts: dict[str, dict[int, np.ndarray]] = {}
    for name in table.column_names:
        if name in _KEYS:
            continue
        part = _PART.fullmatch(name)
        values = column_values(path, name, table[name].combine_chunks())
        if part is None:
            found[name] = values
        elif isinstance(values, list) or values.ndim > 1:
            raise DatasetError(f"column {name} of {path} is one part of an array, so it must hold numbers")
        else:
            parts.setdefault(part["name"], {})[int(part["place"])] = values
    for name, each in parts.items():
        if sorted(each) != list(range(len(each))) or name in found:
            raise DatasetError(
                f"columns {name}.0, {name}.1, … of {path} are one array: number them from 0 without a gap, and name no "
                f"other column {name}"
            )
        found[name] = np.stack([each[place] for place in range(len(each))], axis=1)
    for name in found:
        if not is_array_name(name):
            raise DatasetError(
                f"column {name} of {path} cannot be a side array: its name must be letters, digits and '_', and not "
                "one of the index or of the tokens. Rename it"
            )
    if not found:
        raise DatasetError(f"{path} has no columns beside video_uri and time_s: there is nothing to add")
    return found


def column_values(path: str, name: str, column: pa.Array) -> np.ndarray | list[str]:
    """(rows,) or (rows, W) float32, or texts.

    Raises:
        DatasetError: it holds anything else.
    """
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return column.fill_null("").to_pylist()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        widths = {None if row is None else len(row) for row in column.to_pylist()}
        width = widths.pop() if len(widths) == 1 else None
        if not width:
            raise DatasetError(
                f"column {name} of {path} has lists of different lengths, or none: each row needs as many numbers"
            )
        return _numbers(path, name, column.flatten()).reshape(-1, width)
    return _numbers(path, name, column)


def _numbers(path: str, name: str, values: pa.Array) -> np.ndarray:
    """Float32; what is missing is NaN."""
    kind = values.type
    if pa.types.is_null(kind):
        return np.full(len(values), np.nan, np.float32)
    if not (pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        raise DatasetError(f"column {name} of {path} is {kind}: give numbers, lists of numbers or text")
    numbers = values.cast(pa.float64()).to_numpy(zero_copy_only=False).astype(np.float32)
    if np.isinf(numbers).any():
        raise DatasetError(
            f"column {name} of {path} has numbers that are infinite in float32: give finite ones"
        )
    return numbers


def _taken(values: np.ndarray | list[str], order: np.ndarray) -> np.ndarray | list[str]:
    return values[order] if isinstance(values, np.ndarray) else [values[row] for row in order.tolist()]


def side_row(values: Mapping[str, Any]) -> dict[str, Any]:
    """Plain JSON values for a receipt: NaN is ``null``."""
    row: dict[str, Any] = {}
    for name, each in values.items():
        if isinstance(each, np.ndarray):
            plain = each.astype(object)
            plain[np.isnan(each)] = None
            row[name] = plain.tolist()
        else:
            row[name] = list(each)
    return row


def side_values(row: Mapping[str, Any], arrays: Mapping[str, SideArray]) -> SideValues:
    """The other way round, in the order of the names."""
    return {
        name: list(row[name]) if array.kind == "text" else np.asarray(row[name], np.float32)
        for name, array in sorted(arrays.items())
    }
