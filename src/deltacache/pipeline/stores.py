"""The seam between datasets and the two ways of keeping shards, and what both have in common.

A store writes; reading needs none, for receipts say where in which file the tokens of each clip begin.
T frames, N patches, D hidden.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from deltacache.pipeline.checksums import crc32c_of_array
from deltacache.pipeline.receipts import FileRecord, Receipt, StoredClip
from deltacache.schemas.clips import DeltaClip, FeatureClip
from deltacache.schemas.datasets import DatasetCard

TIMESTAMPS = "timestamps_s"
_STORES = {
    "webdataset": ("deltacache.pipeline.webdataset_store", "WebDatasetStore"),
    "zarr": ("deltacache.pipeline.zarr_store", "ZarrStore"),
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


@dataclass(frozen=True, slots=True)
class Stretch:
    """Bytes that a file (relative to the dataset's folder) must hold at an offset."""

    file: str
    offset: int
    content: bytes


class ShardStore(Protocol):
    """One way of keeping shards in a folder."""

    def write(self, folder: Path, shard_id: str, clips: Iterable[StoredClip]) -> WrittenShard:
        """Write a shard durably under its own name, whole or not at all; without clips, nothing.

        Takes one clip after the other and keeps none.
        """
        ...

    def surroundings(self, receipt: Receipt, row: int, tokens: np.ndarray) -> Iterator[Stretch]:
        """What must lie around the tokens of one clip; with ``tokens``, these are all its bytes."""
        ...


def shard_store(card: DatasetCard) -> ShardStore:
    """The store that ``dataset.json`` names.

    It is looked up by name when something is written: what only reads must not depend on zarr.
    """
    module, name = _STORES[card.store]
    return getattr(import_module(module), name)(card)


def token_array(card: DatasetCard) -> str:
    """Name of the array that a clip is about."""
    return "patch_tokens" if card.kind == "features" else "delta_tokens"


def token_shape(card: DatasetCard) -> tuple[int, ...]:
    """Of one clip: (T, N, D) of features, (T, D) of deltas."""
    frames, (rows, columns) = card.sampling.frames, card.patch_grid
    patches = (rows * columns,) if card.kind == "features" else ()
    return (frames, *patches, card.hidden_size)


def checked_clips(
    card: DatasetCard, shard_id: str, clips: Iterable[StoredClip], written: WrittenShard
) -> Iterator[tuple[StoredClip, np.ndarray]]:
    """Pass on clips with their tokens, C-contiguous and as the card wants them; note each in ``written``.

    Raises:
        ValueError: a clip of another kind or shape, or one id twice.
    """
    kind = FeatureClip if card.kind == "features" else DeltaClip
    for stored in clips:
        clip = stored.clip
        if not isinstance(clip, kind) or clip.clip_id in written.arrays:
            raise ValueError(f"shard {shard_id}: {clip!r} is not a {kind.__name__} or came twice")
        tokens = clip.patch_tokens if isinstance(clip, FeatureClip) else clip.delta_tokens
        if tokens.shape != token_shape(card):
            raise ValueError(
                f"shard {shard_id}: the tokens of {clip!r} must have the shape {token_shape(card)}"
            )
        tokens = np.ascontiguousarray(tokens)
        crcs = {token_array(card): crc32c_of_array(tokens), TIMESTAMPS: crc32c_of_array(clip.timestamps_s)}
        written.arrays[clip.clip_id] = crcs
        written.clips.append(_index_row(stored, shard_id, len(written.clips), crcs[token_array(card)]))
        yield stored, tokens


def _index_row(stored: StoredClip, shard_id: str, row: int, crc: int) -> dict[str, Any]:
    crop = stored.crop
    return {
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
