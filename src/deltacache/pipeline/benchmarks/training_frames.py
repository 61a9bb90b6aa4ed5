"""Labelled frames that heads are trained on, one at a time, with the readers and geometry of the benchmarks.

``train`` is the training split: VSPW's ``train.txt``, Cityscapes' ``gtFine/train``, KITTI's ``train/`` depth maps or
a list of them, without the drives of its test list. ``val`` is what the benchmark scores: for trees that hold nothing
else.
Shapes: H x W a frame, S input size, C crops, H' x W' a half of the label.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from deltacache.pipeline.benchmarks.cityscapes import LABEL_SUFFIX, labelled_cities
from deltacache.pipeline.benchmarks.files import existing, existing_picture, lines_of, names_in
from deltacache.pipeline.benchmarks.frames import (
    INVALID_DEPTH,
    CropSplit,
    check_depth_belongs,
    crop_frames,
    label_halves,
    read_depth,
    read_frame,
    read_label,
    resize_frame,
    split_of,
)
from deltacache.pipeline.benchmarks.kitti import SPLIT_FILE, KittiTraining, kitti_training
from deltacache.pipeline.benchmarks.layouts import benchmark_sequences
from deltacache.pipeline.benchmarks.windows import FrameCounts
from deltacache.schemas.benchmarks import IGNORE, BenchmarkName
from deltacache.schemas.errors import DatasetError

SplitName = Literal["train", "val"]
_PICTURES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".avif"})
_LABEL_FOLDERS = frozenset({"mask", "gtFine", "gtCoarse", "proj_depth", "groundtruth"})


@dataclass(frozen=True, slots=True)
class TrainingFrame:
    """A picture and its label; ``None`` where the picture itself is what is learned."""

    frame: str
    label: str | None


@dataclass(frozen=True, slots=True)
class TrainingFrames:
    """What is trained on.

    Attributes:
        benchmark: ``None`` for pictures without labels.
        dropped: how many frames were left out for which reason.
        lists: files that say which frames these are.
        scored: whether labels are as they are scored; else KITTI's also hold what lies outside the Garg region.
    """

    benchmark: BenchmarkName | None
    frames: tuple[TrainingFrame, ...]
    dropped: dict[str, int]
    lists: tuple[Path, ...] = ()
    scored: bool = False


@dataclass(frozen=True, slots=True, repr=False)
class LoadedFrame:
    """One frame as arrays: ``crops`` (C, S, S, 3) uint8, ``label`` (C, H', W') class ids or metres.

    A whole frame is one crop of any shape, and has no ``split``.
    """

    split: CropSplit | None
    crops: np.ndarray
    label: np.ndarray | None


def labelled_frames(
    benchmark: BenchmarkName,
    root: Path,
    split: SplitName,
    kitti_split: Path | None = None,
    kitti_test: Path | None = None,
) -> TrainingFrames:
    """List the frames below ``root``, in a fixed order.

    Args:
        kitti_split: list of KITTI's training frames, instead of all that have depth below ``train/``.
        kitti_test: list of KITTI's test frames, ``eigen_test_files.txt`` in ``root`` if not given: ``train`` leaves
            out all frames of their drives, ``val`` takes them.

    Raises:
        DatasetError: a file is missing or a line cannot be read, or no frame is left; says what other split there is.
    """
    existing(root)
    if split == "val":
        return _scored(benchmark, root, kitti_split, kitti_test)
    kitti = kitti_training(root, kitti_split, kitti_test) if benchmark == "kitti" else None
    dropped: Counter[str] = Counter()
    try:
        frames = tuple(_training_split(benchmark, root, kitti, dropped))
    except DatasetError as error:
        raise DatasetError(f"{error}. For a tree that has only what is scored, add --split val") from None
    if not frames:
        reasons = "; ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
        raise DatasetError(
            f"{root} has no frame of {benchmark}'s training split ({reasons or 'no label'}): give the training data, "
            "or, for a tree that has only what is scored, add --split val"
        )
    lists = kitti.lists if kitti else (root / "train.txt",) if benchmark == "vspw" else ()
    return TrainingFrames(benchmark, frames, dict(dropped), lists)


def picture_frames(folder: Path) -> TrainingFrames:
    """All pictures below a folder of frames or a benchmark's root, in the order of their names; no labels, and nothing
    hidden, such as the ``._*`` files of macOS.

    Raises:
        DatasetError: there are none.
    """
    found = sorted(
        path
        for path in existing(folder).rglob("*")
        if path.suffix.lower() in _PICTURES
        and not _LABEL_FOLDERS & set(path.relative_to(folder).parts)
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )
    if not found:
        raise DatasetError(
            f"{folder} holds no pictures ({', '.join(sorted(_PICTURES))}): give a folder of frames"
        )
    return TrainingFrames(None, tuple(TrainingFrame(str(path), None) for path in found), {})


def load_frame(frames: TrainingFrames, number: int, size: int, *, flip: bool) -> LoadedFrame:
    """Read, mirror if asked, resize and cut a frame and its label.

    Raises:
        DatasetError: a file is missing or damaged, or frame and label differ in size.
    """
    benchmark, frame = frames.benchmark, frames.frames[number]
    picture = read_frame(benchmark or "vspw", frame.frame)
    shape = (picture.shape[0], picture.shape[1])
    split = split_of(*shape, size)
    label, ignore = None, IGNORE
    if benchmark == "kitti" and frame.label is not None:
        check_depth_belongs(frame.frame, frame.label)
        label, ignore = read_depth(frame.label, shape, garg=frames.scored), INVALID_DEPTH
    elif benchmark is not None and frame.label is not None:
        label = read_label(benchmark, frame.label, shape)
    if flip:
        picture = np.ascontiguousarray(picture[:, ::-1])
        label = None if label is None else np.ascontiguousarray(label[:, ::-1])
    halves = None if label is None else label_halves(label, split, ignore)
    return LoadedFrame(split, crop_frames(resize_frame(picture, split)[None], split)[:, 0], halves)


def _scored(
    benchmark: BenchmarkName, root: Path, kitti_split: Path | None, kitti_test: Path | None
) -> TrainingFrames:
    if kitti_split is not None:
        raise DatasetError(
            f"{kitti_split} is a list of training frames, but --split val takes the test frames: give their list with "
            "--kitti-test FILE, or leave --split val out"
        )
    found = benchmark_sequences(benchmark, root, FrameCounts((1,)), kitti_test)
    frames = tuple(TrainingFrame(each.frames[-1], each.label) for each in found.sequences)
    lists = {"vspw": (root / "val.txt",), "kitti": (kitti_test or root / SPLIT_FILE,)}.get(benchmark, ())
    return TrainingFrames(benchmark, frames, dict(found.dropped), lists, scored=True)


def _training_split(
    benchmark: BenchmarkName, root: Path, kitti: KittiTraining | None, dropped: Counter[str]
) -> Iterator[TrainingFrame]:
    if kitti is not None:
        yield from (TrainingFrame(str(image), str(depth)) for image, depth in kitti.frames(dropped))
    elif benchmark == "vspw":
        yield from _vspw(root)
    else:
        yield from _cityscapes(root)


def _vspw(root: Path) -> Iterator[TrainingFrame]:
    """Every masked frame of the videos of ``train.txt``."""
    for video in lines_of(root / "train.txt"):
        folder = root / "data" / video
        for mask in names_in(folder / "mask", ".png"):
            frame = existing_picture(folder / "origin" / f"{Path(mask).stem}.jpg")
            yield TrainingFrame(str(frame), str(folder / "mask" / mask))


def _cityscapes(root: Path) -> Iterator[TrainingFrame]:
    """Every finely labelled frame; pictures from ``leftImg8bit`` or, without it, the sequences."""
    places = [root / name / "train" for name in ("leftImg8bit", "leftImg8bit_sequence")]
    pictures = next((place for place in places if place.is_dir()), places[0])
    for city in labelled_cities(root, "train"):
        for name in names_in(city, LABEL_SUFFIX):
            picture = pictures / city.name / f"{name[: -len(LABEL_SUFFIX)]}_leftImg8bit.png"
            yield TrainingFrame(str(existing_picture(picture)), str(city / name))
