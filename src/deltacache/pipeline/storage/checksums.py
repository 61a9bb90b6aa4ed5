"""CRC-32C (Castagnoli) of buffers, arrays and files: the checksum of every byte that a dataset keeps.

CRC-32C finds accidents, not forgery; processors compute it in hardware, faster than memory is copied.
"""

import io
import math
from pathlib import Path
from typing import BinaryIO

import numpy as np
from crc32c import crc32c
from numpy.lib import format as npy_format
from upath import UPath

_CHUNK_BYTES = 1 << 22


class ChecksummedFile:
    """A file being written, with the size and CRC-32C of what it holds so far."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.bytes = 0
        self.crc32c = 0

    def write(self, buffer: bytes | memoryview) -> None:
        """Append bytes; a memoryview must be of bytes (format ``B``)."""
        self._file.write(buffer)
        self.crc32c = crc32c(buffer, self.crc32c)
        self.bytes += len(buffer)


def byte_view(array: np.ndarray) -> memoryview:
    """The values of a C-contiguous array as bytes, without a copy."""
    return array.reshape(-1).view(np.uint8).data


def crc32c_of_array(array: np.ndarray) -> int:
    """CRC-32C of the values in C order; of an array whose rows lie apart no more than a row is copied."""
    if array.flags.c_contiguous:
        return crc32c(byte_view(array))
    value = 0
    for row in array:
        value = crc32c(byte_view(np.ascontiguousarray(row)), value)
    return value


def crc32c_of_npy(array: np.ndarray) -> int:
    """CRC-32C of the ``.npy`` file that ``array`` makes."""
    return crc32c(npy_bytes(array))


def crc32c_of_text(text: str) -> int:
    """CRC-32C of the UTF-8 bytes of ``text``."""
    return crc32c(text.encode())


def crc32c_of_file(path: Path | UPath) -> int:
    """CRC-32C of a file's content, read in pieces.

    Raises:
        OSError: the file cannot be read.
    """
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            value = crc32c(chunk, value)
    return value


def npy_header(array: np.ndarray) -> bytes:
    """The bytes before the values in the ``.npy`` file of a C-contiguous array; a multiple of 64."""
    stream = io.BytesIO()
    npy_format.write_array_header_1_0(stream, npy_format.header_data_from_array_1_0(array))
    return stream.getvalue()


def npy_bytes(array: np.ndarray) -> bytes:
    """The whole ``.npy`` file of ``array``: equal arrays give equal bytes."""
    values = np.ascontiguousarray(array)
    return npy_header(values) + values.tobytes()


def npy_view(buffer: memoryview) -> np.ndarray:
    """The array in the bytes of a ``.npy`` file, as a view; never unpickles.

    Raises:
        ValueError: not a plain version-1 ``.npy`` file of exactly this length.
    """
    stream = io.BytesIO(buffer[: 1 << 12])
    version = npy_format.read_magic(stream)
    if version != (1, 0):
        raise ValueError(f"npy version {version}, must be (1, 0)")
    shape, fortran_order, dtype = npy_format.read_array_header_1_0(stream)
    if fortran_order or dtype.hasobject:
        raise ValueError(
            f"npy of {dtype} with fortran_order={fortran_order}, must be plain numbers in C order"
        )
    count = math.prod(shape)
    if stream.tell() + count * dtype.itemsize != len(buffer):
        raise ValueError(f"npy header says {dtype}{shape}, but the file has {len(buffer)} bytes")
    return np.frombuffer(buffer, dtype, count, stream.tell()).reshape(shape)
