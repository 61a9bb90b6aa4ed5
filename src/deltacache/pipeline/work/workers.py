"""What an encoder process does, free of Ray: it holds a model and works on one shard after the other.

Two shards may be worked on at once by two threads, so that one is written while the other is in the forward pass.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Lock
from typing import Protocol

import numpy as np
from upath import UPath

from deltacache.models.checkpoints import LoadedModel
from deltacache.models.deltatok import DeltaTok
from deltacache.pipeline.datasets.dataset import stored_clips
from deltacache.pipeline.datasets.receipts import Failure, StoredClip
from deltacache.pipeline.datasets.writing import checked_receipt, receipt_digest, write_shard
from deltacache.pipeline.decoding.work import DecodedGroup
from deltacache.pipeline.inputs.side_arrays import SideSource
from deltacache.pipeline.work.attempts import Kind, Work
from deltacache.pipeline.work.encoders import ClipEncoder, DeltaEncoder
from deltacache.pipeline.work.shard_work import (
    ShardEncoding,
    ShardResult,
    commit_shard,
    measure_forward,
    not_finite,
    refuse_without_tokens,
    retry_failures,
    try_videos,
)
from deltacache.schemas.clips import FeatureClip
from deltacache.schemas.datasets import DatasetCard
from deltacache.schemas.errors import FailureReason
from deltacache.schemas.provenance import Provenance, require_matches

# ----------------------------------------------------------------------------------------------------
# The work of an encoder on one shard of a feature dataset, free of Ray.
#
# A shard is read by its receipt: a worker never holds the index, so its memory does not grow with the
# dataset.
# ----------------------------------------------------------------------------------------------------


def check_tokenizer_fits(tokenizer: LoadedModel[DeltaTok], card: DatasetCard, path: object) -> None:
    """Refuse a tokenizer that was trained on other features; see ``require_matches``. Image sizes may differ."""
    require_matches(
        Provenance.of_checkpoint(tokenizer.metadata, tokenizer.model.hidden_size, f"the tokenizer {path}"),
        Provenance.of_dataset(card, "this feature dataset"),
        "extract again with that backbone, or load the matching tokenizer",
        any_size=True,
    )


class _Tokenizing:
    """Stored feature clips in, stored delta clips out, counting what it costs."""

    def __init__(
        self,
        encoder: DeltaEncoder,
        clips: Iterator[StoredClip],
        failures: list[Failure],
        on_clips: Callable[[int], None],
    ) -> None:
        self._encoder, self._features, self._on_clips = encoder, clips, on_clips
        self.failures = failures
        self.encode_s = self.read_s = 0.0

    def clips(self) -> Iterator[StoredClip]:
        """Delta clips under everything that is known of their feature clips."""
        while batch := self._read():
            start = time.perf_counter()
            encoded = self._encoder.encode_features([_features(stored) for stored in batch])
            self.encode_s += time.perf_counter() - start
            self._on_clips(len(batch))
            for stored, clip in zip(batch, encoded, strict=True):
                if clip is None:
                    self.failures.append(not_finite(stored.video_uri, stored.view))
                else:
                    yield replace(stored, clip=clip)

    def _read(self) -> list[StoredClip]:
        start = time.perf_counter()
        batch = [clip for _, clip in zip(range(self._encoder.batch_clips), self._features, strict=False)]
        self.read_s += time.perf_counter() - start
        return batch


def tokenize_shard(
    features: tuple[UPath, DatasetCard],
    deltas: tuple[UPath, DatasetCard],
    work: Work,
    encoder: DeltaEncoder,
    on_clips: Callable[[int], None],
    lock: str = "",
) -> ShardResult:
    """Read one shard of features, encode its clips, and commit the shard of deltas with the same id.

    Videos with which workers die become failures; a trial encodes its videos and writes nothing. A shard that is
    finished already (``Kind.RETRY``) keeps its clips as they are, whatever encoding them would give now; those that it
    lacks are encoded and join them. Shards are committed while ``lock`` is held; see ``write_shard``.
    """
    started = time.perf_counter()
    shard_id, known_failures = work.task.shard_id, dict(work.known_failures)
    receipt = checked_receipt(features[0], shard_id, features[1])
    wanted = {video.video_uri for video in work.task.videos} - known_failures.keys()
    replaces = receipt_digest(deltas[0], shard_id) if work.kind is Kind.RETRY else ""
    old = checked_receipt(deltas[0], shard_id, deltas[1]) if replaces else None
    kept = {stored.clip.clip_id: stored for stored in stored_clips(*deltas, old)} if old else {}
    with_kept = {stored.video_uri for stored in kept.values()}
    lacking = [row for row in receipt.clips if row["clip_id"] not in kept]
    blamed: list[Failure] = []
    for uri, error in known_failures.items():
        views = [row["view"] for row in lacking if row["video_uri"] == uri] if uri in with_kept else [None]
        reason = FailureReason.ENCODE_FAILED.value
        blamed.extend(Failure(uri, view, "encode", reason, error) for view in views)
    clips = (
        stored
        for stored in stored_clips(*features, receipt)
        if stored.video_uri in wanted and stored.clip.clip_id not in kept
    )
    failures = [*receipt.failures, *blamed]
    encoding = _Tokenizing(encoder, clips, failures, on_clips)
    count, written = 0, None
    if work.kind is Kind.TRY:
        for _ in encoding.clips():
            pass
    else:
        order = [row["clip_id"] for row in receipt.clips]
        written = write_shard(
            *deltas,
            shard_id,
            _joined(order, kept, encoding.clips()),
            failures,
            list(receipt.sources),
            replaces=replaces,
            lock=lock,
        )
        count = len(written.clips) - len(kept)
    elsewhere = encoding.encode_s + encoding.read_s
    return ShardResult(
        shard_id=shard_id,
        clips=count,
        failed=tuple(dict.fromkeys(failure.video_uri for failure in failures)),
        videos=len(work.task.videos),
        bytes_written=written.total_bytes if written else 0,
        decode_s=0.0,
        encode_s=encoding.encode_s,
        write_s=max(time.perf_counter() - started - elsewhere, 0.0),
        wait_s=encoding.read_s,
        files=tuple(written.files) if written else (),
    )


def _joined(
    order: Iterable[str], kept: Mapping[str, StoredClip], new: Iterator[StoredClip]
) -> Iterator[StoredClip]:
    """The clips that a shard holds already and new ones, both in the order of these ids, which has more."""
    coming = next(new, None)
    for clip_id in order:
        if clip_id in kept:
            yield kept[clip_id]
        elif coming is not None and coming.clip.clip_id == clip_id:
            yield coming
            coming = next(new, None)


def measure_tokenizing(encoder: DeltaEncoder, card: DatasetCard, seconds: float = 1.0) -> float:
    """Clips a second of the tokenizer alone, on noise: a warm-up, then at least two batches and ``seconds``."""
    frames, (rows, columns) = card.sampling.frames, card.patch_grid
    noise = np.random.default_rng(0).standard_normal((frames, rows * columns, card.hidden_size))
    times = np.arange(frames, dtype=np.float32)
    batch = [
        FeatureClip(f"probe-{place}", noise.astype(np.float16), times) for place in range(encoder.batch_clips)
    ]
    refuse_without_tokens(encoder.encode_features(batch))
    start, rounds = time.perf_counter(), 0
    while rounds < 2 or time.perf_counter() - start < seconds:
        encoder.encode_features(batch)
        rounds += 1
    return rounds * len(batch) / (time.perf_counter() - start)


def _features(stored: StoredClip) -> FeatureClip:
    assert isinstance(stored.clip, FeatureClip)  # the dataset was opened as features
    return stored.clip


Decode = Callable[[Work], Iterator[DecodedGroup]]
"""Groups of decoded videos in the order of the plan, wherever they are decoded."""


class ShardWorker(Protocol):
    """A seam: one kind of job, as its workers do it."""

    def measure(self, seconds: float = 1.0) -> float:
        """Clips a second of the bare forward pass: at least two batches and ``seconds``."""
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
    beside: SideSource | None = None

    def measure(self, seconds: float = 1.0) -> float:
        return measure_forward(self.encoder, self.card.sampling.frames, self.card.image_size, seconds)

    def run(self, work: Work, decode: Decode, on_clips: Callable[[int], None]) -> ShardResult:
        shard_id, encoding = (
            work.task.shard_id,
            ShardEncoding(self.encoder, decode(work), on_clips, self.beside),
        )
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

    def measure(self, seconds: float = 1.0) -> float:
        return measure_tokenizing(self.encoder, self.features[1], seconds)

    def run(self, work: Work, decode: Decode, on_clips: Callable[[int], None]) -> ShardResult:
        """Features are read from the dataset: nothing is decoded."""
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
