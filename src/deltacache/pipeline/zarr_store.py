"""Shards as sub-groups of one Zarr v3 group: ``shards/shard-<id>/{patch_tokens|delta_tokens,timestamps_s}``.

Each array is one shard file of the sharding codec, written whole; an inner chunk is one frame, uncompressed, with
its crc32c. T frames, N patches, D hidden.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec
from zarr.storage import LocalStore

from deltacache.pipeline.atomic import remove, sync_file, sync_folder, temporary_path
from deltacache.pipeline.checksums import crc32c_of_file
from deltacache.pipeline.receipts import FileRecord, StoredClip
from deltacache.pipeline.stores import TIMESTAMPS, WrittenShard, checked_clips, token_array
from deltacache.schemas.datasets import DatasetCard
from deltacache.schemas.errors import DatasetError


class ZarrStore:
    """See ``ShardStore``."""

    def __init__(self, card: DatasetCard) -> None:
        self._card = card

    def write(self, folder: Path, shard_id: str, clips: Iterable[StoredClip]) -> WrittenShard:
        """See ``ShardStore``."""
        written = WrittenShard()
        pairs = list(checked_clips(self._card, shard_id, clips, written))
        if not pairs:
            return written
        _ensure_root(folder)
        final = folder / group_name(shard_id)
        temporary = temporary_path(final)
        try:
            self._write_group(temporary, pairs)
            written.files.update(_sync(temporary, final.name))
            remove(final)
            temporary.rename(final)
        finally:
            remove(temporary)
        sync_folder(folder)
        return written

    def _write_group(self, path: Path, pairs: list[tuple[StoredClip, np.ndarray]]) -> None:
        attributes = {"clip_ids": [stored.clip.clip_id for stored, _ in pairs]}
        group = zarr.create_group(LocalStore(path), zarr_format=3, attributes=attributes)
        _write_array(group, token_array(self._card), [tokens for _, tokens in pairs])
        _write_array(group, TIMESTAMPS, [stored.clip.timestamps_s for stored, _ in pairs])

    def open(self, folder: Path, shard_id: str) -> "ZarrShard":
        """See ``ShardStore``."""
        return ZarrShard(folder / group_name(shard_id))


def group_name(shard_id: str) -> str:
    """Name of the sub-group of a shard."""
    return f"shard-{shard_id}"


def _write_array(group: zarr.Group, name: str, clips: list[np.ndarray]) -> None:
    shape = (len(clips), *clips[0].shape)
    array = group.create_array(
        name,
        shape=shape,
        dtype=clips[0].dtype,
        chunks=(1, 1, *shape[2:]),
        shards=shape,
        filters=None,
        compressors=[Crc32cCodec()],
        fill_value=0,
        # All-zero frames must be on disk like all others, so that what is absent can only be damage.
        config={"write_empty_chunks": True},
    )
    array[...] = np.stack(clips)


def _ensure_root(folder: Path) -> None:
    """The group that holds all shards; several writers may make it at once, with equal bytes."""
    if not (folder / "zarr.json").exists():
        temporary = temporary_path(folder / "group")
        try:
            zarr.create_group(LocalStore(temporary), zarr_format=3)
            (temporary / "zarr.json").replace(folder / "zarr.json")
        finally:
            remove(temporary)


def _sync(group: Path, name: str) -> dict[str, FileRecord]:
    """Flush every file of a group to disk; their sizes and checksums by path below the shards' folder."""
    files = {}
    for parent, _, names in os.walk(group):
        for file in sorted(names):
            path = Path(parent) / file
            sync_file(path)
            relative = f"{name}/{path.relative_to(group).as_posix()}"
            files[relative] = FileRecord(path.stat().st_size, crc32c_of_file(path))
        sync_folder(Path(parent))
    return dict(sorted(files.items()))


class ZarrShard:
    """One sub-group, open for reading."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._group = zarr.open_group(LocalStore(path, read_only=True), mode="r")
            self._rows = {clip_id: row for row, clip_id in enumerate(self._group.attrs["clip_ids"])}  # pyright: ignore
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DatasetError(f"{path} cannot be read as a Zarr group ({error})") from error

    def array(self, clip_id: str, name: str, rows: slice) -> np.ndarray:
        """See ``ShardReader``."""
        try:
            return np.asarray(self._group[name][self._rows[clip_id], rows])  # pyright: ignore
        except (OSError, ValueError, KeyError) as error:
            raise DatasetError(f"{self._path} has no readable {name} of {clip_id} ({error})") from error
