"""What the id of a run knows of labelled sequences."""

from pathlib import Path

import pytest

from deltacache.evaluate.benchmarks.run import content_of
from deltacache.schemas.benchmarks import LabelledSequence


@pytest.fixture
def sequence(tmp_path: Path) -> LabelledSequence:
    frames = [tmp_path / f"{number}.jpg" for number in range(2)]
    for frame in frames:
        frame.write_bytes(b"frame")
    (tmp_path / "label.png").write_bytes(b"label")
    return LabelledSequence(
        sequence_id="one",
        group="video",
        frames=tuple(map(str, frames)),
        label=str(tmp_path / "label.png"),
        spacing_s=0.2,
    )


def test_another_label_of_the_same_size_is_another_content(sequence: LabelledSequence) -> None:
    used, unused = (content_of([sequence], labels) for labels in (lambda one: [one.label], lambda _: []))
    assert used != unused
    Path(sequence.label).write_bytes(b"lebal")
    assert content_of([sequence], lambda one: [one.label]) != used
    assert content_of([sequence], lambda _: []) == unused


def test_another_size_of_a_frame_is_another_content_and_another_place_is_not(
    sequence: LabelledSequence, tmp_path: Path
) -> None:
    before = content_of([sequence], lambda one: [one.label])
    moved = Path(sequence.frames[0]).parent.rename(tmp_path.parent / f"{tmp_path.name}-moved")
    elsewhere = LabelledSequence(
        sequence_id="one",
        group="video",
        frames=tuple(str(moved / Path(frame).name) for frame in sequence.frames),
        label=str(moved / "label.png"),
        spacing_s=0.2,
    )
    assert content_of([elsewhere], lambda one: [one.label]) == before
    Path(elsewhere.frames[0]).write_bytes(b"longer frame")
    assert content_of([elsewhere], lambda one: [one.label]) != before
