"""What an evaluation is asked to do; saved as ``config.yaml`` beside its tables."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator

from deltacache.schemas.arguments import Flag
from deltacache.schemas.benchmarks import BENCHMARKS, BenchmarkName
from deltacache.schemas.configs import load_config, read_yaml
from deltacache.schemas.datasets import AskedPrecision, Frozen, Horizons
from deltacache.schemas.errors import DeltacacheError, SettingsError, problems_of
from deltacache.schemas.foresight import ForesightEvaluation
from deltacache.schemas.hub import DatasetPlace, ModelPath, as_saved, model_path
from deltacache.schemas.jobs import (
    DEFAULT_BACKBONE,
    WAIT_FOR_NODES_S,
    Backbone,
    Context,
    Device,
    EigenList,
    RayAddress,
    Seed,
    WaitForNodes,
)

CONFIG = "config.yaml"
CLIPS = "clips"
_METHOD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
OWN_METHODS = (
    "copy_last",
    "deltatok",
    "deltatok_one_step",
    "deltatok_parallel",
    "deltatok_swapped",
    "deltaworld",
    "deltaworld_discriminative",
    "deltaworld_energy",
    "deltaworld_flow",
    "dino_foresight",
    "dino_foresight_delta",
    "dino_world",
    "dino_world_best_of_many",
    "dino_world_energy",
    "dino_world_flow",
    "present",
)


class EvaluationSettings(Frozen):
    """What every evaluation is asked: the models, how far, how often."""

    out: Path
    tokenizer: Annotated[ModelPath | None, Flag(takes=tuple[str, ...])] = Field(
        default=None,
        description="Output of train-tokenizer, a released checkpoint, or a name on the hub; may be repeated.",
    )
    more_tokenizers: tuple[ModelPath, ...] = Field(
        default=(), description="of world models on other delta tokens"
    )
    worlds: Annotated[tuple[ModelPath, ...], Flag("world", takes=tuple[str, ...])] = Field(
        default=(),
        description="Output of train-world, [ARCHITECTURE=]FILE as released, or a name on the hub; may be repeated.",
    )
    architectures: dict[str, str] = Field(
        default={}, description="of world models, by path, whose files do not say it"
    )
    context: Context = 4
    horizons: Annotated[Horizons, Flag(default="1,3")] = Field(
        default=(1, 3), min_length=1, description="Steps after the context, such as 1,3."
    )
    samples: Annotated[int, Flag()] = Field(default=20, ge=1, description="Futures sampled per sequence.")
    seed: Seed = 0
    examples: Annotated[int, Flag()] = Field(
        default=4, ge=0, le=32, description="Sequences of each dataset kept for the report's pictures."
    )
    device: Device = "auto"
    precision: Annotated[AskedPrecision, Flag(choices=("auto", "float32", "bfloat16"))] = Field(
        default="auto",
        description="Precision of matrix products; auto: bfloat16 on GPUs, else float32.",
    )

    @property
    def models_precision(self) -> dict[str, str]:
        """For a run's id, once ``auto`` is resolved: nothing for float32, as before there was another precision."""
        return {} if self.precision == "float32" else {"models_precision": self.precision}

    @property
    def tokenizers(self) -> tuple[Path, ...]:
        """All of them, the main one first."""
        return (*(() if self.tokenizer is None else (self.tokenizer,)), *self.more_tokenizers)

    @property
    def frames(self) -> int:
        """Frames that the longest horizon needs: the context and what comes after."""
        return self.context + max(self.horizons)


class ClipEvaluation(EvaluationSettings):
    """Feature-space metrics on a feature dataset, without labels."""

    features: DatasetPlace = Field(description="a feature dataset: a folder, or a url in an object store")
    dataset: str = Field(default="clips", min_length=1, description="name in the tables")
    futures: Annotated[Path | None, Flag()] = Field(
        default=None,
        description="For clips: CSV or Parquet (video_uri, scene, outcome) of true futures; adds mode coverage, and "
        "the odds error where it has a column probability.",
    )

    where: Annotated[str | None, Flag(default="all clips")] = Field(
        default=None,
        description="For clips: score those for which this SQL expression over index and source columns holds.",
    )
    split: Annotated[float | None, Flag(default="all videos")] = Field(
        default=None,
        gt=0,
        lt=1,
        description="For clips: score the videos that trainers with this --split hold out.",
    )
    split_seed: Annotated[int, Flag()] = Field(default=0, ge=0, description="For clips: seed of that split.")

    @property
    def choice(self) -> dict[str, Any]:
        """Which clips are scored, if not all."""
        own = {
            "where": self.where,
            "split": self.split,
            "split_seed": self.split_seed if self.split else None,
        }
        return {name: value for name, value in own.items() if value is not None}

    @field_validator("features", mode="before")
    @classmethod
    def _features_as_text(cls, features: Any) -> Any:
        return str(features) if hasattr(features, "joinpath") else features  # Path, UPath

    @model_validator(mode="after")
    def _futures_need_a_world(self) -> Self:
        if self.futures is not None and not self.worlds:
            raise ValueError("futures say which outcomes a world model should reach: give a world model")
        return self


class BenchmarkEvaluation(EvaluationSettings):
    """Labelled sequences of the published benchmarks (method section 3)."""

    data: Annotated[dict[BenchmarkName, Path], Flag(takes=dict[str, str])] = Field(
        min_length=1,
        description="NAME=PATH, may be repeated: vspw, cityscapes or kitti with its root; clips with a feature "
        "dataset.",
    )
    heads: Annotated[dict[BenchmarkName, ModelPath], Flag("head")] = Field(
        default={}, description="NAME=FILE: the linear head of a benchmark; may be repeated."
    )
    clips: ClipEvaluation | None = Field(default=None, description="a feature dataset in the same tables")
    backbone: Backbone = DEFAULT_BACKBONE
    image_size: Annotated[int, Flag()] = Field(
        default=512, ge=16, description="Side of the square crops in pixels."
    )
    predictions: Annotated[dict[str, Path], Flag()] = Field(
        default={},
        description="NAME=DIR: futures of a video generator (export-contexts); may be repeated.",
    )
    kitti_split: EigenList = None
    rgb_decoder: Annotated[ModelPath | None, Flag()] = Field(
        default=None, description="Output of train-head rgb, or a released decoder; adds pictures of futures."
    )
    cache: Annotated[Path | None, Flag()] = Field(
        default=None, description="Folder to cache the benchmarks' patch tokens for the next model."
    )
    workers: Annotated[int | None, Flag(default="this process")] = Field(
        default=None, ge=1, description="Processes over which the benchmarks are split."
    )
    ray_address: RayAddress = None
    wait_for_nodes_s: WaitForNodes = WAIT_FOR_NODES_S

    @model_validator(mode="after")
    def _what_belongs_to_data(self) -> Self:
        stray = [name for name in self.heads if name not in self.data]
        if stray:
            raise ValueError(f"head {stray[0]}: there is no data {stray[0]}=DIR for it")
        taken = [name for name in self.predictions if name in OWN_METHODS]
        if taken:
            raise ValueError(
                f"predictions {taken[0]}: that is the name of a built-in method; give another NAME=DIR"
            )
        odd = [name for name in self.predictions if not _METHOD_NAME.fullmatch(name)]
        if odd:
            raise ValueError(
                f"predictions {odd[0]}: a method's name is letters, digits, '.', '_' and '-'; give NAME=DIR"
            )
        if self.kitti_split is not None and "kitti" not in self.data:
            raise ValueError(
                "kitti_split is the list of KITTI's test frames: give kitti=DIR, or leave it out"
            )
        if self.ray_address is not None and self.workers is None:
            raise ValueError("ray_address says where workers run: give their number")
        return self

    @property
    def dataset(self) -> str:
        """All names of the tables' ``dataset``."""
        return ", ".join([*self.data, *([self.clips.dataset] if self.clips else [])])

    @property
    def frame_counts(self) -> tuple[int, ...]:
        """Frames of a sequence up to and with its target, for each horizon."""
        return tuple(self.context + horizon for horizon in self.horizons)


Evaluation = ClipEvaluation | BenchmarkEvaluation | ForesightEvaluation
SettingsT = TypeVar("SettingsT", ClipEvaluation, BenchmarkEvaluation)


def clip_evaluation(**fields: Any) -> ClipEvaluation:
    """Build the settings; what is refused becomes one readable message.

    Raises:
        DeltacacheError: a value is out of range or two values do not go together.
    """
    return _built(ClipEvaluation, fields)


def benchmark_evaluation(**fields: Any) -> BenchmarkEvaluation:
    """``clip_evaluation`` for the published benchmarks."""
    return _built(BenchmarkEvaluation, fields)


def evaluation(
    data: Mapping[str, str], heads: Mapping[str, str], **flags: Any
) -> ClipEvaluation | BenchmarkEvaluation:
    """The evaluation that a command line asks for: of a feature dataset, of benchmarks, or of both.

    Raises:
        DeltacacheError: an unknown name, or flags that do not go together.
    """
    unknown = [name for name in (*data, *heads) if name not in (*BENCHMARKS, CLIPS)]
    if unknown:
        raise DeltacacheError(
            f"{unknown[0]} is not known: give {', '.join(BENCHMARKS)} or {CLIPS}, as NAME=PATH"
        )
    predictions = {name: _absolute(path) for name, path in (flags.get("predictions") or {}).items()}
    roots = {name: _absolute(path) for name, path in data.items() if name != CLIPS}
    named = {name: _absolute(model_path(path)) for name, path in heads.items()}
    clips = None
    if CLIPS in data:
        fields = {name: flags[name] for name in ClipEvaluation.model_fields if name in flags}
        clips = clip_evaluation(features=data[CLIPS], **fields)
    else:
        for name in ("futures", "where", "split"):
            if flags.get(name) is not None:
                raise DeltacacheError(
                    f"--{name} concerns clips of a feature dataset: give --data clips=FEATURES too, or leave it out"
                )
    if not roots:
        of_benchmarks = ("kitti_split", "cache", "workers", "ray_address", "predictions")
        idle = ["head"] if named else [name for name in of_benchmarks if flags.get(name)]
        if idle:
            raise DeltacacheError(
                f"{idle[0]} is for benchmarks, and a feature dataset has no use for it: leave it out"
            )
        if clips is None:
            raise DeltacacheError("there is nothing to evaluate: give --data NAME=PATH")
        return clips
    fields = {name: flags[name] for name in BenchmarkEvaluation.model_fields if name in flags}
    for name in ("kitti_split", "cache"):
        fields[name] = None if flags.get(name) is None else _absolute(flags[name])
    for name in ("tokenizer", "rgb_decoder"):
        fields[name] = None if flags.get(name) is None else _absolute(model_path(flags[name]))
    fields["predictions"] = predictions
    for name in ("worlds", "more_tokenizers"):
        fields[name] = tuple(_absolute(model_path(path)) for path in flags.get(name, ()))
    return benchmark_evaluation(data=roots, heads=named, clips=clips, **fields)


def _absolute(path: str | Path) -> Path:
    """Processes of a cluster have other working directories."""
    return Path(path).absolute()


def load_evaluation(out: Path) -> Evaluation:
    """The settings that were saved in the folder of an evaluation.

    Raises:
        DeltacacheError: they are missing or damaged.
    """
    path = out / CONFIG
    content = read_yaml(path)
    names = content.keys() if isinstance(content, Mapping) else ()
    kinds = {"data": BenchmarkEvaluation, "root": ForesightEvaluation}  # what only they have
    with as_saved():
        return load_config(
            path, next((kind for name, kind in kinds.items() if name in names), ClipEvaluation)
        )


def _built(kind: type[SettingsT], fields: Mapping[str, Any]) -> SettingsT:
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise SettingsError(f"this evaluation cannot be made: {problems_of(error, kind)}") from error
