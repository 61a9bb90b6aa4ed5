"""What a reader of the numbers should know: what was left out, and what the heads were trained on."""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from deltacache.evaluate.benchmarks.opening import Inputs
from deltacache.evaluate.settings import BenchmarkEvaluation
from deltacache.pipeline.benchmarks.windows import SequenceSet
from deltacache.schemas.benchmarks import BenchmarkName

Found = Mapping[BenchmarkName, SequenceSet]

_GROUPS: Mapping[BenchmarkName, str] = MappingProxyType(
    {"vspw": "videos", "cityscapes": "cities", "kitti": "drives"}
)
_FULL_SETS: Mapping[BenchmarkName, tuple[int, str]] = MappingProxyType(
    {"cityscapes": (500, "Cordts et al. 2016")}
)
"""Labelled sequences of the published set, where it is published how many these are."""


def notes_of(settings: BenchmarkEvaluation, found: Found, inputs: Inputs) -> list[str]:
    """In words, for the terminal, ``notes.json`` and the report."""
    notes = [*inputs.models.notes]
    frames = dict(zip(settings.horizons, settings.frame_counts, strict=True))
    for name, each in found.items():
        notes.extend(sequence_notes(name, name, each, frames))
        if name not in settings.heads:
            notes.append(f"{name}: no head, so features alone are scored")
        else:
            notes.extend(head_notes(name, inputs.heads[name], inputs.trained_on.get(name, {})))
    return notes


def counts_of(found: Found) -> list[str]:
    """How much of each benchmark there is."""
    return [
        f"{name}: {len(each.sequences)} sequences with one labelled target each, of "
        f"{len({sequence.group for sequence in each.sequences})} {_GROUPS[name]}"
        for name, each in found.items()
    ]


def sequence_notes(
    dataset: str, benchmark: BenchmarkName, found: SequenceSet, frames: Mapping[int, int]
) -> Iterator[str]:
    """What was left out of a benchmark, and whether it is the published set.

    Args:
        dataset: its name in the tables.
        frames: that a sequence needs, by horizon.
    """
    count = len(found.sequences)
    yield from (f"{dataset}: {number} dropped: {reason}" for reason, number in found.dropped.items())
    for horizon, needed in frames.items():
        short = sum(len(sequence.frames) < needed for sequence in found.sequences)
        if short:
            yield (
                f"{dataset}: {short} of {count} sequences have fewer than {needed} frames: not scored at horizon "
                f"{horizon}"
            )
    full, source = _FULL_SETS.get(benchmark, (count, ""))
    if count != full:
        yield (
            f"{dataset}: {count} sequences, the published validation set has {full} ({source}): "
            "numbers are not comparable with published ones"
        )


def head_notes(dataset: str, head: str, trained_on: Mapping[str, Any]) -> Iterator[str]:
    """Where a head (its fingerprint) learned from what is scored."""
    split = trained_on.get("split", "train")
    if split != "train":
        yield f"{dataset}: the head {head} was trained on the {split} split: its numbers are not comparable"
