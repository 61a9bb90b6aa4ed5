"""VSPW (Miao et al. 2021): ``val.txt`` and ``data/<video>/{origin/*.jpg,mask/*.png}``, 15 frames per second."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from deltacache.pipeline.benchmarks.files import existing_label, lines_of, names_in, safe_id
from deltacache.pipeline.benchmarks.windows import FrameCounts, SequenceSet, choose, frame_numbers
from deltacache.schemas.benchmarks import SPACING_S, LabelledSequence
from deltacache.schemas.errors import DatasetError

_FIRST_TARGET, _TARGET_STEP, _FRAME_STEP = 19, 20, 3


def vspw_sequences(root: Path, counts: FrameCounts) -> SequenceSet:
    """Sequences that end on the frames at indices 19, 39, ... of every video of ``val.txt``.

    Raises:
        DatasetError: a file is missing, or there is no sequence.
    """
    dropped: Counter[str] = Counter()
    candidates = [
        each
        for video in lines_of(root / "val.txt")
        for each in _of_video(root / "data" / video, counts.counts[-1], dropped)
    ]
    return choose(candidates, counts, dropped)


def _of_video(video: Path, most: int, dropped: Counter[str]) -> Iterator[LabelledSequence]:
    frames = names_in(video / "origin", ".jpg")
    _check_complete(video, frames)
    if len(frames) <= _FIRST_TARGET:
        dropped[f"videos of fewer than {_FIRST_TARGET + 1} frames: no target"] += 1
    for target in range(_FIRST_TARGET, len(frames), _TARGET_STEP):
        stem = Path(frames[target]).stem
        yield LabelledSequence(
            sequence_id=safe_id(f"{video.name}_{stem}"),
            group=video.name,
            frames=tuple(
                str(video / "origin" / frames[at]) for at in frame_numbers(target, _FRAME_STEP, 0, most)
            ),
            label=str(existing_label(video / "mask" / f"{stem}.png")),
            spacing_s=SPACING_S["vspw"],
        )


def _check_complete(video: Path, frames: list[str]) -> None:
    """A lost frame would move all targets behind it; every frame has a mask of its name."""
    stems, masks = (
        {Path(name).stem for name in frames},
        {Path(name).stem for name in names_in(video / "mask", ".png")},
    )
    if lost := sorted(masks - stems):
        raise DatasetError(
            f"{video / 'origin' / lost[0]}.jpg is missing, its mask is there: get the video again"
        )
    if lost := sorted(stems - masks):
        raise DatasetError(
            f"{video / 'mask' / lost[0]}.png is missing, its frame is there: get the video again"
        )
