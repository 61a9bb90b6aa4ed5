"""One frame cropped and resized, as clips are."""

import numpy as np

from deltacache.pipeline.decoding.resampling import CroppedClip, Resizer
from deltacache.schemas.clips import CropBox
from deltacache.schemas.datasets import Size


def crop_and_resize(rgb: np.ndarray, crop: CropBox, size: Size, *, flip: bool) -> np.ndarray:
    """(h, w, 3) uint8: the crop of one (H, W, 3) frame."""
    clip, resizer = CroppedClip(1, size, crop, flip=flip), Resizer(size)
    resizer.load(rgb)
    resizer.cut(clip, 0)
    return clip.finish()[0]
