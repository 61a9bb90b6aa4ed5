"""Configs of models and training. Frozen values that check themselves; presets are YAML files of these."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import Field, ValidationError, model_validator

from deltacache.schemas.arguments import Flag
from deltacache.schemas.benchmarks import BENCHMARK_TASK, BenchmarkName
from deltacache.schemas.datasets import Frozen, Precision, TrainingPrecision
from deltacache.schemas.errors import DeltacacheError, problems_of
from deltacache.schemas.secrets import without_secrets
from deltacache.schemas.texts import counted, decoded

# ----------------------------------------------------------------------------------------------------
# YAML files of settings: what one seems to be, and what is wrong with it.
# ----------------------------------------------------------------------------------------------------


ConfigT = TypeVar("ConfigT", bound=Frozen)

TOKENIZER = "a recipe of a tokenizer"
WORLD = "a recipe of a world model"
SYSTEMS = "a list of systems"
CHAIN = "a chain"
_COMMANDS = {
    TOKENIZER: "deltacache train-tokenizer --preset FILE.yaml",
    WORLD: "deltacache train-world --preset FILE.yaml",
    SYSTEMS: "deltacache train-systems --preset FILE.yaml",
    CHAIN: "deltacache run FILE.yaml",
    "settings of an evaluation": "deltacache report with the folder of FILE.yaml",
    "settings of an extraction": "deltacache extract-features, as flags",
}
_WANTED = {
    "TokenizerConfig": TOKENIZER,
    "WorldConfig": WORLD,
    "SystemsConfig": SYSTEMS,
    "ChainConfig": CHAIN,
}
"""What a config's file is called."""
_TELLING = {
    SYSTEMS: {"systems"},
    CHAIN: {"train_videos", "test_videos", "worlds"},
    "settings of an evaluation": {"horizons"},
    "settings of an extraction": {"source"},
}
"""One of these keys tells the kind of file, in this order."""


def read_yaml(path: Path) -> Any:
    """The content as plain values.

    Raises:
        DeltacacheError: there is no such file, or it is not valid YAML.
    """
    try:
        return yaml.safe_load(decoded(path.read_bytes()))
    except FileNotFoundError:
        raise DeltacacheError(f"{path} does not exist: give the path of a YAML config") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DeltacacheError(f"{path} cannot be read ({error}): give the path of a YAML config") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "somewhere"
        raise DeltacacheError(
            f"{path} is not valid YAML: {line}: {error.problem}; correct that line"
        ) from error
    except yaml.YAMLError as error:
        raise DeltacacheError(f"{path} is not valid YAML: {error}; give the path of a YAML config") from error


def load_config(path: Path, kind: type[ConfigT]) -> ConfigT:
    """Read one YAML file as ``kind``; unknown or ill-typed fields are refused by name."""
    content = read_yaml(path)
    wanted = _WANTED.get(kind.__name__, "a YAML file of settings")
    if not isinstance(content, Mapping):
        what = "is empty" if content is None else f"holds a {type(content).__name__}"
        names = ", ".join(kind.model_fields)
        raise DeltacacheError(f"{path} {what}, and {wanted} holds settings by name: give {names}")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        seems = kind_of(content)
        if seems in _COMMANDS and kind.__name__ in _WANTED and seems != wanted:
            raise DeltacacheError(
                f"{path} is not {wanted} but seems to be {seems}, which is for {_COMMANDS[seems]}"
            ) from error
        raise DeltacacheError(f"{path} is not {wanted}: {problems_of(error, kind)}") from error


def kind_of(content: Any) -> str | None:
    """What a YAML file seems to be, by its keys; None for anything else."""
    if not isinstance(content, Mapping):
        return None
    for kind, keys in _TELLING.items():
        if keys & set(content):
            return kind
    model = content.get("model")
    if not isinstance(model, Mapping):
        return None
    # What only one of the two recipes, or its model, has.
    of_tokenizers = {*TokenizerConfig.model_fields, *TokenizerModelConfig.model_fields}
    of_worlds = {*WorldConfig.model_fields, *WorldModelConfig.model_fields}
    keys = {*content, *model}
    tokenizer, world = len(keys & (of_tokenizers - of_worlds)), len(keys & (of_worlds - of_tokenizers))
    return None if tokenizer == world else TOKENIZER if tokenizer > world else WORLD


PRESETS = Path(__file__).parent / "presets"
Stage = Literal["tokenizer", "world"]
SelectionName = Literal["float32", "shortlist", "bfloat16"]
Objective = Literal["best_of_many", "energy", "flow"]
_ORDERED = ("main", "256px", "512px", "cooldown", "cooldown1", "cooldown2")
"""Stages come in this order, others behind them by name."""


class TokenizerModelConfig(Frozen):
    """DeltaTok (method section 1). ``hidden_size`` comes from the features."""

    num_heads: Annotated[int, Flag("heads")] = Field(
        default=12,
        ge=1,
        description="Attention heads of the transformer; must divide the width of its tokens.",
    )
    encoder_layers: int = 12
    decoder_layers: int = 12
    qk_norm: bool = True
    gated_attention: bool = True
    mlp: Literal["gelu", "swiglu"] = "swiglu"
    frame_compression: Literal["off", "learned", "zeros"] = "off"
    rope_theta: float = 100.0
    rope_rescale: float | None = Field(
        default=2.0, description="train mode: coordinates x [1/r, r]; null for none"
    )
    layer_scale_init: float = 1e-5
    tokens_per_frame: Annotated[int, Flag()] = Field(
        default=1, ge=1, le=64, description="Delta tokens per frame; the paper has 1."
    )


class WorldModelConfig(Frozen):
    """A world model (method section 1). ``hidden_size`` and ``tokens_per_frame`` come from the dataset."""

    architecture: str = Field(default="deltaworld", description="a file of deltacache/models/worlds")
    num_heads: Annotated[int, Flag("heads")] = Field(
        default=12,
        ge=1,
        description="Attention heads of the transformer; must divide the width of its tokens.",
    )
    num_layers: int = 12
    mlp_ratio: float = 4.0
    query: Annotated[Literal["noise", "learned"], Flag()] = Field(
        default="noise", description="Noise (best of many), or one learned query."
    )
    objective: Annotated[Objective, Flag()] = Field(
        default="best_of_many",
        description="What futures are trained for: the best of many alone, the energy score of all samples, or flow "
        "matching, which carries noise to tokens in a few steps.",
    )
    noise_std: Annotated[float, Flag(default="0.02 for best_of_many, else 1")] = Field(
        default=0.02, ge=0, description="Standard deviation of the noise."
    )
    flow_layers: int = Field(default=3, ge=1, description="blocks of the head that carries noise to tokens")
    flow_steps: Annotated[int, Flag()] = Field(
        default=8, ge=1, description="Steps from noise to token of a flow, two passes of its head each."
    )
    layer_scale_init: float = 1e-5
    options: dict[str, Any] = Field(default={}, description="further arguments of the architecture")

    @model_validator(mode="before")
    @classmethod
    def _noise_of_the_objective(cls, content: Any) -> Any:
        """Distributions need noise that reaches as far as futures do: with the published 0.02 they collapse."""
        if isinstance(content, Mapping) and content.get("objective", "best_of_many") != "best_of_many":
            return {"noise_std": 1.0, **content}
        return content

    @model_validator(mode="after")
    def _noise_to_sample_with(self) -> Self:
        if self.objective != "best_of_many" and (self.query != "noise" or self.noise_std == 0):
            raise ValueError(
                f"objective {self.objective} samples futures: set query to noise and noise_std above 0"
            )
        return self

    @property
    def arguments(self) -> dict[str, Any]:
        """Of the constructor, all but what comes from the dataset, and what its objective does not use."""
        unused = {"architecture", "options"}
        if self.objective == "best_of_many":  # which models from outside of the package need not know
            unused.add("objective")
        if self.objective != "flow":
            unused |= {"flow_layers", "flow_steps"}
        return {**self.model_dump(exclude=unused), **self.options}


class TrainingConfig(Frozen):
    """The loop: what both trainers share."""

    start: Literal["random", "weights", "everything"] = Field(
        default="random",
        description="what is taken from the stage before: nothing; its weights, with a fresh optimizer at step 0; "
        "or weights, optimizer and step, to go on with other rates",
    )
    steps: Annotated[int, Flag()] = Field(
        ge=1,
        description="Training steps, including those of a continued run; warm-up and decay scale in proportion.",
    )
    batch_size: Annotated[int, Flag(default="the preset's, split over workers")] = Field(
        ge=1, description="Samples in one step of a worker (with --accumulation: in one pass)."
    )
    accumulation: Annotated[int | None, Flag(default="as few as fit in memory")] = Field(
        default=None,
        ge=1,
        description="Passes (micro-batches) whose gradients are accumulated into one step.",
    )
    learning_rate: float = Field(gt=0)
    warmup_steps: Annotated[int, Flag(default="the preset's, in proportion to --steps")] = Field(
        default=5000, ge=0, description="Warm-up steps."
    )
    decay_steps: Annotated[int | None, Flag(default="the preset's, in proportion to --steps")] = Field(
        default=None,
        ge=1,
        description="Step at which a cosine decay after the warm-up reaches 0; without it the rate is constant.",
    )
    weight_decay: float = Field(ge=0)
    precision: Annotated[
        TrainingPrecision, Flag(default="the preset's, auto: bfloat16 on GPUs, else float32")
    ] = Field(
        default="auto",
        description="Precision of matrix products; bfloat16 also suits CPUs with fast bfloat16.",
    )
    gradient_clip: float | None = Field(default=None, gt=0)
    seed: Annotated[int, Flag()] = Field(default=0, ge=0, description="Seed of all random choices.")
    save_every: Annotated[int, Flag()] = Field(default=1000, ge=1, description="Steps between checkpoints.")
    log_every: Annotated[int, Flag()] = Field(
        default=50, ge=1, description="Steps between rows of the curves."
    )
    keep: Annotated[int, Flag()] = Field(default=2, ge=1, description="Number of newest checkpoints to keep.")
    probe_every: Annotated[int, Flag()] = Field(
        default=1000, ge=1, description="Steps between health probes; also at the end."
    )
    probe_clips: int = Field(default=64, ge=2, description="clips used by the probes, always the same")
    wandb: Annotated[Literal["off", "offline", "online"], Flag()] = Field(
        default="off",
        description="Weights & Biases (pip install 'deltacache[wandb]'): as --tracker wandb, offline or online.",
    )
    trackers: Annotated[
        tuple[Literal["tensorboard", "wandb", "mlflow"], ...],
        Flag("tracker", takes=tuple[str, ...], default="tensorboard"),
    ] = Field(
        default=("tensorboard",),
        description="Where rows of the curves are sent: tensorboard, wandb, mlflow (pip install "
        "'deltacache[mlflow]'); may be repeated.",
    )
    project: Annotated[str, Flag()] = Field(
        default="deltacache", min_length=1, description="Project in the trackers (MLflow: experiment)."
    )
    run_name: Annotated[str | None, Flag(default="kind of model and name of OUT")] = Field(
        default=None, min_length=1, description="Name of the run in the trackers."
    )

    def shared_by(self, workers: int, accumulation: int | None = None) -> "TrainingConfig":
        """The same effective batch, computed by ``workers`` in ``accumulation`` passes (``None``: as many as now).

        Raises:
            DeltacacheError: it does not split into equal parts.
        """
        effective = self.batch_size * (self.accumulation or 1)
        passes = self.accumulation if accumulation is None else accumulation
        batch_size, left = divmod(effective, workers * (passes or 1))
        if left or batch_size == 0:
            raise DeltacacheError(
                f"a batch of {effective} does not split into equal parts for {counted(workers, 'worker')} "
                f"x {passes or 1} passes: "
                "give --batch-size, the samples of one pass of one worker, or other numbers of these"
            )
        return self.model_copy(update={"batch_size": batch_size, "accumulation": passes})

    def in_steps(
        self, steps: int | None, warmup_steps: int | None = None, decay_steps: int | None = None
    ) -> "TrainingConfig":
        """The same schedule stretched to so many steps (``None``: as it is), but for what else is given."""
        changes: dict[str, int] = {}
        if steps is not None:
            changes = {"steps": steps, "warmup_steps": self.warmup_steps * steps // self.steps}
            if self.decay_steps is not None:
                changes["decay_steps"] = max(1, self.decay_steps * steps // self.steps)
        given = {"warmup_steps": warmup_steps, "decay_steps": decay_steps}
        changes |= {name: value for name, value in given.items() if value is not None}
        return self.model_copy(update=changes)


class DataChoice(Frozen):
    """Which clips a training takes, and what it is validated on (docs/data.md)."""

    where: Annotated[str | None, Flag(default="all clips")] = Field(
        default=None,
        description="Train on the clips for which this SQL expression over index and source columns holds, such as "
        '"view = 0".',
    )
    split: Annotated[float | None, Flag(default="all videos")] = Field(
        default=None,
        gt=0,
        lt=1,
        description="Share of the videos to train on; the others are held out and give the validation loss.",
    )
    split_seed: Annotated[int, Flag()] = Field(
        default=0,
        ge=0,
        description="Seed of the split; which video is held out depends on its id and this alone.",
    )
    validate_every: Annotated[int, Flag()] = Field(
        default=1000, ge=1, description="Steps between validations; also at the end."
    )
    validate_clips: Annotated[int, Flag()] = Field(
        default=256, ge=1, description="Clips of a validation, always the same."
    )
    patience: Annotated[int | None, Flag(default="train all steps")] = Field(
        default=None,
        ge=1,
        description="Stop after this many validations in a row without a lower loss.",
    )


class TokenizerConfig(Frozen):
    """``train-tokenizer``: a preset, after the command line's changes."""

    model: TokenizerModelConfig
    training: TrainingConfig
    data: DataChoice = DataChoice()
    loss: Literal["mse", "log_cosh"] = "log_cosh"
    black_first_fraction: Annotated[float, Flag()] = Field(
        default=0.0, ge=0, le=1, description="Share of pairs whose first frame is black."
    )


CANDIDATES: Mapping[Any, int] = {"best_of_many": 256, "energy": 8, "flow": 4}
"""Of each objective, where a recipe does not say it."""


class WorldConfig(Frozen):
    """``train-world``: a preset, after the command line's changes."""

    model: WorldModelConfig
    training: TrainingConfig
    data: DataChoice = DataChoice()
    candidates: Annotated[int, Flag(default="the preset's; 8 for energy, 4 for flow")] = Field(
        default=256,
        ge=1,
        description="Number of candidates, K of best-of-many; samples of energy; draws of flow for each frame.",
    )
    smooth_l1_beta: float = Field(default=0.1, gt=0)
    rollout_steps: Annotated[int, Flag()] = Field(
        default=1,
        ge=1,
        description="Frames at the end of a clip that are predicted one from the other in training; 1: each from true "
        "frames.",
    )
    context_noise: Annotated[float, Flag()] = Field(
        default=0.0,
        ge=0,
        description="Standard deviation of noise that training adds to the tokens that are seen.",
    )
    selection: Annotated[SelectionName | Literal["auto"], Flag()] = Field(
        default="auto",
        description="How candidates are compared: in float32; in bfloat16, the best four again in float32 (shortlist); "
        "or in bfloat16 alone. auto: the fastest on this machine that chooses as float32 does.",
    )

    @model_validator(mode="before")
    @classmethod
    def _candidates_of_the_objective(cls, content: Any) -> Any:
        model = content.get("model") if isinstance(content, Mapping) else None
        objective = (
            model.get("objective") if isinstance(model, Mapping) else getattr(model, "objective", None)
        )
        return {"candidates": CANDIDATES[objective], **content} if objective in CANDIDATES else content

    @model_validator(mode="after")
    def _enough_candidates(self) -> Self:
        if self.model.query == "learned" and self.candidates != 1:
            raise ValueError("a learned query has one candidate: set candidates to 1")
        if self.model.objective == "energy" and self.candidates < 2:
            raise ValueError("the energy score compares samples: set candidates to 2 or more")
        return self


def preset_names(kind: Stage) -> list[str]:
    """Folders of ``presets`` with a recipe of this kind."""
    return sorted({path.parent.name for path in PRESETS.glob(f"*/{kind}-*.yaml")})


def preset_stages(kind: Stage, name: str) -> list[str]:
    """The stages of a preset in their order; each is a file ``presets/<name>/<kind>-<stage>.yaml``.

    Raises:
        DeltacacheError: there is no such preset.
    """
    found = [
        path.stem.removeprefix(f"{kind}-")
        for path in PRESETS.glob(f"*/{kind}-*.yaml")
        if path.parent.name == name
    ]
    if not found:
        raise DeltacacheError(
            f"{name!r} is not a preset of a {kind}: give one of {', '.join(preset_names(kind))}, or a YAML file"
        )
    known = {stage: place for place, stage in enumerate(_ORDERED)}
    return sorted(found, key=lambda stage: (known.get(stage, len(known)), stage))


def tokenizer_preset(name: str, stage: str | None = None) -> TokenizerConfig:
    """A stage (``None``: the first) of a preset, such as ``released`` (method section 2); or a YAML file."""
    return load_config(_stage_file("tokenizer", name, stage), TokenizerConfig)


def world_preset(name: str, stage: str | None = None) -> WorldConfig:
    """A stage (``None``: the first) of a preset, such as ``released`` (method section 2); or a YAML file."""
    return load_config(_stage_file("world", name, stage), WorldConfig)


def _stage_file(kind: Stage, name: str, stage: str | None) -> Path:
    if name.endswith((".yaml", ".yml")):
        if stage is not None:
            raise DeltacacheError(f"{name} has only one stage: leave stage {stage!r} out")
        return Path(name)
    stages = preset_stages(kind, name)
    stage = stages[0] if stage is None else stage
    if stage not in stages:
        raise DeltacacheError(
            f"stage {stage!r} is not one of the {kind} preset {name!r}: give one of {', '.join(stages)}"
        )
    return PRESETS / name / f"{kind}-{stage}.yaml"


def config_yaml(config: Frozen) -> str:
    """A config as YAML, in the order of its fields."""
    return yaml.safe_dump(_cleaned(config.model_dump(mode="json")), sort_keys=False)


def _cleaned(value: Any) -> Any:
    """Without the credentials of urls: whoever runs it again gives them again."""
    if isinstance(value, dict):
        return {name: _cleaned(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_cleaned(each) for each in value]
    return without_secrets(value) if isinstance(value, str) and "://" in value else value


def save_config(config: Frozen, path: Path) -> None:
    """Write the resolved config beside an output, as YAML."""
    path.write_text(config_yaml(config))


# ----------------------------------------------------------------------------------------------------
# Configs of ``train-head``: linear heads of the benchmarks, and the RGB decoder.
# ----------------------------------------------------------------------------------------------------


HeadPreset = Literal["released", "tiny"]


class FramesConfig(Frozen):
    """Which frames, and how they are seen."""

    image_size: Annotated[int, Flag(default="512")] = Field(
        default=512, ge=16, description="Shorter side in pixels, and side of the square crops."
    )
    split: Annotated[Literal["train", "val"], Flag(default="train")] = Field(
        default="train", description="Frames to train on; val are the scored frames, for trials only."
    )
    flip: Annotated[float, Flag()] = Field(
        default=0.5, ge=0, le=1, description="Share of frames that are mirrored."
    )
    precision: Precision = Field(default="float32", description="of the backbone")


class HeadConfig(Frozen):
    """A linear head; its class count and task follow from the benchmark."""

    benchmark: BenchmarkName | None = Field(default=None, description="set by the command")
    training: TrainingConfig
    frames: FramesConfig = FramesConfig()
    gradient_loss: float = Field(
        default=0.5, ge=0, description="weight beside the scale-invariant loss of depth"
    )
    rmse_loss: float = Field(default=0.0, ge=0, description="weight of depth's error in metres beside both")


class RgbModelConfig(Frozen):
    """RAE's decoder; width, patch and image size follow from the backbone and the frames."""

    width: int = 1152
    layers: int = 28
    num_heads: int = 16
    mlp_width: int = 4096


class RgbConfig(Frozen):
    """The RGB decoder."""

    model: RgbModelConfig
    training: TrainingConfig
    frames: FramesConfig = FramesConfig()
    gradient_loss: float = Field(default=1.0, ge=0, description="weight beside L1")


def head_preset(benchmark: BenchmarkName, name: HeadPreset) -> HeadConfig:
    """``released`` (DINOv3's probes) or ``tiny`` (a minute on a CPU) for a benchmark."""
    config = load_config(PRESETS / name / f"head-{BENCHMARK_TASK[benchmark]}.yaml", HeadConfig)
    return config.model_copy(update={"benchmark": benchmark})


def rgb_preset(name: HeadPreset) -> RgbConfig:
    """``released`` (RAE's ViT-XL) or ``tiny`` (minutes on a CPU)."""
    return load_config(PRESETS / name / "head-rgb.yaml", RgbConfig)
