"""``train-head``: linear heads and the RGB decoder on the features of a frozen backbone (method section 1).

The recipes are DINOv3's linear probes; ``schemas/presets/released/head-*.yaml`` say each value's source.
"""

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from deltacache.models.backbone import Backbone
from deltacache.models.checkpoints import Kind, LoadedModel
from deltacache.models.heads import DepthHead, SegmentationHead, load_head
from deltacache.models.rgb_decoder import RgbDecoder, load_rgb_decoder, undo_backbone
from deltacache.pipeline.benchmarks.frames import upsample
from deltacache.pipeline.benchmarks.training_frames import TrainingFrames, labelled_frames, picture_frames
from deltacache.schemas.benchmarks import BENCHMARK_TASK, CLASSES
from deltacache.schemas.configs import HeadConfig, RgbConfig
from deltacache.schemas.progress import Reporter
from deltacache.schemas.texts import counted
from deltacache.train.heads.data import HeadBatch, HeadFrames, LabelledCrops
from deltacache.train.heads.losses import depth_losses, picture_losses, segmentation_loss_by_rows
from deltacache.train.heads.setup import HeadRequest, open_head, say_if_scored
from deltacache.train.loop import train
from deltacache.train.order import MicroBatch
from deltacache.train.setup import holding_output, say_finished

# ----------------------------------------------------------------------------------------------------
# What the heads' trainings share: batches of labelled frames through a frozen backbone, and the linear heads'
# losses.
#
# Shapes: M crops or frames of a batch, D hidden, h x w patches, K numbers per patch of a head.
# ----------------------------------------------------------------------------------------------------


LinearHead = SegmentationHead | DepthHead
ModelT = TypeVar("ModelT", SegmentationHead | DepthHead, RgbDecoder)


class HeadTask(ABC, Generic[ModelT]):
    """A head and its frames; see ``TrainingTask``."""

    kind: Kind = "head"
    divisible = False  # a linear head's BatchNorm sees a whole pass

    def __init__(self, model: ModelT, frames: HeadFrames, seed: int, effective_batch: int) -> None:
        self.model = model.train()
        self._frames, self._seed, self._effective_batch = frames, seed, effective_batch

    def batches(self, parts: Iterable[MicroBatch]) -> Generator[HeadBatch]:
        return self._frames.batches(self._seed, self._effective_batch, parts)

    trial_batches = batches

    def bytes_to_load(self, device: torch.device) -> int:
        """None at the beginning: frames are read when they come up."""
        return 0

    def bytes_to_read(self, samples: int) -> int:
        return int(self._frames.computed(samples) * self._frames.frame_bytes)

    def inputs_computed(self, samples: int) -> int:
        """Frames go through the backbone when they come up."""
        return self._frames.computed(samples)

    @abstractmethod
    def training_loss(self, batch: HeadBatch, part: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the batch, and what is logged beside it."""

    def probes(self) -> dict[str, float]:
        """None: ``evaluate`` measures how good a head is."""
        return {}


class LinearHeadTask(HeadTask[LinearHead]):
    """Predictions at the label's resolution, as an evaluation makes them, against the label."""

    def __init__(
        self,
        model: LinearHead,
        frames: HeadFrames,
        seed: int,
        effective_batch: int,
        weights: tuple[float, float],
    ) -> None:
        """``weights``: of depth's gradient and metric losses, beside the scale-invariant one."""
        super().__init__(model, frames, seed, effective_batch)
        self._weights = weights

    def training_loss(self, batch: HeadBatch, part: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """In float32 everywhere: the head costs nothing, and depth needs the digits."""
        del part
        gradient, rmse = self._weights
        with torch.autocast(batch.features.device.type, enabled=False):
            small = self.model(batch.features)
            if isinstance(self.model, SegmentationHead):
                return segmentation_loss_by_rows(small, batch.frames), {}
            labels = [each.label for each in batch.frames]
            metres = [self._depth(small[each.start : each.stop], each)[:, 0] for each in batch.frames]
            losses = depth_losses(metres, labels)
            loss = losses.silog + gradient * losses.gradient + rmse * losses.rmse
        return loss, {"main_loss": losses.silog.detach(), "gradient_loss": losses.gradient.detach()}

    @staticmethod
    def _depth(small: Tensor, frame: LabelledCrops) -> Tensor:
        """Metres (C, 1, h, w) at the size of the label, (C, 1, H', W')."""
        size = (frame.label.shape[-2], frame.label.shape[-1])
        if frame.split is None:
            return functional.interpolate(small, size=size, mode="bilinear", align_corners=False)
        return upsample(small, frame.split, size)


class RgbTask(HeadTask[RgbDecoder]):
    """Pictures from features. A batch's loss is the mean over its pictures, however many crops each has."""

    kind: Kind = "rgb_decoder"
    divisible = True

    def __init__(
        self, model: RgbDecoder, frames: HeadFrames, config: RgbConfig, effective_batch: int
    ) -> None:
        super().__init__(model, frames, config.training.seed, effective_batch)
        self._gradient_loss = config.gradient_loss

    def training_loss(self, batch: HeadBatch, part: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """L1 and multi-scale gradients, of what is not yet cut to [0, 1]."""
        assert batch.pictures is not None  # asked for
        assert batch.shares is not None
        truth = batch.pictures.permute(0, 3, 1, 2) / 255.0
        losses = picture_losses(self.model.unclamped(batch.features), truth)
        absolute, gradient = ((each * batch.shares).sum() for each in losses)
        loss = absolute + self._gradient_loss * gradient
        return loss, {"main_loss": absolute.detach(), "gradient_loss": gradient.detach()}


def train_head(request: HeadRequest, config: HeadConfig, reporter: Reporter) -> Path:
    """Train the linear head of ``config.benchmark`` and return the last checkpoint; a finished run returns at once.

    Raises:
        DatasetError: a file of the split is missing or damaged.
        MismatchError: ``resume`` with another config, backbone or other frames.
        CheckpointError: no such backbone, or a damaged checkpoint.
        DeltacacheError: ``out`` holds something else, or the loss became non-finite.
    """
    with holding_output(request.out, "train-head", resume=request.resume, dry_run=request.dry_run):
        return _train_head(request, config, reporter)


def _train_head(request: HeadRequest, config: HeadConfig, reporter: Reporter) -> Path:
    benchmark = config.benchmark
    if benchmark is None:
        raise ValueError("a head belongs to a benchmark: take head_preset")
    frames = labelled_frames(
        benchmark, request.root, config.frames.split, request.kitti_split, request.kitti_test
    )
    _say(frames, config, reporter)

    def load(path: Path, _: Backbone) -> LoadedModel[LinearHead]:
        loaded = load_head(path, BENCHMARK_TASK[benchmark])
        return LoadedModel(loaded.model, loaded.fingerprint, loaded.metadata)

    opened, inputs = open_head(request, config, frames, "head", load)

    def build() -> LinearHead:
        width = inputs.backbone.hidden_size
        return SegmentationHead(width, CLASSES[benchmark]) if benchmark in CLASSES else DepthHead(width)

    if opened.finished is not None:
        return say_finished("head", opened.finished, opened.config.training.steps, reporter)
    model = opened.model(build).to(inputs.device)
    weights = config.gradient_loss, config.rmse_loss
    task = LinearHeadTask(model, inputs.seen(), config.training.seed, opened.effective_batch, weights)
    return train(task, opened.begin(reporter))


def train_rgb_decoder(request: HeadRequest, config: RgbConfig, reporter: Reporter) -> Path:
    """Train an RGB decoder on the pictures below ``request.root``; see ``train_head``."""
    with holding_output(request.out, "train-head", resume=request.resume, dry_run=request.dry_run):
        return _train_rgb_decoder(request, config, reporter)


def _train_rgb_decoder(request: HeadRequest, config: RgbConfig, reporter: Reporter) -> Path:
    frames = picture_frames(request.root)
    reporter.line(f"train rgb_decoder: {counted(len(frames.frames), 'picture', form=',')}")
    opened, inputs = open_head(request, config, frames, "rgb_decoder", load_rgb_decoder)

    def build() -> RgbDecoder:
        backbone = inputs.backbone
        sizes = {"patch_size": backbone.patch_size, "image_size": config.frames.image_size}
        return RgbDecoder(backbone.hidden_size, **config.model.model_dump(), **sizes)

    if opened.finished is not None:
        return say_finished("rgb_decoder", opened.finished, opened.config.training.steps, reporter)
    model = opened.model(build)
    undo_backbone(model, inputs.backbone)
    task = RgbTask(model.to(inputs.device), inputs.seen(pictures=True), config, opened.effective_batch)
    return train(task, opened.begin(reporter))


def _say(frames: TrainingFrames, config: HeadConfig, reporter: Reporter) -> None:
    dropped = "".join(f", {count:,} left out ({reason})" for reason, count in frames.dropped.items())
    reporter.line(f"train head: {len(frames.frames):,} labelled frames of {frames.benchmark}{dropped}")
    say_if_scored(frames, config.frames.split, reporter)
