"""A generator's frames, checked and cut like the benchmark's own.

Shapes: S samples, C crops, s input size.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deltacache.evaluate.generators.clips import file_of_frame, read_frame_at, samples_in
from deltacache.evaluate.generators.manifest import ContextEntry, read_manifest
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
            DatasetError: contexts without samples, with different numbers of them, or folders of too few pictures.
        """
        wanted = [
            self._entry((dataset, each.sequence_id, horizon))
            for dataset, of_dataset in sequences.items()
            for each in of_dataset
            for horizon in horizons
            if context + horizon <= len(each.frames)
        ]
        files = list(in_threads(self._files, wanted, threads=_STAT_THREADS))
        common = Counter(count for count, _ in files).most_common(1)[0][0]
        for entry, (count, _) in zip(wanted, files, strict=True):
            if count != common or count == 0:
                raise DatasetError(
                    f"{self.root / entry.folder} holds {count} samples (sample-00, ...), most contexts {common}: every "
                    "context needs at least one, and all as many"
                )
        return Answers(common, fingerprint_of({"contexts": [each for _, each in files]}))

    def _entry(self, key: Key) -> ContextEntry:
        dataset, sequence_id, horizon = key
        if key not in self.entries:
            raise MismatchError(
                f"{self.root} has no context of {dataset}'s {sequence_id} at horizon {horizon}: export with the same "
                "--data, --context and --horizons as the evaluation has"
            )
        return self.entries[key]

    def _files(self, entry: ContextEntry) -> tuple[int, str]:
        """How many samples answer a context, and the fingerprint of their scored files."""
        samples = samples_in(self.root / entry.folder)
        scored = [file_of_frame(sample, entry.target_frame) for sample in samples]
        named = [[path.relative_to(self.root).as_posix(), path.stat().st_size] for path in scored]
        return len(samples), fingerprint_of({"entry": entry.model_dump(mode="json"), "files": named})

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


def open_generators(settings: BenchmarkEvaluation) -> tuple[GeneratedFutures, ...]:
    """Those that ``settings`` names; see ``GeneratedFutures.open``."""
    return tuple(GeneratedFutures.open(name, root) for name, root in settings.predictions.items())
