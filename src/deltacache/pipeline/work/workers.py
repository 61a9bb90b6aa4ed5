"""What an encoder process does, free of Ray: it holds a model and works on one shard after the other.

Two shards may be worked on at once by two threads, so that one is written while the other is in the forward pass.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Protocol

from upath import UPath

from deltacache.pipeline.decoding.work import DecodedGroup
from deltacache.pipeline.work.attempts import Kind, Work
from deltacache.pipeline.work.encoders import ClipEncoder, DeltaEncoder
from deltacache.pipeline.work.shard_work import (
    ShardEncoding,
    ShardResult,
    commit_shard,
    measure_forward,
    retry_failures,
    try_videos,
)
from deltacache.pipeline.work.tokenize_work import measure_tokenizing, tokenize_shard
from deltacache.schemas.datasets import DatasetCard

Decode = Callable[[Work], Iterator[DecodedGroup]]
"""Groups of decoded videos in the order of the plan, wherever they are decoded."""


class ShardWorker(Protocol):
    """A seam: one kind of job, as its workers do it."""

    def measure(self) -> float:
        """Clips a second of the bare forward."""
        ...

    def run(self, work: Work, decode: Decode, on_clips: Callable[[int], None]) -> ShardResult:
        """Do one piece of work; ``on_clips`` hears of every batch that was encoded."""
        ...


@dataclass(slots=True)
class VideoShardWorker:
    """From videos to the clips of ``root``."""

    root: UPath
    card: DatasetCard
    encoder: ClipEncoder
    lock: str = ""

    def measure(self) -> float:
        """See ``ShardWorker``."""
        return measure_forward(self.encoder, self.card.sampling.frames, self.card.image_size)

    def run(self, work: Work, decode: Decode, on_clips: Callable[[int], None]) -> ShardResult:
        """See ``ShardWorker``."""
        shard_id, encoding = work.task.shard_id, ShardEncoding(self.encoder, decode(work), on_clips)
        if work.kind is Kind.TRY:
            return try_videos(shard_id, encoding)
        if work.kind is Kind.RETRY:
            return retry_failures(self.root, self.card, shard_id, encoding, self.lock)
        return commit_shard(self.root, self.card, shard_id, encoding, self.lock)


@dataclass(slots=True)
class FeatureShardWorker:
    """From shards of features to shards of deltas."""

    features: tuple[UPath, DatasetCard]
    deltas: tuple[UPath, DatasetCard]
    encoder: DeltaEncoder
    lock: str = ""

    def measure(self) -> float:
        """See ``ShardWorker``."""
        return measure_tokenizing(self.encoder, self.features[1])

    def run(self, work: Work, decode: Decode, on_clips: Callable[[int], None]) -> ShardResult:
        """See ``ShardWorker``; nothing is decoded."""
        return tokenize_shard(self.features, self.deltas, work, self.encoder, on_clips, self.lock)


class WorkCounters:
    """Clips encoded in the works that are under way, counted by several threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._clips: dict[int, int] = {}

    @contextmanager
    def work(self) -> Iterator[Callable[[int], None]]:
        """Count one work: call what this yields with the clips of every batch."""
        mark = object()

        def add(clips: int) -> None:
            with self._lock:
                self._clips[id(mark)] = self._clips.get(id(mark), 0) + clips

        try:
            yield add
        finally:
            with self._lock:
                self._clips.pop(id(mark), None)

    @property
    def clips(self) -> int:
        """How many there are now."""
        with self._lock:
            return sum(self._clips.values())
