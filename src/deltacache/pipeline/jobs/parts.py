"""What jobs are made of: the card of the output, and how workers build their encoders."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from upath import UPath

import deltacache
from deltacache.models.backbone import Backbone
from deltacache.pipeline.decoding.shots import require_detector
from deltacache.pipeline.inputs.lerobot import LeRobotRows, read_info
from deltacache.pipeline.inputs.lists import Tell
from deltacache.pipeline.inputs.side_arrays import SideSource, SideTable
from deltacache.pipeline.inputs.sources import VideoSource, find_videos
from deltacache.pipeline.storage.files import crc32c_of_npy
from deltacache.pipeline.storage.storage import is_remote, set_patience
from deltacache.pipeline.work.encoders import (
    ChosenBackbone,
    ClipEncoder,
    build_delta_encoder,
    build_feature_encoder,
)
from deltacache.pipeline.work.workers import FeatureShardWorker, VideoShardWorker
from deltacache.schemas.datasets import DatasetCard, Precision
from deltacache.schemas.errors import SettingsError
from deltacache.schemas.hub import origins
from deltacache.schemas.jobs import ExtractionSettings

BuildEncoder = Callable[[str], ClipEncoder]
"""From a device (``cpu`` or ``cuda``) to an encoder there."""


def find_sources(settings: ExtractionSettings, tell: Tell | None = None) -> list[VideoSource]:
    """The videos that these settings ask for, in the order of their uris."""
    return find_videos(
        settings.source,
        settings.exclude_list,
        settings.column,
        tell,
        settings.allow_schemes,
        settings.sampling.frames_per_second,
        settings.cameras,
    )


def chosen_backbone(settings: ExtractionSettings) -> ChosenBackbone:
    """What makes the tokens of these settings."""
    return ChosenBackbone(settings.backbone, settings.layers, settings.pca)


def features_card(
    settings: ExtractionSettings, backbone: Backbone, black: np.ndarray, precision: Precision
) -> DatasetCard:
    """What a feature dataset made with these settings is.

    Args:
        black: (N, D) float16, patch tokens of an all-black frame.

    Raises:
        DeltacacheError: side arrays cannot be read, or a package is missing.
    """
    if settings.sampling.shots:
        require_detector()
    return DatasetCard(
        kind="features",
        store=settings.store,
        dtype=settings.dtype,
        precision=precision,
        backbone=backbone.card,
        image_size=settings.image_size,
        patch_grid=backbone.grid(settings.image_size),
        hidden_size=backbone.hidden_size,
        sampling=settings.sampling,
        black_crc32c=crc32c_of_npy(black),
        side_arrays=beside.arrays if (beside := side_table(settings)) else {},
        code_version=deltacache.__version__,
        sources=origins(pca=settings.pca, videos=settings.source),
    )


def side_table(settings: ExtractionSettings) -> SideSource | None:
    """What is stored beside the tokens, if anything: the rows of a file, else those of a LeRobot dataset.

    Raises:
        SettingsError: rules for arrays that there are not.
    """
    if settings.side_arrays is not None:
        return SideTable(settings.side_arrays, settings.side_rules)
    source = settings.source
    if (is_remote(source) or Path(source).is_dir()) and read_info(source) is not None:
        return LeRobotRows(source if is_remote(source) else str(Path(source).absolute()), settings.side_rules)
    if settings.side_rule:
        raise SettingsError(
            "side_rule concerns columns of a file, or arrays of a LeRobot dataset: give --side-arrays as well"
        )
    return None


def feature_encoder(settings: ExtractionSettings, precision: Precision) -> BuildEncoder:
    """From pixels to patch tokens."""
    return partial(
        build_feature_encoder,
        chosen_backbone(settings),
        frames=settings.sampling.frames,
        dtype=settings.dtype,
        precision=precision,
    )


def video_delta_encoder(
    settings: ExtractionSettings, card: DatasetCard, tokenizer: Path, black: np.ndarray
) -> BuildEncoder:
    """From pixels to delta tokens."""
    return partial(
        build_delta_encoder,
        tokenizer,
        black,
        card.patch_grid,
        backbone=chosen_backbone(settings),
        frames=card.sampling.frames,
        precision=card.precision,
        tokenizer_precision=card.tokenizer_precision,
    )


def video_worker(
    out: UPath,
    card: DatasetCard,
    encoder: BuildEncoder,
    lock: str,
    retry_s: float,
    device: str,
    beside: SideSource | None = None,
) -> VideoShardWorker:
    """A worker that makes shards of ``out`` from videos, while ``lock`` is held; runs where it will work."""
    set_patience(retry_s)
    return VideoShardWorker(out, card, encoder(device), lock, beside)


def feature_worker(
    features: tuple[UPath, DatasetCard],
    deltas: tuple[UPath, DatasetCard],
    tokenizer: Path,
    black: np.ndarray,
    lock: str,
    retry_s: float,
    device: str,
) -> FeatureShardWorker:
    """A worker that makes shards of deltas from those of features, while ``lock`` is held; runs where it will work."""
    set_patience(retry_s)
    card = deltas[1]
    encoder = build_delta_encoder(
        tokenizer,
        black,
        card.patch_grid,
        device,
        None,
        frames=card.sampling.frames,
        tokenizer_precision=card.tokenizer_precision,
    )
    return FeatureShardWorker(features, deltas, encoder, lock)
