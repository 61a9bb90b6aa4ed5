"""KITTI depth on the Eigen test split (Eigen et al. 2014): raw drives and annotated depth, 10 frames per second.

The list's lines are ``<image> <depth> <focal>``, ``None`` where there is no ground truth; depth lies below
``train/`` or ``val/``. The list is the user's data.
"""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from deltacache.pipeline.benchmarks.files import (
    existing,
    existing_label,
    existing_picture,
    names_in,
    numbered_lines,
    safe_id,
)
from deltacache.pipeline.benchmarks.windows import FrameCounts, SequenceSet, choose, frame_numbers
from deltacache.schemas.benchmarks import SPACING_S, LabelledSequence
from deltacache.schemas.errors import DatasetError

# ----------------------------------------------------------------------------------------------------
# Lists of KITTI's frames, which are the user's data: lines ``<image> <depth> <focal>``.
#
# An image is ``<date>/<drive>/<camera>/data/<number>.png``, a depth map ``<drive>/proj_depth/...``, or
# ``None`` where there is no ground truth.
# ----------------------------------------------------------------------------------------------------


SPLIT_FILE = "eigen_test_files.txt"
_DRIVE = re.compile(r"\d{4}_\d{2}_\d{2}_drive_\d{4}")
_PARTS = 4  # drive, camera, data, number


@dataclass(frozen=True, slots=True)
class ListedImage:
    """A line of a list.

    Attributes:
        image: its place below the root.
        depth: place of its ground truth below ``train/`` or ``val/``, if there is any.
    """

    image: str
    depth: str | None

    @property
    def drive(self) -> str:
        return drive_of(PurePosixPath(self.image).parts[-_PARTS])


def listed_images(listed: Path) -> list[ListedImage]:
    """The lines of a list, in their order.

    Raises:
        DatasetError: it is missing or empty, or a line does not tell image, drive and depth: names the line.
    """
    found = [_read(listed, number, line) for number, line in numbered_lines(listed)]
    if not found:
        raise DatasetError(f"{listed} names no frame: give a list of lines <image> <depth> <focal>")
    return found


def drive_of(folder: str) -> str:
    """A drive's date and number: its synchronised and its raw folder hold the same frames."""
    match = _DRIVE.match(folder)
    return match[0] if match else folder


def _read(listed: Path, number: int, line: str) -> ListedImage:
    image, depth, *_ = [*line.split(), "", ""]
    parts = PurePosixPath(image).parts
    placed = len(parts) >= _PARTS and parts[-2] == "data" and ".." not in parts
    if not (depth and placed and PurePosixPath(image).stem.isdecimal()):
        raise DatasetError(
            f"{listed}, line {number}: {line!r} must be <image> <depth> <focal>, the image "
            "<date>/<drive>/<camera>/data/<number>.png"
        )
    return ListedImage(image, None if depth == "None" else depth)


_FIRST_TARGET, _FRAME_STEP = 19, 2


def kitti_sequences(root: Path, counts: FrameCounts, split: Path | None = None) -> SequenceSet:
    """Sequences that end on the images of the list that have ground truth and a number of at least 19.

    Args:
        split: the list; ``eigen_test_files.txt`` in ``root`` if not given.

    Raises:
        DatasetError: a file is missing, or a line cannot be read.
    """
    dropped: Counter[str] = Counter()
    listed = split or root / SPLIT_FILE
    return choose(list(_listed(root, listed, counts.counts[-1], dropped)), counts, dropped)


def _listed(root: Path, listed: Path, most: int, dropped: Counter[str]) -> Iterator[LabelledSequence]:
    for each in listed_images(listed):
        if each.depth is None:
            dropped["no ground truth"] += 1
        elif int(Path(each.image).stem) < _FIRST_TARGET:
            dropped[f"target before frame {_FIRST_TARGET}"] += 1
        else:
            yield _sequence(root / each.image, depth_file(root, each.depth), most)


def _sequence(image: Path, depth: Path, most: int) -> LabelledSequence:
    image = existing_picture(image)
    wanted = frame_numbers(
        int(image.stem),
        _FRAME_STEP,
        min(int(path.stem) for path in image.parent.iterdir() if path.stem.isdecimal()),
        most,
    )
    drive, camera = image.parts[-4], image.parts[-3]
    return LabelledSequence(
        sequence_id=safe_id(f"{drive}_{camera}_{image.stem}"),
        group=drive,
        frames=tuple(
            str(existing_picture(image.with_name(f"{at:0{len(image.stem)}d}{image.suffix}"))) for at in wanted
        ),
        label=str(depth),
        spacing_s=SPACING_S["kitti"],
    )


def depth_file(root: Path, depth: str) -> Path:
    """Where a depth map of the list lies.

    Raises:
        DatasetError: neither below ``train/`` nor below ``val/``.
    """
    for part in ("train", "val"):
        with suppress(DatasetError):
            return existing_label(root / part / depth)
    raise DatasetError(
        f"{depth} is neither in {root / 'train'} nor in {root / 'val'}: get KITTI's annotated depth maps, or write "
        "None in the list where there are none"
    )


# ----------------------------------------------------------------------------------------------------
# Frames of KITTI that heads may learn from: none of a drive that the test list names (Eigen et al. 2014).
# ----------------------------------------------------------------------------------------------------


Pair = tuple[Path, Path]
"""An image and its depth map."""


@dataclass(frozen=True, slots=True)
class KittiTraining:
    """What is learned from, and what is not.

    Attributes:
        lists: the files that say so: of test frames and, if there is one, of training frames.
        listed: the training frames; without them all that have depth below ``train/``.
        tested: drives of the test frames, which are left out of either.
    """

    root: Path
    lists: tuple[Path, ...]
    listed: tuple[ListedImage, ...] | None
    tested: frozenset[str]

    def frames(self, dropped: Counter[str]) -> Iterator[Pair]:
        """The frames in a fixed order; what is left out is counted, a 0 says that drives were compared.

        Raises:
            DatasetError: a file is missing.
        """
        dropped[self._reason] = 0
        return self._of_folders(dropped) if self.listed is None else self._of_list(self.listed, dropped)

    @property
    def _reason(self) -> str:
        return f"of drives that {self.lists[0].name} tests"

    def _of_list(self, listed: tuple[ListedImage, ...], dropped: Counter[str]) -> Iterator[Pair]:
        for each in listed:
            if each.drive in self.tested:
                dropped[self._reason] += 1
            elif each.depth is None:
                dropped["no ground truth"] += 1
            else:
                yield existing_picture(self.root / each.image), depth_file(self.root, each.depth)

    def _of_folders(self, dropped: Counter[str]) -> Iterator[Pair]:
        """The annotated depth maps of the left colour camera."""
        for drive in sorted(existing(self.root / "train").iterdir()):
            if drive.name.startswith(".") or not drive.is_dir():
                continue
            folder = drive / "proj_depth" / "groundtruth" / "image_02"
            names = names_in(folder, ".png")
            if drive_of(drive.name) in self.tested:
                dropped[self._reason] += len(names)
                continue
            pictures = self.root / drive.name[:10] / drive.name / "image_02" / "data"
            for name in names:
                yield existing_picture(pictures / name), folder / name


def kitti_training(root: Path, listed: Path | None, tested: Path | None) -> KittiTraining:
    """Read the lists: ``tested`` is ``eigen_test_files.txt`` in ``root`` if it is not given.

    Raises:
        DatasetError: there is no list of test frames, or a line cannot be read.
    """
    path = tested or root / SPLIT_FILE
    if not path.is_file():
        raise DatasetError(
            f"{path} is missing: training leaves out all drives of KITTI's test frames and needs their list; put it "
            "there, or give it with --kitti-test FILE"
        )
    drives = frozenset(each.drive for each in listed_images(path))
    if listed is None:
        return KittiTraining(root, (path,), None, drives)
    return KittiTraining(root, (path, listed), tuple(listed_images(listed)), drives)
