"""Frames of KITTI that heads may learn from: none of a drive that the test list names (Eigen et al. 2014)."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deltacache.pipeline.benchmarks.files import existing, existing_picture, names_in
from deltacache.pipeline.benchmarks.kitti import depth_file
from deltacache.pipeline.benchmarks.kitti_lists import SPLIT_FILE, ListedImage, drive_of, listed_images
from deltacache.schemas.errors import DatasetError

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
