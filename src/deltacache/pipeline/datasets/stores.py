"""The seam between datasets and the two ways of keeping shards, and what both have in common.

A store writes; reading needs none, for receipts say where in which file the tokens of each clip begin.
T frames, N patches, D hidden.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, NamedTuple, Protocol

import numpy as np

from deltacache.pipeline.datasets.receipts import BESIDE, FileRecord, Receipt, StoredClip
from deltacache.pipeline.inputs.side_arrays import side_row, side_values
from deltacache.pipeline.storage.files import crc32c_of_array
from deltacache.pipeline.storage.storage import AnyPath
from deltacache.schemas.clips import DeltaClip, FeatureClip
from deltacache.schemas.datasets import DatasetCard

TIMESTAMPS = "timestamps_s"
SCALES = "patch_tokens_scale"
_STORES = {
    "webdataset": ("deltacache.pipeline.datasets.webdataset_store", "WebDatasetStore"),
    "zarr": ("deltacache.pipeline.datasets.zarr_store", "ZarrStore"),
}


@dataclass(slots=True)
class WrittenShard:
    """What a store writes, filled in while it does: the parts of a receipt that it knows.

    File names are relative to the folder of the shards. For the rest see ``Receipt``.
    """

    files: dict[str, FileRecord] = field(default_factory=dict)
    arrays: dict[str, dict[str, int]] = field(default_factory=dict)
    clips: list[dict[str, Any]] = field(default_factory=list)
    token_file: str = ""
    token_offsets: list[int] = field(default_factory=list)
    frame_stride: int = 0
    scale_file: str = ""
    scale_offsets: list[int] = field(default_factory=list)
    scale_stride: int = 0


class ClipArrays(NamedTuple):
    """What is stored of a clip's tokens: (T, N, D) or (T, D); of int8 ones also their scales (T, N) float32."""

    tokens: np.ndarray
    scales: np.ndarray | None

    def crcs(self, card: DatasetCard) -> dict[str, int]:
        """CRC-32C of the values of each by its name."""
        crcs = {token_array(card): crc32c_of_array(self.tokens)}
        return crcs if self.scales is None else crcs | {SCALES: crc32c_of_array(self.scales)}


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes that a file (relative to the dataset's folder) must hold at an offset."""

    file: str
    offset: int
    content: bytes


class ShardStore(Protocol):
    """One way of keeping shards in a folder."""

    def write(self, folder: AnyPath, shard_id: str, clips: Iterable[StoredClip]) -> WrittenShard:
        """Write a shard durably under its own name, whole or not at all; without clips, nothing.

        Takes one clip after the other and keeps none.
        """
        ...

    def bytes_around(self, receipt: Receipt, row: int, arrays: ClipArrays) -> Iterator[ByteRange]:
        """What must lie around the arrays of one clip; with them, these are all its bytes."""
        ...


def shard_store(card: DatasetCard) -> ShardStore:
    """The store that ``dataset.json`` names.

    It is looked up by name when something is written: what only reads must not depend on zarr.
    """
    module, name = _STORES[card.store]
    return getattr(import_module(module), name)(card)


def numbers_beside(card: DatasetCard, row: dict[str, Any]) -> dict[str, np.ndarray]:
    """The side arrays of a clip that are numbers, from its row: (T,) or (T, W) float32 by name."""
    found = side_values(row.get(BESIDE, {}), card.side_arrays)
    return {name: values for name, values in found.items() if isinstance(values, np.ndarray)}


def texts_beside(card: DatasetCard, row: dict[str, Any]) -> dict[str, list[str]]:
    """Those that are texts: one for each frame."""
    return {
        name: row[BESIDE][name] for name, array in sorted(card.side_arrays.items()) if array.kind == "text"
    }


def token_array(card: DatasetCard) -> str:
    """Name of the array that a clip is about."""
    return "patch_tokens" if card.kind == "features" else "delta_tokens"


def token_shape(card: DatasetCard) -> tuple[int, ...]:
    """Of one clip: (T, N, D) of features; (T, D) of deltas, (T, M, D) with M > 1 tokens per frame."""
    frames, (rows, columns) = card.sampling.frames, card.patch_grid
    tokens = rows * columns if card.kind == "features" else card.tokens_per_frame
    of_a_frame = () if card.kind == "deltas" and tokens == 1 else (tokens,)
    return (frames, *of_a_frame, card.hidden_size)


def token_dtype(card: DatasetCard) -> np.dtype:
    """Of the tokens as they are stored."""
    return np.dtype(card.dtype)


def scale_shape(card: DatasetCard) -> tuple[int, int] | None:
    """Of the scales of one clip: (T, N) of int8 features, else there are none."""
    if card.dtype != "int8":
        return None
    return card.sampling.frames, card.patch_grid[0] * card.patch_grid[1]


def checked_clips(
    card: DatasetCard, shard_id: str, clips: Iterable[StoredClip], written: WrittenShard
) -> Iterator[tuple[StoredClip, ClipArrays]]:
    """Pass on clips with their arrays, C-contiguous and as the card wants them; note each in ``written``.

    Raises:
        ValueError: a clip of another kind, shape or dtype, or one id twice.
    """
    kind = FeatureClip if card.kind == "features" else DeltaClip
    for stored in clips:
        clip = stored.clip
        if not isinstance(clip, kind) or clip.clip_id in written.arrays:
            raise ValueError(f"shard {shard_id}: {clip!r} is not a {kind.__name__} or came twice")
        arrays = _arrays(clip)
        tokens, shape = arrays.tokens, token_shape(card)
        if tokens.shape != shape or tokens.dtype != token_dtype(card):
            raise ValueError(
                f"shard {shard_id}: the tokens of {clip!r} must have the shape {shape} and the dtype "
                f"{card.dtype}, not {tokens.dtype}"
            )
        _check_beside(card, shard_id, stored)
        crcs = arrays.crcs(card)
        written.arrays[clip.clip_id] = crcs | {TIMESTAMPS: crc32c_of_array(clip.timestamps_s)}
        written.clips.append(_index_row(stored, shard_id, len(written.clips), crcs[token_array(card)]))
        yield stored, arrays


def _arrays(clip: FeatureClip | DeltaClip) -> ClipArrays:
    if isinstance(clip, DeltaClip):
        return ClipArrays(np.ascontiguousarray(clip.delta_tokens), None)
    scales = clip.scales if clip.scales is None else np.ascontiguousarray(clip.scales)
    return ClipArrays(np.ascontiguousarray(clip.patch_tokens), scales)


def _check_beside(card: DatasetCard, shard_id: str, stored: StoredClip) -> None:
    given, frames = stored.side_arrays, card.sampling.frames
    for name in given.keys() | card.side_arrays.keys():
        array, values = card.side_arrays.get(name), given.get(name)
        if array is not None and array.kind == "text":
            fits = isinstance(values, list) and len(values) == frames
        else:
            fits = (
                array is not None and isinstance(values, np.ndarray) and values.shape == array.shape(frames)
            )
        if not fits:
            raise ValueError(f"shard {shard_id}: side array {name} of {stored.clip!r} is not {array}")


def _index_row(stored: StoredClip, shard_id: str, row: int, crc: int) -> dict[str, Any]:
    crop = stored.crop
    beside = {BESIDE: side_row(stored.side_arrays)} if stored.side_arrays else {}
    return {
        **beside,
        "clip_id": stored.clip.clip_id,
        "video_uri": stored.video_uri,
        "view": stored.view,
        "shard": shard_id,
        "row": row,
        "frame_indices": [int(index) for index in stored.frame_indices],
        "timestamps_s": stored.clip.timestamps_s.tolist(),
        "crop": [crop.top, crop.left, crop.height, crop.width],
        "flip": bool(stored.flip),
        "decoder": stored.decoder,
        "duplicate_frames": int(stored.duplicate_frames),
        "crc32c": crc,
    }
