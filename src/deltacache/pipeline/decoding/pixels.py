"""The pixels behind cached clips, decoded again from the videos: datasets store tokens, people look at frames."""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from deltacache.pipeline.datasets.dataset import Dataset
from deltacache.pipeline.decoding.child import ChildDecoder
from deltacache.pipeline.decoding.decode import VideoJob
from deltacache.pipeline.inputs.fetching import FetchedVideo, fetched
from deltacache.pipeline.inputs.sources import find_videos
from deltacache.schemas.configs import load_config
from deltacache.schemas.errors import DeltacacheError, VideoRefusedError
from deltacache.schemas.hub import as_saved
from deltacache.schemas.jobs import ExtractionSettings


def clip_pixels(dataset: Dataset, clip_ids: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Pairs of clip id and its pixels (T, H, W, 3) uint8, for the clips whose videos are still there.

    Where the videos lie is read from the ``config.yaml`` that extraction left in the dataset.
    """
    config = dataset.root / "config.yaml"
    with as_saved():
        settings = load_config(config, ExtractionSettings) if config.is_file() else None  # pyright: ignore[reportArgumentType]
    if settings is None:
        return
    rows = {clip_id: position for position, clip_id in enumerate(dataset.clip_ids)}
    paths = _paths(settings)
    with (
        ChildDecoder(settings.limits.timeout_s, settings.limits.memory_bytes) as decoder,
        tempfile.TemporaryDirectory(prefix="deltacache-") as spool,
    ):
        for clip_id in clip_ids:
            row = dataset.index.slice(rows[clip_id], 1).to_pylist()[0]
            path = paths.get(row["video_uri"])
            if path is None:
                continue
            try:
                with fetched(path, Path(spool)) as video:
                    decoded = decoder.decode(_job(video, clip_id, row, settings))
            except VideoRefusedError:
                continue  # the video changed since: a picture less, no number touched
            for clip in decoded:
                if list(clip.frame_indices) == row["frame_indices"]:
                    yield clip_id, clip.pixels


def _job(video: FetchedVideo, clip_id: str, row: dict[str, Any], settings: ExtractionSettings) -> VideoJob:
    return VideoJob(
        path=video.path,
        video_uri=row["video_uri"],
        video_id=clip_id.rpartition("-v")[0],
        first_view=row["view"],
        views=1,
        image_size=settings.image_size,
        sampling=video.sampling_of(settings.sampling),
        span=video.span,
    )


def _paths(settings: ExtractionSettings) -> dict[str, str]:
    try:
        videos = find_videos(
            settings.source,
            None,
            settings.column,
            schemes=settings.allow_schemes,
            frames_per_second=settings.sampling.frames_per_second,
            cameras=settings.cameras,
        )
    except DeltacacheError:
        return {}  # the folder is gone
    return {video.video_uri: video.path for video in videos}
