"""``train-foresight-head``: linear heads on the features of whole frames of Cityscapes (Table D).

The recipe is that of the benchmarks' heads; ``docs/foresight.md`` says how it differs from DINO-Foresight's DPT heads.
Shapes: B frames, N patches, D hidden, h x w patches of a frame, H x W pixels of a label.
"""

from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

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
from deltacache.pipeline.benchmarks.training_frames import TrainingFrame, TrainingFrames, labelled_frames
from deltacache.pipeline.work.frame_features import FrameFeatures, load_frame_features
from deltacache.schemas.benchmarks import CLASSES
from deltacache.schemas.datasets import sides
from deltacache.schemas.foresight import ForesightHeadConfig
from deltacache.schemas.progress import Reporter
from deltacache.train.data import RESIDENT_SHARE, memory_bytes, prefetch, sent
from deltacache.train.heads.data import mean_file_bytes
from deltacache.train.heads.losses import DepthLosses, depth_losses, whole_segmentation_loss_by_rows
from deltacache.train.heads.setup import described_frames, say_if_scored
from deltacache.train.heads.training import LinearHead, LinearTask
from deltacache.train.loop import train
from deltacache.train.order import MicroBatch, batch_items, step_rng
from deltacache.train.setup import holding_output, open_run, say_finished

_AHEAD = 2
_PLACES: dict[str, Any] = {"depth": True, "features": {"backbone", "pca"}}
"""Where things lie; what they are, fingerprints say."""


@dataclass(frozen=True, slots=True)
class FrameBatch:
    """``features`` (B, D, h, w) float32 on the device, and a label (H, W) of each frame."""

    features: Tensor
    labels: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class _Seen:
    """A frame's tokens (N, D) float16, on the CPU if they are kept, else on the device; its label, on the CPU."""

    tokens: Tensor
    label: Tensor


class WholeFrames:
    """Labelled frames through a frozen backbone; those that memory holds are computed once."""

    def __init__(
        self,
        frames: TrainingFrames,
        config: ForesightHeadConfig,
        features: FrameFeatures,
        device: torch.device,
    ) -> None:
        self._frames, self._config = frames.frames, config
        self._listed = frames
        self._features, self._device = features, device
        self._known: OrderedDict[tuple[int, bool], _Seen] = OrderedDict()
        self._bytes = 0

    def batches(self, seed: int, effective_batch: int, parts: Iterable[MicroBatch]) -> Generator[FrameBatch]:
        """The batches of ``parts``: frames epoch by epoch, some of them mirrored."""
        return prefetch((self._batch(seed, effective_batch, part) for part in parts), _AHEAD)

    def computed(self, samples: int) -> int:
        """How many of so many frames go through the backbone: those beyond what memory keeps come again."""
        variants = 2 if 0 < self._config.flip < 1 else 1
        whole, seen = variants * len(self._frames), max(1, len(self._known))
        kept = min(whole, int(RESIDENT_SHARE * memory_bytes() / max(1, self._bytes / seen)))
        return min(samples, whole) if kept == whole else samples

    @property
    def frame_bytes(self) -> float:
        """Of the files of a frame, on average over the first ones."""
        return mean_file_bytes(self._listed)

    def _batch(self, seed: int, effective_batch: int, part: MicroBatch) -> FrameBatch:
        numbers = batch_items(seed, part.step, effective_batch, len(self._frames))[part.positions]
        drawn = step_rng("flip", seed, part.step).random(effective_batch)[part.positions] < self._config.flip
        seen = [self._seen(*key) for key in zip(numbers.tolist(), drawn.tolist(), strict=True)]
        tokens = torch.stack([sent(each.tokens, self._device) for each in seen]).float()
        labels = tuple(sent(each.label, self._device) for each in seen)
        return FrameBatch(tokens.transpose(1, 2).unflatten(2, self._features.grid), labels)

    def _seen(self, number: int, flip: bool) -> _Seen:
        known = self._known.get((number, flip))
        if known is not None:
            return known
        picture, label = self._read(self._frames[number])
        if flip:
            picture, label = (np.ascontiguousarray(part[:, ::-1]) for part in (picture, label))
        tokens = self._features.tokens([picture])[0].half()
        size = tokens.nbytes + label.nbytes
        if self._bytes + size > RESIDENT_SHARE * memory_bytes():
            return _Seen(tokens, torch.from_numpy(label))
        seen = self._known[number, flip] = _Seen(tokens.cpu(), torch.from_numpy(label))
        self._bytes += size
        return seen

    def _read(self, frame: TrainingFrame) -> tuple[np.ndarray, np.ndarray]:
        assert frame.label is not None  # of labelled_frames
        config, shape = self._config, frame_shape("cityscapes", frame.frame)
        if config.depth is None:
            label = read_label("cityscapes", frame.label, shape)
        else:
            label = read_depth_map(Path(frame.label), shape)
        return read_whole(frame.frame, sides(config.features.image_size)), label


class WholeFrameHeadTask(LinearTask[FrameBatch]):
    """A linear head on whole frames."""

    def segmentation(self, small: Tensor, batch: FrameBatch) -> Tensor:
        return whole_segmentation_loss_by_rows(small, batch.labels)

    def depth(self, small: Tensor, batch: FrameBatch) -> DepthLosses:
        large = [
            functional.interpolate(each[None], size=label.shape, mode="bilinear", align_corners=False)
            for each, label in zip(small, batch.labels, strict=True)
        ]
        return depth_losses([depth[:, 0] for depth in large], [label[None] for label in batch.labels])


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
    model = opened.model(_builder(config, features)).to(chosen)
    seen = WholeFrames(frames, config, features, chosen)
    weights = config.gradient_loss, config.rmse_loss
    task = WholeFrameHeadTask(model, seen, config.training.seed, opened.effective_batch, weights)
    return train(task, opened.begin(reporter))


def _builder(config: ForesightHeadConfig, features: FrameFeatures) -> Callable[[], LinearHead]:
    if config.task == "depth":
        return lambda: DepthHead(features.hidden_size)
    return lambda: SegmentationHead(features.hidden_size, CLASSES["cityscapes"])


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
