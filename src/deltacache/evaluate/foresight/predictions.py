"""What each method says the labelled frame looks like.

Shapes: T frames of a sequence, H horizon, N patches, D hidden, C context.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from deltacache.evaluate.benchmarks.labels import depth_totals, segmentation_totals
from deltacache.evaluate.inputs import check_world
from deltacache.evaluate.metrics import Metrics, feature_metrics, finite_of_head, metrics_of
from deltacache.evaluate.output import Method, ModelRecord, training_record
from deltacache.models.checkpoints import LoadedModel, load_tokenizer, load_world
from deltacache.models.deltatok import DeltaTok, Grid
from deltacache.models.devices import allow_tf32
from deltacache.models.futures import decode_future
from deltacache.models.heads import DepthHead, SegmentationHead, load_head
from deltacache.models.world_model import WorldModel
from deltacache.pipeline.benchmarks.frames import (
    depth_of,
    frame_shape,
    read_depth_map,
    read_label,
    read_whole,
)
from deltacache.pipeline.work.frame_features import FrameFeatures, load_frame_features
from deltacache.schemas.benchmarks import CLASSES, SPACING_S, LabelledSequence, Task
from deltacache.schemas.datasets import sides
from deltacache.schemas.errors import DeltacacheError, MismatchError
from deltacache.schemas.foresight import ForesightEvaluation
from deltacache.schemas.provenance import Provenance, require_matches


@dataclass(frozen=True)
class Systems:
    """The models that take part, on one device.

    Attributes:
        worlds: each with its name and fingerprints.
        tokenizer: of the worlds that predict delta tokens, and its fingerprint.
        black: (N, D) of an all-black frame.
        spacing_s: seconds between frames.
    """

    worlds: tuple[tuple[Method, WorldModel], ...]
    tokenizer: tuple[str, DeltaTok] | None
    black: Tensor
    grid: Grid
    context: int
    spacing_s: float

    @torch.inference_mode()
    def predictions(self, frames: Tensor, horizon: int) -> Iterator[tuple[Method, Tensor]]:
        """Yield (N, D) of the last of ``frames`` (T, N, D) from the context that ends ``horizon`` frames before it.

        The bounds are first: the last context frame repeated, and the truth itself. What compression alone costs is
        ``deltatok_one_step``, the delta token of the true last two frames decoded from the true frame before, and, over
        the whole horizon, ``deltatok_parallel`` and ``deltatok`` (closed loop).
        """
        seen = frames[-horizon - self.context : -horizon]
        yield Method("copy_last"), seen[-1]
        yield Method("present"), frames[-1]
        if self.tokenizer is not None:
            fingerprint, tokenizer = self.tokenizer
            yield Method("deltatok", tokenizer=fingerprint), self.reconstruction(frames, horizon)[-1]
            clip = frames[None, -horizon - 1 :]
            parallel = tokenizer.reconstruct_parallel(clip, self.black, self.grid, horizon)
            yield Method("deltatok_parallel", tokenizer=fingerprint), parallel[0, -1]
            one_step = tokenizer.reconstruct_parallel(clip[:, -2:], self.black, self.grid, 1)
            yield Method("deltatok_one_step", tokenizer=fingerprint), one_step[0, -1]
        for method, future in self.futures(frames, horizon):
            yield method, future[-1]

    @torch.inference_mode()
    def futures(self, frames: Tensor, horizon: int) -> Iterator[tuple[Method, Tensor]]:
        """Yield every world model's (H, N, D) of the last ``horizon`` of ``frames`` (T, N, D)."""
        seen = frames[-horizon - self.context : -horizon]
        for method, world in self.worlds:
            yield method, self._future(world, seen, horizon)

    @torch.inference_mode()
    def reconstruction(self, frames: Tensor, horizon: int) -> Tensor:
        """The last frames (H, N, D) through DeltaTok, closed loop; no frames without a tokenizer."""
        if self.tokenizer is None:
            return frames[:0]
        return self.tokenizer[1].reconstruct_closed_loop(frames[None], self.black, self.grid, horizon)[0]

    def _future(self, world: WorldModel, seen: Tensor, horizon: int) -> Tensor:
        count = len(seen) + horizon
        seconds = self.spacing_s * torch.arange(count, device=seen.device, dtype=torch.float32)[None]
        if world.trains_on == "features":
            return world.rollout(seen[None], seconds, grid=self.grid)[0, 0]
        assert self.tokenizer is not None  # checked on opening
        tokenizer = self.tokenizer[1]
        deltas = tokenizer.encode_clip(seen[None], self.black, self.grid)
        futures = world.rollout(deltas, seconds, grid=self.grid)
        return decode_future(tokenizer, seen[None, -1], futures, self.grid)[0, 0]


# ----------------------------------------------------------------------------------------------------
# How a prediction of the labelled frame is judged: by its features, and by what heads read off them.
#
# Shapes: N patches, D hidden, h x w patches of a frame, K numbers per patch of a head, H x W pixels of the
# label.
# ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labels:
    """Of one frame: class ids (H, W), relative or metric depth (H, W); None where it is not scored."""

    classes: Tensor | None
    depth: Tensor | None


@dataclass(frozen=True)
class Heads:
    """What reads labels off features; None where it is not scored."""

    segmentation: SegmentationHead | None
    depth: DepthHead | None
    grid: Grid

    @torch.inference_mode()
    def totals(self, prediction: Tensor, truth: Tensor, labels: Labels) -> Iterator[tuple[str, np.ndarray]]:
        """Yield task and sums of ``pooled`` of one predicted frame (N, D)."""
        yield "features", np.concatenate([[1.0], feature_metrics(prediction, truth).cpu().numpy()])
        if self.segmentation is not None and labels.classes is not None:
            classes = self._at_label(self.segmentation, prediction, labels.classes).argmax(0)
            totals = segmentation_totals(classes, labels.classes, self.segmentation.classes)
            yield "segmentation", totals.cpu().numpy()
        if self.depth is not None and labels.depth is not None:
            depth = self._at_label(self.depth, prediction, labels.depth)[0]
            yield "depth", depth_totals(depth, labels.depth).cpu().numpy()

    def _at_label(self, head: SegmentationHead | DepthHead, tokens: Tensor, label: Tensor) -> Tensor:
        """(K, H, W)."""
        return self.read(head, tokens[None], (label.shape[0], label.shape[1]))[0]

    @torch.inference_mode()
    def read(self, head: SegmentationHead | DepthHead, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """What a head says of tokens (B, N, D), upsampled to H x W: (B, K, H, W)."""
        small = finite_of_head(head(tokens.transpose(1, 2).unflatten(2, self.grid)))
        return functional.interpolate(small, size=size, mode="bilinear", align_corners=False)


# ----------------------------------------------------------------------------------------------------
# The models of Table D's evaluation, loaded and checked against each other.
# ----------------------------------------------------------------------------------------------------


_TASKS: tuple[Task, ...] = ("segmentation", "depth")


@dataclass(frozen=True)
class ForesightInputs:
    """Everything that is loaded once.

    Attributes:
        fingerprints: of all models, by what they are.
        record: the same for ``models.json``, with what the heads were trained on.
    """

    features: FrameFeatures
    systems: Systems
    heads: Heads
    fingerprints: Mapping[str, Any]
    record: ModelRecord


def load_inputs(settings: ForesightEvaluation, device: torch.device) -> ForesightInputs:
    """Load all models of ``settings``.

    Raises:
        CheckpointError: one is missing or damaged.
        MismatchError: models that do not belong together.
        DeltacacheError: a world model is named twice, or has many futures.
    """
    allow_tf32(device, settings.features.precision != "float32")
    features = load_frame_features(settings.features, device)
    tokenizer = None if settings.tokenizer is None else load_tokenizer(settings.tokenizer)
    if tokenizer is not None:
        assert settings.tokenizer is not None  # loaded from there
        check_made_for(tokenizer, settings.tokenizer, "tokenizer", features)
        tokenizer.model.to(device).requires_grad_(False).to_precision(settings.features.precision)
    worlds = [_world(path, tokenizer, settings, features, device) for path in settings.worlds]
    names = [method.world for method, _ in worlds]
    if len(set(names)) < len(names):
        raise DeltacacheError(
            "a world model is named twice: its rows could not be distinguished, so name it once"
        )
    heads = _heads(settings, features, device)
    systems = Systems(
        worlds=tuple(worlds),
        tokenizer=None if tokenizer is None else (tokenizer.fingerprint, tokenizer.model),
        black=features.black(),
        grid=features.grid,
        context=settings.context,
        spacing_s=SPACING_S["cityscapes"],
    )
    exact = settings.features.precision == "float32"
    fingerprints = {
        **({} if exact else {"models_precision": settings.features.precision}),
        "features": features.metadata,
        "tokenizer": None if tokenizer is None else tokenizer.fingerprint,
        "worlds": names,
        "heads": [None if head is None else head.fingerprint for head in map(heads.get, _TASKS)],
    }
    segmentation, depth = (None if head is None else head.model for head in map(heads.get, _TASKS))
    assert not isinstance(segmentation, DepthHead)
    assert not isinstance(depth, SegmentationHead)
    record = ModelRecord(
        backbone=features.metadata["backbone_sha256"],
        pca=features.metadata["pca_fingerprint"],
        tokenizer=fingerprints["tokenizer"],
        worlds=tuple(name or "" for name in names),
        heads={task: head.fingerprint for task, head in heads.items()},
        heads_trained_on={
            task: said for task, head in heads.items() if (said := training_record(head.metadata))
        },
        rgb_decoder=None,
    )
    return ForesightInputs(features, systems, Heads(segmentation, depth, features.grid), fingerprints, record)


def check_made_for(loaded: LoadedModel[Any], path: Path, what: str, features: FrameFeatures) -> None:
    """Refuse a model of other features; see ``require_matches``."""
    require_matches(
        Provenance.of_checkpoint(loaded.metadata, loaded.model.hidden_size, f"the {what} {path}"),
        features.provenance,
        "load the model that was trained on these features",
    )


def _world(
    path: Path,
    tokenizer: LoadedModel[DeltaTok] | None,
    settings: ForesightEvaluation,
    features: FrameFeatures,
    device: torch.device,
) -> tuple[Method, WorldModel]:
    loaded = load_world(path)
    model = loaded.model
    if model.stochastic:
        raise DeltacacheError(
            f"the world model {path} has many futures, and this protocol scores one: give one with a learned query"
        )
    check_made_for(loaded, path, "world model", features)
    used = None
    if model.trains_on == "deltas":
        if tokenizer is None or settings.tokenizer is None:
            raise DeltacacheError(f"the world model {path} predicts delta tokens: give their tokenizer")
        used = tokenizer.fingerprint
        check_world(loaded, path, tokenizer, settings.tokenizer)
    method = Method(model.label, tokenizer=used, world=loaded.fingerprint)
    return method, model.to(device).eval().requires_grad_(False).to_precision(settings.features.precision)


def _heads(
    settings: ForesightEvaluation, features: FrameFeatures, device: torch.device
) -> dict[Task, LoadedModel[SegmentationHead] | LoadedModel[DepthHead]]:
    found: dict[Task, LoadedModel[SegmentationHead] | LoadedModel[DepthHead]] = {}
    for task, path in settings.heads.items():
        loaded = load_head(path, task)
        check_made_for(loaded, path, f"{task} head", features)
        if isinstance(loaded.model, SegmentationHead) and loaded.model.classes != CLASSES["cityscapes"]:
            raise MismatchError(
                f"the head {path} knows {loaded.model.classes} classes, Cityscapes has {CLASSES['cityscapes']}: give a "
                "head of Cityscapes"
            )
        loaded.model.to(device).eval().requires_grad_(False)
        found[task] = loaded
    return found


# ----------------------------------------------------------------------------------------------------
# One labelled sequence of Cityscapes as whole frames.
#
# Shapes: T frames, h x w pixels as the backbone sees them, N patches, D hidden, H x W pixels of the
# label.
# ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WholeSequence:
    """``pictures`` (h, w, 3) uint8 of each frame, ``tokens`` (T, N, D) float32 on the device, labels of the last."""

    sequence: LabelledSequence
    pictures: tuple[np.ndarray, ...]
    tokens: Tensor
    labels: Labels


def load_whole(
    sequence: LabelledSequence, settings: ForesightEvaluation, inputs: ForesightInputs
) -> WholeSequence:
    """Read frames and labels.

    Raises:
        DatasetError: one is missing or damaged.
    """
    size = sides(settings.features.image_size)
    pictures = tuple(read_whole(path, size) for path in sequence.frames)
    tokens = inputs.features.tokens(pictures)
    return WholeSequence(sequence, pictures, tokens, _labels(sequence, settings, inputs, tokens.device))


def depth_place(sequence: LabelledSequence, settings: ForesightEvaluation) -> Path | None:
    """The depth map of the last frame, if depth is scored."""
    return None if settings.depth is None else depth_of(sequence.label, "val", settings.depth)


def _labels(
    sequence: LabelledSequence, settings: ForesightEvaluation, inputs: ForesightInputs, device: torch.device
) -> Labels:
    shape = frame_shape("cityscapes", sequence.frames[-1])
    classes = depth = None
    if inputs.heads.segmentation is not None:
        classes = torch.from_numpy(read_label("cityscapes", sequence.label, shape)).to(device)
    place = depth_place(sequence, settings)
    if place is not None:
        depth = torch.from_numpy(read_depth_map(place, shape)).to(device)
    return Labels(classes, depth)


# ----------------------------------------------------------------------------------------------------
# What is said of whole frames beyond the metrics of the benchmarks, and what is not.
# ----------------------------------------------------------------------------------------------------


MOVABLE = tuple(range(11, 19))
"""Cityscapes' train ids of what moves: person, rider, car, truck, bus, train, motorcycle, bicycle."""


def movable_totals(totals: np.ndarray) -> np.ndarray:
    """Of the sums of segmentation (..., 3 C) those of the classes that move."""
    parts = np.split(totals, 3, axis=-1)
    return np.concatenate([part[..., list(MOVABLE)] for part in parts], axis=-1)


def whole_frame_metrics(task: str, totals: np.ndarray) -> Metrics:
    """``metrics_of`` with ``miou_movable``, and without depth's absolute error: relative maps have no metres."""
    metrics = {name: values for name, values in metrics_of(task, totals).items() if name != "rmse"}
    if task == "segmentation":
        metrics["miou_movable"] = metrics_of(task, movable_totals(totals))["miou"]
    return metrics
