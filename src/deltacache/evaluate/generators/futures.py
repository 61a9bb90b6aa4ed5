"""A generator's frames, checked and cut like the benchmark's own.

Shapes: S samples, C crops, s input size.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deltacache.evaluate.generators.clips import read_frame_at, samples_in
from deltacache.evaluate.generators.manifest import ContextEntry, read_manifest
from deltacache.evaluate.generators.padding import unpadded
from deltacache.evaluate.settings import BenchmarkEvaluation
from deltacache.pipeline.benchmarks.geometry import Split, crop_frames, resize_frame
from deltacache.schemas.benchmarks import BenchmarkName, LabelledSequence
from deltacache.schemas.errors import DatasetError, MismatchError

Key = tuple[BenchmarkName, str, int]
"""Benchmark, sequence, horizon."""


@dataclass(frozen=True)
class GeneratedFutures:
    """Where one generator's samples lie.

    Attributes:
        samples: of every context; as many of each.
    """

    name: str
    root: Path
    entries: Mapping[Key, ContextEntry]
    samples: int

    @classmethod
    def open(cls, name: str, root: Path) -> "GeneratedFutures":
        """Look at what is there; no frame is read.

        Raises:
            DatasetError: contexts without samples, or with different numbers of them.
        """
        entries: dict[Key, ContextEntry] = {
            (each.dataset, each.sequence_id, each.horizon): each for each in read_manifest(root).contexts
        }
        counts = {root / each.folder: len(samples_in(root / each.folder)) for each in entries.values()}
        if not counts:
            raise DatasetError(f"{root} was exported without any context: export with --data NAME=DIR")
        common = Counter(counts.values()).most_common(1)[0][0]
        for folder, count in counts.items():
            if count != common or count == 0:
                raise DatasetError(
                    f"{folder} holds {count} samples (sample-00, ...), most contexts {common}: every context needs "
                    "at least one, and all as many"
                )
        return cls(name, root, entries, common)

    def check_covers(
        self,
        dataset: BenchmarkName,
        sequences: Iterable[LabelledSequence],
        context: int,
        horizons: Sequence[int],
    ) -> None:
        """Refuse an evaluation of what was not exported.

        Raises:
            MismatchError: names the first sequence and horizon that is not there.
        """
        for each in sequences:
            for horizon in horizons:
                enough = context + horizon <= len(each.frames)
                if enough and (dataset, each.sequence_id, horizon) not in self.entries:
                    raise MismatchError(
                        f"{self.root} has no context of {dataset}'s {each.sequence_id} at horizon {horizon}: export "
                        "with the same --data, --context and --horizons as the evaluation has"
                    )

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

    @property
    def content(self) -> list[list[object]]:
        """Names and sizes of all files of the samples."""
        files = [
            path
            for entry in self.entries.values()
            for sample in samples_in(self.root / entry.folder)
            for path in (sorted(sample.iterdir()) if sample.is_dir() else [sample])
        ]
        return [[path.relative_to(self.root).as_posix(), path.stat().st_size] for path in files]


def open_generators(settings: BenchmarkEvaluation) -> tuple[GeneratedFutures, ...]:
    """Those that ``settings`` names; see ``GeneratedFutures.open``."""
    return tuple(GeneratedFutures.open(name, root) for name, root in settings.predictions.items())
