"""Which frames heads are trained on, and how they are cut, on copies of the miniature trees."""

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from deltacache.pipeline.benchmarks.frames import garg_region, label_halves, read_label
from deltacache.pipeline.benchmarks.training_frames import labelled_frames, load_frame, picture_frames
from deltacache.schemas.benchmarks import BENCHMARKS, IGNORE
from deltacache.schemas.errors import DatasetError

DRIVE = "2011_09_28_drive_0002_sync"


@pytest.fixture
def trees(mini_benchmarks: Path, tmp_path: Path) -> Path:
    """The miniature trees under the names of training splits, beside those of validation."""
    root = tmp_path / "trees"
    for name in BENCHMARKS:
        shutil.copytree(mini_benchmarks / name, root / name)
    (root / "vspw" / "train.txt").write_text("102_clip2\n\n100_clip0\n")
    shutil.copytree(root / "cityscapes/gtFine/val", root / "cityscapes/gtFine/train")
    shutil.copytree(root / "cityscapes/leftImg8bit_sequence/val", root / "cityscapes/leftImg8bit/train")
    return root


def test_val_are_the_frames_that_are_scored(mini_benchmarks: Path) -> None:
    found = {name: labelled_frames(name, mini_benchmarks / name, "val") for name in BENCHMARKS}
    assert {name: len(each.frames) for name, each in found.items()} == {
        "vspw": 5,
        "cityscapes": 2,
        "kitti": 2,
    }
    assert found["kitti"].dropped == {"no ground truth": 1}
    assert found["vspw"].frames[0].frame.endswith("vspw/data/100_clip0/origin/00000019.jpg")
    assert found["vspw"].frames[0].label == str(mini_benchmarks / "vspw/data/100_clip0/mask/00000019.png")


def test_vspw_takes_every_mask_of_the_listed_videos(trees: Path) -> None:
    frames = labelled_frames("vspw", trees / "vspw", "train").frames
    masks = [sorted((trees / "vspw/data" / video / "mask").iterdir()) for video in ("102_clip2", "100_clip0")]
    assert [each.label for each in frames] == [str(path) for video in masks for path in video]
    assert all(Path(each.frame).stem == Path(each.label or "").stem for each in frames)


def test_cityscapes_takes_still_pictures_or_sequences(trees: Path) -> None:
    root = trees / "cityscapes"
    stills = labelled_frames("cityscapes", root, "train").frames
    assert [Path(each.frame).relative_to(root).as_posix() for each in stills] == [
        "leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png",
        "leftImg8bit/train/bremen/bremen_000003_000019_leftImg8bit.png",
    ]
    shutil.rmtree(root / "leftImg8bit")
    shutil.copytree(root / "leftImg8bit_sequence/val", root / "leftImg8bit_sequence/train")
    moving = labelled_frames("cityscapes", root, "train").frames
    assert [each.frame.replace("leftImg8bit_sequence", "leftImg8bit") for each in moving] == [
        each.frame for each in stills
    ]


def image(drive: str, number: int) -> str:
    return f"{drive[:10]}/{drive}/image_02/data/{number:010d}.png"


def line(drive: str, number: int) -> str:
    """A line of a list."""
    return f"{image(drive, number)} {drive}/proj_depth/groundtruth/image_02/{number:010d}.png 721.5\n"


def test_kitti_leaves_the_drives_of_the_test_list_out(trees: Path, tmp_path: Path) -> None:
    root = trees / "kitti"
    depths = sorted((root / "train").rglob("*.png"))
    left_out = f"{len(depths)} of drives that eigen_test_files.txt tests.*--split val"
    with pytest.raises(DatasetError, match=left_out):
        labelled_frames("kitti", root, "train")
    elsewhere = (root / "eigen_test_files.txt").rename(tmp_path / "tested.txt")
    with pytest.raises(DatasetError, match=f"{len(depths)} of drives that tested.txt tests"):
        labelled_frames("kitti", root, "train", kitti_test=elsewhere)
    elsewhere.write_text(line("2011_09_26_drive_0002_sync", 21))
    found = labelled_frames("kitti", root, "train", kitti_test=elsewhere)
    assert [each.label for each in found.frames] == [str(path) for path in depths]
    pictures = root / "2011_09_28" / DRIVE / "image_02/data"
    assert [each.frame for each in found.frames] == [str(pictures / path.name) for path in depths]
    assert found.dropped == {"of drives that tested.txt tests": 0}
    elsewhere.write_text(f"{image(DRIVE, 5).replace('_sync', '_extract')} None 721.5\n")
    with pytest.raises(DatasetError, match=f"{len(depths)} of drives that tested.txt tests"):
        labelled_frames("kitti", root, "train", kitti_test=elsewhere)


def test_kitti_is_not_trained_without_knowing_its_test_frames(trees: Path, tmp_path: Path) -> None:
    root, listed = trees / "kitti", tmp_path / "list.txt"
    (root / "eigen_test_files.txt").unlink()
    listed.write_text(line(DRIVE, 18))
    for training in (None, listed):
        with pytest.raises(DatasetError, match=r"eigen_test_files\.txt is missing.*--kitti-test FILE"):
            labelled_frames("kitti", root, "train", training)
    with pytest.raises(DatasetError, match=r"lost\.txt is missing.*--kitti-test FILE"):
        labelled_frames("kitti", root, "train", listed, tmp_path / "lost.txt")
    listed.write_text("\n \n")
    with pytest.raises(DatasetError, match=r"list\.txt names no frame: give a list of lines <image> <depth>"):
        labelled_frames("kitti", root, "train", kitti_test=listed)


def test_a_list_of_kitti_loses_its_test_drives(trees: Path, tmp_path: Path) -> None:
    root, listed, tested = trees / "kitti", tmp_path / "list.txt", tmp_path / "tested.txt"
    other = "2011_09_26_drive_0002_sync"
    listed.write_text(line(DRIVE, 18) + line(other, 21) + f"{image(DRIVE, 20)} None 721.5\n")
    tested.write_text(line(other, 7))
    found = labelled_frames("kitti", root, "train", listed, tested)
    depth = f"{root}/train/{DRIVE}/proj_depth/groundtruth/image_02/0000000018.png"
    assert [(each.frame, each.label) for each in found.frames] == [(f"{root / image(DRIVE, 18)}", depth)]
    assert found.dropped == {"of drives that tested.txt tests": 1, "no ground truth": 1}
    assert found.lists == (tested, listed)


def test_the_test_list_itself_is_nothing_to_train_on(trees: Path) -> None:
    root = trees / "kitti"
    listed = root / "eigen_test_files.txt"
    with pytest.raises(
        DatasetError, match=r"no frame of kitti's.*\(3 of drives that eigen_test_files\.txt tests\)"
    ):
        labelled_frames("kitti", root, "train", listed)
    with pytest.raises(
        DatasetError, match=r"--split val takes the test frames: give their list with --kitti-test"
    ):
        labelled_frames("kitti", root, "val", listed)
    assert labelled_frames("kitti", root, "val", kitti_test=listed).lists == (listed,)


@pytest.mark.parametrize(
    "bad",
    [
        image(DRIVE, 18),
        f"2011_09_28/{DRIVE}/image_02/0000000018.png d.png 721.5",
        "0000000018.png d.png 721.5",
        f"{image(DRIVE, 18).replace('0000000018', 'first')} d.png 721.5",
        f"2011_09_28/{DRIVE}/image_02/../data/0000000018.png d.png 721.5",
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_a_line_that_tells_no_drive_is_refused_with_its_number(
    trees: Path, tmp_path: Path, bad: str, training: bool
) -> None:
    root, listed = trees / "kitti", tmp_path / "list.txt"
    listed.write_text(f"{line(DRIVE, 18)}\n\n{bad}\n")
    message = (
        r"list\.txt, line 4: .* must be <image> <depth> <focal>, the image <date>/<drive>/<camera>/data/"
    )
    lists = {"kitti_split": listed} if training else {"kitti_test": listed}
    for split in ("train",) if training else ("train", "val"):
        with pytest.raises(DatasetError, match=message):
            labelled_frames("kitti", root, split, **lists)


@pytest.mark.parametrize("split", ["train", "val"])
def test_missing_labels_of_cityscapes_are_named(trees: Path, split) -> None:
    place = trees / "cityscapes/gtFine" / split
    for path in place.rglob("*_labelIds.png"):
        path.rename(path.with_name(path.name.replace("labelIds", "labelTrainIds")))
    with pytest.raises(
        DatasetError, match=rf"gtFine/{split} holds no <city>/\*_gtFine_labelIds\.png: unpack gtFine"
    ):
        labelled_frames("cityscapes", trees / "cityscapes", split)


@pytest.mark.parametrize(
    ("name", "missing"), [("vspw", "train.txt"), ("cityscapes", "gtFine/train"), ("kitti", "train")]
)
def test_a_tree_without_the_training_split_says_so(mini_benchmarks: Path, tmp_path: Path, name, missing: str):
    shutil.copy(mini_benchmarks / "kitti" / "eigen_test_files.txt", tmp_path)
    with pytest.raises(DatasetError, match=rf"{missing} is missing.*add --split val"):
        labelled_frames(name, tmp_path, "train")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_mirrored_frame_is_the_frame_of_a_mirrored_file(trees: Path, name) -> None:
    frames = labelled_frames(name, trees / name, "val")
    mirrored = load_frame(frames, 0, 64, flip=True)
    for path in (frames.frames[0].frame, frames.frames[0].label):
        written = Path(path).with_suffix(".png")
        cv2.imwrite(str(written), np.ascontiguousarray(cv2.imread(path, cv2.IMREAD_UNCHANGED)[:, ::-1]))
        if written != Path(path):
            written.replace(path)  # the reader looks at the content
    plain = load_frame(frames, 0, 64, flip=False)
    if name == "kitti":  # the Garg region is not symmetric
        assert (plain.label > 0).mean() == pytest.approx((mirrored.label > 0).mean(), rel=0.05)
    else:
        np.testing.assert_array_equal(mirrored.label, plain.label)
    np.testing.assert_array_equal(mirrored.crops, plain.crops)


def test_training_learns_depth_also_where_it_is_not_scored(trees: Path, tmp_path: Path) -> None:
    root, listed, tested = trees / "kitti", tmp_path / "list.txt", tmp_path / "tested.txt"
    listed.write_text(line(DRIVE, 30))
    tested.write_text(line("2011_09_26_drive_0002_sync", 21))
    learned = load_frame(labelled_frames("kitti", root, "train", listed, tested), 0, 64, flip=False)
    scored = load_frame(labelled_frames("kitti", root, "val", kitti_test=listed), 0, 64, flip=False)
    inside = label_halves(garg_region(352, 1216), scored.split, False)
    np.testing.assert_array_equal(np.where(inside, learned.label, 0), scored.label)
    assert (learned.label[~inside] > 0).any()


def test_labels_are_those_of_the_benchmark(mini_benchmarks: Path) -> None:
    frames = labelled_frames("vspw", mini_benchmarks / "vspw", "val")
    loaded = load_frame(frames, 1, 64, flip=False)
    whole = read_label("vspw", frames.frames[1].label or "", (72, 128))
    np.testing.assert_array_equal(np.concatenate(list(loaded.label), 1), whole)
    assert loaded.crops.shape == (2, 64, 64, 3)
    assert loaded.label.max() < 124 or loaded.label.max() == IGNORE


def test_pictures_are_all_but_labels(mini_benchmarks: Path, tmp_path: Path) -> None:
    found = picture_frames(mini_benchmarks / "vspw")
    assert len(found.frames) == len(list((mini_benchmarks / "vspw").rglob("*.jpg"))) > 100
    assert all(each.label is None and "/origin/" in each.frame for each in found.frames)
    assert load_frame(found, 0, 64, flip=False).label is None
    with pytest.raises(DatasetError, match="holds no pictures"):
        picture_frames(tmp_path)


@pytest.mark.parametrize("suffix", ["webp", "bmp", "avif", "JPG"])
def test_pictures_of_other_kinds_and_none_that_are_hidden(suffix: str, tmp_path: Path) -> None:
    picture = np.full((80, 96, 3), (200, 120, 40), np.uint8)
    Image.fromarray(picture).save(tmp_path / f"a.{suffix}")
    for hidden in ("._a.jpg", ".b.png", ".DS_Store", "Thumbs.db", ".cache/c.png", "mask/d.png"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).write_bytes(b"no picture")
    found = picture_frames(tmp_path)
    assert [each.frame for each in found.frames] == [str(tmp_path / f"a.{suffix}")]
    crops = load_frame(found, 0, 64, flip=False).crops
    assert np.abs(crops.reshape(-1, 3).astype(int) - (200, 120, 40)).max() <= 6


def test_training_trees_in_capitals_and_with_hidden_files(trees: Path, tmp_path: Path) -> None:
    tested = tmp_path / "test.txt"
    tested.write_text(line("2011_10_03_drive_0001_sync", 20), encoding="utf-8-sig")

    def listed() -> list[tuple[str, str]]:
        found = [
            labelled_frames(name, trees / name, "train", kitti_test=tested).frames for name in BENCHMARKS
        ]
        return [(each.frame.lower(), str(each.label).lower()) for frames in found for each in frames]

    expected = listed()
    for path in [each for each in trees.rglob("*") if each.suffix in (".png", ".jpg")]:
        path.rename(path.with_suffix(path.suffix.upper()))
        path.with_name(f"._{path.name}").write_bytes(b"macOS")
    for folder in [each for each in trees.rglob("*") if each.is_dir()]:
        (folder / ".DS_Store").write_bytes(b"macOS")
    assert listed() == expected
