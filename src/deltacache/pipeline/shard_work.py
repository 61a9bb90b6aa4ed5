"""The work on one shard, free of Ray: decode its videos, encode its clips, commit it.

A shard travels between processes as one row of plain arrays and JSON (``to_row``/``from_row``): the pixels
of all its clips stacked, everything else as text.

Shapes: M clips of the shard, T frames, S image size.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deltacache.pipeline.dataset import write_shard
from deltacache.pipeline.decode import VideoJob
from deltacache.pipeline.decode_child import ChildDecoder
from deltacache.pipeline.encoders import ClipEncoder
from deltacache.pipeline.plan import PlannedVideo, ShardTask
from deltacache.pipeline.receipts import Failure, StoredClip
from deltacache.schemas.clips import CropBox, DeltaClip, FeatureClip, PixelClip
from deltacache.schemas.datasets import DatasetCard, SamplingSettings
from deltacache.schemas.errors import VideoRefusedError
from deltacache.schemas.jobs import DecodeLimits

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class DecodeSettings:
    """What decoding a shard needs beside the shard itself."""

    image_size: int
    sampling: SamplingSettings
    limits: DecodeLimits


@dataclass(frozen=True, slots=True)
class DecodedShard:
    """All clips of one shard as pixels, and the videos that gave none."""

    shard_id: str
    clips: tuple[PixelClip, ...]
    failures: tuple[Failure, ...]
    decode_s: float


@dataclass(frozen=True, slots=True)
class ShardResult:
    """What a committed shard tells the driver. Seconds are those of the worker that did the part."""

    shard_id: str
    clips: int
    failures: int
    videos: int
    bytes_written: int
    decode_s: float
    encode_s: float
    write_s: float
    forward_s: float  # seconds a clip of the bare forward, measured by this encoder before its first shard


def decode_shard(task: ShardTask, paths: dict[str, str], settings: DecodeSettings) -> DecodedShard:
    """Decode every video of a shard, each in a disposable child; a refused video becomes a failure."""
    start = time.perf_counter()
    clips: list[PixelClip] = []
    failures: list[Failure] = []
    with ChildDecoder(settings.limits.timeout_s, settings.limits.memory_bytes) as decoder:
        for video in task.videos:
            job = _job(video, paths.get(video.video_uri, video.video_uri), settings)
            try:
                clips.extend(decoder.decode(job))
            except VideoRefusedError as error:
                failures.append(Failure(video.video_uri, None, "decode", error.reason.value, error.message))
    return DecodedShard(task.shard_id, tuple(clips), tuple(failures), time.perf_counter() - start)


def _job(video: PlannedVideo, path: str, settings: DecodeSettings) -> VideoJob:
    return VideoJob(
        path=path,
        video_uri=video.video_uri,
        video_id=video.video_id,
        first_view=video.first_view,
        views=video.views,
        image_size=settings.image_size,
        sampling=settings.sampling,
    )


def commit_decoded(
    root: Path, card: DatasetCard, shard: DecodedShard, encoder: ClipEncoder, forward_s: float
) -> ShardResult:
    """Encode a decoded shard and commit it under ``root``."""
    start = time.perf_counter()
    stored = [_stored(clip, encoder.encode(clip)) for clip in shard.clips]
    encoded = time.perf_counter()
    receipt = write_shard(root, card, shard.shard_id, stored, list(shard.failures))
    return ShardResult(
        shard_id=shard.shard_id,
        clips=len(stored),
        failures=len(shard.failures),
        videos=len({clip.video_uri for clip in shard.clips}) + len(shard.failures),
        bytes_written=receipt.total_bytes,
        decode_s=shard.decode_s,
        encode_s=encoded - start,
        write_s=time.perf_counter() - encoded,
        forward_s=forward_s,
    )


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


def measure_forward(encode: Callable[[PixelClip], object], frames: int, image_size: int) -> float:
    """Seconds a clip of the bare forward on noise: a warm-up, then at least two clips and half a second."""
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
    encode(clip)
    start, rounds = time.perf_counter(), 0
    while rounds < 2 or time.perf_counter() - start < 0.5:
        encode(clip)
        rounds += 1
    return (time.perf_counter() - start) / rounds


def to_row(shard: DecodedShard, settings: DecodeSettings) -> Row:
    """One row of plain values: pixels (M, T, S, S, 3), the rest as JSON."""
    shape = (settings.sampling.frames, settings.image_size, settings.image_size, 3)
    pixels = (
        np.stack([clip.pixels for clip in shard.clips]) if shard.clips else np.zeros((0, *shape), np.uint8)
    )
    about = {
        "clips": [_clip_about(clip) for clip in shard.clips],
        "failures": [asdict(failure) for failure in shard.failures],
        "decode_s": shard.decode_s,
    }
    return {"shard_id": shard.shard_id, "pixels": pixels, "about": json.dumps(about)}


def _clip_about(clip: PixelClip) -> dict[str, Any]:
    crop = clip.crop
    return {
        "clip_id": clip.clip_id,
        "video_uri": clip.video_uri,
        "view": clip.view,
        "timestamps_s": clip.timestamps_s.tolist(),
        "frame_indices": list(clip.frame_indices),
        "crop": [crop.top, crop.left, crop.height, crop.width],
        "flip": clip.flip,
        "decoder": clip.decoder,
        "duplicate_frames": clip.duplicate_frames,
    }


def from_row(row: Row) -> DecodedShard:
    """The inverse of ``to_row``."""
    about = json.loads(str(row["about"]))
    return DecodedShard(
        shard_id=str(row["shard_id"]),
        clips=tuple(_clips_from(about["clips"], row["pixels"])),
        failures=tuple(Failure(**failure) for failure in about["failures"]),
        decode_s=about["decode_s"],
    )


def _clips_from(abouts: list[dict[str, Any]], pixels: np.ndarray) -> Iterator[PixelClip]:
    for about, frames in zip(abouts, pixels, strict=True):
        yield PixelClip(
            clip_id=about["clip_id"],
            video_uri=about["video_uri"],
            view=about["view"],
            pixels=frames,
            timestamps_s=np.asarray(about["timestamps_s"], np.float32),
            frame_indices=tuple(about["frame_indices"]),
            crop=CropBox(*about["crop"]),
            flip=about["flip"],
            decoder=about["decoder"],
            duplicate_frames=about["duplicate_frames"],
        )
