"""Cityscapes as DINO-Foresight uses it: whole frames at one size, and depth maps in a folder of the user's.

Shapes: H x W a frame as it is, h x w resized.
"""

from pathlib import Path

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from deltacache.pipeline.benchmarks.cityscapes import LABEL_SUFFIX
from deltacache.pipeline.benchmarks.files import existing
from deltacache.pipeline.benchmarks.reading import read_frame
from deltacache.schemas.benchmarks import MAX_DEPTH_M, MIN_DEPTH_M
from deltacache.schemas.errors import DatasetError

_ENDINGS = ("_leftImg8bit_depth.png", "_leftImg8bit.png", "_depth.png", ".png", "_depth.npy", ".npy")
_STEPS_A_METRE = 256.0


def read_whole(path: str, size: tuple[int, int]) -> np.ndarray:
    """A frame (h, w, 3) uint8 RGB resized to rows x columns, bilinear with antialiasing as extraction does it.

    Raises:
        DatasetError: missing or no picture.
    """
    picture = read_frame("cityscapes", path)
    if picture.shape[:2] == size:
        return picture
    return np.asarray(Image.fromarray(picture).resize((size[1], size[0]), Image.Resampling.BILINEAR))


def depth_of(label: str, split: str, folder: Path) -> Path:
    """The depth map of the frame that ``label`` (``<city>/<snippet>_gtFine_labelIds.png``) is of.

    ``folder`` holds ``<split>/<city>/<snippet>`` with one of ``_leftImg8bit_depth.png`` (what DINO-Foresight's script
    writes), ``_leftImg8bit.png``, ``_depth.png``, ``.png``, ``_depth.npy`` or ``.npy`` behind it.

    Raises:
        DatasetError: there is none.
    """
    place = existing(folder) / split / Path(label).parent.name
    snippet = Path(label).name[: -len(LABEL_SUFFIX)]
    ways = (
        place / f"{snippet}{cased}" for end in _ENDINGS for cased in (end, f"{end[:-4]}{end[-4:].upper()}")
    )
    found = next((path for path in ways if path.is_file()), None)
    if found is None:
        raise DatasetError(
            f"{place / snippet} has no depth map ({', '.join(_ENDINGS)}): give the folder that holds "
            "<split>/<city>/<snippet>..., see docs/foresight.md"
        )
    return found


def read_depth_map(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """(H, W) float32 of a frame of ``shape``, 0 where nothing is known.

    A map of 8 bits is relative (Depth Anything's, 1 to 255) and stretched so that 255 is ``MAX_DEPTH_M``: neither
    delta1 nor the relative error depend on the unit. 16 bits are 1/256 m, ``.npy`` metres.

    Raises:
        DatasetError: damaged, of another size or kind of number.
    """
    stored = _stored(path)
    if stored.ndim == 3 and stored.shape[-1] == 3 and (stored == stored[..., :1]).all():
        stored = stored[..., 0]  # a grey picture saved in colour
    if stored.shape != shape:
        raise DatasetError(
            f"{path} has the shape {stored.shape}, its frame {shape}: depth maps must be of one number a pixel "
            "and of the frame's own size"
        )
    if stored.dtype == np.uint8:
        return stored.astype(np.float32) * np.float32(MAX_DEPTH_M / 255)
    if stored.dtype == np.uint16:
        depth = stored.astype(np.float32) / np.float32(_STEPS_A_METRE)
    elif np.issubdtype(stored.dtype, np.floating):
        depth = stored.astype(np.float32)
        if not np.isfinite(depth).all():
            raise DatasetError(
                f"{path} holds depths that are not finite (NaN or infinite): where nothing is known, metres are 0; "
                "make it again"
            )
    else:
        raise DatasetError(f"{path} holds {stored.dtype}: give 8 or 16 bits a pixel, or floats in metres")
    return np.where((depth > MIN_DEPTH_M) & (depth <= MAX_DEPTH_M), depth, np.float32(0))


def is_relative(path: Path) -> bool:
    """Whether a map is one of relative inverse depth: of 8 bits, where near is large and there is no unit."""
    return _stored(path).dtype == np.uint8


def _stored(path: Path) -> np.ndarray:
    try:
        if path.suffix.lower() == ".npy":
            return np.load(path, allow_pickle=False)
        picture = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    except (OSError, ValueError, EOFError, UnidentifiedImageError, cv2.error) as error:
        raise DatasetError(f"{path} is damaged or no depth map ({error}): make it again") from error
    if picture is None:
        raise DatasetError(f"{path} is damaged or no depth map: make it again")
    return picture
