"""Frames and labels of sequences, read ahead of the model in threads.

Shapes: C crops, T frames, S input size, H' x W' a half of the label.
"""

import time
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np

from deltacache.pipeline.benchmarks.frames import (
    INVALID_DEPTH,
    CropSplit,
    check_depth_belongs,
    crop_frames,
    frame_shape,
    label_halves,
    read_frame,
    read_label,
    resize_frame,
    split_of,
)
from deltacache.schemas.benchmarks import BENCHMARK_TASK, IGNORE, BenchmarkName, LabelledSequence
from deltacache.schemas.errors import DatasetError

Key = TypeVar("Key")
Loaded = TypeVar("Loaded")


@dataclass(frozen=True, slots=True, repr=False)
class LoadedSequence:
    """One sequence as arrays.

    Attributes:
        crops: (C, T, S, S, 3) uint8; None where cached tokens are enough.
        tokens: (C, T, N, D) float16 from a cache.
        label: (C, H', W') class ids or metres; None where nothing is scored by label.
        seconds: it took to read.
        generated: (S, C, s, s, 3) uint8, the target as a video generator made it, by its name and the horizon.
    """

    sequence: LabelledSequence
    split: CropSplit
    crops: np.ndarray | None
    label: np.ndarray | None
    seconds: float
    tokens: np.ndarray | None = None
    generated: Mapping[tuple[str, int], np.ndarray] = field(default_factory=dict)


def load_sequence(
    benchmark: BenchmarkName, sequence: LabelledSequence, image_size: int, *, labelled: bool
) -> LoadedSequence:
    """Read, resize and cut all frames of a sequence, and its label.

    Raises:
        DatasetError: a file is missing or damaged, or frames or label differ in size.
    """
    started = time.perf_counter()
    frames, split, shape = [], None, None
    for path in sequence.frames:
        frame = read_frame(benchmark, path)
        shape = shape or (frame.shape[0], frame.shape[1])
        if frame.shape[:2] != shape:
            raise DatasetError(
                f"{path} has {frame.shape[0]} x {frame.shape[1]} pixels, {sequence.frames[0]} {shape[0]} x "
                f"{shape[1]}: all frames of a sequence must have the same size"
            )
        split = split or split_of(*shape, image_size)
        frames.append(resize_frame(frame, split))
    assert split is not None  # a sequence has frames
    assert shape is not None
    crops = crop_frames(np.stack(frames), split)
    label = _halves(benchmark, sequence, shape, split) if labelled else None
    return LoadedSequence(sequence, split, crops, label, time.perf_counter() - started)


def load_cached(
    benchmark: BenchmarkName, sequence: LabelledSequence, features: "CachedTokens", *, labelled: bool
) -> LoadedSequence:
    """The same with patch tokens instead of frames, which are not read.

    Raises:
        DatasetError: a clip of the cache, or the label, is missing or damaged.
    """
    started = time.perf_counter()
    shape = frame_shape(benchmark, sequence.frames[-1])
    split = split_of(*shape, features.image_size)
    tokens = np.stack([features.read(sequence.sequence_id, crop) for crop in range(split.crops)])
    label = _halves(benchmark, sequence, shape, split) if labelled else None
    return LoadedSequence(sequence, split, None, label, time.perf_counter() - started, tokens)


def crops_bytes(sequence: LabelledSequence, image_size: int) -> int:
    """At most, of what ``load_sequence`` gives: two crops of every frame. The label is small beside them."""
    return 2 * len(sequence.frames) * image_size**2 * 3


class CachedTokens(Protocol):
    """A seam: where patch tokens were kept."""

    image_size: int

    @abstractmethod
    def read(self, sequence_id: str, crop: int) -> np.ndarray:
        """(T, N, D) float16."""
        ...


def _halves(
    benchmark: BenchmarkName, sequence: LabelledSequence, shape: tuple[int, int], split: CropSplit
) -> np.ndarray:
    ignore = IGNORE if BENCHMARK_TASK[benchmark] == "segmentation" else INVALID_DEPTH
    if benchmark == "kitti":
        check_depth_belongs(sequence.frames[-1], sequence.label)
    return label_halves(read_label(benchmark, sequence.label, shape), split, ignore)


AHEAD_BYTES = 512 << 20


class Ahead(Generic[Key, Loaded]):
    """Loads items in threads, a bounded number and a bounded size ahead, across calls.

    Args:
        size: bytes that an item will have; one larger than ``most_bytes`` is loaded alone.
    """

    def __init__(
        self,
        load: Callable[[Key], Loaded],
        threads: int,
        size: Callable[[Key], int],
        most_bytes: int = AHEAD_BYTES,
    ) -> None:
        self._load, self._most, self._size, self._most_bytes = load, 2 * threads, size, most_bytes
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="deltacache-frames")
        self._under_way: OrderedDict[Key, Future[Loaded]] = OrderedDict()

    def loaded(self, items: Sequence[Key], following: Sequence[Key] = ()) -> Iterator[Loaded]:
        """Yield what was loaded of ``items``, in order; ``following`` are begun too, for the next call."""
        wanted = [*items, *following]
        for key in [key for key in self._under_way if key not in set(wanted)]:
            self._under_way.pop(key).cancel()
        for at, item in enumerate(items):
            for key in self._affordable(wanted[at : at + self._most]):
                if key not in self._under_way:
                    self._under_way[key] = self._pool.submit(self._load, key)
            yield self._under_way.pop(item).result()

    def _affordable(self, keys: Sequence[Key]) -> Iterator[Key]:
        """The first of them, and what follows as long as all together are small enough."""
        total = 0
        for at, key in enumerate(keys):
            total += self._size(key)
            if at and total > self._most_bytes:
                return
            yield key

    def close(self) -> None:
        """End the threads; what they have not begun is not loaded."""
        self._pool.shutdown(wait=True, cancel_futures=True)
