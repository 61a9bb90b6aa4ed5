"""Frames and labels of the benchmarks: read, cropped, resized, and whole."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional

from deltacache.pipeline.benchmarks.cityscapes import LABEL_SUFFIX
from deltacache.pipeline.benchmarks.files import existing
from deltacache.schemas.benchmarks import CLASSES, IGNORE, MAX_DEPTH_M, MIN_DEPTH_M, BenchmarkName
from deltacache.schemas.clips import CropBox
from deltacache.schemas.errors import DatasetError

# ----------------------------------------------------------------------------------------------------
# Pictures and labels of the benchmarks, checked.
#
# Shapes: T frames, H x W pixels.
# ----------------------------------------------------------------------------------------------------


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
        raise DatasetError(f"{path} is damaged or not a picture: get it again")
    picture = cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
    return kb_crop(picture, path) if benchmark == "kitti" else picture


def frame_shape(benchmark: BenchmarkName, path: str) -> tuple[int, int]:
    """Rows and columns of what ``read_frame`` gives, from the file's header alone.

    Raises:
        DatasetError: missing, or not a picture.
    """
    return _KB_CROP if benchmark == "kitti" else stored_shape(path)


def stored_shape(path: str) -> tuple[int, int]:
    """Rows and columns of a picture as it lies on disk.

    Raises:
        DatasetError: missing, or not a picture.
    """
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except FileNotFoundError:
        raise DatasetError(f"{path} is missing: get the benchmark's frames") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise DatasetError(f"{path} is damaged or not a picture ({error}): get it again") from error


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
    """Stored id minus one; 0 and what is not a class are ignored."""
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
        raise DatasetError(f"{path} is damaged or not a picture ({error}): get it again") from error
    if label.ndim != 2:
        raise DatasetError(f"{path} has {label.shape[-1]} channels: a label has one number per pixel")
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


# ----------------------------------------------------------------------------------------------------
# Two square crops of a frame and two halves of its label (method section 3).
#
# Shapes: T frames, H x W a frame as it is, h x w resized, S input size, C crops (2, or 1 of square
# frames).
# ----------------------------------------------------------------------------------------------------


_MOST_ASPECT = 2


@dataclass(frozen=True, slots=True)
class CropSplit:
    """How a frame of one size is cut.

    Attributes:
        resized: h, w; the shorter is the input size, the longer at most twice that.
        wide: whether the crops lie side by side (else one above the other).
    """

    resized: tuple[int, int]
    wide: bool

    @property
    def size(self) -> int:
        """Side of a crop."""
        return min(self.resized)

    @property
    def crops(self) -> int:
        """Number of crops."""
        return 1 if self.resized[0] == self.resized[1] else 2

    @property
    def overlap(self) -> bool:
        """Whether the crops share pixels; the halves of the label never do."""
        return self.crops == 2 and max(self.resized) < _MOST_ASPECT * self.size

    @property
    def corners(self) -> tuple[tuple[int, int], ...]:
        """Top and left of each crop in the resized frame."""
        height, width = self.resized
        return ((0, 0), (height - self.size, width - self.size))[: self.crops]

    def box(self, crop: int, height: int, width: int) -> CropBox:
        """Where a crop lies in the frame of ``height`` x ``width`` pixels before it was resized."""
        (top, left), (rows, columns) = self.corners[crop], self.resized
        down, across = height / rows, width / columns
        size = (round(self.size * down), round(self.size * across))
        return CropBox(round(top * down), round(left * across), *size)


def split_of(height: int, width: int, size: int) -> CropSplit:
    """The split of frames of ``height`` x ``width`` for an input size: aspect clamped to 1:2."""
    short = min(height, width)
    long = min(round(size * max(height, width) / short), _MOST_ASPECT * size)
    return CropSplit((size, long) if width >= height else (long, size), wide=width > height)


def resize_frame(frame: np.ndarray, split: CropSplit) -> np.ndarray:
    """(H, W, 3) uint8 to (h, w, 3), bilinear."""
    height, width = split.resized
    if frame.shape[:2] == (height, width):
        return frame
    return cv2.resize(frame, (width, height), interpolation=cv2.INTER_LINEAR)


def crop_frames(frames: np.ndarray, split: CropSplit) -> np.ndarray:
    """(T, h, w, 3) resized frames to (C, T, S, S, 3): the crops at both ends."""
    size = split.size
    return np.stack([frames[:, top : top + size, left : left + size] for top, left in split.corners])


def label_halves(label: np.ndarray, split: CropSplit, ignore: int) -> np.ndarray:
    """(..., H, W) to (C, ..., H', W'): halves that do not overlap.

    Of an odd side the second half gets the larger part, and the first one row or column of ``ignore`` behind it.
    """
    if split.crops == 1:
        return label[None]
    axis = label.ndim - 1 if split.wide else label.ndim - 2
    middle = label.shape[axis] // 2
    first, second = np.split(label, [middle], axis)
    padding = [(0, 0)] * label.ndim
    padding[axis] = (0, second.shape[axis] - middle)
    return np.stack([np.pad(first, padding, constant_values=ignore), second])


# ----------------------------------------------------------------------------------------------------
# Cityscapes as DINO-Foresight uses it: whole frames at one size, and depth maps in a folder of the user's.
#
# Shapes: H x W a frame as it is, h x w resized.
# ----------------------------------------------------------------------------------------------------


_ENDINGS = ("_leftImg8bit_depth.png", "_leftImg8bit.png", "_depth.png", ".png", "_depth.npy", ".npy")
_STEPS_A_METRE = 256.0


def read_whole(path: str, size: tuple[int, int]) -> np.ndarray:
    """A frame (h, w, 3) uint8 RGB resized to rows x columns, bilinear with antialiasing as extraction does it.

    Raises:
        DatasetError: missing or not a picture.
    """
    picture = read_frame("cityscapes", path)
    if picture.shape[:2] == size:
        return picture
    return np.array(Image.fromarray(picture).resize((size[1], size[0]), Image.Resampling.BILINEAR))


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
            f"{path} has the shape {stored.shape}, its frame {shape}: depth maps must have one number per pixel "
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
        raise DatasetError(f"{path} holds {stored.dtype}: give 8 or 16 bits per pixel, or floats in metres")
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
        raise DatasetError(f"{path} is damaged or not a depth map ({error}): make it again") from error
    if picture is None:
        raise DatasetError(f"{path} is damaged or not a depth map: make it again")
    return picture


# ----------------------------------------------------------------------------------------------------
# From patches back to the label's pixels, the same in training and evaluation (method section 3).
#
# Shapes: C crops, K numbers a place, h x w patches, H' x W' pixels of a label half, R of its rows.
# ----------------------------------------------------------------------------------------------------


def upsample(predictions: Tensor, split: CropSplit, half: tuple[int, int]) -> Tensor:
    """Predictions (C, K, h, w) of the crops at the size of the label's halves: (C, K, H', W')."""
    crops = [upsample_crop(each[None], split, half, crop) for crop, each in enumerate(predictions)]
    return torch.cat(crops)


def upsample_crop(predictions: Tensor, split: CropSplit, half: tuple[int, int], crop: int) -> Tensor:
    """Predictions (B, K, h, w) of one crop at the size of its half of the label: (B, K, H', W').

    Crops that overlap reach beyond their half: they are upsampled to a square of the half's longer side,
    which is then cut at the end that belongs to the crop.
    """
    if not split.overlap:
        return _resize(predictions, half)
    side, (height, width) = max(half), half
    square = _resize(predictions, (side, side))
    if crop == 0:
        return square[:, :, :height, :width]
    return square[:, :, side - height :, side - width :]


def upsample_rows(
    predictions: Tensor, split: CropSplit, half: tuple[int, int], crop: int, rows: range
) -> Tensor:
    """``rows`` of what ``upsample_crop`` gives, up to rounding, without the others: (B, K, R, W')."""
    side, (height, width) = max(half), half
    size = (side, side) if split.overlap else half
    top, left = (size[0] - height, size[1] - width) if crop else (0, 0)
    wanted = range(top + rows.start, top + rows.stop)
    return resized_rows(predictions, size, wanted)[..., left : left + width]


def resized_rows(predictions: Tensor, size: tuple[int, int], rows: range) -> Tensor:
    """``rows`` of predictions (B, K, h, w) resized bilinearly to H', W', up to rounding: (B, K, R, W')."""
    patches = predictions.shape[2]
    exact = torch.promote_types(predictions.dtype, torch.float32)
    at = torch.arange(rows.start, rows.stop, dtype=exact, device=predictions.device)
    source = ((at + 0.5) * (patches / size[0]) - 0.5).clamp_min(0)  # the places of align_corners=False
    above = source.long().clamp_max(patches - 1)
    share = (source - above).to(predictions.dtype)[:, None]
    upper, lower = predictions[:, :, above], predictions[:, :, (above + 1).clamp_max(patches - 1)]
    return _resize(torch.lerp(upper, lower, share), (len(rows), size[1]))


def _resize(predictions: Tensor, size: tuple[int, int]) -> Tensor:
    return functional.interpolate(predictions, size=size, mode="bilinear", align_corners=False)
