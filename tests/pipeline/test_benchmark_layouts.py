"""Which frames make a sequence, and what is refused, on the miniature trees and changed copies of them."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from deltacache.pipeline.benchmarks.frames import (
    check_depth_belongs,
    garg_region,
    read_depth,
    read_frame,
    read_label,
)
from deltacache.pipeline.benchmarks.layouts import benchmark_sequences
from deltacache.pipeline.benchmarks.windows import FrameCounts, choose, frame_numbers
from deltacache.schemas.benchmarks import BENCHMARKS, BenchmarkName
from deltacache.schemas.errors import DatasetError

SEVEN = FrameCounts((5, 7))


@pytest.fixture
def tree(mini_benchmarks: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of one miniature tree to change."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(mini_benchmarks / name, tmp_path / name))

    return copy


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_sequences_are_those_of_the_released_code(
    benchmark: BenchmarkName, golden: Path, mini_benchmarks: Path
) -> None:
    expected = json.loads((golden / "eval" / "expected_samples.json").read_text())[benchmark]
    found = benchmark_sequences(benchmark, mini_benchmarks / benchmark, SEVEN)
    frames = [
        [Path(frame).relative_to(mini_benchmarks).as_posix() for frame in each.frames]
        for each in found.sequences
    ]
    assert frames == expected


def test_labels_are_those_of_the_last_frames(mini_benchmarks: Path) -> None:
    def labels(name: BenchmarkName) -> list[str]:
        return [each.label for each in benchmark_sequences(name, mini_benchmarks / name, SEVEN).sequences]

    assert labels("vspw")[1].endswith("100_clip0/mask/00000039.png")
    assert labels("cityscapes")[1].endswith("val/bremen/bremen_000003_000019_gtFine_labelIds.png")
    assert labels("kitti")[0].endswith(
        "val/2011_09_26_drive_0002_sync/proj_depth/groundtruth/image_02/0000000021.png"
    )


def test_groups_are_videos_cities_and_drives(mini_benchmarks: Path) -> None:
    groups = {
        name: [each.group for each in benchmark_sequences(name, mini_benchmarks / name, SEVEN).sequences]
        for name in BENCHMARKS
    }
    assert groups["vspw"] == ["100_clip0", "100_clip0", "101_clip1", "102_clip2", "102_clip2"]
    assert groups["cityscapes"] == ["aachen", "bremen"]
    assert groups["kitti"] == ["2011_09_26_drive_0002_sync", "2011_09_28_drive_0002_sync"]


def test_longer_sequences_only_where_there_are_frames(mini_benchmarks: Path) -> None:
    found = benchmark_sequences("vspw", mini_benchmarks / "vspw", FrameCounts((5, 7, 14)))
    assert [len(each.frames) for each in found.sequences] == [7, 14, 7, 7, 14]
    only_long = benchmark_sequences("vspw", mini_benchmarks / "vspw", FrameCounts((14,)))
    assert len(only_long.sequences) == 2
    assert only_long.dropped == {"fewer than 14 frames up to the target": 3}


def test_a_sequence_is_cut_to_the_frames_before_its_label(mini_benchmarks: Path) -> None:
    """Of more frames than are used, the last ones: the label belongs to the last of all."""
    (whole, *_) = benchmark_sequences("vspw", mini_benchmarks / "vspw", FrameCounts((7,))).sequences
    (cut,) = choose([whole], FrameCounts((3,)), Counter()).sequences
    assert cut.frames == whole.frames[-3:]


def test_a_snippet_has_nineteen_frames_before_its_label(mini_benchmarks: Path) -> None:
    with pytest.raises(DatasetError, match=r"no sequence of cityscapes.*2 fewer than 8 frames"):
        benchmark_sequences("cityscapes", mini_benchmarks / "cityscapes", FrameCounts((8,)))


def test_kitti_counts_what_it_drops(tree: Callable[[str], Path]) -> None:
    root = tree("kitti")
    listed = root / "eigen_test_files.txt"
    lines = listed.read_text().splitlines()
    early = lines[0].replace("0000000021", "0000000018")
    split = root.parent / "split.txt"
    split.write_text("\n".join([*lines, early, ""]))
    found = benchmark_sequences("kitti", root, SEVEN, split)
    assert len(found.sequences) == 2
    assert found.dropped == {"no ground truth": 1, "target before frame 19": 1}


def test_frame_numbers_stop_at_the_first_frame() -> None:
    assert list(frame_numbers(19, 3, 0, 7)) == [1, 4, 7, 10, 13, 16, 19]
    assert list(frame_numbers(19, 3, 0, 9)) == [1, 4, 7, 10, 13, 16, 19]
    assert list(frame_numbers(21, 2, 9, 3)) == [17, 19, 21]


@pytest.mark.parametrize(
    ("benchmark", "lost"),
    [
        ("vspw", "data/101_clip1/mask/00000019.png"),
        ("vspw", "data/101_clip1/mask/00000004.png"),
        ("vspw", "data/101_clip1/origin/00000003.jpg"),
        ("vspw", "data/101_clip1/origin"),
        ("vspw", "val.txt"),
        ("cityscapes", "leftImg8bit_sequence/val/aachen/aachen_000000_000010_leftImg8bit.png"),
        ("kitti", "2011_09_26/2011_09_26_drive_0002_sync/image_02/data/0000000013.png"),
        ("kitti", "eigen_test_files.txt"),
        ("kitti", "val/2011_09_26_drive_0002_sync/proj_depth/groundtruth/image_02/0000000021.png"),
    ],
)
def test_missing_files_are_refused_by_name(
    benchmark: BenchmarkName, lost: str, tree: Callable[[str], Path]
) -> None:
    root = tree(benchmark)
    path = root / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(DatasetError, match=Path(lost).name):
        benchmark_sequences(benchmark, root, SEVEN)


def test_a_target_listed_twice_is_refused(tree: Callable[[str], Path]) -> None:
    root = tree("vspw")
    (root / "val.txt").write_text("100_clip0\n100_clip0\n")
    with pytest.raises(DatasetError, match="100_clip0_00000019 is listed 2 times"):
        benchmark_sequences("vspw", root, SEVEN)


def test_vspw_classes_start_at_one(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    cv2.imwrite(str(path), np.array([[0, 1, 124, 125, 254, 255]], np.uint8))
    assert read_label("vspw", str(path), (1, 6)).tolist() == [[255, 0, 123, 255, 255, 255]]


def test_cityscapes_train_ids(tmp_path: Path) -> None:
    path = tmp_path / "labels.png"
    cv2.imwrite(str(path), np.array([[0, 7, 8, 11, 26, 33, 29, 255]], np.uint8))
    assert read_label("cityscapes", str(path), (1, 8)).tolist() == [[255, 0, 1, 2, 13, 18, 255, 255]]


@pytest.mark.parametrize(
    ("benchmark", "label", "message"),
    [
        ("cityscapes", np.full((4, 6), 34, np.uint8), "class id 34"),
        ("vspw", np.full((4, 6), 300, np.uint16), "class id 300"),
        ("vspw", np.zeros((4, 7), np.uint8), "4 x 7 pixels, its frame 4 x 6"),
        ("cityscapes", np.zeros((4, 6, 3), np.uint8), "3 channels"),
        ("kitti", np.zeros((351, 1216), np.uint16), "KB crop needs 352 x 1216"),
    ],
)
def test_wrong_labels_are_refused_by_name(
    benchmark: BenchmarkName, label: np.ndarray, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "wrong.png"
    cv2.imwrite(str(path), label)
    with pytest.raises(DatasetError, match=message) as refused:
        read_label(benchmark, str(path), (4, 6))
    assert str(path) in str(refused.value)


def test_depth_counts_in_the_garg_region_and_range_only(tmp_path: Path) -> None:
    stored = np.full((375, 1242), 10 * 256, np.uint16)
    stored[200, 600:604] = [0, 80 * 256, 79 * 256, 1]
    path = tmp_path / "depth.png"
    cv2.imwrite(str(path), stored)
    depth = read_label("kitti", str(path), (352, 1216))
    assert depth[200 - 23, 600 - 13 : 604 - 13].tolist() == [0.0, 0.0, 79.0, 1 / 256]
    inside = garg_region(352, 1216)
    assert (depth[~inside] == 0).all()
    assert np.flatnonzero(inside.max(1))[[0, -1]].tolist() == [143, 348]
    assert np.flatnonzero(inside.max(0))[[0, -1]].tolist() == [43, 1171]


def test_kitti_frames_are_cropped_at_the_bottom(mini_benchmarks: Path) -> None:
    path = mini_benchmarks / "kitti/2011_09_26/2011_09_26_drive_0002_sync/image_02/data/0000000021.png"
    whole = cv2.imread(str(path))
    assert whole is not None
    whole = whole[:, :, ::-1]
    np.testing.assert_array_equal(read_frame("kitti", str(path)), whole[23:, 13 : 13 + 1216])


def test_damaged_pictures_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "frame.jpg"
    path.write_bytes(b"\xff\xd8 no picture")
    with pytest.raises(DatasetError, match=r"frame\.jpg is damaged"):
        read_frame("vspw", str(path))
    with pytest.raises(DatasetError, match=r"frame\.jpg is damaged"):
        read_label("vspw", str(path), (4, 6))
    with pytest.raises(DatasetError, match=r"gone\.jpg is missing"):
        read_frame("vspw", str(tmp_path / "gone.jpg"))


def test_depth_of_another_drive_is_refused_although_the_crops_agree(tmp_path: Path) -> None:
    frame, depth = tmp_path / "frame.png", tmp_path / "depth.png"
    cv2.imwrite(str(frame), np.zeros((375, 1242, 3), np.uint8))
    cv2.imwrite(str(depth), np.zeros((370, 1226), np.uint16))
    with pytest.raises(
        DatasetError, match=r"depth.png has 370 x 1226 pixels, its frame .*frame.png 375 x 1242"
    ):
        check_depth_belongs(str(frame), str(depth))
    cv2.imwrite(str(depth), np.zeros((375, 1242), np.uint8))
    with pytest.raises(DatasetError, match=r"depth.png has 8 bits a pixel: depth has 16"):
        read_depth(str(depth), (352, 1216))


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_trees_as_people_have_them(benchmark: BenchmarkName, tree: Callable[[str], Path]) -> None:
    """Hidden files of macOS and Windows, suffixes in capitals, and byte-order marks change nothing."""
    root = tree(benchmark)
    expected = benchmark_sequences(benchmark, root, SEVEN)
    for path in [each for each in root.rglob("*") if each.is_file()]:
        if path.suffix == ".txt":
            path.write_text(path.read_text(), encoding="utf-8-sig")
            continue
        path.rename(path.with_suffix(path.suffix.upper()))
        path.with_name(f"._{path.name}").write_bytes(b"macOS")
    for folder in [each for each in root.rglob("*") if each.is_dir()]:
        (folder / ".DS_Store").write_bytes(b"macOS")
        (folder / "Thumbs.db").write_bytes(b"Windows")
        (folder / ".checkpoints").mkdir()
    found = benchmark_sequences(benchmark, root, SEVEN)
    assert [
        [Path(frame).with_suffix(Path(frame).suffix.lower()) for frame in each.frames]
        for each in found.sequences
    ] == [list(map(Path, each.frames)) for each in expected.sequences]
    assert [each.label.lower() for each in found.sequences] == [
        each.label.lower() for each in expected.sequences
    ]
    assert [each.sequence_id for each in found.sequences] == [each.sequence_id for each in expected.sequences]
    last = found.sequences[-1]
    shape = read_frame(benchmark, last.frames[-1]).shape[:2]
    assert read_label(benchmark, last.label, (shape[0], shape[1])).shape == shape
    if benchmark != "kitti":  # its frames are listed by name
        some = Path(last.label) if benchmark == "cityscapes" else Path(last.frames[-1])
        shutil.copy(some, some.with_suffix(some.suffix.lower()))
        with pytest.raises(DatasetError, match="twice, with its ending in capitals and without"):
            benchmark_sequences(benchmark, root, SEVEN)


def test_kitti_converted_to_jpeg_under_its_list_of_png(tree: Callable[[str], Path]) -> None:
    root = tree("kitti")
    expected = benchmark_sequences("kitti", root, SEVEN)
    for path in list(root.rglob("image_02/data/*.png")):
        cv2.imwrite(str(path.with_suffix(".jpg")), cv2.imread(str(path)))
        path.unlink()
    found = benchmark_sequences("kitti", root, SEVEN)
    assert [[Path(frame).stem for frame in each.frames] for each in found.sequences] == [
        [Path(frame).stem for frame in each.frames] for each in expected.sequences
    ]
    assert all(frame.endswith(".jpg") for each in found.sequences for frame in each.frames)
    assert [each.label for each in found.sequences] == [each.label for each in expected.sequences]
