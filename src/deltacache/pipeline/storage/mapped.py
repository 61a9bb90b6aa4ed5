"""Arrays in files: views of the page cache, of more files than may be open at once; from object stores, read by
the byte range.
"""

import math
import mmap
from collections import OrderedDict
from pathlib import Path
from threading import Lock

import numpy as np
import numpy.typing as npt

from deltacache.pipeline.storage.errors import is_damage, readable_errors
from deltacache.pipeline.storage.storage import AnyPath, is_local, read_range

_OPEN_FILES = 64
"""A mapped file keeps a descriptor open, and a process may have as few as 256."""
_KEPT_BYTES = 1 << 28
"""Of what was read from object stores."""


class MappedFiles:
    """Files mapped on first use; the least recently used are let go. Safe to use from several threads."""

    def __init__(self) -> None:
        self._maps: OrderedDict[Path, mmap.mmap] = OrderedDict()
        self._ranges: OrderedDict[tuple[str, int, int], bytes] = OrderedDict()
        self._range_bytes = 0
        self._lock = Lock()

    def array(
        self, path: AnyPath, dtype: npt.DTypeLike, offset: int, shape: tuple[int, ...], row_stride: int
    ) -> np.ndarray:
        """A read-only view of C-contiguous rows that lie ``row_stride`` bytes apart, the first at ``offset``.

        It stays valid after its file was let go. Of a file in an object store just these bytes are read.

        Raises:
            OSError: the file cannot be opened.
            StorageError: the store refuses or does not answer.
            ValueError: the file is empty or ends before the array does.
        """
        dtype = np.dtype(dtype)
        inner = [dtype.itemsize * math.prod(shape[axis + 1 :]) for axis in range(1, len(shape))]
        strides = (row_stride, *inner)
        if is_local(path):
            return np.ndarray(shape, dtype, self._map(path), offset, strides)
        row_bytes = dtype.itemsize * math.prod(shape[1:])
        size = (shape[0] - 1) * row_stride + row_bytes if math.prod(shape) else 0
        return np.ndarray(shape, dtype, self._range(path, offset, size), 0, strides)

    def float16(self, path: AnyPath, offset: int, shape: tuple[int, ...], row_stride: int) -> np.ndarray:
        """``array`` of float16."""
        return self.array(path, np.float16, offset, shape, row_stride)

    def release(self) -> None:
        """Give the pages that were read back to the page cache: views stay valid, and read them from there again.

        Until then they count as memory of this process, however large the files are.
        """
        with self._lock:
            for mapped in self._maps.values():
                mapped.madvise(mmap.MADV_DONTNEED)

    def _map(self, path: Path) -> mmap.mmap:
        with self._lock:
            mapped = self._maps.pop(path, None)
            if mapped is None:
                with path.open("rb") as file:
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._maps[path] = mapped
            if len(self._maps) > _OPEN_FILES:
                self._maps.popitem(last=False)
            return mapped

    def _range(self, path: AnyPath, offset: int, size: int) -> bytes:
        """These bytes of an object, from memory if they were read not long ago."""
        key = (str(path), offset, size)
        with self._lock:
            if key in self._ranges:
                self._ranges.move_to_end(key)
                return self._ranges[key]
        content = _read(path, offset, size)
        with self._lock:
            if key not in self._ranges:
                self._ranges[key] = content
                self._range_bytes += size
            while self._range_bytes > _KEPT_BYTES and len(self._ranges) > 1:
                _, oldest = self._ranges.popitem(last=False)
                self._range_bytes -= len(oldest)
        return content


def _read(path: AnyPath, offset: int, size: int) -> bytes:
    assert not is_local(path)
    try:
        return read_range(path, offset, size)
    except Exception as error:
        if is_damage(error):
            raise
        with readable_errors(path, "read"):
            raise
