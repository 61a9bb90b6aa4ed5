"""``contexts.json``: what was exported for a generator, and what is expected back."""

from pathlib import Path

from pydantic import Field, ValidationError

from deltacache.evaluate.generators.padding import Padding, Placement
from deltacache.pipeline.storage.atomic import replacing
from deltacache.schemas.benchmarks import BenchmarkName
from deltacache.schemas.datasets import Frozen
from deltacache.schemas.errors import DatasetError
from deltacache.schemas.refusals import problems_of

MANIFEST = "contexts.json"
_FORMAT_VERSION = 1


class ContextEntry(Frozen):
    """One context: of one sequence, at one horizon.

    Attributes:
        target_frame: which frame of the generated ones is scored, from 0: the one at the labelled target.
    """

    dataset: BenchmarkName
    horizon: int = Field(ge=1)
    sequence_id: str
    context_frames: int = Field(ge=1)
    target_frame: int = Field(ge=0)
    frames_per_second: float = Field(gt=0)
    place: Placement

    @property
    def folder(self) -> Path:
        """Below the export: holds ``context``, and the samples that come back."""
        return Path(self.dataset) / f"h{self.horizon}" / self.sequence_id


class ContextManifest(Frozen):
    """All contexts of an export."""

    format_version: int = _FORMAT_VERSION
    padding: Padding
    contexts: tuple[ContextEntry, ...]


def write_manifest(root: Path, manifest: ContextManifest) -> None:
    """Written last: an export without it is not finished."""
    with replacing(root / MANIFEST) as temporary:
        temporary.write_text(manifest.model_dump_json(indent=1) + "\n")


def read_manifest(root: Path) -> ContextManifest:
    """What was exported to ``root``.

    Raises:
        DatasetError: it is missing, damaged or of another format.
    """
    path = root / MANIFEST
    try:
        manifest = ContextManifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise DatasetError(
            f"{path} is missing: predictions lie in the folder that `deltacache export-contexts` wrote, or beside a "
            "copy of its contexts.json"
        ) from None
    except OSError as error:
        raise DatasetError(f"{path} cannot be read ({error}): export the contexts again") from error
    except ValidationError as error:
        problems = problems_of(error, ContextManifest)
        raise DatasetError(f"{path} is damaged ({problems}): export the contexts again") from error
    if manifest.format_version != _FORMAT_VERSION:
        raise DatasetError(
            f"{path} has format {manifest.format_version}, this code reads {_FORMAT_VERSION}: export again"
        )
    return manifest
