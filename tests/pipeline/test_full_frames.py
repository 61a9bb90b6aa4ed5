"""Whole frames and depth maps as Table D needs them."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from deltacache.pipeline.benchmarks.frames import depth_of, read_depth_map, read_whole
from deltacache.pipeline.benchmarks.layouts import benchmark_sequences
from deltacache.pipeline.benchmarks.windows import FrameCounts
from deltacache.schemas.errors import DatasetError

SHAPE = (4, 6)


def grey(path: Path, values: np.ndarray) -> Path:
    assert cv2.imwrite(str(path), values)
    return path


def test_frames_are_every_third_up_to_index_19(mini_benchmarks: Path) -> None:
    found = benchmark_sequences("cityscapes", mini_benchmarks / "cityscapes", FrameCounts((5, 7)))
    for each in found.sequences:
        numbers = [int(Path(path).name.split("_")[-2]) for path in each.frames]
        assert numbers == [1, 4, 7, 10, 13, 16, 19]
        assert "_000019_" in each.label


def test_frames_are_resized_as_pillow_does_it(mini_benchmarks: Path) -> None:
    path = next((mini_benchmarks / "cityscapes" / "leftImg8bit_sequence").rglob("*.png"))
    with Image.open(path) as picture:
        expected = np.asarray(picture.convert("RGB").resize((48, 28), Image.Resampling.BILINEAR))
        whole = np.asarray(picture.convert("RGB"))
    assert np.array_equal(read_whole(str(path), (28, 48)), expected)
    assert np.array_equal(read_whole(str(path), (whole.shape[0], whole.shape[1])), whole)


def test_depth_in_8_bits_is_relative(tmp_path: Path) -> None:
    stored = np.arange(24, dtype=np.uint8).reshape(SHAPE) * 11
    path = grey(tmp_path / "a.png", stored)
    depth = read_depth_map(path, SHAPE)
    assert depth.dtype == np.float32
    np.testing.assert_allclose(depth, stored * (80.0 / 255.0), rtol=1e-6)
    assert depth[0, 0] == 0
    colour = grey(tmp_path / "b.png", np.repeat(stored[..., None], 3, 2))
    assert np.array_equal(read_depth_map(colour, SHAPE), depth)


def test_depth_in_16_bits_and_floats_is_in_metres(tmp_path: Path) -> None:
    metres = np.linspace(0, 115, 24).reshape(SHAPE)
    stored = (metres * 256).astype(np.uint16)
    expected = np.where((stored > 0) & (stored <= 80 * 256), stored / 256, 0)
    np.testing.assert_allclose(read_depth_map(grey(tmp_path / "a.png", stored), SHAPE), expected)
    np.save(tmp_path / "b.npy", metres)
    known = np.where((metres > 1e-3) & (metres <= 80), metres, 0)
    np.testing.assert_allclose(read_depth_map(tmp_path / "b.npy", SHAPE), known, rtol=1e-6)
    metres[0, 1] = np.nan
    np.save(tmp_path / "b.npy", metres)
    with pytest.raises(DatasetError, match=r"b\.npy holds depths that are not finite .*metres are 0"):
        read_depth_map(tmp_path / "b.npy", SHAPE)


def test_maps_that_do_not_belong_are_refused(tmp_path: Path) -> None:
    path = grey(tmp_path / "a.png", np.zeros(SHAPE, np.uint8))
    with pytest.raises(DatasetError, match=r"a\.png has the shape \(4, 6\), its frame \(8, 6\)"):
        read_depth_map(path, (8, 6))
    np.save(tmp_path / "b.npy", np.zeros(SHAPE, np.int64))
    with pytest.raises(DatasetError, match=r"holds int64: give 8 or 16 bits"):
        read_depth_map(tmp_path / "b.npy", SHAPE)
    (tmp_path / "c.png").write_bytes(b"no picture")
    with pytest.raises(DatasetError, match=r"c\.png is damaged"):
        read_depth_map(tmp_path / "c.png", SHAPE)
    (tmp_path / "d.npy").write_bytes(b"no array")
    with pytest.raises(DatasetError, match=r"d\.npy is damaged"):
        read_depth_map(tmp_path / "d.npy", SHAPE)


@pytest.mark.parametrize(
    "ending", ["_leftImg8bit_depth.png", "_leftImg8bit.png", "_depth.png", ".png", ".npy"]
)
def test_a_map_is_found_by_its_snippet(ending: str, tmp_path: Path) -> None:
    label = "/x/gtFine/val/bremen/bremen_000003_000019_gtFine_labelIds.png"
    folder = tmp_path / "val" / "bremen"
    folder.mkdir(parents=True)
    with pytest.raises(DatasetError, match=r"bremen_000003_000019 has no depth map"):
        depth_of(label, "val", tmp_path)
    (folder / "bremen_000003_000016.png").touch()
    wanted = folder / f"bremen_000003_000019{ending}"
    wanted.touch()
    assert depth_of(label, "val", tmp_path) == wanted
    with pytest.raises(DatasetError, match="has no depth map"):
        depth_of(label, "train", tmp_path)
