"""What an evaluation is asked to do; saved as ``config.yaml`` beside its tables."""

from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from upath import UPath

from deltacache.schemas.datasets import Frozen
from deltacache.schemas.errors import DeltacacheError


class ClipEvaluation(Frozen):
    """Feature-space metrics on a feature dataset, without labels."""

    out: Path
    features: str = Field(description="a feature dataset: a folder, or a url in an object store")
    dataset: str = Field(default="clips", min_length=1, description="name in the tables")
    tokenizer: Path | None = None
    worlds: tuple[Path, ...] = ()
    context: int = Field(default=4, ge=1, description="frames that are seen")
    horizons: tuple[int, ...] = Field(default=(1, 3), min_length=1, description="frames after the context")
    samples: int = Field(default=20, ge=1, description="roll-outs of a world model with a noise query")
    seed: int = Field(default=0, ge=0)
    futures: Path | None = Field(default=None, description="CSV or Parquet: video_uri, scene, outcome")
    examples: int = Field(default=4, ge=0, le=32, description="sequences kept for the report's pictures")
    device: str = "auto"

    @field_validator("features", mode="before")
    @classmethod
    def _features_as_text(cls, features: Any) -> Any:
        return str(features) if isinstance(features, Path | UPath) else features

    @field_validator("horizons")
    @classmethod
    def _horizons_in_order(cls, horizons: tuple[int, ...]) -> tuple[int, ...]:
        if min(horizons) < 1:
            raise ValueError(f"horizon {min(horizons)} is not after the context: give numbers from 1 up")
        return tuple(sorted(set(horizons)))

    @model_validator(mode="after")
    def _models_that_need_each_other(self) -> Self:
        if self.worlds and self.tokenizer is None:
            raise ValueError("a world model predicts delta tokens: give the tokenizer they were made with")
        if self.futures is not None and not self.worlds:
            raise ValueError("futures say which outcomes a world model should reach: give a world model")
        return self

    @property
    def frames(self) -> int:
        """Frames that a sequence needs: the context and the longest horizon."""
        return self.context + max(self.horizons)


def clip_evaluation(**fields: Any) -> ClipEvaluation:
    """Build the settings; what is refused becomes one readable message.

    Raises:
        DeltacacheError: a value is out of range or two values do not go together.
    """
    try:
        return ClipEvaluation.model_validate(fields)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, each['loc'])) or 'settings'}: {each['msg'].removeprefix('Value error, ')}"
            + (f" (got {each['input']!r})" if each["loc"] else "")
            for each in error.errors()
        )
        raise DeltacacheError(f"this evaluation cannot be made: {problems}") from error
