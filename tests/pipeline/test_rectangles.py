"""Frames that are no squares: sizes in configs, crops, resizing, messages between processes, cards."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError
from small_datasets import BLACK, make_dataset, small_card

from crops import crop_and_resize
from deltacache.pipeline.datasets.changes import describe
from deltacache.pipeline.datasets.plan import PlannedVideo
from deltacache.pipeline.datasets.writing import card_bytes, prepare_dataset, read_card
from deltacache.pipeline.decoding.child import ChildDecoder, job_from_json, job_to_json
from deltacache.pipeline.decoding.decode import VideoJob, decode_video
from deltacache.pipeline.decoding.sampling import draw_view, largest_crop
from deltacache.pipeline.decoding.work import DecodeSettings, groups_of
from deltacache.pipeline.storage.storage import dataset_root
from deltacache.pipeline.work.encoders import FeatureEncoder
from deltacache.pipeline.work.shard_work import measure_forward
from deltacache.schemas.clips import CropBox
from deltacache.schemas.datasets import (
    BackboneCard,
    DatasetCard,
    SamplingSettings,
    Size,
    parse_size,
    sides,
    size_text,
)
from deltacache.schemas.errors import MismatchError
from deltacache.schemas.jobs import DecodeLimits, ExtractionSettings

AT_25_FPS = np.arange(100, dtype=np.float32) / 25


@pytest.mark.parametrize(
    ("given", "size"),
    [
        (512, 512), ("512", 512), ("448x896", (448, 896)), ("448X896", (448, 896)), ([448, 896], (448, 896)),
        ((448, 896), (448, 896)), ("64x64", 64), ([64, 64], 64), ([64], 64),
    ],
)  # fmt: skip
def test_sizes_as_they_are_written(given: object, size: Size) -> None:
    assert parse_size(given) == size
    settings = ExtractionSettings.model_validate({"source": "v", "image_size": given})
    assert settings.image_size == size
    assert ExtractionSettings.model_validate(json.loads(settings.model_dump_json())) == settings
    assert parse_size(size_text(size)) == size
    assert sides(size) == (size if isinstance(size, tuple) else (size, size))


@pytest.mark.parametrize(
    "wrong", ["", "x", "448x", "1x2x3", "large", 0, -16, (448, 0), [], 44.8, True, None, "4.5"]
)
def test_other_sizes_are_refused(wrong: object) -> None:
    with pytest.raises(ValidationError, match="give the side of a square such as 512, or height x width"):
        ExtractionSettings.model_validate({"source": "v", "image_size": wrong})


def test_sizes_too_small_are_refused() -> None:
    with pytest.raises(
        ValidationError, match="image size 448x8 is too small: give at least 16 pixels per side"
    ):
        ExtractionSettings.model_validate({"source": "v", "image_size": "448x8"})


def test_fingerprints_of_squares_are_those_from_before_there_were_rectangles() -> None:
    """Written down with the version before: datasets on disk must stay readable, and be continued."""
    assert small_card("features", "zarr").fingerprint == "1e7d0ef071f9edcf"
    assert small_card("deltas", "zarr").fingerprint == "e1745cfde24e7774"
    assert json.loads(card_bytes(small_card("features", "zarr")))["image_size"] == 48
    assert set(json.loads(card_bytes(small_card("features", "zarr")))["backbone"]) == {
        "id", "weights_sha256", "patch_size", "hidden_size", "image_mean", "image_std",
    }  # fmt: skip


def test_cards_of_rectangles_layers_and_pcas(tmp_path: Path) -> None:
    plain = small_card("features", "zarr")
    chosen = BackboneCard(**{**plain.backbone.model_dump(), "layers": (2, 5), "pca_fingerprint": "ab" * 8})
    joined = BackboneCard(**{**plain.backbone.model_dump(), "layers": (2, 5)})
    cards = [
        plain,
        small_card("features", "zarr", image_size=(32, 48)),
        small_card("features", "zarr", backbone=joined),
        small_card("features", "zarr", backbone=chosen),
    ]
    assert len({card.fingerprint for card in cards}) == len(cards)
    for card in cards:
        (tmp_path / "dataset.json").write_bytes(card_bytes(card))
        assert read_card(tmp_path) == card
        assert DatasetCard.model_validate_json(card.model_dump_json()).fingerprint == card.fingerprint
        made = card.deltas(store="zarr", tokenizer="0" * 16, code_version="1")
        assert (made.backbone, made.image_size) == (card.backbone, card.image_size)
    assert chosen.choice == {"layers": [2, 5], "pca_fingerprint": "ab" * 8}
    assert (plain.backbone.choice, joined.choice) == ({}, {"layers": [2, 5]})
    assert chosen.name == "tiny@5e5e5e5e5e5e5e5e, layers 2,5, PCA abababababababab"
    assert plain.backbone.name == "tiny@5e5e5e5e5e5e5e5e"


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"layers": (2, 6)}, r"backbone\.layers is \[2,5\], asked for \[2,6\]"),
        ({"layers": None}, r"backbone\.layers is \[2,5\], asked for null"),
        (
            {"pca_fingerprint": "cd" * 8},
            rf'backbone\.pca_fingerprint is "{"ab" * 8}", asked for "{"cd" * 8}"',
        ),
        ({"pca_fingerprint": None}, rf'backbone\.pca_fingerprint is "{"ab" * 8}", asked for null'),
    ],
)
def test_a_dataset_is_not_continued_with_other_layers_or_another_pca(
    tmp_path: Path, asked: dict[str, object], words: str
) -> None:
    made = small_card("features", "zarr").backbone.model_dump()
    made |= {"layers": (2, 5), "pca_fingerprint": "ab" * 8}
    first, other = (
        small_card("features", "zarr", backbone=BackboneCard(**fields)) for fields in (made, made | asked)
    )
    prepare_dataset(tmp_path / "data", first, BLACK)
    prepare_dataset(tmp_path / "data", first, BLACK)
    with pytest.raises(MismatchError, match=words) as refused:
        prepare_dataset(tmp_path / "data", other, BLACK)
    assert str(refused.value).endswith("Use its settings, or another output folder")
    assert read_card(dataset_root(tmp_path / "data")) == first


@pytest.mark.parametrize(
    ("height", "width", "target", "crop"),
    [
        (1024, 2048, (448, 896), (0, 0, 1024, 2048)),
        (1080, 1920, (448, 896), (60, 0, 960, 1920)),
        (240, 640, (1, 2), (0, 80, 240, 480)),
        (640, 240, (1, 2), (260, 0, 120, 240)),
        (640, 240, (3, 1), (0, 13, 640, 213)),
        (100, 3, (1, 7), (49, 0, 1, 3)),
    ],
)
def test_the_largest_crop_of_an_aspect(
    height: int, width: int, target: tuple[int, int], crop: tuple[int, ...]
) -> None:
    assert largest_crop(height, width, target) == CropBox(*crop)


@pytest.mark.parametrize("seed", range(50))
def test_the_largest_crop_is_centred_inside_and_cannot_grow(seed: int) -> None:
    rng = random.Random(seed)
    height, width, rows, columns = (rng.randint(20, 900) for _ in range(4))
    crop = largest_crop(height, width, (rows, columns))
    assert crop.height == height or crop.width == width
    assert crop.top in ((height - crop.height) // 2, 0)
    assert crop.left + crop.width <= width
    assert crop.top + crop.height <= height
    exact = min(height / rows, width / columns)
    assert abs(crop.height - exact * rows) <= 1
    assert abs(crop.width - exact * columns) <= 1
    assert largest_crop(height, width, (5, 5)) == largest_crop(height, width, (1, 1))


def test_views_take_the_targets_aspect() -> None:
    still = SamplingSettings(augment=False)
    assert draw_view("a", 0, AT_25_FPS, 240, 640, still, (448, 896)).crop == CropBox(0, 80, 240, 480)
    crops = [
        draw_view(f"v{n}", 0, AT_25_FPS, 400, 800, SamplingSettings(), (448, 896)).crop for n in range(300)
    ]
    aspects = [crop.width / crop.height for crop in crops]
    assert 1.49 < min(aspects) < 1.6
    assert 2.5 < max(aspects) < 2.68
    assert abs(np.mean(np.log(aspects)) - math.log(2)) < 0.04
    areas = [crop.width * crop.height / (400 * 800) for crop in crops]
    assert min(areas) > 0.59


def test_times_and_flips_do_not_depend_on_the_target() -> None:
    square = draw_view("a", 0, AT_25_FPS, 400, 800, SamplingSettings())
    wide = draw_view("a", 0, AT_25_FPS, 400, 800, SamplingSettings(), (64, 128))
    assert square.frame_indices == wide.frame_indices
    same = draw_view("a", 0, AT_25_FPS, 400, 800, SamplingSettings(), (64, 64))
    assert (same.crop, same.flip) == (square.crop, square.flip)


@pytest.mark.parametrize("seed", range(40))
def test_resizing_is_at_most_one_grey_level_from_pillow(seed: int) -> None:
    rng = random.Random(seed)
    height, width = rng.randint(16, 400), rng.randint(16, 400)
    rgb = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    crop_height, crop_width = rng.randint(height // 2, height), rng.randint(width // 2, width)
    crop = CropBox(
        rng.randint(0, height - crop_height), rng.randint(0, width - crop_width), crop_height, crop_width
    )
    size, flip = (rng.choice([28, 56, 112, 224]), rng.choice([16, 56, 98, 448])), bool(seed % 2)
    cut = rgb[crop.top : crop.top + crop_height, crop.left : crop.left + crop_width]
    wanted = np.asarray(Image.fromarray(cut.copy()).resize(size[::-1], Image.Resampling.BILINEAR)).astype(int)
    got = crop_and_resize(rgb, crop, size, flip=flip).astype(int)
    assert got.shape == (*size, 3)
    assert np.abs((got[:, ::-1] if flip else got) - wanted).max() <= 1


def write_shaded(folder: Path, height: int, width: int) -> Path:
    """Five frames: red grows downwards, green to the right."""
    folder.mkdir()
    picture = np.zeros((height, width, 3), np.uint8)
    picture[..., 0] = np.linspace(0, 255, height).round()[:, None]
    picture[..., 1] = np.linspace(0, 255, width).round()
    for number in range(5):
        picture[..., 2] = 10 * number
        Image.fromarray(picture).save(folder / f"frame_{number / 10:.1f}.png")
    return folder


def test_videos_are_decoded_to_rectangles_in_a_child_too(tmp_path: Path) -> None:
    folder = write_shaded(tmp_path / "v", 90, 200)
    sampling = SamplingSettings(frames=3, spacing_min_s=0.1, spacing_max_s=0.1, augment=False)
    job = VideoJob(str(folder), "v", "video", 0, 2, (28, 56), sampling)
    assert job_from_json(json.loads(json.dumps(job_to_json(job)))) == job
    clips = decode_video(job)
    with ChildDecoder(60, 4 << 30) as decoder:
        again = decoder.decode(job)
    for clip, other in zip(clips, again, strict=True):
        assert clip.pixels.shape == (3, 28, 56, 3)
        assert clip.crop == CropBox(0, 10, 90, 180)
        np.testing.assert_array_equal(clip.pixels, other.pixels)
        red, green = clip.pixels[0, :, 0, 0].astype(int), clip.pixels[0, 0, :, 1].astype(int)
        assert (red[0] < 8, red[-1] > 247, green[0] > 10, green[-1] < 245) == (True,) * 4
        assert (np.diff(red) >= 0).all()
        assert (np.diff(green) >= 0).all()


def test_groups_are_bounded_by_the_pixels_of_rectangles() -> None:
    videos = [PlannedVideo(f"v{n}", f"v{n}", 10, 0, 1) for n in range(64)]
    sampling, limits = SamplingSettings(frames=8), DecodeLimits()
    sizes = {
        size: len(groups_of(videos, DecodeSettings(size, sampling, limits))[0]) for size in (512, (512, 1024))
    }
    assert sizes == {512: 2, (512, 1024): 1}


def test_the_bare_forward_is_measured_on_rectangles() -> None:
    class Counting(FeatureEncoder):
        batch_clips = 2

        def __init__(self) -> None:
            self.shapes: set[tuple[int, ...]] = set()

        def encode(self, clips):
            self.shapes |= {clip.pixels.shape for clip in clips}
            return []

    encoder = Counting()
    assert measure_forward(encoder, 3, (28, 56), seconds=0.01) > 0
    assert encoder.shapes == {(3, 28, 56, 3)}


def test_what_a_dataset_is(tmp_path: Path) -> None:
    make_dataset(tmp_path, "features", "zarr", "a.mp4")
    assert "tiny, 48 px, 2 x 3 patches, 4 wide" in str(describe(tmp_path))
