"""Datasets: reading clips in any order, verified, and loading delta tokens whole.

The write side is imported from here too. C clips, T frames, N patches, D hidden.
"""

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from deltacache.pipeline.checksums import crc32c_of_array
from deltacache.pipeline.commits import FAILURES_FILE, INDEX_FILE, finish_dataset, write_shard
from deltacache.pipeline.plan import read_plan, write_plan
from deltacache.pipeline.preparation import SHARDS, prepare_dataset, read_black, read_card
from deltacache.pipeline.receipts import Failure, finished_shards, read_receipt
from deltacache.pipeline.stores import ShardReader, shard_store, token_array, token_shape
from deltacache.schemas.clips import DeltaClip, FeatureClip
from deltacache.schemas.datasets import DatasetCard
from deltacache.schemas.errors import DatasetError
from deltacache.schemas.tables import FAILURES_SCHEMA, INDEX_SCHEMA

__all__ = [
    "Dataset",
    "DeltaArrays",
    "finish_dataset",
    "finished_shards",
    "load_deltas",
    "open_dataset",
    "prepare_dataset",
    "read_plan",
    "write_plan",
    "write_shard",
]

_OPEN_SHARDS = 64
"""Each open shard holds a file descriptor."""
_WAY_OUT = (
    "`deltacache verify` lists all damage; remove the receipts of damaged shards and run the command that made the "
    "dataset again"
)


@dataclass(frozen=True, slots=True, repr=False)
class DeltaArrays:
    """A whole delta dataset in memory.

    Attributes:
        delta_tokens: (C, T, D) float16, C-contiguous.
        timestamps_s: (C, T) float32, seconds from the first frame of each video.
        clip_ids: C ids.
    """

    delta_tokens: np.ndarray
    timestamps_s: np.ndarray
    clip_ids: tuple[str, ...]

    def __repr__(self) -> str:
        return f"DeltaArrays(delta_tokens={self.delta_tokens.shape})"


class Dataset:
    """A finished dataset, open for reading clips in any order. Safe to use from several threads."""

    def __init__(
        self, root: Path, card: DatasetCard, index: pa.Table, black_patch_tokens: np.ndarray
    ) -> None:
        """Use ``open_dataset``."""
        self.root = root
        self.card = card
        self.index = index
        self.black_patch_tokens = black_patch_tokens
        self.clip_ids: list[str] = index["clip_id"].to_pylist()
        self._shards: list[str] = index["shard"].to_pylist()
        self._crcs = index["crc32c"].to_numpy()
        self._timestamps = _timestamps(index, card, root)
        self._store = shard_store(card)
        self._readers: OrderedDict[str, ShardReader] = OrderedDict()
        self._lock = Lock()
        self._verified = np.zeros(len(self), dtype=bool)

    def __len__(self) -> int:
        return len(self.clip_ids)

    def __repr__(self) -> str:
        return f"Dataset({self.root}, {self.card.kind}, clips={len(self)}, clip={token_shape(self.card)})"

    def __getstate__(self) -> tuple[Path, DatasetCard, pa.Table, np.ndarray]:
        return self.root, self.card, self.index, self.black_patch_tokens

    def __setstate__(self, state: tuple[Path, DatasetCard, pa.Table, np.ndarray]) -> None:
        self.__init__(*state)

    @property
    def timestamps_s(self) -> np.ndarray:
        """(C, T) float32, seconds from the first frame of each video."""
        return self._timestamps

    @property
    def failures(self) -> pa.Table:
        """The refused videos and clips: ``failures.parquet``."""
        return _read_table(self.root / FAILURES_FILE, FAILURES_SCHEMA)

    def failures_of(self, shard_id: str) -> list[Failure]:
        """The refused videos and clips of one shard."""
        return list(read_receipt(self.root, shard_id).failures)

    def read(self, clip: int) -> FeatureClip | DeltaClip:
        """One clip; its tokens may be a read-only view of the file. Verified every time.

        Raises:
            DatasetError: the shard is missing, short or altered.
        """
        position = range(len(self))[clip]
        tokens = self._verified_tokens(position)
        timestamps = self._timestamps[position]
        if self.card.kind == "features":
            return FeatureClip(self.clip_ids[position], tokens, timestamps)
        return DeltaClip(self.clip_ids[position], tokens, timestamps)

    def read_frames(self, clip: int, start: int, stop: int) -> np.ndarray:
        """Tokens of frames ``start .. stop - 1``: (stop - start, N, D) float16, or (stop - start, D) for deltas.

        May be a read-only view of the file. The whole clip is verified the first time.

        Raises:
            DatasetError: the shard is missing, short or altered.
        """
        position = range(len(self))[clip]
        frames = self.card.sampling.frames
        if not 0 <= start <= stop <= frames:
            raise IndexError(f"frames {start}..{stop} of a clip of {frames}")
        if not self._verified[position]:
            return self._verified_tokens(position)[start:stop]
        return self._tokens(position, slice(start, stop))

    def _verified_tokens(self, position: int) -> np.ndarray:
        tokens = self._tokens(position, slice(None))
        crc, expected = crc32c_of_array(tokens), int(self._crcs[position])
        if crc != expected:
            raise self._damaged(
                position, f"its tokens have crc32c {crc:08x}, but the index says {expected:08x}"
            )
        self._verified[position] = True
        return tokens

    def _tokens(self, position: int, frames: slice) -> np.ndarray:
        shape = token_shape(self.card)
        try:
            tokens = self._reader(self._shards[position]).array(
                self.clip_ids[position], token_array(self.card), frames
            )
        except DatasetError as error:
            raise self._damaged(position, str(error)) from error
        if tokens.dtype != np.float16 or tokens.shape[1:] != shape[1:]:
            raise self._damaged(
                position, f"its tokens are {tokens.dtype}{tokens.shape}, must be float16{shape}"
            )
        return tokens

    def _reader(self, shard_id: str) -> ShardReader:
        with self._lock:
            reader = self._readers.pop(shard_id, None)
            if reader is None:
                _check_files(self.root, shard_id)
                reader = self._store.open(self.root / SHARDS, shard_id)
            self._readers[shard_id] = reader
            if len(self._readers) > _OPEN_SHARDS:
                self._readers.popitem(last=False)
            return reader

    def _damaged(self, position: int, what: str) -> DatasetError:
        shard, clip_id = self._shards[position], self.clip_ids[position]
        return DatasetError(f"{self.root}: clip {clip_id} of shard {shard} is damaged: {what}. {_WAY_OUT}")


def open_dataset(root: Path, kind: Literal["features", "deltas"] | None = None) -> Dataset:
    """Open a finished dataset for reading.

    Raises:
        DatasetError: not a dataset, not finished, damaged, or not of ``kind``.
    """
    card = read_card(root)
    if kind is not None and card.kind != kind:
        command = "extract-features" if kind == "features" else "tokenize"
        raise DatasetError(
            f"{root} holds {card.kind}, but {kind} are needed: give a dataset made by deltacache {command}"
        )
    return Dataset(root, card, _read_table(root / INDEX_FILE, INDEX_SCHEMA), read_black(root, card))


def load_deltas(root: Path) -> DeltaArrays:
    """Load a whole delta dataset into memory, verified.

    Raises:
        DatasetError: not a finished delta dataset, or a shard is missing, short or altered.
    """
    dataset = open_dataset(root, "deltas")
    tokens = np.empty((len(dataset), *token_shape(dataset.card)), dtype=np.float16)
    for position in range(len(dataset)):
        tokens[position] = dataset.read_frames(position, 0, tokens.shape[1])
    return DeltaArrays(tokens, dataset.timestamps_s, tuple(dataset.clip_ids))


def _read_table(path: Path, schema: pa.Schema) -> pa.Table:
    if not path.exists():
        raise DatasetError(
            f"{path} does not exist: the dataset is not finished, run the command that makes it again"
        )
    try:
        return pq.read_table(path, schema=schema)
    except (pa.ArrowInvalid, OSError) as error:
        raise DatasetError(
            f"{path} is damaged ({error}): remove it and run the command that made the dataset again"
        ) from error


def _timestamps(index: pa.Table, card: DatasetCard, root: Path) -> np.ndarray:
    column = index["timestamps_s"].combine_chunks()
    values = column.flatten().to_numpy()
    shape = (len(column), card.sampling.frames)
    if values.size != shape[0] * shape[1]:
        raise DatasetError(f"{root / INDEX_FILE} is damaged: not every clip has {shape[1]} times. {_WAY_OUT}")
    return values.reshape(shape)


def _check_files(root: Path, shard_id: str) -> None:
    """Refuse missing and short files before a reader can take them for zeros."""
    for name, record in read_receipt(root, shard_id).files.items():
        path = root / name
        size = path.stat().st_size if path.is_file() else None
        if size != record.bytes:
            held = "is missing" if size is None else f"has {size} bytes"
            raise DatasetError(f"{path} {held}, but its receipt says {record.bytes} bytes")
