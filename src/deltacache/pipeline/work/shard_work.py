"""The work of an encoder on one shard, free of Ray: encode clips as they are decoded, commit them.

Groups of videos go through one after the other, so that memory does not grow with the shard: the store asks for
a clip, the encoder for a batch, the batch for a group, and the next groups are decoded somewhere else meanwhile.
"""

import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from upath import UPath

from deltacache.pipeline.datasets.dataset import stored_clips
from deltacache.pipeline.datasets.receipts import Failure, Receipt, SourceRecord, StoredClip, receipt_path
from deltacache.pipeline.datasets.writing import checked_receipt, receipt_digest, write_shard
from deltacache.pipeline.decoding.work import DecodedGroup
from deltacache.pipeline.inputs.side_arrays import SideSource
from deltacache.pipeline.storage.errors import readable_errors
from deltacache.pipeline.storage.storage import size_of
from deltacache.pipeline.work.encoders import ClipEncoder
from deltacache.schemas.clips import CropBox, DeltaClip, FeatureClip, PixelClip, clip_id_of
from deltacache.schemas.datasets import DatasetCard, Size, sides
from deltacache.schemas.errors import DatasetError, DeltacacheError, FailureReason


@dataclass(frozen=True, slots=True)
class ShardResult:
    """What a finished piece of work tells the driver.

    Attributes:
        clips: new ones in the dataset.
        failed: uris of the videos that were refused.
        files: the shard's, relative to the dataset's folder.
        host: the machine that did the work.
        decode_s: seconds of all decoders together; ``encode_s``, ``write_s``, ``wait_s`` are those of the
            encoder: in the forward pass, writing, and waiting for pixels (or reading tokens).
    """

    shard_id: str
    clips: int
    failed: tuple[str, ...]
    videos: int
    bytes_written: int
    decode_s: float
    encode_s: float
    write_s: float
    wait_s: float
    files: tuple[str, ...] = ()
    host: str = field(default_factory=socket.gethostname)


_Encoded: TypeAlias = tuple[PixelClip, FeatureClip | DeltaClip | None]


class ShardEncoding:
    """Groups in, stored clips out, counting what it costs. Use one for each piece of work.

    ``failures`` and ``sources`` are whole once ``clips`` is exhausted.
    """

    def __init__(
        self,
        encoder: ClipEncoder,
        groups: Iterable[DecodedGroup],
        on_clips: Callable[[int], None],
        beside: SideSource | None = None,
    ) -> None:
        self._encoder, self._groups, self._on_clips, self._beside = encoder, groups, on_clips, beside
        self.failures: list[Failure] = []
        self.sources: list[SourceRecord] = []
        self.count = 0
        self.videos = 0
        self.decode_s = self.encode_s = self.wait_s = 0.0

    def clips(self) -> Iterator[StoredClip]:
        """Stored clips in the order of the plan."""
        pieces: list[_Encoded] = []
        for pixels, clip in self._all_encoded():
            if pixels.windows:
                pieces.append((pixels, clip))
                if len(pieces) * len(pixels.frame_indices) >= pixels.windows[-1] + len(pixels.frame_indices):
                    yield from self._windows(pieces)
                    pieces = []
            elif clip is None:
                self.failures.append(not_finite(pixels.video_uri, pixels.view))
            else:
                yield _stored(pixels, clip, self._beside)
        place = {source.video_uri: position for position, source in enumerate(self.sources)}
        self.failures.sort(key=lambda failure: (place.get(failure.video_uri, 0), failure.view or 0))

    def _windows(self, pieces: "Sequence[_Encoded]") -> Iterator[StoredClip]:
        """The clips of a video from its pieces, which hold each of its frames once."""
        first, frames = pieces[0][0], len(pieces[0][0].frame_indices)
        features = [clip for _, clip in pieces if isinstance(clip, FeatureClip)]
        if len(features) < len(pieces):
            self.failures.append(not_finite(first.video_uri, None))
            return
        tokens = np.concatenate([clip.patch_tokens for clip in features])
        scales = [clip.scales for clip in features if clip.scales is not None]
        of_tokens = np.concatenate(scales) if scales else None
        times = np.concatenate([clip.timestamps_s for clip in features])
        indices = [index for pixels, _ in pieces for index in pixels.frame_indices]
        for view, begin in enumerate(first.windows):
            own = slice(begin, begin + frames)
            clip = FeatureClip(
                clip_id_of(first.clip_id.rpartition("-v")[0], view),
                tokens[own],
                times[own],
                None if of_tokens is None else of_tokens[own],
            )
            yield StoredClip(
                clip=clip,
                video_uri=first.video_uri,
                view=view,
                frame_indices=tuple(indices[own]),
                crop=first.crop,
                flip=first.flip,
                decoder=first.decoder,
                duplicate_frames=sum(a == b for a, b in pairwise(indices[own])),
                side_arrays=self._beside.at(first.video_uri, clip.timestamps_s) if self._beside else {},
            )

    def _all_encoded(self) -> "Iterator[_Encoded]":
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

    def _encoded(self, batch: list[PixelClip]) -> "Iterator[_Encoded]":
        start = time.perf_counter()
        encoded = self._encoder.encode(batch)
        self.encode_s += time.perf_counter() - start
        self.count += len(batch)
        self._on_clips(len(batch))
        yield from zip(batch, encoded, strict=True)

    def result(self, shard_id: str, started: float, receipt: Receipt | None, clips: int) -> ShardResult:
        """The figures of the finished work; ``receipt`` is that of the shard, if one was committed."""
        elsewhere = self.encode_s + self.wait_s
        return ShardResult(
            shard_id=shard_id,
            clips=clips,
            failed=tuple(dict.fromkeys(failure.video_uri for failure in self.failures)),
            videos=self.videos,
            bytes_written=receipt.total_bytes if receipt else 0,
            decode_s=self.decode_s,
            encode_s=self.encode_s,
            write_s=max(time.perf_counter() - started - elsewhere, 0.0),
            wait_s=self.wait_s,
            files=tuple(receipt.files) if receipt else (),
        )


def commit_shard(
    root: UPath, card: DatasetCard, shard_id: str, encoding: ShardEncoding, lock: str = ""
) -> ShardResult:
    """Encode a shard as its groups arrive, and commit it, while ``lock`` is held; see ``write_shard``."""
    started = time.perf_counter()
    receipt = write_shard(
        root, card, shard_id, encoding.clips(), encoding.failures, encoding.sources, lock=lock
    )
    return encoding.result(shard_id, started, receipt, len(receipt.clips))


def try_videos(shard_id: str, encoding: ShardEncoding) -> ShardResult:
    """Encode some videos of a shard and write nothing: the question is whether a worker survives it."""
    started = time.perf_counter()
    for _ in encoding.clips():
        pass
    return encoding.result(shard_id, started, None, 0)


_PATIENCE_S = 10.0
"""A network file system may show a file to other machines only after some seconds."""


def check_is_here(root: UPath, result: ShardResult) -> None:
    """Look for a shard that a worker says it has committed, as the next command will.

    Raises:
        DatasetError: its receipt or one of its files is not there.
    """
    deadline = time.monotonic() + _PATIENCE_S
    for path in (*(root / name for name in result.files), receipt_path(root, result.shard_id)):
        with readable_errors(path, "read"):
            while size_of(path) is None:
                if time.monotonic() > deadline:
                    raise DatasetError(
                        f"shard {result.shard_id} was committed on {result.host}, but {path} is not there on "
                        f"{socket.gethostname()}, where this command runs: all nodes and the next command must see "
                        "one output folder. Give a folder that they share under the same path, such as one of a "
                        "network file system, or an object store. What lies in that folder on "
                        f"{result.host} does not count"
                    )
                time.sleep(0.2)


def not_finite(video_uri: str, view: int | None) -> Failure:
    """The row of a clip whose tokens cannot be used; of a video whose clips share their frames, ``view`` is None."""
    message = "its tokens are not finite: NaN, or beyond what float16 holds"
    return Failure(video_uri, view, "encode", FailureReason.ENCODE_FAILED.value, message)


class _UnchangedError(Exception):
    """The retried videos are as they were: nothing is written."""


def retry_failures(
    root: UPath, card: DatasetCard, shard_id: str, encoding: ShardEncoding, lock: str = ""
) -> ShardResult:
    """Try the refused videos of a finished shard again; what succeeds is merged into the shard.

    Nothing changes when all are refused again and are the same files. Otherwise the shard is written aside with
    the old clips and the new ones, and its file and receipt take the places of the old ones. A crash leaves the
    shard as it was, or the next command ends the commit.
    """
    started = time.perf_counter()
    replaces = receipt_digest(root, shard_id)
    receipt = checked_receipt(root, shard_id, card)
    failures: list[Failure] = []
    sources: list[SourceRecord] = []
    clips = _merged(root, card, receipt, encoding, failures, sources)
    try:
        renewed = write_shard(root, card, shard_id, clips, failures, sources, replaces=replaces, lock=lock)
    except _UnchangedError:
        return encoding.result(shard_id, started, None, 0)
    return encoding.result(shard_id, started, renewed, len(renewed.clips) - len(receipt.clips))


def _merged(
    root: UPath,
    card: DatasetCard,
    receipt: Receipt,
    encoding: ShardEncoding,
    failures: list[Failure],
    sources: list[SourceRecord],
) -> Iterator[StoredClip]:
    """Old and new clips, video by video in the order of the plan; fills ``failures`` and ``sources``."""
    old, new = _Peekable(stored_clips(root, card, receipt)), _Peekable(encoding.clips())
    held = {row["video_uri"] for row in receipt.clips}
    for source in receipt.sources:
        if source.video_uri in held:
            yield from old.of(source.video_uri)
            new.skip(source.video_uri)  # an earlier attempt committed it, and died before it could say so
        else:
            yield from new.of(source.video_uri)
    new.finish()
    tried = {source.video_uri: source for source in encoding.sources if source.video_uri not in held}
    sources.extend(tried.get(source.video_uri, source) for source in receipt.sources)
    kept = [failure for failure in receipt.failures if failure.video_uri not in tried]
    again = [failure for failure in encoding.failures if failure.video_uri in tried]
    place = {source.video_uri: position for position, source in enumerate(sources)}
    failures.extend(sorted([*kept, *again], key=lambda failure: place[failure.video_uri]))
    same_files = [s.sha256 for s in sources] == [s.sha256 for s in receipt.sources]
    reasons = [
        [(row.video_uri, row.view, row.reason) for row in rows] for rows in (failures, receipt.failures)
    ]
    if same_files and reasons[0] == reasons[1]:
        raise _UnchangedError


class _Peekable:
    """Clips that come video by video."""

    def __init__(self, clips: Iterator[StoredClip]) -> None:
        self._clips = clips
        self._next = next(clips, None)

    def of(self, video_uri: str) -> Iterator[StoredClip]:
        """The clips of this video, if they are the next."""
        while self._next is not None and self._next.video_uri == video_uri:
            yield self._next
            self._next = next(self._clips, None)

    def skip(self, video_uri: str) -> None:
        for _ in self.of(video_uri):
            pass

    def finish(self) -> None:
        """Raise when something is left: it came out of order."""
        if self._next is not None:
            raise ValueError(f"clip {self._next.clip.clip_id} came out of the plan's order")


def _stored(pixels: PixelClip, clip: FeatureClip | DeltaClip, beside: SideSource | None) -> StoredClip:
    return StoredClip(
        clip=clip,
        video_uri=pixels.video_uri,
        view=pixels.view,
        frame_indices=pixels.frame_indices,
        crop=pixels.crop,
        flip=pixels.flip,
        decoder=pixels.decoder,
        duplicate_frames=pixels.duplicate_frames,
        side_arrays=beside.at(pixels.video_uri, clip.timestamps_s) if beside else {},
    )


def refuse_without_tokens(encoded: Sequence[object | None]) -> None:
    """Refuse an encoder that gives no finite tokens when it is first measured.

    Raises:
        DeltacacheError: one is None.
    """
    if None in encoded:
        raise DeltacacheError(
            "the encoder gives tokens for noise that are not finite (NaN, or beyond 65504, where float16 ends): the "
            "weights of the backbone or tokenizer are damaged or of another model. Give others, or try "
            "--precision float32"
        )


def measure_forward(encoder: ClipEncoder, frames: int, image_size: Size, seconds: float = 1.0) -> float:
    """Clips a second of the encoder alone, on noise: a warm-up, then at least two batches and ``seconds``."""
    rng = np.random.default_rng(0)
    height, width = sides(image_size)
    clip = PixelClip(
        clip_id="probe",
        video_uri="probe",
        view=0,
        pixels=rng.integers(0, 256, (frames, height, width, 3), dtype=np.uint8),
        timestamps_s=np.arange(frames, dtype=np.float32),
        frame_indices=tuple(range(frames)),
        crop=CropBox(0, 0, height, width),
        flip=False,
        decoder="none",
        duplicate_frames=0,
    )
    batch = [replace(clip, clip_id=f"probe-{place}") for place in range(encoder.batch_clips)]
    refuse_without_tokens(encoder.encode(batch))
    start, rounds = time.perf_counter(), 0
    while rounds < 2 or time.perf_counter() - start < seconds:
        encoder.encode(batch)
        rounds += 1
    return rounds * len(batch) / (time.perf_counter() - start)
