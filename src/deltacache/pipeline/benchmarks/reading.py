"""Pictures and labels of the benchmarks, checked.

Shapes: T frames, H x W pixels.
"""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from deltacache.schemas.benchmarks import (
    CLASSES,
    IGNORE,
    MAX_DEPTH_M,
    MIN_DEPTH_M,
    BenchmarkName,
)
from deltacache.schemas.errors import DatasetError

INVALID_DEPTH = 0
_KB_CROP = (352, 1216)
_GARG_ROWS = (0.40810811, 0.99189189)
_GARG_COLUMNS = (0.03594771, 0.96405229)
_DEPTH_SCALE = 256.0  # stored numbers a metre
# Cityscapes' label ids 0..33 in the order of its 19 train ids; the others are ignored.
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_CITYSCAPES_LAST_ID = 33
_CITYSCAPES_LICENCE_PLATE = 255  # -1 in eight bits


def read_frame(benchmark: BenchmarkName, path: str) -> np.ndarray:
    """One picture (H, W, 3) uint8 RGB; of KITTI its KB crop.

    Raises:
        DatasetError: missing, damaged, or too small for the crop.
    """
    content = _bytes(path)
    picture = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR) if content else None
    if picture is None:
        raise DatasetError(f"{path} is damaged or no picture: get it again")
    picture = cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
    return kb_crop(picture, path) if benchmark == "kitti" else picture


def frame_shape(benchmark: BenchmarkName, path: str) -> tuple[int, int]:
    """Rows and columns of what ``read_frame`` gives, from the file's header alone.

    Raises:
        DatasetError: missing, or no picture.
    """
    return _KB_CROP if benchmark == "kitti" else stored_shape(path)


def stored_shape(path: str) -> tuple[int, int]:
    """Rows and columns of a picture as it lies on disk.

    Raises:
        DatasetError: missing, or no picture.
    """
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except FileNotFoundError:
        raise DatasetError(f"{path} is missing: get the benchmark's frames") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise DatasetError(f"{path} is damaged or no picture ({error}): get it again") from error


def read_label(benchmark: BenchmarkName, path: str, shape: tuple[int, int]) -> np.ndarray:
    """The label of a frame of ``shape`` (of KITTI: of the crop), for evaluation.

    Returns:
        (H, W) uint8 class ids with ``IGNORE``; of KITTI (H, W) float32 metres, ``INVALID_DEPTH`` outside the
        Garg region and the range of depths that count.

    Raises:
        DatasetError: missing, damaged, of another size, or with a class id that does not exist.
    """
    if benchmark == "kitti":
        return read_depth(path, shape)
    label = _read_single_channel(path)
    _check_size(label, path, shape)
    return _TRAIN_IDS[benchmark](label, path)


def check_depth_belongs(frame: str, depth: str) -> None:
    """Refuse a depth map of another size than its frame: after the crop all would be of one size.

    Raises:
        DatasetError: names both.
    """
    of_frame, of_depth = stored_shape(frame), stored_shape(depth)
    if of_frame != of_depth:
        raise DatasetError(
            f"{depth} has {of_depth[0]} x {of_depth[1]} pixels, its frame {frame} {of_frame[0]} x {of_frame[1]}: depth "
            "and frames must be of the same drive"
        )


def read_depth(path: str, shape: tuple[int, int], *, garg: bool = True) -> np.ndarray:
    """KB crop (H, W) float32 of a depth map in metres; see ``read_label``."""
    stored = kb_crop(_read_single_channel(path), path)
    if stored.dtype != np.uint16:
        raise DatasetError(
            f"{path} has {8 * stored.itemsize} bits a pixel: depth has 16, in 1/256 m; get it again"
        )
    _check_size(stored, path, shape)
    depth = stored.astype(np.float32) / _DEPTH_SCALE
    valid = (depth > MIN_DEPTH_M) & (depth < MAX_DEPTH_M)
    if garg:
        valid &= garg_region(*shape)
    return np.where(valid, depth, np.float32(INVALID_DEPTH))


def kb_crop(picture: np.ndarray, path: str) -> np.ndarray:
    """352 x 1216 at the bottom and in the middle (the KITTI depth benchmark's own crop).

    Raises:
        DatasetError: the picture is smaller.
    """
    rows, columns = _KB_CROP
    height, width = picture.shape[:2]
    if height < rows or width < columns:
        raise DatasetError(
            f"{path} has {height} x {width} pixels, the KB crop needs {rows} x {columns}: give KITTI's originals"
        )
    left = (width - columns) // 2
    return picture[height - rows :, left : left + columns]


def garg_region(height: int, width: int) -> np.ndarray:
    """(H, W) bool: where Garg et al. (2016) evaluate depth."""
    region = np.zeros((height, width), dtype=bool)
    rows, columns = (
        [int(share * side) for share in shares]
        for shares, side in (
            (_GARG_ROWS, height),
            (_GARG_COLUMNS, width),
        )
    )
    region[slice(*rows), slice(*columns)] = True
    return region


def _vspw_ids(label: np.ndarray, path: str) -> np.ndarray:
    """Stored id minus one; 0 and what is no class are ignored."""
    if label.max(initial=0) > IGNORE:
        raise DatasetError(f"{path} has the class id {label.max()}, VSPW has 0..{IGNORE}: give its masks")
    ids = label.astype(np.uint8) - np.uint8(1)  # 0 becomes 255
    ids[ids >= CLASSES["vspw"]] = IGNORE
    return ids


def _cityscapes_ids(label: np.ndarray, path: str) -> np.ndarray:
    wrong = (label > _CITYSCAPES_LAST_ID) & (label != _CITYSCAPES_LICENCE_PLATE)
    if wrong.any():
        raise DatasetError(
            f"{path} has the class id {label[wrong][0]}, Cityscapes has 0..{_CITYSCAPES_LAST_ID}: give the "
            "*_labelIds.png files"
        )
    return _CITYSCAPES_TABLE[label]


def _cityscapes_table() -> np.ndarray:
    table = np.full(256, IGNORE, dtype=np.uint8)
    table[list(_CITYSCAPES_IDS)] = np.arange(CLASSES["cityscapes"])
    return table


_CITYSCAPES_TABLE = _cityscapes_table()
_TRAIN_IDS: dict[str, Callable[[np.ndarray, str], np.ndarray]] = {
    "vspw": _vspw_ids,
    "cityscapes": _cityscapes_ids,
}


def _read_single_channel(path: str) -> np.ndarray:
    """Stored numbers (H, W), indices of a palette as they are."""
    try:
        with Image.open(path) as image:
            label = np.array(image)
    except FileNotFoundError:
        raise DatasetError(f"{path} is missing: get the benchmark's labels") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise DatasetError(f"{path} is damaged or no picture ({error}): get it again") from error
    if label.ndim != 2:
        raise DatasetError(f"{path} has {label.shape[-1]} channels: a label has one number a pixel")
    return label


def _check_size(label: np.ndarray, path: str, shape: tuple[int, int]) -> None:
    if label.shape != shape:
        raise DatasetError(
            f"{path} has {label.shape[0]} x {label.shape[1]} pixels, its frame {shape[0]} x {shape[1]}: labels "
            "and frames must be of the same release"
        )


def _bytes(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise DatasetError(f"{path} is missing: get the benchmark's frames") from None
    except OSError as error:
        raise DatasetError(f"{path} cannot be read ({error})") from error
