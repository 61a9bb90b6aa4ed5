"""``train-foresight-head``: linear heads on the features of whole frames of Cityscapes (Table D).

The recipe is that of the benchmarks' heads; ``docs/foresight.md`` says how it differs from DINO-Foresight's DPT heads.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from deltacache import __version__
from deltacache.models.checkpoints import LoadedModel
from deltacache.models.devices import choose_device
from deltacache.models.heads import DepthHead, SegmentationHead, load_head
from deltacache.pipeline.benchmarks.frames import (
    depth_of,
    frame_shape,
    read_depth_map,
    read_label,
    read_whole,
)
from deltacache.pipeline.benchmarks.training_frames import (
    LoadedFrame,
    TrainingFrame,
    TrainingFrames,
    labelled_frames,
)
from deltacache.pipeline.work.frame_features import FrameFeatures, load_frame_features
from deltacache.schemas.benchmarks import CLASSES
from deltacache.schemas.datasets import sides
from deltacache.schemas.foresight import ForesightHeadConfig
from deltacache.schemas.progress import Reporter
from deltacache.train.heads.data import HeadFrames
from deltacache.train.heads.setup import described_frames, say_if_scored
from deltacache.train.heads.training import LinearHead, LinearHeadTask
from deltacache.train.loop import train
from deltacache.train.setup import holding_output, open_run, say_finished

_PLACES: dict[str, Any] = {"depth": True, "features": {"backbone", "pca"}}
"""Where things lie; what they are, fingerprints say."""


def train_foresight_head(
    root: Path,
    out: Path,
    config: ForesightHeadConfig,
    *,
    resume: bool,
    device: str,
    reporter: Reporter,
    dry_run: bool = False,
) -> Path:
    """Train a head on the labelled frames below ``root`` and return the last checkpoint.

    Raises:
        DatasetError: a frame, label or depth map is missing or damaged.
        MismatchError: ``resume`` with another config, backbone or other frames.
        DeltacacheError: ``out`` holds something else, or the loss became non-finite.
    """
    with holding_output(out, "train-foresight-head", resume=resume, dry_run=dry_run):
        return _train(root, out, config, resume, device, reporter, dry_run)


def _train(
    root: Path,
    out: Path,
    config: ForesightHeadConfig,
    resume: bool,
    device: str,
    reporter: Reporter,
    dry_run: bool,
) -> Path:
    frames = _frames(root, config)
    reporter.line(f"train head: {len(frames.frames):,} whole frames of cityscapes, for {config.task}")
    say_if_scored(frames, config.split, reporter)
    chosen = choose_device(device)
    features = load_frame_features(config.features, chosen)

    def load(path: Path) -> LoadedModel[LinearHead]:
        loaded = load_head(path, config.task)
        return LoadedModel(loaded.model, loaded.fingerprint, loaded.metadata)

    metadata = _metadata(root, frames, config, features)
    opened = open_run(out, config, "head", load, metadata, resume=resume, dry_run=dry_run)
    if opened.finished is not None:
        return say_finished("head", opened.finished, opened.config.training.steps, reporter)
    width, classes = features.hidden_size, CLASSES["cityscapes"]
    build = partial(DepthHead, width) if config.task == "depth" else partial(SegmentationHead, width, classes)
    model = opened.model(build).to(chosen)
    size = sides(config.features.image_size)

    def load_whole(number: int, mirrored: bool) -> LoadedFrame:
        frame = frames.frames[number]
        assert frame.label is not None  # of labelled_frames
        shape = frame_shape("cityscapes", frame.frame)
        if config.depth is None:
            label = read_label("cityscapes", frame.label, shape)
        else:
            label = read_depth_map(Path(frame.label), shape)
        picture = read_whole(frame.frame, size)
        if mirrored:
            picture, label = (np.ascontiguousarray(part[:, ::-1]) for part in (picture, label))
        return LoadedFrame(None, picture[None], label[None])

    seen = HeadFrames(frames, load_whole, size, config.flip, features.backbone, chosen)
    weights = config.gradient_loss, config.rmse_loss
    task = LinearHeadTask(model, seen, config.training.seed, opened.effective_batch, weights)
    return train(task, opened.begin(reporter))


def _frames(root: Path, config: ForesightHeadConfig) -> TrainingFrames:
    """Frames and what is learned of them: class ids, or the depth maps in their place."""
    listed = labelled_frames("cityscapes", root, config.split)
    if config.depth is None:
        return listed
    maps = [str(depth_of(each.label or "", config.split, config.depth)) for each in listed.frames]
    frames = [TrainingFrame(each.frame, found) for each, found in zip(listed.frames, maps, strict=True)]
    return replace(listed, frames=tuple(frames))


def _metadata(
    root: Path, frames: TrainingFrames, config: ForesightHeadConfig, features: FrameFeatures
) -> dict[str, Any]:
    roots = (root,) if config.depth is None else (root, config.depth)
    return {
        **features.metadata,
        "config": config.model_dump(mode="json", exclude=_PLACES),
        "hidden_size": features.hidden_size,
        **described_frames(frames, config.split, *roots),
        "code_version": __version__,
    }
