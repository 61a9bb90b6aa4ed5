"""The models of an evaluation of benchmarks, loaded and checked against each other."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltacache import __version__
from deltacache.evaluate.benchmarks.labels import DepthScorer, LabelScorer, SegmentationScorer
from deltacache.evaluate.benchmarks.loading import LoadedSequence
from deltacache.evaluate.inputs import Models, load_models
from deltacache.evaluate.output import training_record
from deltacache.evaluate.predictions import RolloutProtocol
from deltacache.evaluate.settings import BenchmarkEvaluation
from deltacache.models.backbone import Backbone, load_backbone
from deltacache.models.checkpoints import LoadedModel
from deltacache.models.deltatok import Grid
from deltacache.models.devices import allow_tf32, choose_device
from deltacache.models.heads import DepthHead, SegmentationHead, load_head
from deltacache.models.rgb_decoder import RgbDecoder, load_rgb_decoder
from deltacache.pipeline.storage.files import crc32c_of_npy
from deltacache.pipeline.work.encoders import black_patch_tokens_of, resolve_precision
from deltacache.schemas.benchmarks import BENCHMARK_TASK, CLASSES, SPACING_S, BenchmarkName
from deltacache.schemas.datasets import DatasetCard, SamplingSettings
from deltacache.schemas.errors import MismatchError
from deltacache.schemas.provenance import Provenance, require_matches

_BACKBONE_FRAMES = 64  # of a forward pass


@dataclass(frozen=True)
class BenchmarkInputs:
    """Everything that is loaded once a process.

    Attributes:
        black: (N, D) float16, patch tokens of an all-black frame, as a feature dataset holds them.
        scorers: None for a benchmark without a head.
        heads: fingerprints.
        trained_on: what heads say of the frames that they learned from.
        rgb: makes pictures of features (B, D, h, w), for the report.
        rgb_fingerprint: of its weights.
    """

    backbone: Backbone
    black: np.ndarray
    models: Models
    protocol: RolloutProtocol
    scorers: dict[BenchmarkName, LabelScorer | None]
    heads: dict[BenchmarkName, str]
    trained_on: dict[BenchmarkName, Mapping[str, Any]]
    rgb: RgbDecoder | None
    rgb_fingerprint: str | None
    device: torch.device


def load_inputs(settings: BenchmarkEvaluation, device_name: str | None = None) -> BenchmarkInputs:
    """Load all models of ``settings``, on its device or the one of this name.

    Raises:
        CheckpointError: one is missing or damaged.
        MismatchError: models that do not belong together.
    """
    device = choose_device(device_name or settings.device)
    precision = resolve_precision(device, settings.precision)
    allow_tf32(device, precision != "float32")
    backbone = load_backbone(settings.backbone, precision).to(device)
    grid = backbone.grid(settings.image_size)
    with torch.inference_mode():
        exact = backbone.black_patch_tokens(settings.image_size)
        black = black_patch_tokens_of(backbone, settings.image_size)
    card = feature_card(settings, backbone, black, settings.frames, next(iter(settings.data)), device)
    protocol = RolloutProtocol(
        context=settings.context,
        horizons=settings.horizons,
        seed=settings.seed,
        grid=grid,
        black=torch.from_numpy(black).to(device).float() if settings.cache else exact,
    )
    scorers: dict[BenchmarkName, LabelScorer | None] = dict.fromkeys(settings.data)
    heads: dict[BenchmarkName, str] = {}
    trained_on: dict[BenchmarkName, Mapping[str, Any]] = {}
    for name, path in settings.heads.items():
        tokens = Provenance(backbone.id, backbone.hidden_size, backbone.weights_sha256)
        scorers[name], loaded = load_scorer(name, path, tokens, grid, device)
        heads[name] = loaded.fingerprint
        trained_on[name] = training_record(loaded.metadata)
    models = load_models(settings, card, f"backbone {backbone.id}", device)
    rgb, rgb_fingerprint = None, None
    if settings.rgb_decoder is not None:
        decoder = load_rgb_decoder(settings.rgb_decoder, backbone)
        rgb, rgb_fingerprint = decoder.model.to(device).requires_grad_(False), decoder.fingerprint
    return BenchmarkInputs(
        backbone, black, models, protocol, scorers, heads, trained_on, rgb, rgb_fingerprint, device
    )


def feature_card(
    settings: BenchmarkEvaluation,
    backbone: Backbone,
    black: np.ndarray,
    frames: int,
    benchmark: BenchmarkName,
    device: torch.device,
) -> DatasetCard:
    """What patch tokens of a benchmark's crops are, as a feature dataset says it."""
    spacing = SPACING_S[benchmark]
    return DatasetCard(
        kind="features",
        store="webdataset",
        precision=resolve_precision(device, settings.precision),
        backbone=backbone.card,
        image_size=settings.image_size,
        patch_grid=backbone.grid(settings.image_size),
        hidden_size=backbone.hidden_size,
        sampling=SamplingSettings(
            frames=frames, spacing_min_s=spacing, spacing_max_s=spacing, augment=False, allow_duplicates=False
        ),
        black_crc32c=crc32c_of_npy(black),
        code_version=__version__,
    )


def load_scorer(
    name: BenchmarkName, path: Path, tokens: Provenance, grid: Grid, device: torch.device
) -> tuple[LabelScorer, LoadedModel[SegmentationHead] | LoadedModel[DepthHead]]:
    """The head of a benchmark, for ``tokens`` on a ``grid`` of patches.

    Raises:
        CheckpointError: missing, damaged, or of another task.
        MismatchError: trained on other tokens, or with other classes.
    """
    loaded = load_head(path, BENCHMARK_TASK[name])
    head = loaded.model.to(device).eval().requires_grad_(False)
    require_matches(
        Provenance.of_checkpoint(loaded.metadata, head.hidden_size, f"the head {path}"),
        tokens,
        "give the head that was trained on this backbone",
    )
    if isinstance(head, DepthHead):
        return DepthScorer(head, grid), loaded
    if head.classes != CLASSES[name]:
        raise MismatchError(
            f"the head {path} knows {head.classes} classes, {name} has {CLASSES[name]}: give a head of {name}"
        )
    assert isinstance(head, SegmentationHead)
    return SegmentationScorer(head, grid, head.classes), loaded


@torch.inference_mode()
def patch_tokens(inputs: BenchmarkInputs, loaded: LoadedSequence) -> Tensor:
    """(C, T, N, D) float32 of a sequence's crops (C, T, S, S, 3), on the device."""
    if loaded.crops is None:
        raise ValueError(f"{loaded.sequence.sequence_id} was loaded without its frames")
    return crop_tokens(inputs, loaded.crops)


def crop_tokens(inputs: BenchmarkInputs, crops: np.ndarray) -> Tensor:
    """(A, B, N, D) float32 of crops (A, B, S, S, 3) uint8, on the device."""
    frames = torch.from_numpy(crops).flatten(0, 1).permute(0, 3, 1, 2)
    tokens = torch.cat([inputs.backbone.patch_tokens(chunk) for chunk in frames.split(_BACKBONE_FRAMES)])
    return tokens.unflatten(0, crops.shape[:2])
