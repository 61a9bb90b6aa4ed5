"""Cityscapes (Cordts et al. 2016): ``leftImg8bit_sequence/val`` and ``gtFine/val``, 16 frames per second.

A snippet has 30 frames; the 20th is labelled, and its number is in the label's name.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from deltacache.pipeline.benchmarks.files import existing, existing_picture, names_in, safe_id
from deltacache.pipeline.benchmarks.windows import FrameCounts, SequenceSet, choose, frame_numbers
from deltacache.schemas.benchmarks import SPACING_S, LabelledSequence
from deltacache.schemas.errors import DatasetError

_FRAMES_BEFORE_LABEL, _FRAME_STEP = 19, 3
LABEL_SUFFIX = "_gtFine_labelIds.png"


def cityscapes_sequences(root: Path, counts: FrameCounts) -> SequenceSet:
    """Sequences that end on the labelled frame of every snippet of the validation split.

    Raises:
        DatasetError: a file is missing or oddly named, or there is no sequence.
    """
    candidates = [
        each for city in labelled_cities(root, "val") for each in _of_city(root, city, counts.counts[-1])
    ]
    return choose(candidates, counts, Counter())


def labelled_cities(root: Path, split: str) -> list[Path]:
    """The folders of a split's cities with fine labels, in a fixed order.

    Raises:
        DatasetError: there is no label in any.
    """
    place = existing(root / "gtFine" / split)
    cities = sorted(path for path in place.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not any(names_in(city, LABEL_SUFFIX) for city in cities):
        raise DatasetError(
            f"{place} holds no <city>/*{LABEL_SUFFIX}: unpack gtFine there; polygons and labelTrainIds are not read"
        )
    return cities


def _of_city(root: Path, labels: Path, most: int) -> Iterator[LabelledSequence]:
    frames = root / "leftImg8bit_sequence" / "val" / labels.name
    for name in names_in(labels, LABEL_SUFFIX):
        snippet = name[: -len(LABEL_SUFFIX)]
        drive, _, number = snippet.rpartition("_")
        if not (drive and number.isdecimal()):
            raise DatasetError(f"{labels / name} must be named <city>_<drive>_<frame>{LABEL_SUFFIX}")
        target = int(number)
        wanted = frame_numbers(target, _FRAME_STEP, max(0, target - _FRAMES_BEFORE_LABEL), most)
        yield LabelledSequence(
            sequence_id=safe_id(snippet),
            group=labels.name,
            frames=tuple(
                str(existing_picture(frames / f"{drive}_{at:0{len(number)}d}_leftImg8bit.png"))
                for at in wanted
            ),
            label=str(labels / name),
            spacing_s=SPACING_S["cityscapes"],
        )
