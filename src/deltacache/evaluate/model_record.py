"""``models.json`` of an evaluation: fingerprints of what gave its numbers and pictures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from deltacache.evaluate.output import MODELS
from deltacache.pipeline.storage.atomic import replacing
from deltacache.schemas.benchmarks import BenchmarkName, Task
from deltacache.schemas.datasets import Frozen
from deltacache.schemas.errors import DatasetError
from deltacache.schemas.refusals import problems_of

HeadName = BenchmarkName | Task


class ModelRecord(Frozen):
    """Fingerprints of all models that took part.

    Attributes:
        backbone: SHA-256 of its weights.
        pca: what reduces the backbone's features.
        tokenizer: the main one; it, ``more_tokenizers`` and ``worlds`` are in the order of the settings.
        heads: by benchmark; of whole frames by task.
        heads_trained_on: what the training wrote into the head, such as ``benchmark``, ``split`` and ``frames``;
            released heads say nothing.
        rgb_decoder: that of the pictures; it takes part in no number.
    """

    backbone: str
    pca: str | None = None
    tokenizer: str | None
    more_tokenizers: tuple[str, ...] = ()
    worlds: tuple[str, ...]
    heads: Mapping[HeadName, str] = {}
    heads_trained_on: Mapping[HeadName, Mapping[str, Any]] = {}
    rgb_decoder: str | None = None

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """All of them, the main one first."""
        return (*(() if self.tokenizer is None else (self.tokenizer,)), *self.more_tokenizers)

    def head_text(self, name: HeadName) -> str:
        """A head's fingerprint and training data in words."""
        split = self.heads_trained_on.get(name, {}).get("split")
        return self.heads[name] + (f", trained on the {split} split" if split else "")


def said_of_training(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    """``trained_on`` of a head's checkpoint; nothing in a released one."""
    said = metadata.get("trained_on")
    return said if isinstance(said, Mapping) else {}


def write_models(out: Path, record: ModelRecord) -> None:
    """Keep ``record`` beside the tables."""
    with replacing(out / MODELS) as temporary:
        temporary.write_text(record.model_dump_json(indent=2) + "\n")


def read_models(out: Path) -> ModelRecord | None:
    """What was kept; None in an older evaluation.

    Raises:
        DatasetError: it is damaged.
    """
    path = out / MODELS
    if not path.exists():
        return None
    try:
        return ModelRecord.model_validate_json(path.read_bytes())
    except ValidationError as error:
        problems = problems_of(error, ModelRecord)
        raise DatasetError(f"{path} is damaged ({problems}): run evaluate again into a new folder") from error
