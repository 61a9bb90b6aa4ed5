"""The work of an encoder on one shard, free of Ray: encode clips as they are decoded, commit them.

Groups of videos go through one after the other, so that memory does not grow with the shard: the store asks for
a clip, the encoder for a batch, the batch for a group, and the next groups are decoded somewhere else meanwhile.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from upath import UPath

from deltacache.pipeline.commits import write_shard
from deltacache.pipeline.decode_work import DecodedGroup
from deltacache.pipeline.encoders import ClipEncoder
from deltacache.pipeline.receipts import Failure, SourceRecord, StoredClip, read_receipt, receipt_path
from deltacache.pipeline.shard_reading import stored_clips
from deltacache.schemas.clips import CropBox, DeltaClip, FeatureClip, PixelClip
from deltacache.schemas.datasets import DatasetCard


@dataclass(frozen=True, slots=True)
class ShardResult:
    """What a finished piece of work tells the driver.

    Attributes:
        clips: new ones in the dataset.
        decode_s: seconds of all decoders together; ``encode_s``, ``write_s``, ``wait_s`` are those of the
            encoder: in the forward, writing, and waiting for pixels (or reading tokens).
    """

    shard_id: str
    clips: int
    failures: int
    videos: int
    bytes_written: int
    decode_s: float
    encode_s: float
    write_s: float
    wait_s: float


class ShardEncoding:
    """Groups in, stored clips out, counting what it costs. Use one for each piece of work.

    ``failures`` and ``sources`` are whole once ``clips`` is exhausted.
    """

    def __init__(
        self, encoder: ClipEncoder, groups: Iterable[DecodedGroup], on_clips: Callable[[int], None]
    ) -> None:
        self._encoder, self._groups, self._on_clips = encoder, groups, on_clips
        self.failures: list[Failure] = []
        self.sources: list[SourceRecord] = []
        self.count = 0
        self.videos = 0
        self.decode_s = self.encode_s = self.wait_s = 0.0

    def clips(self) -> Iterator[StoredClip]:
        """Stored clips in the order of the plan."""
        batch: list[PixelClip] = []
        for group in self._arriving():
            for clip in group.clips:
                batch.append(clip)
                if len(batch) == self._encoder.batch_clips:
                    yield from self._encoded(batch)
                    batch = []
        if batch:
            yield from self._encoded(batch)

    def _arriving(self) -> Iterator[DecodedGroup]:
        groups = iter(self._groups)
        while True:
            start = time.perf_counter()
            group = next(groups, None)
            self.wait_s += time.perf_counter() - start
            if group is None:
                return
            self.failures.extend(group.failures)
            self.sources.extend(group.sources)
            self.videos += len(group.sources)
            self.decode_s += group.decode_s
            yield group

    def _encoded(self, batch: list[PixelClip]) -> Iterator[StoredClip]:
        start = time.perf_counter()
        encoded = self._encoder.encode(batch)
        self.encode_s += time.perf_counter() - start
        self.count += len(batch)
        self._on_clips(len(batch))
        for pixels, clip in zip(batch, encoded, strict=True):
            yield _stored(pixels, clip)

    def result(self, shard_id: str, started: float, bytes_written: int, clips: int) -> ShardResult:
        """The figures of the finished work."""
        elsewhere = self.encode_s + self.wait_s
        return ShardResult(
            shard_id=shard_id,
            clips=clips,
            failures=len(self.failures),
            videos=self.videos,
            bytes_written=bytes_written,
            decode_s=self.decode_s,
            encode_s=self.encode_s,
            write_s=max(time.perf_counter() - started - elsewhere, 0.0),
            wait_s=self.wait_s,
        )


def commit_shard(root: UPath, card: DatasetCard, shard_id: str, encoding: ShardEncoding) -> ShardResult:
    """Encode a shard as its groups arrive, and commit it."""
    started = time.perf_counter()
    receipt = write_shard(root, card, shard_id, encoding.clips(), encoding.failures, encoding.sources)
    return encoding.result(shard_id, started, receipt.total_bytes, len(receipt.clips))


def try_videos(shard_id: str, encoding: ShardEncoding) -> ShardResult:
    """Encode some videos of a shard and write nothing: the question is whether a worker survives it."""
    started = time.perf_counter()
    for _ in encoding.clips():
        pass
    return encoding.result(shard_id, started, 0, 0)


def retry_failures(root: UPath, card: DatasetCard, shard_id: str, encoding: ShardEncoding) -> ShardResult:
    """Try the refused videos of a finished shard again; what succeeds is merged into the shard.

    Nothing changes when all are refused again. Otherwise the receipt goes first, so that a crash leaves no
    receipt of another content: the next run then makes the whole shard.
    """
    started = time.perf_counter()
    new = {stored.clip.clip_id: stored for stored in encoding.clips()}
    if not new or not receipt_path(root, shard_id).exists():  # or an earlier attempt died in between
        return encoding.result(shard_id, started, 0, 0)
    receipt = read_receipt(root, shard_id)
    tried = {source.video_uri: source for source in encoding.sources}
    sources = [tried.get(source.video_uri, source) for source in receipt.sources]
    failures = [failure for failure in receipt.failures if failure.video_uri not in tried]
    failures = _in_order([*failures, *encoding.failures], sources)
    receipt_path(root, shard_id).unlink()
    merged = _merged(stored_clips(root, card, receipt), new.values(), sources)
    renewed = write_shard(root, card, shard_id, merged, failures, sources)
    return encoding.result(shard_id, started, renewed.total_bytes, len(new))


def _merged(
    old: Iterator[StoredClip], new: Iterable[StoredClip], sources: Sequence[SourceRecord]
) -> Iterator[StoredClip]:
    """Old and new clips, video by video in the order of the plan."""
    fresh: dict[str, list[StoredClip]] = {}
    for stored in new:
        fresh.setdefault(stored.video_uri, []).append(stored)
    waiting = next(old, None)
    for source in sources:
        while waiting is not None and waiting.video_uri == source.video_uri:
            yield waiting
            waiting = next(old, None)
        yield from fresh.get(source.video_uri, ())


def _in_order(failures: list[Failure], sources: Sequence[SourceRecord]) -> list[Failure]:
    place = {source.video_uri: position for position, source in enumerate(sources)}
    return sorted(failures, key=lambda failure: place[failure.video_uri])


def _stored(pixels: PixelClip, clip: FeatureClip | DeltaClip) -> StoredClip:
    return StoredClip(
        clip=clip,
        video_uri=pixels.video_uri,
        view=pixels.view,
        frame_indices=pixels.frame_indices,
        crop=pixels.crop,
        flip=pixels.flip,
        decoder=pixels.decoder,
        duplicate_frames=pixels.duplicate_frames,
    )


def measure_forward(encoder: ClipEncoder, frames: int, image_size: int, seconds: float = 1.0) -> float:
    """Clips a second of the encoder alone, on noise: a warm-up, then at least two batches and ``seconds``."""
    rng = np.random.default_rng(0)
    clip = PixelClip(
        clip_id="probe",
        video_uri="probe",
        view=0,
        pixels=rng.integers(0, 256, (frames, image_size, image_size, 3), dtype=np.uint8),
        timestamps_s=np.arange(frames, dtype=np.float32),
        frame_indices=tuple(range(frames)),
        crop=CropBox(0, 0, image_size, image_size),
        flip=False,
        decoder="none",
        duplicate_frames=0,
    )
    batch = [replace(clip, clip_id=f"probe-{place}") for place in range(encoder.batch_clips)]
    encoder.encode(batch)
    start, rounds = time.perf_counter(), 0
    while rounds < 2 or time.perf_counter() - start < seconds:
        encoder.encode(batch)
        rounds += 1
    return rounds * len(batch) / (time.perf_counter() - start)
