"""Training in stages within a chain: each begins with what the one before it left (method section 2)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from deltacache.schemas.arguments import merged
from deltacache.schemas.clips import check_id
from deltacache.schemas.configs import TokenizerConfig, WorldConfig, tokenizer_preset, world_preset
from deltacache.schemas.datasets import Frozen
from deltacache.schemas.errors import DeltacacheError
from deltacache.schemas.progress import Reporter
from deltacache.train.setup import TrainingRequest
from deltacache.train.workers.launch import launch
from deltacache.train.workers.trainable import Workers

_HINT = "the chain is not finished: the same command goes on"


def _from_preset(value: Any, load: Any) -> Any:
    """``{preset: released, stage: 512px, training: {...}}`` as the whole config of that stage, so changed.

    Another number of steps keeps the shape of the schedule, as ``--steps`` does.
    """
    if not isinstance(value, Mapping) or "preset" not in value:
        return value
    changes = {name: each for name, each in value.items() if name not in ("preset", "stage")}
    try:
        config = load(value["preset"], value.get("stage"))
    except (DeltacacheError, KeyError) as error:
        raise ValueError(f"preset {value['preset']!r}: {error}") from error
    training = changes.get("training")
    steps = training.get("steps") if isinstance(training, Mapping) else None
    if isinstance(steps, int) and steps > 0:  # what else it may be, the config refuses
        config = config.model_copy(update={"training": config.training.in_steps(steps)})
    return merged(config.model_dump(mode="json"), changes)


AnyTokenizerConfig = Annotated[TokenizerConfig, BeforeValidator(lambda v: _from_preset(v, tokenizer_preset))]
AnyWorldConfig = Annotated[WorldConfig, BeforeValidator(lambda v: _from_preset(v, world_preset))]


class TokenizerStage(Frozen):
    """One stage of a tokenizer; ``image_size`` is that of its features (``None``: that of the videos)."""

    name: str
    image_size: int | None = Field(default=None, ge=16)
    config: AnyTokenizerConfig


class WorldStage(Frozen):
    """One stage of a world model."""

    name: str
    config: AnyWorldConfig


class TokenizerStages(Frozen):
    """The stages of a tokenizer; the last one's features make the delta tokens."""

    stages: tuple[TokenizerStage, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        _check_order([(stage.name, stage.config.training.start) for stage in self.stages])
        if self.stages[-1].image_size is not None:
            raise ValueError("the last stage takes the features of train_videos: leave its image_size out")
        return self


class WorldStages(Frozen):
    """The stages of one world model."""

    stages: tuple[WorldStage, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        _check_order([(stage.name, stage.config.training.start) for stage in self.stages])
        return self


def _check_order(stages: Sequence[tuple[str, str]]) -> None:
    names = [check_id(name, "stage name") for name, _ in stages]
    if len(set(names)) < len(names):
        raise ValueError(f"stages {', '.join(names)}: give each a name of its own")
    for position, (name, start) in enumerate(stages):
        if (start == "random") != (position == 0):
            raise ValueError(
                f"stage {name} has training.start {start}: the first stage is random, and each one after it "
                "starts with weights or everything of the one before"
            )


def train_stages(
    kind: Literal["tokenizer", "world"],
    stages: Sequence[TokenizerStage] | Sequence[WorldStage],
    data: Sequence[Path | str],
    folders: Sequence[Path],
    device: str,
    workers: Workers,
    reporter: Reporter,
) -> None:
    """Train each stage on its data into its folder; finished ones are skipped."""
    before = None
    for stage, root, folder in zip(stages, data, folders, strict=True):
        training = stage.config.training.shared_by(workers.count)
        config: Any = stage.config.model_copy(update={"training": training})
        request = TrainingRequest(root, folder, config, True, device, before, _HINT)
        launch(kind, request, reporter, workers)
        before = folder
