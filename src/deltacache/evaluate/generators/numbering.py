"""The pictures of a generator's sample in the order of their numbers: none may be missing without a word."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from deltacache.schemas.errors import DatasetError

_PICTURES = (".png", ".jpg", ".jpeg")
_WAY_OUT = "generate it again, or number its pictures one by one from 0 or 1, all samples alike"


@dataclass(frozen=True, slots=True)
class Numbered:
    """Pictures of one folder, numbered one by one.

    Attributes:
        first: the number of the first picture, 0 or 1.
        pictures: in order.
    """

    folder: Path
    first: int
    pictures: tuple[Path, ...]

    def name_of(self, number: int) -> str:
        """What the picture of that number is called here, or would be."""
        path = self.pictures[0]
        *_, digits = re.finditer(r"\d+", path.stem)
        written = f"{number:0{len(digits[0])}d}"
        return f"{path.stem[: digits.start()]}{written}{path.stem[digits.end() :]}{path.suffix}"


def numbered_pictures(folder: Path) -> Numbered:
    """The pictures of ``folder`` by the last number in their names, with or without leading zeros.

    Raises:
        DatasetError: a name without a number, a number twice, or one that is missing.
    """
    found = sorted(
        (_number_of(path), path.name, path)
        for path in folder.iterdir()
        if path.suffix.lower() in _PICTURES and not path.name.startswith(".")
    )
    numbers, pictures = [number for number, _, _ in found], tuple(path for _, _, path in found)
    for (one, name, _), (other, following, _) in pairwise(found):
        if one == other:
            raise DatasetError(
                f"{folder} has number {one} twice, {name} and {following}: the last number in a name is that of "
                "the frame; remove one of them, or name them so"
            )
    sample = Numbered(folder, numbers[0] if numbers else 0, pictures)
    for expected, number in enumerate(numbers, min(sample.first, 1)):
        if number != expected:
            raise _missing(sample, expected, f"it holds {pictures[0].name} to {pictures[-1].name}")
    return sample


def check_first_numbers(samples: Sequence[Numbered]) -> None:
    """Refuse samples that begin with 1 where most begin with 0, and the other way round.

    Raises:
        DatasetError: names the folder and the number.
    """
    usual = _usual([each.first for each in samples if each.pictures])
    for each in samples:
        if each.pictures and each.first != usual:
            raise _missing(
                each, 0, f"it begins with {each.name_of(each.first)}, most samples with number {usual}"
            )


def check_counts(samples: Sequence[Numbered], of: str) -> None:
    """Refuse samples that have another number of pictures than most.

    Raises:
        DatasetError: names the folder and the first number that is missing or too many.
    """
    usual = _usual([len(each.pictures) for each in samples])
    for each in samples:
        count = len(each.pictures)
        told = f"it holds {count} pictures, most samples of {of} {usual}"
        if count < usual:
            raise _missing(each, each.first + count, told)
        if count > usual:
            surplus = each.first + usual
            raise DatasetError(
                f"{each.folder} has a picture of number {surplus} ({each.name_of(surplus)}; {told}): "
                "remove it and what follows, or generate the others again"
            )


def _usual(values: Sequence[int]) -> int:
    """What most have; the higher one where there are as many."""
    counts = Counter(values)
    return max(counts, key=lambda each: (counts[each], each), default=0)


def _missing(sample: Numbered, number: int, told: str) -> DatasetError:
    name = f"{sample.name_of(number)}; " if sample.pictures else ""
    return DatasetError(f"{sample.folder} has no picture of number {number} ({name}{told}): {_WAY_OUT}")


def _number_of(path: Path) -> int:
    numbers = re.findall(r"\d+", path.stem)
    if not numbers:
        raise DatasetError(
            f"{path} has no number in its name, so it cannot be told which frame it is: name pictures by their "
            "frame, such as 000.png, or remove it"
        )
    return int(numbers[-1])
