"""``train-systems``: several world models on the same feature shards, for one table (the paper's Tables 2 and C).

The output folder holds ``tokenizers/<name>``, ``deltas/<name>`` and ``worlds/<system>``; each training decides by its
own rules whether it is finished, so a stopped call goes on where it was.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import Field, model_validator

from deltacache.chain import AnyTokenizerConfig, AnyWorldConfig, TokenizerStage, WorldStage, train_stages
from deltacache.models.deltatok import DeltaTok
from deltacache.models.worlds import world_class
from deltacache.pipeline.datasets.dataset import Dataset
from deltacache.pipeline.jobs.offline import tokenize_features
from deltacache.pipeline.storage.files import replacing
from deltacache.pipeline.storage.locking import LOCK_FILE, dataset_lock
from deltacache.schemas.arguments import changed_by
from deltacache.schemas.clips import check_id
from deltacache.schemas.configs import PRESETS, TokenizerConfig, WorldConfig, load_config, save_config
from deltacache.schemas.datasets import Frozen
from deltacache.schemas.errors import DeltacacheError, MismatchError
from deltacache.schemas.jobs import ClusterSettings, SystemsLaunch, TokenizeSettings
from deltacache.schemas.progress import Reporter
from deltacache.train.mixture import open_training_data
from deltacache.train.setup import check_fits
from deltacache.train.workers.trainable import Workers

CONFIG = "systems.yaml"
TrainedConfig = TypeVar("TrainedConfig", TokenizerConfig, WorldConfig)


class System(Frozen):
    """A world model, and the tokenizer whose tokens it is trained on; none where it predicts patch tokens."""

    tokenizer: str | None = None
    world: AnyWorldConfig


class SystemsConfig(Frozen):
    """The content of ``systems.yaml``. The first system is the one that the others are measured by."""

    tokenizers: dict[str, AnyTokenizerConfig] = Field(default={})
    systems: dict[str, System] = Field(min_length=1)

    @model_validator(mode="after")
    def _belong_together(self) -> Self:
        for name in (*self.tokenizers, *self.systems):
            check_id(name, "name")
        for name, system in self.systems.items():
            architecture = system.world.model.architecture
            needs = world_class(architecture).trains_on == "deltas"
            if needs and system.tokenizer not in self.tokenizers:
                raise ValueError(
                    f"system {name}: a {architecture} is trained on delta tokens, but tokenizer "
                    f"{system.tokenizer!r} is not one of {', '.join(self.tokenizers) or 'those given'}"
                )
            if not needs and system.tokenizer is not None:
                raise ValueError(
                    f"system {name}: a {architecture} is trained on patch tokens: leave its tokenizer out"
                )
        return self

    def changed(self, seed: int | None, accumulation: int | None) -> "SystemsConfig":
        """The same with every training's seed, and its batch in so many passes; ``None``: as it is.

        Raises:
            DeltacacheError: a batch does not split into equal passes.
        """

        def change(config: TrainedConfig) -> TrainedConfig:
            training = config.training.shared_by(1, accumulation)
            if seed is not None:
                training = training.model_copy(update={"seed": seed})
            return config.model_copy(update={"training": training})

        systems = {
            name: each.model_copy(update={"world": change(each.world)}) for name, each in self.systems.items()
        }
        tokenizers = {name: change(each) for name, each in self.tokenizers.items()}
        return SystemsConfig(tokenizers=tokenizers, systems=systems)


@dataclass(frozen=True, slots=True)
class SystemPaths:
    """Where the parts of each system lie."""

    out: Path

    def tokenizer(self, name: str) -> Path:
        """The trained tokenizer."""
        return self.out / "tokenizers" / name

    def deltas(self, name: str) -> Path:
        """Delta tokens of that tokenizer."""
        return self.out / "deltas" / name

    def world(self, name: str) -> Path:
        """The trained world model of a system."""
        return self.out / "worlds" / name

    @property
    def evaluation(self) -> Path:
        """Tables and report of all systems."""
        return self.out / "evaluation"

    def models(self, config: "SystemsConfig") -> dict[str, Any]:
        """What an evaluation of all systems is given."""
        tokenizers = [self.tokenizer(name).absolute() for name in config.tokenizers]
        return {
            "tokenizer": tokenizers[0] if tokenizers else None,
            "more_tokenizers": tuple(tokenizers[1:]),
            "worlds": tuple(self.world(name).absolute() for name in config.systems),
        }


def systems_preset(name: str) -> SystemsConfig:
    """The systems of a preset, or of a YAML file.

    Raises:
        DeltacacheError: there is no such preset, or the file is not a list of systems.
    """
    if name.endswith((".yaml", ".yml")):
        return load_config(Path(name), SystemsConfig)
    known = sorted(path.parent.name for path in PRESETS.glob(f"*/{CONFIG}"))
    if name not in known:
        raise DeltacacheError(
            f"{name!r} is not a preset of systems: give one of {', '.join(known)}, or a YAML file"
        )
    return load_config(PRESETS / name / CONFIG, SystemsConfig)


def systems_settings(launch: SystemsLaunch) -> SystemsConfig:
    """The systems that ``train-systems`` trains: the preset with its changes."""
    config = systems_preset(launch.preset).changed(launch.seed, launch.accumulation)
    return changed_by(config, launch.assignments)


def train_systems(
    config: SystemsConfig,
    features: Path | str,
    out: Path,
    workers: Workers,
    device: str,
    reporter: Reporter,
    encoders: int | None = None,
) -> SystemPaths:
    """Train all tokenizers and world models that are not finished yet.

    Args:
        encoders: processes that make the delta tokens; 0: this one, without Ray.

    Raises:
        DeltacacheError: ``features`` cannot be trained on, or ``out`` holds other systems.
    """
    with dataset_lock(out, "train-systems"):
        _check_all_fit(config, open_training_data(features, "features"))  # before days of training
        _claim(out, config)
        cluster = ClusterSettings(
            ray_address=workers.ray_address if encoders != 0 else None,
            encoders=encoders,
            gpus_per_encoder=0 if device == "cpu" else None,
            wait_for_nodes_s=workers.wait_for_nodes_s,
        )
        return _train(config, features, SystemPaths(out), workers, device, reporter, cluster)


def _train(
    config: SystemsConfig,
    features: Path | str,
    paths: SystemPaths,
    workers: Workers,
    device: str,
    reporter: Reporter,
    cluster: ClusterSettings,
) -> SystemPaths:
    for name, each in config.tokenizers.items():
        reporter.line(f"tokenizer {name}")
        stages = (TokenizerStage(name="only", config=each),)
        train_stages("tokenizer", stages, [features], [paths.tokenizer(name)], device, workers, reporter)
        job = TokenizeSettings(features=str(features), tokenizer=paths.tokenizer(name), cluster=cluster)
        tokenize_features(job, paths.deltas(name), reporter)
    for name, system in config.systems.items():
        reporter.line(f"system {name}")
        data = features if system.tokenizer is None else paths.deltas(system.tokenizer)
        stages = (WorldStage(name="only", config=system.world),)
        train_stages("world", stages, [data], [paths.world(name)], device, workers, reporter)
    return paths


def _check_all_fit(config: SystemsConfig, dataset: Dataset) -> None:
    """Refuse what the features' width cannot be split into by any of the models."""
    width = dataset.card.hidden_size
    for each in config.tokenizers.values():
        check_fits(dataset, partial(DeltaTok, width, **each.model.model_dump()))
    for system in config.systems.values():
        model = system.world.model
        several: dict[str, Any] = {}
        if system.tokenizer is not None:
            count = config.tokenizers[system.tokenizer].model.tokens_per_frame
            several = {"tokens_per_frame": count} if count > 1 else {}
        check_fits(dataset, partial(world_class(model.architecture), width, **model.arguments, **several))


def open_systems(out: Path) -> tuple[SystemsConfig, SystemPaths]:
    """What ``train_systems`` left in ``out``.

    Raises:
        DeltacacheError: there are none.
    """
    if not (out / CONFIG).is_file():
        raise DeltacacheError(f"{out} holds no {CONFIG}: give the output of deltacache train-systems")
    return load_config(out / CONFIG, SystemsConfig), SystemPaths(out)


def _claim(out: Path, config: SystemsConfig) -> None:
    saved = out / CONFIG
    if saved.is_file():
        if load_config(saved, SystemsConfig) != config:
            raise MismatchError(
                f"{out} holds other systems (see {saved}): choose another folder, or remove it"
            )
        return
    if out.exists() and any(path.name != LOCK_FILE for path in out.iterdir()):
        raise DeltacacheError(
            f"{out} is not empty and is not an output of train-systems: choose another folder, or empty it"
        )
    out.mkdir(parents=True, exist_ok=True)
    with replacing(saved) as temporary:
        save_config(config, temporary)
