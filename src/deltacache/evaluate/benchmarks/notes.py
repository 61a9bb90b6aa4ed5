"""What a reader of the numbers should know: what was left out, and what the heads were trained on."""

from collections.abc import Iterator, Mapping
from types import MappingProxyType

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
    notes: list[str] = []
    for name, each in found.items():
        notes.extend(f"{name}: {count} dropped: {reason}" for reason, count in each.dropped.items())
        notes.extend(_too_short(settings, name, each))
        if name not in settings.heads:
            notes.append(f"{name}: no head, so features alone are scored")
        notes.extend(_other_sets(inputs, name, each))
    return notes


def counts_of(found: Found) -> list[str]:
    """How much of each benchmark there is."""
    return [
        f"{name}: {len(each.sequences)} sequences with one labelled target each, of "
        f"{len({sequence.group for sequence in each.sequences})} {_GROUPS[name]}"
        for name, each in found.items()
    ]


def _too_short(settings: BenchmarkEvaluation, name: BenchmarkName, found: SequenceSet) -> Iterator[str]:
    for horizon, frames in zip(settings.horizons, settings.frame_counts, strict=True):
        short = sum(len(sequence.frames) < frames for sequence in found.sequences)
        if short:
            yield (
                f"{name}: {short} of {len(found.sequences)} sequences have fewer than {frames} frames: not "
                f"scored at horizon {horizon}"
            )


def _other_sets(inputs: Inputs, name: BenchmarkName, found: SequenceSet) -> Iterator[str]:
    """Where numbers are not those of the published protocol."""
    if name in _FULL_SETS:
        full, source = _FULL_SETS[name]
        if len(found.sequences) != full:
            yield (
                f"{name}: {len(found.sequences)} sequences, the published validation set has {full} ({source}): "
                "numbers are not comparable with published ones"
            )
    split = inputs.trained_on.get(name, {}).get("split", "train")
    if split != "train":
        yield (
            f"{name}: the head {inputs.heads[name]} was trained on the {split} split: its numbers are not comparable"
        )
