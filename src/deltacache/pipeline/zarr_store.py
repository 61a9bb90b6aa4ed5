"""Shards as sub-groups of one Zarr v3 group: ``shards/shard-<id>/`` with arrays ``patch_tokens`` or
``delta_tokens``, and ``timestamps_s``, one row a clip.

Each array is one shard file of the sharding codec. The zarr package writes the metadata; the shard files are
laid out here, as the codec's specification says and in the order of the clips, so that a shard larger than
memory can be written clip by clip and its frames read without a copy. An inner chunk is a frame of patch
tokens, else a clip: raw little-endian values and their crc32c. Chunks of zeros are written like all others.
C clips, T frames, N patches, D hidden.
"""

import math
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path, PurePosixPath

import numpy as np
import zarr
from crc32c import crc32c
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.storage import LocalStore

from deltacache.pipeline.atomic import remove, sync, temporary_path
from deltacache.pipeline.checksums import ChecksummedFile, byte_view, crc32c_of_array, crc32c_of_file
from deltacache.pipeline.receipts import FileRecord, Receipt, StoredClip
from deltacache.pipeline.stores import (
    TIMESTAMPS,
    Stretch,
    WrittenShard,
    checked_clips,
    token_array,
    token_shape,
)
from deltacache.schemas.datasets import DatasetCard

_CRC = struct.Struct("<I")


class ZarrStore:
    """See ``ShardStore``."""

    def __init__(self, card: DatasetCard) -> None:
        self._card = card

    def write(self, folder: Path, shard_id: str, clips: Iterable[StoredClip]) -> WrittenShard:
        """See ``ShardStore``."""
        written = WrittenShard()
        pairs = checked_clips(self._card, shard_id, clips, written)
        first = next(pairs, None)
        if first is None:
            return written
        _ensure_root(folder)
        final = folder / f"shard-{shard_id}"
        temporary = temporary_path(final)
        try:
            data = self._write_data(temporary, chain([first], pairs), written)
            self._write_metadata(temporary, list(written.arrays))
            written.files = {
                f"{final.name}/{name}": record for name, record in _sync(temporary, data).items()
            }
            _put_in_place(temporary, final, written.files)
        finally:
            remove(temporary)
        sync(folder)
        written.token_file = f"{final.name}/{_data_file(token_array(self._card), len(self._shape))}"
        return written

    def surroundings(self, receipt: Receipt, row: int, tokens: np.ndarray) -> Iterator[Stretch]:
        """See ``ShardStore``."""
        times = np.asarray(receipt.clips[row][TIMESTAMPS], np.float32).tobytes()
        group = "/".join(PurePosixPath(receipt.token_file).parts[:2])
        content = times + _CRC.pack(crc32c(times))
        yield Stretch(f"{group}/{_data_file(TIMESTAMPS, 1)}", row * len(content), content)
        offset = receipt.token_offsets[row]
        for chunk in self._chunks(tokens):
            offset += chunk.nbytes
            yield Stretch(receipt.token_file, offset, _CRC.pack(crc32c_of_array(chunk)))
            offset += _CRC.size

    @staticmethod
    def _chunks(tokens: np.ndarray) -> Iterable[np.ndarray]:
        """Inner chunks of one clip: its frames (N, D), or all its delta tokens (T, D)."""
        return tokens if tokens.ndim == 3 else [tokens]

    @property
    def _shape(self) -> tuple[int, ...]:
        return token_shape(self._card)

    def _write_data(
        self, group: Path, pairs: Iterable[tuple[StoredClip, np.ndarray]], written: WrittenShard
    ) -> dict[str, FileRecord]:
        """Write the shard files of both arrays, a clip at a time."""
        token_file, times_file = (
            _data_file(token_array(self._card), len(self._shape)),
            _data_file(TIMESTAMPS, 1),
        )
        with ExitStack() as stack:
            tokens_out = _ShardFile(stack, group / token_file)
            times_out = _ShardFile(stack, group / times_file)
            for stored, tokens in pairs:
                written.token_offsets.append(tokens_out.bytes)
                for chunk in self._chunks(tokens):
                    tokens_out.add(chunk)
                times_out.add(np.ascontiguousarray(stored.clip.timestamps_s))
            records = {token_file: tokens_out.finish(), times_file: times_out.finish()}
        between = _CRC.size if len(self._shape) == 3 else 0
        written.frame_stride = 2 * math.prod(self._shape[1:]) + between
        return records

    def _write_metadata(self, path: Path, clip_ids: list[str]) -> None:
        group = zarr.create_group(LocalStore(path), zarr_format=3, attributes={"clip_ids": clip_ids})
        chunk = (1, *self._shape[1:]) if len(self._shape) == 3 else self._shape
        _create_array(group, token_array(self._card), "float16", (len(clip_ids), *self._shape), chunk)
        times = self._shape[:1]
        _create_array(group, TIMESTAMPS, "float32", (len(clip_ids), *times), times)


def _create_array(
    group: zarr.Group, name: str, dtype: str, shape: tuple[int, ...], chunk: tuple[int, ...]
) -> None:
    """Write the metadata of an array of one shard. Its data lie there already."""
    group.create_array(
        name,
        dtype=dtype,
        shape=shape,
        shards=shape,
        chunks=(1, *chunk),
        filters=None,
        serializer=BytesCodec(endian="little"),
        compressors=[Crc32cCodec()],
        fill_value=0,
    )


def _data_file(array: str, clip_dimensions: int) -> str:
    return "/".join([array, "c", *("0" for _ in range(1 + clip_dimensions))])


class _ShardFile:
    """One shard of the sharding codec: chunks as they come, then their offsets and sizes, then a checksum."""

    def __init__(self, stack: ExitStack, path: Path) -> None:
        path.parent.mkdir(parents=True)
        self._written = ChecksummedFile(stack.enter_context(path.open("xb")))
        self._index: list[tuple[int, int]] = []

    @property
    def bytes(self) -> int:
        """How much was written so far."""
        return self._written.bytes

    def add(self, chunk: np.ndarray) -> None:
        """Append the next chunk, in C order of the array's chunk grid."""
        start, values = self.bytes, byte_view(chunk)
        self._written.write(values)
        self._written.write(_CRC.pack(crc32c(values)))
        self._index.append((start, self.bytes - start))

    def finish(self) -> FileRecord:
        """Write the index and say what was written."""
        index = np.asarray(self._index, dtype="<u8").tobytes()
        self._written.write(index)
        self._written.write(_CRC.pack(crc32c(index)))
        return FileRecord(self._written.bytes, self._written.crc32c)


def _ensure_root(folder: Path) -> None:
    """The group that holds all shards; several writers may make it at once, with equal bytes."""
    if not (folder / "zarr.json").exists():
        temporary = temporary_path(folder / "group")
        try:
            zarr.create_group(LocalStore(temporary), zarr_format=3)
            (temporary / "zarr.json").replace(folder / "zarr.json")
        finally:
            remove(temporary)


def _sync(group: Path, known: dict[str, FileRecord]) -> dict[str, FileRecord]:
    """Flush every file and folder of a group to disk; the files by path below it."""
    records = {}
    for parent, _, names in os.walk(group, topdown=False):
        for name in names:
            path = Path(parent, name)
            sync(path)
            relative = path.relative_to(group).as_posix()
            records[relative] = known.get(relative) or _record(path)
        sync(Path(parent))
    return dict(sorted(records.items()))


def _record(path: Path) -> FileRecord:
    return FileRecord(path.stat().st_size, crc32c_of_file(path))


def _put_in_place(temporary: Path, final: Path, files: dict[str, FileRecord]) -> None:
    """Rename a group to its name. An equal one that another attempt left there may be in use: it stays."""
    try:
        temporary.rename(final)
    except OSError:
        if not final.is_dir():
            raise
        if _holds(final, files):
            return
        aside = temporary_path(final)
        final.rename(aside)
        try:
            temporary.rename(final)
        finally:
            remove(aside)


def _holds(final: Path, files: dict[str, FileRecord]) -> bool:
    paths = {f"{final.name}/{p.relative_to(final).as_posix()}": p for p in final.rglob("*") if p.is_file()}
    return paths.keys() == files.keys() and all(_record(path) == files[name] for name, path in paths.items())
