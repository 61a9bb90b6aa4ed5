"""What a stage takes from the stage before it: weights alone, or everything (method section 2)."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from deltacache.models.checkpoints import CONFIG_FILE, LoadedModel
from deltacache.models.deltatok import DeltaTok
from deltacache.models.world_model import WorldModel
from deltacache.schemas.errors import CheckpointError, DeltacacheError, MismatchError
from deltacache.train.checkpoints import finished_checkpoints, read_checkpoint

Start = Literal["random", "weights", "everything"]
ModelT = TypeVar("ModelT", DeltaTok, WorldModel)

_FREE_ARGUMENTS = frozenset({"rope_rescale", "layer_scale_init", "noise_std"})
"""Arguments that may differ from those of the stage before: they concern training, not what weights mean."""
_COMPARED = ("architecture", "backbone_sha256", "hidden_size", "tokenizer_fingerprint")


@dataclass(frozen=True)
class StageBefore(Generic[ModelT]):
    """What to begin with: ``model`` has the weights; the rest is as for a resumed run."""

    model: ModelT
    step: int
    optimizer_state: dict[str, Any] | None
    record: Mapping[str, Any]


def check_start(start: Start, start_from: Path | None) -> None:
    """Refuse a stage that needs another without it, and the other way round.

    Raises:
        DeltacacheError: says which flag is missing.
    """
    if start == "random" and start_from is not None:
        raise DeltacacheError(
            f"training.start is random, but {start_from} is given to start from: "
            "give --init-from (weights alone) or --continue-from (everything)"
        )
    if start != "random" and start_from is None:
        flag = "--init-from" if start == "weights" else "--continue-from"
        raise DeltacacheError(
            f"this stage starts with {start} of the stage before it (training.start): give {flag} PATH, the "
            "output of that stage"
        )


def read_stage_before(
    start: Start,
    path: Path,
    model: ModelT,
    load: Callable[..., LoadedModel[ModelT]],
    metadata: Mapping[str, Any],
) -> StageBefore[ModelT]:
    """Fill ``model``, made for this stage, with the weights of the stage at ``path``.

    ``start`` "weights" takes a checkpoint, a training output or a released file; "everything" needs
    the training state of one of our own. ``metadata`` is what this run would write into a checkpoint.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
        MismatchError: it is of another architecture, backbone or tokenizer; names what differs.
    """
    if start == "weights":
        loaded, step, optimizer_state = _load_weights(path, model, load), 0, None
    else:
        folder = newest_step(path)
        resumed = read_checkpoint(folder, load)
        loaded = LoadedModel(resumed.model, resumed.metadata["fingerprint"], resumed.metadata)
        step, optimizer_state = resumed.step, resumed.optimizer_state
    _check_belongs(path, model, loaded, metadata)
    model.load_state_dict(loaded.model.state_dict())
    record = {"start": start, "fingerprint": loaded.fingerprint, "step": loaded.metadata.get("step")}
    return StageBefore(model, step, optimizer_state, record)


def newest_step(path: Path) -> Path:
    """``path`` if it is a ``step-*`` folder, or the newest one of the training output at ``path``.

    Raises:
        CheckpointError: there is none.
    """
    if (path / CONFIG_FILE).is_file():
        return path
    steps = finished_checkpoints(path)
    if not steps:
        raise CheckpointError(
            f"{path} holds no checkpoint with its training state: give the output of the stage before, "
            "or --init-from for its weights alone"
        )
    return steps[-1]


def fingerprint_at(path: Path) -> str | None:
    """The fingerprint of the checkpoint at ``path`` as its config.json says; ``None`` if there is no such file."""
    steps = finished_checkpoints(path)
    file = (steps[-1] if steps else path) / CONFIG_FILE
    return json.loads(file.read_bytes()).get("fingerprint") if file.is_file() else None


def check_same_start(resumed: Mapping[str, Any], start_from: Path | None) -> None:
    """Refuse to go on with a run that was started from another checkpoint than the one given now."""
    before = (resumed.get("started_from") or {}).get("fingerprint")
    now = None if start_from is None else fingerprint_at(start_from)
    if now is not None and before != now:
        raise MismatchError(
            f"this run was started from a checkpoint with fingerprint {before}, but {start_from} has {now}: "
            "--resume goes on with the same one; give that, or choose another output folder"
        )


def _load_weights(
    path: Path, model: DeltaTok | WorldModel, load: Callable[..., LoadedModel[ModelT]]
) -> LoadedModel[ModelT]:
    own = path.is_dir() and ((path / CONFIG_FILE).is_file() or bool(finished_checkpoints(path)))
    if own:
        return load(path)
    settled = {name: value for name, value in model.arguments.items() if name != "hidden_size"}
    return load(path, settled)  # a released file does not say how many heads it has


def _check_belongs(
    path: Path, model: DeltaTok | WorldModel, loaded: LoadedModel[Any], metadata: Mapping[str, Any]
) -> None:
    before, now = loaded.model.arguments, model.arguments
    different = [
        f"{name} was {before.get(name)}, now {now.get(name)}"
        for name in sorted((before.keys() | now.keys()) - _FREE_ARGUMENTS)
        if before.get(name) != now.get(name)
    ]
    different += [
        f"{name} was {loaded.metadata[name]}, now {metadata[name]}"
        for name in _COMPARED
        if name in loaded.metadata and name in metadata and loaded.metadata[name] != metadata[name]
    ]
    if "backbone_sha256" in loaded.metadata:  # these are left out where they are not used
        different += [
            f"{name} was {loaded.metadata.get(name)}, now {metadata.get(name)}"
            for name in ("layers", "pca_fingerprint")
            if loaded.metadata.get(name) != metadata.get(name)
        ]
    if different:
        raise MismatchError(
            f"{path} does not belong to this stage ({'; '.join(dict.fromkeys(different))}): a stage goes on with the "
            "same model on tokens of the same kind; change the config or give another checkpoint"
        )
