"""Checkpoints of a run: written aside, flushed, renamed, so that ``step-XXXXXXXX`` is always complete."""

import json
import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor

from deltacache.models.checkpoints import CONFIG_FILE, Kind, LoadedModel, SavedModel, save_weights
from deltacache.models.deltatok import DeltaTok
from deltacache.models.heads import DepthHead, SegmentationHead
from deltacache.models.rgb_decoder import RgbDecoder
from deltacache.models.world_model import WorldModel
from deltacache.pipeline.storage.errors import readable_errors
from deltacache.pipeline.storage.files import crc32c_of_file, remove, sync, temporary_path
from deltacache.schemas.errors import CheckpointError, MismatchError

STATE_FILE = "training_state.pt"
BEST = "best"
"""Beside ``checkpoints``: a link to the one with the lowest validation loss."""
STATE_FORMAT = 1
_FINISHED = re.compile(r"step-\d{8,}")
ModelT = TypeVar("ModelT", bound=SavedModel)


@dataclass(frozen=True, slots=True)
class TrainingState:
    """What a checkpoint holds: the model's weights and arguments, and the optimizer's ``state_dict``."""

    weights: Mapping[str, Tensor]
    arguments: Mapping[str, Any]
    optimizer: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Resumed(Generic[ModelT]):
    """A checkpoint read back: ``step`` optimizer steps are done."""

    folder: Path
    step: int
    model: ModelT
    metadata: Mapping[str, Any]
    optimizer_state: dict[str, Any]


def finished_checkpoints(out: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in (out / "checkpoints").glob("step-*") if _FINISHED.fullmatch(path.name)]
    return sorted(found, key=steps_of)


def steps_of(checkpoint: Path) -> int:
    """How many steps a ``step-*`` folder is after."""
    return int(checkpoint.name.removeprefix("step-"))


def checkpoint_folder(out: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` steps is."""
    return out / "checkpoints" / f"step-{step:08d}"


def save_checkpoint(out: Path, kind: Kind, saved: TrainingState, metadata: Mapping[str, Any]) -> Path:
    """Write ``checkpoints/step-<metadata["step"]>``; it appears under its name only when complete.

    Raises:
        StorageError: the disk is full, or refuses for another reason.
    """
    with readable_errors(out), _system_errors():
        return _save(out, kind, saved, metadata)


def _save(out: Path, kind: Kind, saved: TrainingState, metadata: Mapping[str, Any]) -> Path:
    final = checkpoint_folder(out, metadata["step"])
    new = temporary_path(final)
    new.mkdir()
    state = {"format_version": STATE_FORMAT, "step": metadata["step"], "optimizer": saved.optimizer}
    with (new / STATE_FILE).open("wb") as file:
        torch.save(state, file)
    checksum = crc32c_of_file(new / STATE_FILE)
    metadata = {**metadata, "training_state_crc32c": checksum}
    save_weights(new, saved.weights, saved.arguments, kind, metadata)
    for part in new.iterdir():
        sync(part)
    sync(new)
    new.rename(final)
    sync(final.parent)
    return final


@contextmanager
def _system_errors() -> Iterator[None]:
    """Raise what the system said, not what PyTorch and safetensors make of it."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    except SafetensorError as error:
        if code := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
        raise


def link_best(out: Path, step: int) -> None:
    """Let ``OUT/best`` be the checkpoint after ``step`` steps; at no time is it half a checkpoint."""
    link, target = out / BEST, checkpoint_folder(out, step).relative_to(out)
    if not (out / target).exists():  # a checkpoint that is gone on from lies before one that was deleted
        link.unlink(missing_ok=True)
        return
    if link.is_symlink() and link.readlink() == target:
        return
    new = temporary_path(link)
    new.symlink_to(target)
    new.replace(link)
    sync(out)


def delete_old(out: Path, keep: int, best: int | None = None) -> None:
    """Keep the newest ``keep`` checkpoints, and the one after ``best`` steps.

    A crash here leaves no folder that looks complete and is not.
    """
    for path in finished_checkpoints(out)[:-keep]:
        if steps_of(path) == best:
            continue
        doomed = temporary_path(path)
        path.rename(doomed)
        remove(doomed)


def load_newest(out: Path, kind: Kind, load: Callable[[Path], LoadedModel[ModelT]]) -> Resumed[ModelT] | None:
    """Read the newest checkpoint, which must be of ``kind``; ``None`` if there is none.

    Raises:
        MismatchError: it is of the other kind.
        CheckpointError: it is damaged; says which one it is and what to do. Older ones are not taken
            silently, since that would repeat and overwrite finished work.
    """
    finished = finished_checkpoints(out)
    if not finished:
        return None
    newest = finished[-1]
    try:
        try:
            found = json.loads((newest / CONFIG_FILE).read_bytes())["kind"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{newest / CONFIG_FILE} cannot be read: {error!r}") from error
        if found != kind:
            raise MismatchError(f"{newest} is of a {found}, not of a {kind}: choose another output folder")
        return read_checkpoint(newest, load)
    except CheckpointError as error:
        before = finished[-2].name if len(finished) > 1 else "none, so that training starts again"
        raise CheckpointError(
            f"{newest} is damaged and cannot be resumed: {error}. Delete that folder to go on from the one "
            f"before it (the previous is {before})"
        ) from error


def read_checkpoint(folder: Path, load: Callable[[Path], LoadedModel[ModelT]]) -> Resumed[ModelT]:
    """Read a ``step-*`` folder with its training state.

    Raises:
        CheckpointError: a part is missing or damaged.
    """
    loaded = load(folder)
    path = folder / STATE_FILE
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    # PyTorch's reader does not check the checksums of its own zip format
    if crc32c_of_file(path) != loaded.metadata.get("training_state_crc32c"):
        raise CheckpointError(f"the checksum of {path} differs from the one in config.json")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if state["format_version"] != STATE_FORMAT:
        raise CheckpointError(f"{path} has format {state['format_version']}, this code reads {STATE_FORMAT}")
    return Resumed(folder, state["step"], loaded.model, loaded.metadata, state["optimizer"])


# ----------------------------------------------------------------------------------------------------
# What the loop can train.
# ----------------------------------------------------------------------------------------------------


TrainedModel = DeltaTok | WorldModel | SegmentationHead | DepthHead | RgbDecoder
