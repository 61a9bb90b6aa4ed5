"""Configs of models and training. Frozen values that check themselves; presets are YAML files of these."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, model_validator

from deltacache.schemas.arguments import Flag
from deltacache.schemas.datasets import Frozen, TrainingPrecision
from deltacache.schemas.errors import DeltacacheError
from deltacache.schemas.secrets import without_secrets
from deltacache.schemas.yaml_files import load_config

PRESETS = Path(__file__).parent / "presets"
Stage = Literal["tokenizer", "world"]
_ORDERED = ("main", "256px", "512px", "cooldown", "cooldown1", "cooldown2")
"""Stages come in this order, others behind them by name."""


class TokenizerModelConfig(Frozen):
    """DeltaTok (method section 1). ``hidden_size`` comes from the features."""

    num_heads: Annotated[int, Flag("heads")] = Field(default=12, ge=1, description="Attention heads.")
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
    num_heads: Annotated[int, Flag("heads")] = Field(default=12, ge=1, description="Attention heads.")
    num_layers: int = 12
    mlp_ratio: float = 4.0
    query: Annotated[Literal["noise", "learned"], Flag()] = Field(
        default="noise", description="Noise (best of many), or one learned query."
    )
    noise_std: float = 0.02
    layer_scale_init: float = 1e-5
    options: dict[str, Any] = Field(default={}, description="further arguments of the architecture")

    @property
    def arguments(self) -> dict[str, Any]:
        """Of the constructor, all but what comes from the dataset."""
        common = self.model_dump(exclude={"architecture", "options"})
        return {**common, **self.options}


class TrainingConfig(Frozen):
    """The loop: what both trainers share."""

    start: Literal["random", "weights", "everything"] = Field(
        default="random",
        description="what is taken from the stage before: nothing; its weights, with a fresh optimizer at step 0; "
        "or weights, optimizer and step, to go on with other rates",
    )
    steps: Annotated[int, Flag()] = Field(
        ge=1,
        description="Training steps, those of a continued run included; warm-up and decay change in proportion.",
    )
    batch_size: Annotated[int, Flag(default="the preset's, shared by workers")] = Field(
        ge=1, description="Samples of a worker's step (with --accumulation: of a pass)."
    )
    accumulation: Annotated[int | None, Flag(default="as few as fit in memory")] = Field(
        default=None, ge=1, description="Passes whose gradients make one step."
    )
    learning_rate: float = Field(gt=0)
    warmup_steps: Annotated[int, Flag(default="the preset's, in proportion to --steps")] = Field(
        default=5000, ge=0, description="Steps of the warm-up."
    )
    decay_steps: Annotated[int | None, Flag(default="the preset's, in proportion to --steps")] = Field(
        default=None,
        ge=1,
        description="Step at which a cosine after the warm-up reaches 0; without it the rate is constant.",
    )
    weight_decay: float = Field(ge=0)
    precision: Annotated[
        TrainingPrecision, Flag(default="the preset's, auto: bfloat16 on GPUs, else float32")
    ] = Field(
        default="auto",
        description="What products are computed in; bfloat16 also on CPUs that are fast in it.",
    )
    gradient_clip: float | None = Field(default=None, gt=0)
    seed: Annotated[int, Flag()] = Field(default=0, ge=0, description="All random choices follow from it.")
    save_every: Annotated[int, Flag()] = Field(default=1000, ge=1, description="Steps between checkpoints.")
    log_every: Annotated[int, Flag()] = Field(
        default=50, ge=1, description="Steps between rows of the curves."
    )
    keep: Annotated[int, Flag()] = Field(default=2, ge=1, description="Checkpoints that are kept.")
    probe_every: Annotated[int, Flag()] = Field(
        default=1000, ge=1, description="Steps between health probes; also at the end."
    )
    probe_clips: int = Field(default=64, ge=2, description="clips that the probes look at, always the same")
    wandb: Annotated[Literal["off", "offline", "online"], Flag()] = Field(
        default="off", description="Weights & Biases (pip install 'deltacache[wandb]')."
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
                f"a batch of {effective} does not split into equal parts for {workers} workers x {passes or 1} passes: "
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


class TokenizerConfig(Frozen):
    """``train-tokenizer``: a preset, after the command line's changes."""

    model: TokenizerModelConfig
    training: TrainingConfig
    loss: Literal["mse", "log_cosh"] = "log_cosh"
    black_first_fraction: Annotated[float, Flag()] = Field(
        default=0.0, ge=0, le=1, description="Share of pairs whose first frame is black."
    )


class WorldConfig(Frozen):
    """``train-world``: a preset, after the command line's changes."""

    model: WorldModelConfig
    training: TrainingConfig
    candidates: Annotated[int, Flag()] = Field(default=256, ge=1, description="K of best-of-many.")
    smooth_l1_beta: float = Field(default=0.1, gt=0)

    @model_validator(mode="after")
    def _one_candidate_without_noise(self) -> Self:
        if self.model.query == "learned" and self.candidates != 1:
            raise ValueError("a learned query has one candidate: set candidates to 1")
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
            f"{name!r} is no preset of a {kind}: give one of {', '.join(preset_names(kind))}, or a YAML file"
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
            raise DeltacacheError(f"{name} is one stage by itself: leave stage {stage!r} out")
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
