"""A generator's frames, checked and cut like the benchmark's own.

Shapes: S samples, C crops, s input size.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deltacache.evaluate.generators.clips import picture_of, read_frame_at, samples_in
from deltacache.evaluate.generators.manifest import ContextEntry, read_manifest
from deltacache.evaluate.generators.numbering import (
    Numbered,
    check_counts,
    check_first_numbers,
    numbered_pictures,
)
from deltacache.evaluate.generators.padding import unpadded
from deltacache.evaluate.settings import BenchmarkEvaluation
from deltacache.pipeline.benchmarks.geometry import Split, crop_frames, resize_frame
from deltacache.pipeline.storage.parallel import in_threads
from deltacache.schemas.benchmarks import BenchmarkName, LabelledSequence
from deltacache.schemas.errors import DatasetError, MismatchError
from deltacache.schemas.fingerprints import fingerprint_of

_STAT_THREADS = 8

Key = tuple[BenchmarkName, str, int]
"""Benchmark, sequence, horizon."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What a generator has for one evaluation.

    Attributes:
        samples: of every context; as many of each.
        fingerprint: of names and sizes of the files that are scored, and of where in them.
    """

    samples: int
    fingerprint: str


@dataclass(frozen=True, slots=True)
class _Answer:
    """To one context: its number of samples, those that are pictures, the fingerprint of the scored files."""

    samples: int
    folders: tuple[Numbered, ...]
    fingerprint: str


@dataclass(frozen=True)
class GeneratedFutures:
    """Where one generator's samples lie; contexts that nobody asks for need none."""

    name: str
    root: Path
    entries: Mapping[Key, ContextEntry]

    @classmethod
    def open(cls, name: str, root: Path) -> "GeneratedFutures":
        """Read what was exported.

        Raises:
            DatasetError: ``contexts.json`` is missing or damaged.
        """
        entries: dict[Key, ContextEntry] = {
            (each.dataset, each.sequence_id, each.horizon): each for each in read_manifest(root).contexts
        }
        return cls(name, root, entries)

    def check_covers(
        self,
        sequences: Mapping[BenchmarkName, Sequence[LabelledSequence]],
        context: int,
        horizons: Sequence[int],
    ) -> Answers:
        """Refuse an evaluation of what was not exported or not answered; frames are not decoded.

        Raises:
            MismatchError: names the first sequence and horizon that was not exported.
            DatasetError: contexts without samples, with different numbers of them, or folders in which a picture is
                missing or without a number.
        """
        wanted = [
            self._entry((dataset, each.sequence_id, horizon))
            for dataset, of_dataset in sequences.items()
            for each in of_dataset
            for horizon in horizons
            if context + horizon <= len(each.frames)
        ]
        answers = list(in_threads(self._answer, wanted, threads=_STAT_THREADS))
        common = Counter(each.samples for each in answers).most_common(1)[0][0]
        for entry, each in zip(wanted, answers, strict=True):
            if each.samples != common or each.samples == 0:
                raise DatasetError(
                    f"{self.root / entry.folder} holds {each.samples} samples (sample-00, ...), most contexts "
                    f"{common}: every context needs at least one, and all as many"
                )
        _check_pictures(wanted, answers)
        return Answers(common, fingerprint_of({"contexts": [each.fingerprint for each in answers]}))

    def _entry(self, key: Key) -> ContextEntry:
        dataset, sequence_id, horizon = key
        if key not in self.entries:
            raise MismatchError(
                f"{self.root} has no context of {dataset}'s {sequence_id} at horizon {horizon}: export with the same "
                "--data, --context and --horizons as the evaluation has"
            )
        return self.entries[key]

    def _answer(self, entry: ContextEntry) -> "_Answer":
        samples = samples_in(self.root / entry.folder)
        folders = {path: numbered_pictures(path) for path in samples if path.is_dir()}
        scored = [
            picture_of(folders[path], entry.target_frame) if path in folders else path for path in samples
        ]
        named = [[path.relative_to(self.root).as_posix(), path.stat().st_size] for path in scored]
        fingerprint = fingerprint_of({"entry": entry.model_dump(mode="json"), "files": named})
        return _Answer(len(samples), tuple(folders.values()), fingerprint)

    def load(self, key: Key, split: Split) -> np.ndarray:
        """The scored frame of every sample, resized and cut as the true frames are: (S, C, s, s, 3) uint8.

        Raises:
            DatasetError: a frame is missing, damaged, or of another size than the context's.
        """
        entry = self.entries[key]
        place = entry.place
        crops = []
        for sample in samples_in(self.root / entry.folder):
            frame = read_frame_at(sample, entry.target_frame)
            if frame.shape[:2] != (place.height, place.width):
                raise DatasetError(
                    f"{sample} has frames of {frame.shape[0]} x {frame.shape[1]} pixels, its context {place.height} x "
                    f"{place.width}: resize the generator's frames to the size that was exported"
                )
            resized = resize_frame(unpadded(frame, place), split)
            crops.append(crop_frames(resized[None], split)[:, 0])
        return np.stack(crops)


def _check_pictures(entries: Sequence[ContextEntry], answers: Sequence[_Answer]) -> None:
    """All begin with the same number; there may be fewer for a shorter horizon, or another benchmark."""
    check_first_numbers([folder for each in answers for folder in each.folders])
    alike: dict[str, list[Numbered]] = defaultdict(list)
    for entry, each in zip(entries, answers, strict=True):
        alike[f"{entry.dataset} at horizon {entry.horizon}"].extend(each.folders)
    for of, samples in alike.items():
        check_counts(samples, of)


def open_generators(settings: BenchmarkEvaluation) -> tuple[GeneratedFutures, ...]:
    """Those that ``settings`` names; see ``GeneratedFutures.open``."""
    return tuple(GeneratedFutures.open(name, root) for name, root in settings.predictions.items())
