"""Cutting and resizing against Pillow: at most one grey level apart, at every edge too."""

import random

import numpy as np
import pytest
from PIL import Image

from crops import crop_and_resize
from deltacache.pipeline.decoding.resampling import CroppedClip, Resizer
from deltacache.schemas.clips import CropBox


def pillow(rgb: np.ndarray, crop: CropBox, size: int, *, flip: bool) -> np.ndarray:
    """The slow, obvious way."""
    cut = rgb[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    image = Image.fromarray(np.ascontiguousarray(cut)).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image)[:, ::-1] if flip else np.asarray(image)


def difference(rgb: np.ndarray, crop: CropBox, size: int, *, flip: bool = False) -> int:
    got = crop_and_resize(rgb, crop, size, flip=flip).astype(int)
    return int(np.abs(got - pillow(rgb, crop, size, flip=flip)).max())


@pytest.mark.parametrize("seed", range(60))
def test_noise_of_any_size_is_at_most_one_grey_level_from_pillow(seed: int) -> None:
    rng = random.Random(seed)
    height, width = rng.randint(16, 500), rng.randint(16, 500)
    rgb = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    crop_height, crop_width = rng.randint(height // 2, height), rng.randint(width // 2, width)
    top, left = rng.randint(0, height - crop_height), rng.randint(0, width - crop_width)
    crop = CropBox(top, left, crop_height, crop_width)
    assert difference(rgb, crop, rng.choice([16, 32, 64, 112, 224, 256]), flip=bool(seed % 2)) <= 1


@pytest.mark.parametrize("size", [128, 256, 512])
@pytest.mark.parametrize("shape", [(240, 320), (720, 1280), (1080, 1920), (1280, 720)])
def test_real_sizes_black_beside_white(size: int, shape: tuple[int, int]) -> None:
    """The hardest picture there is: every pixel black or white."""
    height, width = shape
    rgb = np.random.default_rng(0).integers(0, 2, (*shape, 3), np.uint8) * 255
    assert difference(rgb, CropBox(3, 5, height - 7, width - 9), size) <= 1


def test_grey_stays_grey_and_nothing_outside_the_crop_bleeds_in() -> None:
    for value in (0, 1, 127, 255):
        rgb = np.full((300, 400, 3), 255 - value, np.uint8)
        rgb[50:250, 70:330] = value
        for size in (64, 256, 512):
            assert (crop_and_resize(rgb, CropBox(50, 70, 200, 260), size, flip=False) == value).all()


def test_a_crop_of_the_wanted_size_is_the_crop() -> None:
    rgb = np.random.default_rng(1).integers(0, 256, (80, 90, 3), np.uint8)
    out = crop_and_resize(rgb, CropBox(7, 9, 64, 64), 64, flip=False)
    np.testing.assert_array_equal(out, rgb[7:71, 9:73])


def test_one_resizer_serves_frames_of_several_sizes() -> None:
    rng, resizer = np.random.default_rng(2), Resizer(48)
    for shape in ((100, 60), (60, 100), (100, 60), (31, 47)):
        rgb, crop = rng.integers(0, 256, (*shape, 3), np.uint8), CropBox(2, 1, 28, 40)
        resizer.load(rgb)
        clip = CroppedClip(2, 48, crop, flip=True)
        resizer.cut(clip, 1)
        resizer.cut(clip, 0)
        for frame in clip.finish():
            np.testing.assert_array_equal(frame, crop_and_resize(rgb, crop, 48, flip=True))
