"""The models of an evaluation, checked against each other and against the features."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from deltacache.evaluate.output import Method
from deltacache.evaluate.settings import ClipEvaluation, EvaluationSettings
from deltacache.models.checkpoints import LoadedModel, load_tokenizer, load_world
from deltacache.models.deltatok import DeltaTok
from deltacache.models.devices import InPrecision
from deltacache.models.world_model import WorldModel
from deltacache.models.worlds import architecture_of
from deltacache.pipeline.work.encoders import resolve_precision
from deltacache.schemas.datasets import DatasetCard, Precision, parse_size, size_text
from deltacache.schemas.errors import DeltacacheError, MismatchError
from deltacache.schemas.provenance import Provenance, require_matches

ModelT = TypeVar("ModelT", bound=InPrecision)


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
    """A world model that fits the features, or the delta tokens of its ``tokenizer``.

    Attributes:
        samples: rollouts of each sequence, 1 where nothing is random.
        tokenizer: decodes what it predicts; ``None`` where that is patch tokens.
    """

    model: WorldModel
    method: Method
    samples: int
    tokenizer: Tokenizer | None

    @property
    def single(self) -> bool:
        """There is but one future, which is neither best nor mean."""
        return not self.model.stochastic

    def numbers_of_patches(self, context: Tensor, steps: int) -> int:
        """Held at once for one future of a context (C, N, D): keys and values of every block, and the frames."""
        frames, patches, _ = context.shape
        layers = int(self.model.arguments.get("num_layers", 1))
        return (2 * layers * (frames + steps) + steps) * patches * self.model.noise_size


@dataclass(frozen=True, slots=True)
class Models:
    """What takes part besides the bounds, which need no model.

    Attributes:
        trained_sizes: of those that were trained on features of another image size than these: that size, in pixels, by
            fingerprint.
    """

    tokenizers: tuple[Tokenizer, ...]
    worlds: tuple[World, ...]
    notes: tuple[str, ...] = ()
    trained_sizes: Mapping[str, str] = field(default_factory=dict)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The main one."""
        return self.tokenizers[0] if self.tokenizers else None

    @property
    def world_ids(self) -> list[str]:
        """For a run's id: weights, and what they were taken for, which released files leave open."""
        return [f"{world.method.world} as {architecture_of(world.model)}" for world in self.worlds]

    @property
    def fingerprints(self) -> dict[str, Any]:
        """For ``models.json``, in the order of the settings."""
        return {
            "tokenizer": self.tokenizer.fingerprint if self.tokenizer else None,
            "more_tokenizers": tuple(each.fingerprint for each in self.tokenizers[1:]),
            "worlds": tuple(world.method.world or "" for world in self.worlds),
        }

    @property
    def further(self) -> dict[str, list[str]]:
        """Fingerprints of the others, for a run's id; nothing where there are none."""
        others = [each.fingerprint for each in self.tokenizers[1:]]
        return {"more_tokenizers": others} if others else {}


def load_models(
    settings: EvaluationSettings, card: DatasetCard, features: str, device: torch.device
) -> Models:
    """Load what ``settings`` names, for the features that ``card`` describes and ``features`` names.

    Models that were trained at another image size are used on feature datasets, where somebody chose the size when
    these were made, and every row says so. Benchmarks, where the size may be the default, refuse them.

    The models compute in the precision of ``settings``, ``auto`` as ``device`` has it.

    Raises:
        CheckpointError: a checkpoint is missing or damaged.
        MismatchError: models that belong to other features or to another tokenizer.
    """
    any_size = isinstance(settings, ClipEvaluation)
    notes: list[str] = []
    trained_sizes: dict[str, str] = {}

    def note_size(model: LoadedModel[Any], path: Path) -> None:
        size = model.metadata.get("image_size")
        if said := card.other_size(size, path):
            notes.append(said)
            trained_sizes[model.fingerprint] = size_text(parse_size(size))

    precision = resolve_precision(device, settings.precision)
    tokenizers: dict[Path, LoadedModel[DeltaTok]] = {}
    for path in settings.tokenizers:
        loaded = load_tokenizer(path)
        check_tokenizer(loaded, card, path, features, any_size=any_size)
        note_size(loaded, path)
        for other, each in tokenizers.items():
            if each.fingerprint == loaded.fingerprint:
                raise DeltacacheError(
                    f"{path} and {other} are the same tokenizer ({loaded.fingerprint}): its rows would count twice, "
                    "so name it once"
                )
        tokenizers[path] = loaded
    ready = {
        path: Tokenizer(_ready(each.model, device, precision), each.fingerprint)
        for path, each in tokenizers.items()
    }
    worlds = list[World]()
    for path in settings.worlds:
        world = load_world(path, architecture=settings.architectures.get(str(path)))
        note_size(world, path)
        if world.model.trains_on == "features":
            check_patch_world(world, path, card, features, any_size=any_size)
            own = None
        else:
            own = ready[_tokenizer_of(world, path, tokenizers)]
        for other, each in zip(settings.worlds, worlds, strict=False):
            if each.method.world == world.fingerprint:
                raise DeltacacheError(
                    f"{path} and {other} are the same world model ({world.fingerprint}): its rows could not be "
                    "distinguished, so name it once"
                )
        method = Method(
            world.model.label, tokenizer=None if own is None else own.fingerprint, world=world.fingerprint
        )
        samples = settings.samples if world.model.stochastic else 1
        worlds.append(World(_ready(world.model, device, precision), method, samples, own))
    return Models(tuple(ready.values()), tuple(worlds), tuple(notes), trained_sizes)


def _tokenizer_of(
    world: LoadedModel[WorldModel], path: Path, tokenizers: Mapping[Path, LoadedModel[DeltaTok]]
) -> Path:
    """The tokenizer whose delta tokens ``world`` predicts: the one it names, or the only one."""
    if not tokenizers:
        raise MismatchError(
            f"the world model {path} predicts delta tokens: give the tokenizer they were made with"
        )
    made_with = world.metadata.get("tokenizer_fingerprint")
    for place, each in tokenizers.items():
        if made_with == each.fingerprint:
            return place
    if made_with is None and len(tokenizers) > 1:
        raise MismatchError(
            f"the world model {path} does not say which tokenizer's delta tokens it predicts: give only one tokenizer"
        )
    place = next(iter(tokenizers))
    check_world(world, path, tokenizers[place], place)
    return place


def check_tokenizer(
    tokenizer: LoadedModel[DeltaTok], card: DatasetCard, path: Path, features: str, *, any_size: bool = False
) -> None:
    """Refuse a tokenizer of other features than ``card`` describes; see ``require_matches``."""
    require_matches(
        Provenance.of_checkpoint(tokenizer.metadata, tokenizer.model.hidden_size, f"the tokenizer {path}"),
        Provenance.of_dataset(card, features),
        "extract again, or load the matching tokenizer",
        any_size=any_size,
    )


def check_world(
    world: LoadedModel[WorldModel], path: Path, tokenizer: LoadedModel[DeltaTok], tokenizer_path: Path
) -> None:
    """Refuse a world model of another tokenizer's delta tokens; see ``require_matches``."""
    require_matches(
        Provenance.of_checkpoint(world.metadata, world.model.hidden_size, f"the world model {path}"),
        Provenance(
            f"the tokenizer {tokenizer_path}",
            tokenizer.model.hidden_size,
            tokenizer_fingerprint=tokenizer.fingerprint,
        ),
        "load the tokenizer it was trained with",
    )


def check_patch_world(
    world: LoadedModel[WorldModel], path: Path, card: DatasetCard, features: str, *, any_size: bool = False
) -> None:
    """Refuse a world model of other patch tokens than ``card`` describes; see ``require_matches``."""
    require_matches(
        Provenance.of_checkpoint(world.metadata, world.model.hidden_size, f"the world model {path}"),
        Provenance.of_dataset(card, features),
        "extract again with the backbone it was trained on, or load the matching world model",
        any_size=any_size,
    )


def _ready(model: ModelT, device: torch.device, precision: Precision) -> ModelT:
    return model.to(device).eval().requires_grad_(False).to_precision(precision)
