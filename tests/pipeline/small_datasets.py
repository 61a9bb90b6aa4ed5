"""Datasets of a few drawn clips, small enough to write in milliseconds."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from deltacache.pipeline.datasets.dataset import (
    finish_dataset,
    prepare_dataset,
    quantise,
    write_plan,
    write_shard,
)
from deltacache.pipeline.datasets.plan import PlannedVideo, ShardTask, extend_plan, read_plan, shard_tasks
from deltacache.pipeline.datasets.receipts import Failure, SourceRecord, StoredClip
from deltacache.pipeline.inputs.sources import VideoSource, video_id_of
from deltacache.pipeline.storage.files import crc32c_of_npy, sealed_table
from deltacache.schemas.clips import CropBox, DeltaClip, FeatureClip, clip_id_of
from deltacache.schemas.datasets import BackboneCard, DatasetCard, SamplingSettings

FRAMES, GRID, HIDDEN = 3, (2, 3), 4
BLACK = np.linspace(-1, 1, GRID[0] * GRID[1] * HIDDEN, dtype=np.float16).reshape(-1, HIDDEN)


def small_card(kind: str, store: str, **changes: Any) -> DatasetCard:
    """A card for clips of ``FRAMES`` frames of ``GRID`` patches, ``HIDDEN`` wide; kind "int8": such features."""
    backbone = BackboneCard(
        id="tiny",
        weights_sha256="5e" * 32,
        patch_size=16,
        hidden_size=HIDDEN,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.2, 0.2, 0.2),
    )
    settings: dict[str, Any] = {
        "kind": "deltas" if kind == "deltas" else "features",
        "dtype": "int8" if kind == "int8" else "float16",
        "store": store,
        "backbone": backbone,
        "tokenizer_fingerprint": "0123456789abcdef" if kind == "deltas" else None,
        "image_size": 48,
        "patch_grid": GRID,
        "hidden_size": HIDDEN,
        "sampling": SamplingSettings(frames=FRAMES),
        "black_crc32c": crc32c_of_npy(BLACK),
        "code_version": "0.1.0",
    }
    return DatasetCard(**settings | changes)


def videos_named(*names: str) -> list[VideoSource]:
    """Sources that need not exist."""
    return [VideoSource(video_id_of(name), name, f"/videos/{name}", 100 + len(name)) for name in names]


def drawn_clip(kind: str, video: PlannedVideo, view: int) -> StoredClip:
    """A clip whose numbers come from its id; view 1 is all zeros, as an empty chunk would be."""
    clip_id = clip_id_of(video.video_id, view)
    rng = np.random.default_rng(list(clip_id.encode()))
    shape = (FRAMES, HIDDEN) if kind == "deltas" else (FRAMES, GRID[0] * GRID[1], HIDDEN)
    tokens = (rng.normal(size=shape) * (view != 1)).astype(np.float16)
    times = np.sort(rng.random(FRAMES)).astype(np.float32)
    clip = DeltaClip(clip_id, tokens, times) if kind == "deltas" else FeatureClip(clip_id, tokens, times)
    if kind == "int8":
        values, scales = quantise(torch.from_numpy(tokens))
        clip = FeatureClip(clip_id, values.numpy(), times, scales.numpy())
    indices = tuple(int(index) for index in (times * 100).astype(int))
    return StoredClip(clip, video.video_uri, view, indices, CropBox(1, 2, 30, 40), view == 2, "pyav", view)


def shard_of(kind: str, task: ShardTask) -> tuple[list[StoredClip], list[Failure]]:
    """What the work on a shard gives: videos with "broken" in their name are refused."""
    clips, failures = [], []
    for video in task.videos:
        if "broken" in video.video_uri:
            failures.append(Failure(video.video_uri, None, "decode", "truncated", "ends after 3 frames"))
            continue
        views = range(video.first_view, video.first_view + video.views)
        clips.extend(drawn_clip(kind, video, view) for view in views)
    return clips, failures


def sources_of(task: ShardTask) -> list[SourceRecord]:
    """A record of each planned video; those with "broken" in their name could not be read."""
    return [
        SourceRecord(
            video.video_id,
            video.video_uri,
            video.size_bytes,
            video.first_view,
            video.views,
            version="1700000000000000000",
            sha256=""
            if "broken" in video.video_uri
            else hashlib.sha256(video.video_uri.encode()).hexdigest(),
        )
        for video in task.videos
    ]


def make_dataset(
    root: Path, kind: str, store: str, *names: str, views: int = 2, videos_per_shard: int = 2
) -> list[ShardTask]:
    """Make a finished dataset of these videos at ``root``; the shards of its plan."""
    card = small_card(kind, store)
    prepare_dataset(root, card, BLACK)
    plan = extend_plan(read_plan(root), videos_named(*names), views, videos_per_shard)
    write_plan(root, plan)
    tasks = shard_tasks(plan)
    for task in tasks:
        write_shard(root, card, task.shard_id, *shard_of(kind, task), sources_of(task))
    finish_dataset(root)
    return tasks


def all_bytes(root: Path) -> dict[str, bytes]:
    """Every file below ``root``, by relative path."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


def write_sealed(path: Path, table: pa.Table) -> None:
    """The table as a sealed Parquet file."""
    with sealed_table(path, table.schema, page_checksums=False) as written:
        written.add(table)
