"""The models of Table D's evaluation, loaded and checked against each other."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltacache.evaluate.foresight.predictions import Systems
from deltacache.evaluate.foresight.scoring import Heads
from deltacache.evaluate.model_record import ModelRecord, said_of_training
from deltacache.evaluate.rows import Method
from deltacache.models.checkpoints import LoadedModel, load_tokenizer, load_world
from deltacache.models.deltatok import DeltaTok
from deltacache.models.devices import allow_tf32
from deltacache.models.heads import DepthHead, SegmentationHead, load_head
from deltacache.models.world_model import WorldModel
from deltacache.pipeline.work.frame_features import FrameFeatures, load_frame_features
from deltacache.schemas.benchmarks import CLASSES, SPACING_S, Task
from deltacache.schemas.datasets import Precision
from deltacache.schemas.errors import DeltacacheError, MismatchError
from deltacache.schemas.foresight import ForesightEvaluation

_TASKS: tuple[Task, ...] = ("segmentation", "depth")


@dataclass(frozen=True)
class Inputs:
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


def load_inputs(settings: ForesightEvaluation, device: torch.device) -> Inputs:
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
    worlds = [
        _world(path, tokenizer, features, device, settings.features.precision) for path in settings.worlds
    ]
    names = [method.world for method, _ in worlds]
    if len(set(names)) < len(names):
        raise DeltacacheError(
            "a world model is named twice: its rows could not be told apart, so name it once"
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
            task: said for task, head in heads.items() if (said := said_of_training(head.metadata))
        },
        rgb_decoder=None,
    )
    return Inputs(features, systems, Heads(segmentation, depth, features.grid), fingerprints, record)


def check_made_for(loaded: LoadedModel[Any], path: Path, what: str, features: FrameFeatures) -> None:
    """Refuse a model of other features; what its checkpoint does not say is not compared.

    Raises:
        MismatchError: another width, backbone, layers, PCA or patch grid.
    """
    if loaded.model.hidden_size != features.hidden_size:
        raise MismatchError(
            f"the {what} {path} takes {loaded.model.hidden_size}-wide tokens, but these features are "
            f"{features.hidden_size} wide: give the backbone, --layers and --pca it was trained with"
        )
    ours = "backbone_sha256" in loaded.metadata
    for name, used in features.metadata.items():
        made_with = loaded.metadata.get(name, None if ours else used)
        if made_with != used:
            raise MismatchError(
                f"the {what} {path} was trained on features with {name} {made_with}, but here it is {used}: give the "
                "backbone, --layers, --pca and --image-size it was trained with"
            )


def _world(
    path: Path,
    tokenizer: LoadedModel[DeltaTok] | None,
    features: FrameFeatures,
    device: torch.device,
    precision: Precision,
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
        if tokenizer is None:
            raise DeltacacheError(f"the world model {path} predicts delta tokens: give their tokenizer")
        used = tokenizer.fingerprint
        made_with = loaded.metadata.get("tokenizer_fingerprint", used)
        if made_with != used:
            raise MismatchError(
                f"the world model {path} was trained on delta tokens of tokenizer {made_with}, but {used} is given: "
                "load the tokenizer it was trained with"
            )
    method = Method(model.label, tokenizer=used, world=loaded.fingerprint)
    return method, model.to(device).eval().requires_grad_(False).to_precision(precision)


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
