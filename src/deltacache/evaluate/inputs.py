"""The models of an evaluation, checked against each other and against the features."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from deltacache.evaluate.rows import Method
from deltacache.evaluate.settings import EvaluationSettings
from deltacache.models.checkpoints import LoadedModel, load_tokenizer, load_world
from deltacache.models.deltatok import DeltaTok
from deltacache.models.deltaworld import DeltaWorld
from deltacache.schemas.datasets import DatasetCard
from deltacache.schemas.errors import DeltacacheError, MismatchError

ModelT = TypeVar("ModelT", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A tokenizer that fits the features."""

    model: DeltaTok
    fingerprint: str

    def method(self, name: str) -> Method:
        """A way of reconstructing with this tokenizer."""
        return Method(name, tokenizer=self.fingerprint)


@dataclass(frozen=True, slots=True)
class World:
    """A world model that fits the tokenizer. ``samples``: roll-outs of each sequence, 1 without noise."""

    model: DeltaWorld
    method: Method
    samples: int


@dataclass(frozen=True, slots=True)
class Models:
    """What takes part besides the bounds, which need no model."""

    tokenizer: Tokenizer | None
    worlds: tuple[World, ...]


def load_models(
    settings: EvaluationSettings, card: DatasetCard, features: str, device: torch.device
) -> Models:
    """Load what ``settings`` names, for the features that ``card`` describes and ``features`` names.

    Raises:
        CheckpointError: a checkpoint is missing or damaged.
        MismatchError: models that belong to other features or to another tokenizer.
    """
    if settings.tokenizer is None:
        return Models(None, ())
    loaded = load_tokenizer(settings.tokenizer)
    check_tokenizer(loaded, card, settings.tokenizer, features)
    tokenizer = Tokenizer(_ready(loaded.model, device), loaded.fingerprint)
    worlds = []
    for path in settings.worlds:
        world = load_world(path)
        check_world(world, path, loaded, settings.tokenizer)
        worlds.append(_world_entry(world, tokenizer, settings.samples, device))
    _check_distinct(settings.worlds, worlds)
    return Models(tokenizer, tuple(worlds))


def check_tokenizer(tokenizer: LoadedModel[DeltaTok], card: DatasetCard, path: Path, features: str) -> None:
    """Refuse a tokenizer of other features. A released checkpoint says its width only.

    Raises:
        MismatchError: another width, patch grid or backbone.
    """
    width = tokenizer.model.hidden_size
    if width != card.hidden_size:
        raise MismatchError(
            f"{features} holds {card.hidden_size}-wide tokens of {card.backbone.id} at {card.image_size} px, "
            f"but the tokenizer {path} expects {width}: extract again or load the matching tokenizer"
        )
    made_with, used = tokenizer.metadata.get("backbone_sha256"), card.backbone.weights_sha256
    if made_with is not None and made_with != used:
        raise MismatchError(
            f"the tokenizer {path} was trained on features of backbone {made_with[:16]}, but {features} was "
            f"made with {used[:16]} ({card.backbone.id}): extract again with that backbone or load the "
            "matching tokenizer"
        )
    grid = tokenizer.metadata.get("patch_grid")
    if grid is not None and tuple(grid) != card.patch_grid:
        raise MismatchError(
            f"the tokenizer {path} was trained on {_by(grid)} patches a frame, but {features} has "
            f"{_by(card.patch_grid)} ({card.image_size} px): extract again at its image size or load the "
            "matching tokenizer"
        )


def check_world(
    world: LoadedModel[DeltaWorld], path: Path, tokenizer: LoadedModel[DeltaTok], tokenizer_path: Path
) -> None:
    """Refuse a world model of another tokenizer's delta tokens.

    Raises:
        MismatchError: another width or another tokenizer.
    """
    if world.model.hidden_size != tokenizer.model.hidden_size:
        raise MismatchError(
            f"the world model {path} predicts {world.model.hidden_size}-wide delta tokens, but those of "
            f"{tokenizer_path} are {tokenizer.model.hidden_size} wide: load the tokenizer it was trained with"
        )
    made_with = world.metadata.get("tokenizer_fingerprint")
    if made_with is not None and made_with != tokenizer.fingerprint:
        raise MismatchError(
            f"the world model {path} was trained on delta tokens of tokenizer {made_with}, but "
            f"{tokenizer_path} is {tokenizer.fingerprint}: load the tokenizer it was trained with"
        )


def _by(grid: Sequence[int]) -> str:
    return " x ".join(map(str, grid))


def _world_entry(
    world: LoadedModel[DeltaWorld], tokenizer: Tokenizer, samples: int, device: torch.device
) -> World:
    learned = world.model.q_embed is not None
    name = "deltaworld_discriminative" if learned else "deltaworld"
    method = Method(name, tokenizer=tokenizer.fingerprint, world=world.fingerprint)
    return World(_ready(world.model, device), method, 1 if learned else samples)


def _check_distinct(paths: Sequence[Path], worlds: Sequence[World]) -> None:
    seen: dict[str | None, Path] = {}
    for path, world in zip(paths, worlds, strict=True):
        if world.method.world in seen:
            raise DeltacacheError(
                f"{path} and {seen[world.method.world]} are the same world model ({world.method.world}): "
                "its rows could not be told apart, so name it once"
            )
        seen[world.method.world] = path


def _ready(model: ModelT, device: torch.device) -> ModelT:
    return model.to(device).eval().requires_grad_(False)
