"""Shards as WebDataset tars: ``<clip_id>.json``, ``.patch_tokens.npy`` or ``.delta_tokens.npy``, ``.timestamps_s.npy``.

The headers are the standard library's; values go from the array to the file without a copy in between, and come
back as views of the mapped file. Nothing here needs the webdataset package.
"""

import mmap
import tarfile
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from crc32c import crc32c

from deltacache.pipeline.atomic import replacing
from deltacache.pipeline.checksums import npy_header, npy_view
from deltacache.pipeline.receipts import FileRecord, StoredClip
from deltacache.pipeline.stores import TIMESTAMPS, WrittenShard, checked_clips, token_array
from deltacache.schemas.datasets import DatasetCard
from deltacache.schemas.errors import DatasetError
from deltacache.schemas.fingerprints import canonical_json


class WebDatasetStore:
    """See ``ShardStore``."""

    def __init__(self, card: DatasetCard) -> None:
        self._card = card

    def write(self, folder: Path, shard_id: str, clips: Iterable[StoredClip]) -> WrittenShard:
        """See ``ShardStore``."""
        written = WrittenShard()
        final = folder / tar_name(shard_id)
        pairs = checked_clips(self._card, shard_id, clips, written)
        first = next(pairs, None)
        if first is None:
            return written
        with replacing(final) as temporary, temporary.open("xb") as file:
            tar = _TarWriter(file)
            for stored, tokens in chain([first], pairs):
                self._write_sample(tar, stored, tokens, written.clips[-1])
            written.files[final.name] = tar.finish()
        return written

    def _write_sample(
        self, tar: "_TarWriter", stored: StoredClip, tokens: np.ndarray, row: dict[str, Any]
    ) -> None:
        key = stored.clip.clip_id
        about = {name: value for name, value in row.items() if name not in ("shard", "row")}
        tar.add(f"{key}.json", canonical_json(about).encode())
        tar.add(f"{key}.{token_array(self._card)}.npy", npy_header(tokens), tokens)
        timestamps = np.ascontiguousarray(stored.clip.timestamps_s)
        tar.add(f"{key}.{TIMESTAMPS}.npy", npy_header(timestamps), timestamps)

    def open(self, folder: Path, shard_id: str) -> "TarShard":
        """See ``ShardStore``."""
        return TarShard(folder / tar_name(shard_id))


def tar_name(shard_id: str) -> str:
    """File name of a shard."""
    return f"shard-{shard_id}.tar"


class _TarWriter:
    """A tar of plain files, all at time 0: equal members give equal bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._bytes = 0
        self._crc = 0

    def add(self, name: str, *parts: bytes | np.ndarray) -> None:
        """Append one member whose content is ``parts`` one after the other."""
        info = tarfile.TarInfo(name)
        buffers = [
            part if isinstance(part, bytes) else part.reshape(-1).view(np.uint8).data for part in parts
        ]
        info.size = sum(len(buffer) for buffer in buffers)
        info.mode = 0o444
        for buffer in (info.tobuf(tarfile.PAX_FORMAT), *buffers):
            self._write(buffer)
        self._write(bytes(-info.size % tarfile.BLOCKSIZE))

    def finish(self) -> FileRecord:
        """Write the end of the archive and say what was written."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self._bytes % tarfile.RECORDSIZE))
        self._file.flush()
        return FileRecord(self._bytes, self._crc)

    def _write(self, buffer: bytes | memoryview) -> None:
        self._file.write(buffer)
        self._crc = crc32c(buffer, self._crc)
        self._bytes += len(buffer)


class TarShard:
    """One tar, indexed once and mapped into memory: reading is a view of the page cache."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with path.open("rb") as file:
                self._members = _members(file)
                self._map = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (tarfile.TarError, OSError, ValueError) as error:
            raise DatasetError(
                f"{path} cannot be read as a tar ({error}): deltacache verify lists all damage; remove the "
                "shard's receipt and run the command that made the dataset again"
            ) from error

    def array(self, clip_id: str, name: str, rows: slice) -> np.ndarray:
        """See ``ShardReader``; the array is a read-only view."""
        member = f"{clip_id}.{name}.npy"
        try:
            offset, size = self._members[member]
            return npy_view(self._map[offset : offset + size])[rows]
        except (KeyError, ValueError) as error:
            raise DatasetError(f"{self._path} has no readable {member} ({error})") from error


def _members(file: BinaryIO) -> dict[str, tuple[int, int]]:
    """Name to (offset, bytes) of every regular member."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        return {info.name: (info.offset_data, info.size) for info in tar if info.isreg()}
