"""Datasets: reading clips in any order, verified, and loading delta tokens whole.

The write side is imported from here too. C clips, T frames, N patches, D hidden.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from deltacache.pipeline.datasets.plan import open_plan, read_plan, runs_of, write_plan
from deltacache.pipeline.datasets.receipts import (
    BESIDE,
    Receipt,
    StoredClip,
    finished_shards,
    read_receipt,
    read_receipts,
)
from deltacache.pipeline.datasets.stores import (
    SCALES,
    TIMESTAMPS,
    ClipArrays,
    scale_shape,
    token_array,
    token_dtype,
    token_shape,
)
from deltacache.pipeline.datasets.writing import (
    FAILURES_FILE,
    INDEX_FILE,
    SOURCES_FILE,
    TABLES_FILE,
    TablesSummary,
    finish_dataset,
    open_table,
    prepare_dataset,
    read_black,
    read_card,
    read_table,
    read_tables_summary,
    write_shard,
)
from deltacache.pipeline.inputs.side_arrays import side_values
from deltacache.pipeline.storage.errors import readable_errors
from deltacache.pipeline.storage.files import crc32c_of_array, read_columns, seal_of
from deltacache.pipeline.storage.mapped import MappedFiles
from deltacache.pipeline.storage.storage import AnyPath, dataset_root, in_threads, is_local
from deltacache.schemas.clips import CropBox, DeltaClip, FeatureClip
from deltacache.schemas.datasets import DatasetCard
from deltacache.schemas.errors import DatasetError, StorageError
from deltacache.schemas.tables import FAILURES_SCHEMA, INDEX_SCHEMA, SOURCES_SCHEMA

if TYPE_CHECKING:
    from torch import Tensor


# ----------------------------------------------------------------------------------------------------
# int8 patch tokens: each token has a scale, its largest absolute value / 127.
#
# Shapes: T frames, N patches, D hidden size.
# ----------------------------------------------------------------------------------------------------


LARGEST = 127


def quantise(tokens: "Tensor") -> "tuple[Tensor, Tensor]":
    """Values (..., D) int8 and scales (...) float32 of ``tokens`` (..., D), on their device.

    Values are rounded half to even. A token of zeros has the scale 0 and values 0. A token that is not finite
    has a scale that is not: ``FeatureClip`` refuses it.
    """
    exact = tokens.float()
    scales = exact.abs().amax(dim=-1) / LARGEST
    steps = scales.masked_fill(scales == 0, 1.0).unsqueeze(-1)
    return (exact / steps).round().char(), scales


def dequantise_on_device(values: "Tensor", scales: "Tensor") -> "Tensor":
    """Tokens (..., D) float16 of ``values`` (..., D) int8 and ``scales`` (...) float32."""
    return (values.float() * scales.unsqueeze(-1)).half()


def dequantise(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Tokens (T, N, D) float16 of ``values`` (T, N, D) int8 and ``scales`` (T, N) float32.

    The product in float32, rounded to float16: the same bits as on any device. By torch and a frame at a time,
    which stays in the cache: 12 times as fast as numpy's rounding to float16.
    """
    import torch  # here, because what reads deltas does not need it

    tokens = torch.empty(values.shape, dtype=torch.float16)
    for frame, of_frame, out in zip(values, scales, tokens, strict=True):
        exact = torch.from_numpy(frame.copy()).float()  # a copy, for torch takes no read-only memory
        out.copy_(exact.mul_(torch.from_numpy(of_frame.copy()).unsqueeze(-1)))
    return tokens.numpy()


# ----------------------------------------------------------------------------------------------------
# Reading one shard by its receipt: no index, no other shard, neither zarr nor webdataset.
#
# T frames, N patches, D hidden size.
# ----------------------------------------------------------------------------------------------------


class ShardLayout(NamedTuple):
    """In which files of a shard the arrays of its clips lie, and how many bytes apart their frames."""

    token_file: AnyPath
    frame_stride: int
    scale_file: AnyPath
    scale_stride: int

    @classmethod
    def of(cls, root: AnyPath, receipt: Receipt) -> "ShardLayout":
        """Of the shard of this receipt."""
        return cls(
            root / receipt.token_file, receipt.frame_stride, root / receipt.scale_file, receipt.scale_stride
        )

    def arrays(
        self, files: MappedFiles, card: DatasetCard, token_offset: int, scale_offset: int
    ) -> ClipArrays:
        """Read-only views of the clip at these offsets, not verified. ``scale_offset`` matters for int8 only.

        Raises:
            OSError: a file cannot be opened.
            ValueError: a file ends before the array does.
        """
        tokens = files.array(
            self.token_file, token_dtype(card), token_offset, token_shape(card), self.frame_stride
        )
        shape = scale_shape(card)
        if shape is None:
            return ClipArrays(tokens, None)
        return ClipArrays(
            tokens, files.array(self.scale_file, np.float32, scale_offset, shape, self.scale_stride)
        )


def clip_arrays(
    files: MappedFiles, root: AnyPath, card: DatasetCard, receipt: Receipt, row: int
) -> ClipArrays:
    """The arrays of one clip of a shard as ``ShardLayout.arrays`` gives them."""
    scale_offset = receipt.scale_offsets[row] if receipt.scale_offsets else 0
    return ShardLayout.of(root, receipt).arrays(files, card, receipt.token_offsets[row], scale_offset)


def check_sizes(root: AnyPath, receipt: Receipt) -> None:
    """Refuse missing and short files before anybody can take them for zeros.

    Raises:
        DatasetError: a file of the shard is missing or has another size.
    """
    for name, record in receipt.files.items():
        path = root / name
        size = path.stat().st_size if path.is_file() else None
        if size != record.bytes:
            held = "is missing" if size is None else f"has {size} bytes"
            raise DatasetError(f"{path} {held}, but its receipt says {record.bytes} bytes")


class Altered(NamedTuple):
    """An array of a clip whose values are not the ones that were written."""

    array: str
    message: str


def altered_array(card: DatasetCard, arrays: ClipArrays, crcs: Mapping[str, int]) -> Altered | None:
    """The first array of a clip whose values do not have the CRC-32C that ``crcs`` has for its name."""
    words = {token_array(card): "tokens", SCALES: "scales"}
    for name, crc in arrays.crcs(card).items():
        if crc != crcs.get(name):
            must = f"must be {crcs[name]:08x}" if name in crcs else "and the receipt has none"
            return Altered(name, f"its {words[name]} have crc32c {crc:08x}, {must}")
    return None


def stored_clips(root: AnyPath, card: DatasetCard, receipt: Receipt) -> Iterator[StoredClip]:
    """The clips of a finished shard in its order, as they are stored: writing them again gives the same bytes.

    Tokens and scales are views of the files, verified clip by clip as they are taken. Times and the rest come
    from the receipt, which has a checksum of itself.

    Raises:
        DatasetError: a file is missing, short or long, or a clip altered: names file and clip.
        StorageError: the store refuses or does not answer.
    """
    if not receipt.clips:
        return
    try:
        check_sizes(root, receipt)
    except DatasetError as error:
        first = receipt.clips[0]["clip_id"]
        raise _damaged(root, receipt, receipt.token_file, first, str(error)) from error
    files = MappedFiles()
    for position, row in enumerate(receipt.clips):
        clip_id, crcs = row["clip_id"], receipt.arrays[row["clip_id"]]
        try:
            arrays = clip_arrays(files, root, card, receipt, position)
        except StorageError:
            raise
        except (OSError, ValueError) as error:
            raise _damaged(root, receipt, receipt.token_file, clip_id, str(error)) from error
        times = np.asarray(row[TIMESTAMPS], np.float32)
        altered = altered_array(card, arrays, crcs)
        if altered is not None:
            file = receipt.scale_file if altered.array == SCALES else receipt.token_file
            raise _damaged(root, receipt, file, clip_id, altered.message)
        if crc32c_of_array(times) != crcs.get(TIMESTAMPS):
            raise _damaged(root, receipt, receipt.token_file, clip_id, "its times do not have their crc32c")
        yield _stored(card, row, arrays, times)


def _damaged(root: AnyPath, receipt: Receipt, file: str, clip_id: str, what: str) -> DatasetError:
    return DatasetError(
        f"{root / file}: clip {clip_id} of shard {receipt.shard_id} is damaged: {what}. `deltacache verify {root} "
        "--repair` lists all damage and drops that shard; run the command that made the dataset again then"
    )


def _stored(card: DatasetCard, row: dict[str, Any], arrays: ClipArrays, times: np.ndarray) -> StoredClip:
    if card.kind == "features":
        clip = FeatureClip(row["clip_id"], arrays.tokens, times, arrays.scales)
    else:
        clip = DeltaClip(row["clip_id"], arrays.tokens, times)
    return StoredClip(
        clip=clip,
        video_uri=row["video_uri"],
        view=row["view"],
        frame_indices=tuple(row["frame_indices"]),
        crop=CropBox(*row["crop"]),
        flip=row["flip"],
        decoder=row["decoder"],
        duplicate_frames=row["duplicate_frames"],
        side_arrays=side_values(row.get(BESIDE, {}), card.side_arrays),
    )


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

Item = TypeVar("Item")
Result = TypeVar("Result")

_REMOTE_READS = 16


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
    clip_ids: list[str]

    def __repr__(self) -> str:
        return f"DeltaArrays(delta_tokens={self.delta_tokens.shape})"


class Dataset:
    """A finished dataset, open for reading clips in any order, from several threads if need be.

    Opening takes some 100 bytes per shard. Reading adds 13 bytes per clip (29 of int8 features) and some 1,300 bytes
    for each shard that was read from, ``timestamps_s`` adds 4 T bytes per clip, ids some 50 (``read`` needs both, and
    ``clip_ids`` makes a list of texts besides), and ``index`` all that it holds.

    Attributes:
        black_patch_tokens: (N, D) float16, of an all-black frame.
    """

    def __init__(
        self, root: AnyPath, card: DatasetCard, index: pq.ParquetFile, black_patch_tokens: np.ndarray
    ) -> None:
        """Use ``open_dataset``."""
        self.root = root
        self.card = card
        self.black_patch_tokens = black_patch_tokens
        self._table = index
        self._reading = Lock()  # of the table
        self._shard_ids, self._starts = self._runs()
        self._shards = {shard_id: shard for shard, shard_id in enumerate(self._shard_ids)}
        self._layouts: dict[int, ShardLayout] = {}  # by shard
        self._offsets = np.empty(len(self), dtype=np.int64)  # of clips whose shard is in _layouts
        scaled = len(self) if card.dtype == "int8" else 0
        self._scale_offsets, self._scale_crcs = (np.empty(scaled, dtype=np.int64) for _ in range(2))
        self._verified = np.zeros(len(self), dtype=bool)
        self._files = MappedFiles()

    def __len__(self) -> int:
        return self._table.metadata.num_rows

    def __repr__(self) -> str:
        return f"Dataset({self.root}, {self.card.kind}, clips={len(self)}, clip={token_shape(self.card)})"

    def __reduce__(self) -> tuple[Callable[..., "Dataset"], tuple[AnyPath, DatasetCard, str, np.ndarray]]:
        return _reopened, (self.root, self.card, seal_of(self._table), self.black_patch_tokens)

    @cached_property
    def index(self) -> pa.Table:
        """All of the index in memory: a row a clip; shards follow each other in the plan's order."""
        with self._reading:
            return read_columns(self._table, INDEX_SCHEMA).combine_chunks()

    @cached_property
    def timestamps_s(self) -> np.ndarray:
        """(C, T) float32, seconds from the first frame of each video."""
        times = np.empty((len(self), self.card.sampling.frames), np.float32)
        done = 0
        for column in self._batches("timestamps_s"):
            values = column.flatten().to_numpy()
            if values.size != len(column) * times.shape[1]:
                raise self._damaged_index(f"a clip does not have {times.shape[1]} times")
            times[done : done + len(column)] = values.reshape(len(column), -1)
            done += len(column)
        return times

    def column(self, name: str) -> pa.Array:
        """One column of the index: a value per clip."""
        column = pa.chunked_array(self._batches(name), INDEX_SCHEMA.field(name).type).combine_chunks()
        return column.chunk(0) if isinstance(column, pa.ChunkedArray) else column

    def side_array(self, name: str) -> np.ndarray | list[list[str]]:
        """A side array of all clips: (C, T) or (C, T, W) float32, or a text for each frame; see ``card.side_arrays``.

        Value t belongs to frame t, and to delta token t, which leads from frame t - 1 to frame t.

        Raises:
            DatasetError: there is no such side array, or a receipt is damaged.
        """
        array = self.card.side_arrays.get(name)
        if array is None:
            known = ", ".join(sorted(self.card.side_arrays)) or "none"
            raise DatasetError(f"{self.root} has no side array {name!r}; it has: {known}")
        rows = (row for receipt in read_receipts(self.root, self._shard_ids) for row in receipt.clips)
        values = [row[BESIDE][name] for row in rows]
        if array.kind == "text":
            return values
        return np.asarray(values, np.float32).reshape(len(self), *array.shape(self.card.sampling.frames))

    @property
    def shard_ids(self) -> tuple[str, ...]:
        """The shards that hold clips, in the order of the index."""
        return tuple(self._shard_ids)

    @property
    def clip_ids(self) -> list[str]:
        """Ids in the order of the index."""
        return self._ids.to_pylist()

    @cached_property
    def _ids(self) -> pa.Array:
        columns = (column.cast(pa.large_string()) for column in self._batches("clip_id"))
        return pa.concat_arrays([pa.array([], pa.large_string()), *columns])

    @cached_property
    def _crcs(self) -> np.ndarray:
        """(C,) uint32, of the tokens."""
        return np.concatenate(
            [np.empty(0, np.uint32), *(column.to_numpy() for column in self._batches("crc32c"))]
        )

    def _batches(self, name: str) -> Iterator[pa.Array]:
        with self._reading:
            for batch in self._table.iter_batches(columns=[name]):
                yield batch.column(0)

    def _runs(self) -> tuple[list[str], np.ndarray]:
        """Ids of the shards in the index, and where the clips of each begin (and the last ends)."""
        shards, starts = runs_of(self._batches("shard"))
        if len({*shards, None}) != len(shards) + 1:
            raise self._damaged_index("the clips of a shard are not together")
        return shards, starts

    def _damaged_index(self, what: str) -> DatasetError:
        return DatasetError(
            f"{self.root / INDEX_FILE} is damaged: {what}. Remove it and run the command that made the dataset again"
        )

    @property
    def failures(self) -> pa.Table:
        """The refused videos and clips: ``failures.parquet``."""
        return read_table(self.root / FAILURES_FILE, FAILURES_SCHEMA)

    def clips_of(self, shard_id: str) -> range:
        """Positions of the clips of one shard; empty when it has none."""
        shard = self._shards.get(shard_id)
        if shard is None:
            return range(0)
        return range(int(self._starts[shard]), int(self._starts[shard + 1]))

    def read(self, clip: int) -> FeatureClip | DeltaClip:
        """One clip, float16, verified every time; its tokens are a read-only view of the file (int8: a new array).

        Raises:
            DatasetError: the shard is missing, short or altered.
        """
        position = range(len(self))[clip]
        tokens = _float16(self._verify(position))
        if self.card.kind == "features":
            return FeatureClip(self._clip_id(position), tokens, self.timestamps_s[position])
        return DeltaClip(self._clip_id(position), tokens, self.timestamps_s[position])

    def read_frames(self, clip: int, start: int, stop: int) -> np.ndarray:
        """Tokens of frames ``start .. stop - 1``: (stop - start, N, D) float16, of deltas (stop - start, D).

        A read-only view of the file; of int8 features a new array. The whole clip is verified the first time.

        Raises:
            DatasetError: the shard is missing, short or altered.
        """
        position = range(len(self))[clip]
        if not 0 <= start <= stop <= self.card.sampling.frames:
            raise IndexError(f"frames {start}..{stop} of a clip of {self.card.sampling.frames}")
        arrays = self._arrays(position) if self._verified[position] else self._verify(position)
        return _float16(arrays, slice(start, stop))

    def release(self) -> None:
        """Let go of the memory of what was read from local files; views of it stay valid. For who reads clips once."""
        self._files.release()

    def read_all(self) -> np.ndarray:
        """The tokens of all clips, verified: (C, T, N, D) float16, of deltas (C, T, D).

        Raises:
            DatasetError: a shard is missing, short or altered.
        """
        frames = self.card.sampling.frames
        tokens = np.empty((len(self), *token_shape(self.card)), dtype=np.float16)

        def read_shard(shard_id: str) -> None:
            for position in self.clips_of(shard_id):
                tokens[position] = self.read_frames(position, 0, frames)

        deque(self.at_once(read_shard, self._shard_ids), maxlen=0)
        return tokens

    def at_once(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """``work`` on each item, in order; on several at a time where reading waits for a network."""
        return map(work, items) if is_local(self.root) else in_threads(work, items, threads=_REMOTE_READS)

    def _clip_id(self, position: int) -> str:
        return self._ids[position].as_py()

    def _verify(self, position: int) -> ClipArrays:
        arrays = self._arrays(position)
        crcs = {token_array(self.card): int(self._crcs[position])}
        if arrays.scales is not None:
            crcs[SCALES] = int(self._scale_crcs[position])
        altered = altered_array(self.card, arrays, crcs)
        if altered is not None:
            raise self._damaged(position, altered.message)
        self._verified[position] = is_local(self.root)  # what is fetched again is checked again
        return arrays

    def _arrays(self, position: int) -> ClipArrays:
        """All frames of a clip as views, not verified."""
        shard = int(np.searchsorted(self._starts, position, side="right")) - 1
        try:
            layout = self._layouts.get(shard) or self._locate(shard)
            scale_offset = int(self._scale_offsets[position]) if self._scale_offsets.size else 0
            return layout.arrays(self._files, self.card, int(self._offsets[position]), scale_offset)
        except StorageError:
            raise
        except (OSError, ValueError, DatasetError) as error:
            raise self._damaged(position, str(error)) from error

    def _locate(self, shard: int) -> ShardLayout:
        """Look up where the clips of a shard lie, once its files are known to be whole."""
        receipt = read_receipt(self.root, self._shard_ids[shard])
        check_sizes(self.root, receipt)
        clips = slice(int(self._starts[shard]), int(self._starts[shard + 1]))
        if [row["crc32c"] for row in receipt.clips] != self._crcs[clips].tolist():
            raise DatasetError(f"the receipt of shard {receipt.shard_id} lists other clips than the index")
        if self._scale_offsets.size:
            self._scale_offsets[clips] = receipt.scale_offsets
            self._scale_crcs[clips] = [crcs.get(SCALES, -1) for crcs in receipt.arrays.values()]
        self._offsets[clips] = receipt.token_offsets
        self._layouts[shard] = ShardLayout.of(
            self.root, receipt
        )  # last: other threads know by it that all is there
        return self._layouts[shard]

    def _damaged(self, position: int, what: str) -> DatasetError:
        shard_id = self._shard_ids[int(np.searchsorted(self._starts, position, side="right")) - 1]
        return DatasetError(
            f"{self.root}: clip {self._clip_id(position)} of shard {shard_id} is damaged: {what}. "
            f"`deltacache verify {self.root} --repair` lists all damage and drops that shard; run the command that "
            "made the dataset again then"
        )


def open_dataset(
    root: AnyPath | str,
    kind: Literal["features", "deltas"] | None = None,
    held: TablesSummary | None = None,
) -> Dataset:
    """Open a finished dataset for reading; ``held`` is its ``finished_summary``, if that is known already.

    Raises:
        DatasetError: not a dataset, not finished, damaged, or not of ``kind``.
        StorageError: it is where the system or the store refuses, or does not answer.
    """
    root = dataset_root(root)
    with readable_errors(root, "read"):
        return _open(root, kind, held)


def _open(root: AnyPath, kind: str | None, held: TablesSummary | None) -> Dataset:
    card = read_card(root)
    if kind is not None and card.kind != kind:
        command = "extract-features" if kind == "features" else "tokenize"
        raise DatasetError(
            f"{root} holds {card.kind}, but {kind} are needed: give a dataset made by deltacache {command}"
        )
    if held is None:
        _refuse_unfinished(root)
    return Dataset(root, card, open_table(root / INDEX_FILE, INDEX_SCHEMA, held), read_black(root, card))


def _refuse_unfinished(root: AnyPath) -> None:
    """Refuse a dataset that lacks shards of its plan, or whose tables lack them.

    ``tables.json`` goes before a table is replaced and comes after, so without it the tables may be older ones. Where
    an older version wrote it, receipts and ``sources.parquet``, which has rows of every shard, say what is there.
    """
    plan = open_plan(root)
    try:
        summary = read_tables_summary(root)
        missing = summary.planned_shards - summary.shards
        whole = missing == 0 and summary.plan == plan.seal
    except DatasetError:
        missing = len({*plan.shard_ids} - finished_shards(root))
        held = (root / TABLES_FILE).exists() or not plan.videos
        whole = missing == 0 and held and (not plan.videos or _shards_in_sources(root) == plan.shard_ids)
    if not whole:
        what = (
            f"{missing} planned shards are missing"
            if missing
            else "its tables do not hold all planned shards"
        )
        raise DatasetError(f"{root} is not finished: {what}. Run the command that makes it again")


def _shards_in_sources(root: AnyPath) -> list[str]:
    with open_table(root / SOURCES_FILE, SOURCES_SCHEMA) as file:
        return runs_of(batch.column(0) for batch in file.iter_batches(columns=["shard"]))[0]


def _reopened(root: AnyPath, card: DatasetCard, seal: str, black_patch_tokens: np.ndarray) -> Dataset:
    """In another process: the same dataset, if it still is."""
    with readable_errors(root, "read"):
        index = open_table(root / INDEX_FILE, INDEX_SCHEMA)
    if seal_of(index) != seal:
        raise DatasetError(f"{root} was written to since it was opened: run the command again")
    return Dataset(root, card, index, black_patch_tokens)


def load_deltas(root: AnyPath | str) -> DeltaArrays:
    """Load a whole delta dataset into memory, verified.

    Raises:
        DatasetError: not a finished delta dataset, or a shard is missing, short or altered.
    """
    dataset = open_dataset(root, "deltas")
    return DeltaArrays(dataset.read_all(), dataset.timestamps_s, dataset.clip_ids)


def _float16(arrays: ClipArrays, frames: slice = slice(None)) -> np.ndarray:
    tokens = arrays.tokens[frames]
    return tokens if arrays.scales is None else dequantise(tokens, arrays.scales[frames])
