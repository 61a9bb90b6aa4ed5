"""Lists of KITTI's frames, which are the user's data: lines ``<image> <depth> <focal>``.

An image is ``<date>/<drive>/<camera>/data/<number>.png``, a depth map ``<drive>/proj_depth/...``, or ``None``
where there is no ground truth.
"""

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from deltacache.pipeline.benchmarks.files import numbered_lines
from deltacache.schemas.errors import DatasetError

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
        """See ``drive_of``."""
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
