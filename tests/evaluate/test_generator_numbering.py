"""Pictures of a generator's samples are taken by their numbers: what is missing is named, and nothing moves up."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from deltacache.evaluate.generators import (
    ContextEntry,
    GeneratedFutures,
    numbered_pictures,
    placement_of,
    read_frame_at,
)
from deltacache.schemas.benchmarks import LabelledSequence
from deltacache.schemas.errors import DatasetError

SEQUENCES = ("one", "two", "three")


def write(folder: Path, names: list[str]) -> Path:
    folder.mkdir(parents=True)
    for value, name in enumerate(names):
        cv2.imwrite(str(folder / name), np.full((8, 12, 3), value, np.uint8))
    return folder


def entry(sequence: str, horizon: int = 1) -> ContextEntry:
    place = placement_of(8, 12, "plain", "vspw")
    return ContextEntry(
        dataset="vspw", horizon=horizon, sequence_id=sequence, context_frames=4, target_frame=2,
        frames_per_second=5.0, place=place,
    )  # fmt: skip


def check(root: Path, samples: dict[str, list[str]]) -> None:
    """Cover three sequences at horizon 1 with one sample of these pictures each."""
    entries = {("vspw", name, 1): entry(name) for name in SEQUENCES}
    for name, pictures in samples.items():
        write(root / entries["vspw", name, 1].folder / "sample-00", pictures)
    sequences = [LabelledSequence(name, name, ("frame",) * 5, "label", 0.2) for name in SEQUENCES]
    GeneratedFutures("seer", root, entries).check_covers({"vspw": sequences}, 4, (1,))  # pyright: ignore[reportArgumentType]


def names(first: int, last: int) -> list[str]:
    return [f"{number:03d}.png" for number in range(first, last + 1)]


@pytest.mark.parametrize("first", [0, 1])
def test_numbers_begin_at_0_or_1(tmp_path: Path, first: int) -> None:
    sample = write(tmp_path / "sample-00", names(first, 23 + first))
    assert [int(read_frame_at(sample, at)[0, 0, 0]) for at in (0, 2, 23)] == [0, 2, 23]
    check(tmp_path / "all", dict.fromkeys(SEQUENCES, names(first, 23 + first)))


@pytest.mark.parametrize("missing", [1, 2, 12])
def test_a_missing_picture_is_named(tmp_path: Path, missing: int) -> None:
    sample = write(tmp_path / "sample-00", names(0, 23))
    (sample / f"{missing:03d}.png").unlink()
    with pytest.raises(
        DatasetError, match=rf"sample-00 has no picture of number {missing} \({missing:03d}\.png"
    ):
        read_frame_at(sample, 2)


def test_a_sample_that_begins_later_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DatasetError, match=r"no picture of number 1 \(001\.png; it holds 002\.png to 009\.png"
    ):
        numbered_pictures(write(tmp_path / "sample-00", names(2, 9)))


def test_names_carry_one_number_each(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"cover\.png has no number in its name"):
        numbered_pictures(write(tmp_path / "a", [*names(0, 3), "cover.png"]))
    with pytest.raises(DatasetError, match=r"has number 2 twice, 002\.png and 2\.png"):
        numbered_pictures(write(tmp_path / "b", [*names(0, 3), "2.png"]))


@pytest.mark.parametrize(
    ("pictures", "words"),
    [
        (names(1, 23), r"h1/two/sample-00 has no picture of number 0 \(000\.png; it begins with 001\.png, most .* 0\)"),
        (names(0, 22), r"h1/two/sample-00 has no picture of number 23 \(023\.png; it holds 23 pictures, .* 24\)"),
        (names(0, 24), r"h1/two/sample-00 has a picture of number 24 \(024\.png; it holds 25 pictures, .* 24\)"),
    ],
)  # fmt: skip
def test_samples_are_numbered_alike(tmp_path: Path, pictures: list[str], words: str) -> None:
    whole = names(0, 23)
    with pytest.raises(DatasetError, match=words):
        check(tmp_path, {"one": whole, "two": pictures, "three": whole})
