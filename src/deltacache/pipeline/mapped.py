"""Files mapped into memory: arrays that are views of the page cache, of more files than may be open at once."""

import math
import mmap
from collections import OrderedDict
from pathlib import Path
from threading import Lock

import numpy as np

_OPEN_FILES = 64
"""A mapped file keeps a descriptor open, and a process may have as few as 256."""


class MappedFiles:
    """Files mapped on first use; the least recently used are let go. Safe to use from several threads."""

    def __init__(self) -> None:
        self._maps: OrderedDict[Path, mmap.mmap] = OrderedDict()
        self._lock = Lock()

    def float16(self, path: Path, offset: int, shape: tuple[int, ...], row_stride: int) -> np.ndarray:
        """A read-only view of C-contiguous rows that lie ``row_stride`` bytes apart, the first at ``offset``.

        It stays valid after its file was let go.

        Raises:
            OSError: the file cannot be opened.
            ValueError: the file is empty or ends before the array does.
        """
        inner = [2 * math.prod(shape[axis + 1 :]) for axis in range(1, len(shape))]
        return np.ndarray(shape, np.float16, self._map(path), offset, (row_stride, *inner))

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
