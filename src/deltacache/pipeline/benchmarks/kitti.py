"""KITTI depth on the Eigen test split (Eigen et al. 2014): raw drives and annotated depth, 10 frames a second.

The list's lines are ``<image> <depth> <focal>``, ``None`` where there is no ground truth; depth lies below
``train/`` or ``val/``. The list is the user's data.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from deltacache.pipeline.benchmarks.files import existing_label, existing_picture, safe_id
from deltacache.pipeline.benchmarks.kitti_lists import SPLIT_FILE, listed_images
from deltacache.pipeline.benchmarks.windows import FrameCounts, SequenceSet, choose, frame_numbers
from deltacache.schemas.benchmarks import SPACING_S, LabelledSequence
from deltacache.schemas.errors import DatasetError

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
    wanted = frame_numbers(int(image.stem), _FRAME_STEP, _first_number(image.parent), most)
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


def _first_number(folder: Path) -> int:
    return min(int(path.stem) for path in folder.iterdir() if path.stem.isdecimal())


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
