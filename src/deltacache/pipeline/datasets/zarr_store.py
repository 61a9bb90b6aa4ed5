"""Shards as sub-groups of one Zarr v3 group: ``shards/shard-<id>/`` with arrays ``patch_tokens`` or
``delta_tokens``, and ``timestamps_s``, one row a clip; of int8 tokens also ``patch_tokens_scale``; and one array for
each side array that is numbers. Texts stand in the attributes of the sub-group.

Each array is one shard file of the sharding codec. The zarr package writes the metadata; the shard files are
laid out here, as the codec's specification says and in the order of the clips, so that a shard larger than
memory can be written clip by clip and its frames read without a copy. An inner chunk is a frame of patch
tokens or their scales, else a clip: raw little-endian values and their crc32c. Chunks of zeros are written
like all others.
C clips, T frames, N patches, D hidden.
"""

import math
import struct
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import zarr
from crc32c import crc32c
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.storage import LocalStore

from deltacache.pipeline.datasets.receipts import FileRecord, Receipt, StoredClip
from deltacache.pipeline.datasets.stores import (
    SCALES,
    TIMESTAMPS,
    ByteRange,
    ClipArrays,
    WrittenShard,
    checked_clips,
    numbers_beside,
    scale_shape,
    texts_beside,
    token_array,
    token_dtype,
    token_shape,
)
from deltacache.pipeline.storage.files import (
    ChecksummedFile,
    byte_view,
    crc32c_of_array,
    crc32c_of_file,
    replacing_folder,
    write_bytes,
)
from deltacache.pipeline.storage.storage import AnyPath
from deltacache.schemas.datasets import DatasetCard

_CRC = struct.Struct("<I")


class ZarrStore:
    def __init__(self, card: DatasetCard) -> None:
        self._card = card

    def write(self, folder: AnyPath, shard_id: str, clips: Iterable[StoredClip]) -> WrittenShard:
        written = WrittenShard()
        pairs = checked_clips(self._card, shard_id, clips, written)
        first = next(pairs, None)
        if first is None:
            return written
        ensure_root(folder)
        final = folder / f"shard-{shard_id}"
        with replacing_folder(final) as group:
            data = self._write_data(group, chain([first], pairs), written)
            self._write_metadata(group, list(written.arrays), written.clips)
            # The files of a group by path below it.
            paths = {path.relative_to(group).as_posix(): path for path in group.rglob("*") if path.is_file()}
            records = {name: data.get(name) or _record(paths[name]) for name in sorted(paths)}
        written.files = {f"{final.name}/{name}": record for name, record in records.items()}
        written.token_file = f"{final.name}/{_data_file(token_array(self._card), len(self._shape))}"
        if self._scale_shape is not None:
            written.scale_file = f"{final.name}/{_data_file(SCALES, len(self._scale_shape))}"
        return written

    def bytes_around(self, receipt: Receipt, row: int, arrays: ClipArrays) -> Iterator[ByteRange]:
        times = np.asarray(receipt.clips[row][TIMESTAMPS], np.float32).tobytes()
        group = "/".join(PurePosixPath(receipt.token_file).parts[:2])
        content = times + _CRC.pack(crc32c(times))
        yield ByteRange(f"{group}/{_data_file(TIMESTAMPS, 1)}", row * len(content), content)
        yield from _checksums(receipt.token_file, receipt.token_offsets[row], self._chunks(arrays.tokens))
        if arrays.scales is not None:
            yield from _checksums(receipt.scale_file, receipt.scale_offsets[row], arrays.scales)
        for name, values in numbers_beside(self._card, receipt.clips[row]).items():
            content = values.tobytes() + _CRC.pack(crc32c(values.tobytes()))
            yield ByteRange(f"{group}/{_data_file(name, values.ndim)}", row * len(content), content)

    @staticmethod
    def _chunks(tokens: np.ndarray) -> Iterable[np.ndarray]:
        """Inner chunks of one clip: its frames (N, D), or all its delta tokens (T, D)."""
        return tokens if tokens.ndim == 3 else [tokens]

    @property
    def _shape(self) -> tuple[int, ...]:
        return token_shape(self._card)

    @property
    def _scale_shape(self) -> tuple[int, int] | None:
        return scale_shape(self._card)

    def _write_data(
        self, group: Path, pairs: Iterable[tuple[StoredClip, ClipArrays]], written: WrittenShard
    ) -> dict[str, FileRecord]:
        """Write the shard files of all arrays, a clip at a time."""
        dimensions = {token_array(self._card): len(self._shape), TIMESTAMPS: 1}  # of each array in one clip
        if self._scale_shape is not None:
            dimensions[SCALES] = len(self._scale_shape)
        dimensions |= self._beside()
        names = {array: _data_file(array, count) for array, count in dimensions.items()}
        with ExitStack() as stack:
            files = {array: _ShardFile(stack, group / name) for array, name in names.items()}
            tokens_out, times_out = files[token_array(self._card)], files[TIMESTAMPS]
            for stored, (tokens, scales) in pairs:
                written.token_offsets.append(tokens_out.bytes)
                tokens_out.add(self._chunks(tokens))
                if scales is not None:
                    written.scale_offsets.append(files[SCALES].bytes)
                    files[SCALES].add(scales)
                times_out.add([np.ascontiguousarray(stored.clip.timestamps_s)])
                for name, values in numbers_beside(self._card, written.clips[-1]).items():
                    files[name].add([values])
            records = {names[array]: file.finish() for array, file in files.items()}
        between = _CRC.size if len(self._shape) == 3 else 0
        written.frame_stride = token_dtype(self._card).itemsize * math.prod(self._shape[1:]) + between
        if self._scale_shape is not None:
            written.scale_stride = 4 * self._scale_shape[1] + _CRC.size
        return records

    def _beside(self) -> dict[str, int]:
        arrays = self._card.side_arrays.items()
        return {name: len(array.shape(self._shape[0])) for name, array in arrays if array.kind == "numbers"}

    def _write_metadata(self, path: Path, clip_ids: list[str], rows: list[dict[str, Any]]) -> None:
        texts = [texts_beside(self._card, row) for row in rows]
        attributes: dict[str, Any] = {"clip_ids": clip_ids, **({"texts": texts} if any(texts) else {})}
        group = zarr.create_group(LocalStore(path), zarr_format=3, attributes=attributes)
        clips = len(clip_ids)
        chunk = (1, *self._shape[1:]) if len(self._shape) == 3 else self._shape
        _create_array(group, token_array(self._card), self._card.dtype, (clips, *self._shape), chunk)
        if self._scale_shape is not None:
            _create_array(group, SCALES, "float32", (clips, *self._scale_shape), (1, self._scale_shape[1]))
        times = self._shape[:1]
        _create_array(group, TIMESTAMPS, "float32", (clips, *times), times)
        for name in self._beside():
            shape = self._card.side_arrays[name].shape(self._shape[0])
            _create_array(group, name, "float32", (clips, *shape), shape)


def _checksums(file: str, offset: int, chunks: Iterable[np.ndarray]) -> Iterator[ByteRange]:
    """The checksum behind each chunk, the first of which lies at ``offset``."""
    for chunk in chunks:
        offset += chunk.nbytes
        yield ByteRange(file, offset, _CRC.pack(crc32c_of_array(chunk)))
        offset += _CRC.size


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

    def add(self, chunks: Iterable[np.ndarray]) -> None:
        """Append the next chunks, in C order of the array's chunk grid."""
        for chunk in chunks:
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


def ensure_root(folder: AnyPath) -> None:
    """The group that holds all shards; several writers may make it at once, with equal bytes."""
    if not (folder / "zarr.json").exists():
        with tempfile.TemporaryDirectory() as aside:
            zarr.create_group(LocalStore(aside), zarr_format=3)
            write_bytes(folder / "zarr.json", Path(aside, "zarr.json").read_bytes())


def _record(path: Path) -> FileRecord:
    return FileRecord(path.stat().st_size, crc32c_of_file(path))
