"""Which clips of a dataset are taken: those for which an expression holds, and one side of a split by video."""

import hashlib
import sqlite3
from collections.abc import Iterable

import numpy as np

from deltacache.pipeline.datasets.dataset import Dataset
from deltacache.pipeline.datasets.writing import SOURCES_FILE, read_table
from deltacache.schemas.errors import DatasetError
from deltacache.schemas.tables import SOURCES_SCHEMA

_IDS_AT_ONCE = 65536
CLIP_COLUMNS = {
    "clip_id": "TEXT",
    "video_uri": "TEXT",
    "view": "INTEGER",
    "shard": "TEXT",
    "row": "INTEGER",
    "start_s": "REAL",
    "end_s": "REAL",
    "flip": "INTEGER",
    "decoder": "TEXT",
    "duplicate_frames": "INTEGER",
}
"""Of the index, with the times of the first and the last frame."""
SOURCE_COLUMNS = {"video_id": "TEXT", "size_bytes": "INTEGER", "version": "TEXT", "sha256": "TEXT"}
_FUNCTIONS = frozenset(
    (
        "abs",
        "coalesce",
        "glob",
        "ifnull",
        "iif",
        "instr",
        "length",
        "like",
        "lower",
        "ltrim",
        "max",
        "min",
        "nullif",
        "replace",
        "round",
        "rtrim",
        "substr",
        "trim",
        "upper",
    )
)
"""Those that give the same value every time, and touch nothing else."""


def rows_where(dataset: Dataset, where: str) -> np.ndarray:
    """The clips for which ``where`` holds, (C,) int64 in the order of the index.

    ``where`` is an SQL expression over ``CLIP_COLUMNS`` and ``SOURCE_COLUMNS``, such as ``view = 0 and video_uri like
    'kitchen/%'``. SQLite evaluates it on tables in memory; nothing but the columns and a few functions is allowed.

    Raises:
        DatasetError: it cannot be read, names no column or an unknown one, or holds for no clip.
    """
    query = (
        "SELECT clips.place FROM clips LEFT JOIN sources USING (shard, video_uri) "
        f"WHERE (\n{where}\n) ORDER BY clips.place"
    )
    used: set[tuple[str, str]] = set()

    def allow(action: int, name: str | None, column: str | None, *_: str | None) -> int:
        if action == sqlite3.SQLITE_READ:
            used.add((name or "", column or ""))
            return sqlite3.SQLITE_OK
        function = action == sqlite3.SQLITE_FUNCTION and (column or "").lower() in _FUNCTIONS
        return sqlite3.SQLITE_OK if function or action == sqlite3.SQLITE_SELECT else sqlite3.SQLITE_DENY

    database = sqlite3.connect(":memory:")
    try:
        for table, columns in (("clips", CLIP_COLUMNS), ("sources", SOURCE_COLUMNS)):
            keys = {} if table == "clips" else {"shard": "TEXT", "video_uri": "TEXT"}
            named = ", ".join(f"{name} {kind}" for name, kind in {**keys, **columns}.items())
            database.execute(
                f"CREATE TABLE {table} ({'place INTEGER PRIMARY KEY, ' * (table == 'clips')}{named})"
            )
        database.execute("CREATE UNIQUE INDEX of_video ON sources (shard, video_uri)")
        database.set_authorizer(allow)
        database.execute(query)  # says what is wrong before anything is read
        asked = {name for table, name in used if name in CLIP_COLUMNS or table == "sources"}
        database.set_authorizer(None)
        if not asked - {"shard", "video_uri"} and not any(name in where for name in ("shard", "video_uri")):
            raise DatasetError(_message(where, "it names no column"))
        _fill(database, "clips", {"place": range(len(dataset)), **_clip_values(dataset, asked)})
        if asked & SOURCE_COLUMNS.keys():
            sources = read_table(dataset.root / SOURCES_FILE, SOURCES_SCHEMA)
            names = ("shard", "video_uri", *sorted(asked & SOURCE_COLUMNS.keys()))
            _fill(database, "sources", {name: sources[name].to_pylist() for name in names})
        database.set_authorizer(allow)
        rows = [place for (place,) in database.execute(query)]
    except sqlite3.Error as error:
        raise DatasetError(_message(where, str(error))) from error
    finally:
        database.close()
    if not rows:
        raise DatasetError(
            f"{dataset.root} has no clip for which {where!r} holds, of {len(dataset):,}: give another --where"
        )
    return np.asarray(rows, dtype=np.int64)


def _message(where: str, what: str) -> str:
    names = ", ".join((*CLIP_COLUMNS, *SOURCE_COLUMNS))
    return (
        f'--where {where!r} cannot be used: {what}. It is an SQL expression such as "view = 0 and video_uri like '
        f"'kitchen/%'\", over the columns {names}, without functions that depend on more than their arguments"
    )


def _clip_values(dataset: Dataset, asked: set[str]) -> dict[str, list[object]]:
    values: dict[str, list[object]] = {}
    for name in CLIP_COLUMNS:
        if name in ("start_s", "end_s"):
            if name in asked:
                values[name] = dataset.timestamps_s[:, 0 if name == "start_s" else -1].tolist()
        elif name in asked or name in ("shard", "video_uri"):
            values[name] = dataset.column(name).to_pylist()
    return values


def _fill(database: sqlite3.Connection, table: str, columns: dict[str, Iterable[object]]) -> None:
    names, marks = ", ".join(columns), ", ".join("?" * len(columns))
    rows = zip(*columns.values(), strict=True)
    database.executemany(f"INSERT OR IGNORE INTO {table} ({names}) VALUES ({marks})", rows)


def is_held_out(video_id: str, split: float, seed: int = 0) -> bool:
    """Whether a video is among the ``1 - split`` that are not trained on.

    A function of the video's id and the seed alone: videos that are added later move no other one, and all datasets
    made from the same videos are split alike.
    """
    digest = hashlib.sha256(f"split {seed} {video_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >= round(split * 2**64)


def split_rows(dataset: Dataset, split: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The clips of the videos that are trained on and of those that are held out, int64 in the index's order."""
    out, ids, last = np.empty(len(dataset), dtype=bool), dataset.column("clip_id"), ("", False)
    for at in range(0, len(ids), _IDS_AT_ONCE):
        for place, clip_id in enumerate(ids.slice(at, _IDS_AT_ONCE).to_pylist(), at):
            video_id = clip_id.rpartition("-v")[0]
            if video_id != last[0]:  # the views of a video follow each other
                last = video_id, is_held_out(video_id, split, seed)
            out[place] = last[1]
    return np.flatnonzero(~out), np.flatnonzero(out)
