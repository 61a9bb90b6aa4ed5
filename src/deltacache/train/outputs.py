"""The output folder of a run: whose it is, and whether a run may start or go on in it."""

import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from deltacache.models.checkpoints import CONFIG_FILE, Kind, LoadedModel, SavedModel
from deltacache.pipeline.storage.atomic import is_temporary, remove_leftovers
from deltacache.pipeline.storage.locking import LOCK_FILE, dataset_lock
from deltacache.schemas.configs import TrainingConfig
from deltacache.schemas.errors import DeltacacheError, MismatchError
from deltacache.train.checkpoints import (
    Resumed,
    checkpoint_folder,
    finished_checkpoints,
    load_newest,
    read_checkpoint,
    steps_of,
)
from deltacache.train.schedules import warmup_cosine

_SCHEDULE = ("warmup_steps", "decay_steps")
FREE_ON_RESUME = frozenset(
    f"training.{name}"
    for name in (
        *("steps", "save_every", "log_every", "keep", "probe_every", "probe_clips", "wandb"),
        *("batch_size", "accumulation"),  # their product with the number of workers must stay
        *_SCHEDULE,  # the rates of the steps that are done must stay
    )
)
"""What may change between a run and its continuation: none of these changes what a step has computed."""
_BEFORE_THERE_WAS = {"training.precision": "auto"}
"""What runs of older versions did, whose configs do not say it."""

NOTHING_DONE = -1
"""In place of a step: there is no checkpoint."""
STORAGE_LAG_S = 60.0
RAY_FOLDER = ".ray-train"
"""Ray Train's own notes, while several workers train."""
_OURS = frozenset({"checkpoints", "config.yaml", "curves.parquet", "curves.png", "tensorboard", "wandb"})
ModelT = TypeVar("ModelT", bound=SavedModel)


@contextmanager
def holding_output(out: Path, command: str, *, resume: bool, dry_run: bool = False) -> Iterator[None]:
    """Hold the lock of an output folder, so that a second command that would write there is refused.

    With several workers, the command that started them holds it. A dry run takes no lock: it writes nothing.

    Raises:
        DeltacacheError: the folder may not be written (see ``check_output``), or another command writes there.
    """
    check_output(out, resume=resume)  # before a lock is put there
    if dry_run:
        yield
        return
    with dataset_lock(out, command):
        yield


def claim_output(
    out: Path,
    kind: Kind,
    load: Callable[[Path], LoadedModel[ModelT]],
    metadata: Mapping[str, Any],
    *,
    resume: bool,
    dry_run: bool = False,
) -> Resumed[ModelT] | None:
    """Make sure that ``out`` may be written, and return what to go on from (``None``: start at step 0).

    ``metadata`` is what this run would write into a checkpoint; it must agree with what is there.

    Raises:
        DeltacacheError: the folder holds something else, or checkpoints and ``resume`` is false.
        CheckpointError: the newest checkpoint is damaged.
        MismatchError: the run there was of the other trainer, or had another config or other data.
    """
    check_output(out, resume=resume)
    if not dry_run:
        (out / "checkpoints").mkdir(
            parents=True, exist_ok=True
        )  # first, so that an interrupted start is known
        for folder in (out, out / "checkpoints"):
            remove_leftovers(folder)
    resumed = load_newest(out, kind, load)
    if resumed is not None:
        _check_same_run(resumed, metadata)
    return resumed


def check_output(out: Path, *, resume: bool) -> None:
    """Refuse a folder that may not be written, without writing anything; see ``claim_output``."""
    _check_ours(out)
    if not resume and finished_checkpoints(out):
        raise DeltacacheError(
            f"{out} already holds checkpoints up to {finished_checkpoints(out)[-1].name}: "
            "add --resume or choose another folder"
        )


def join_output(
    out: Path, load: Callable[[Path], LoadedModel[ModelT]], metadata: Mapping[str, Any], step: int
) -> Resumed[ModelT] | None:
    """What the first of several workers goes on from, which is after ``step`` steps; nothing is written.

    Raises:
        DeltacacheError: this worker does not see it, also after a while: shared storage may lag behind.
    """
    wanted = out / "checkpoints" if step == NOTHING_DONE else checkpoint_folder(out, step)
    deadline = time.monotonic() + STORAGE_LAG_S
    while not wanted.is_dir():
        if time.monotonic() > deadline:
            raise DeltacacheError(
                f"{wanted} is not seen by the worker on {platform.node()}: several workers need an output folder on "
                "storage that all nodes share, at the same path"
            )
        time.sleep(0.5)
    if step == NOTHING_DONE:
        return None
    resumed = read_checkpoint(wanted, load)
    _check_same_run(resumed, metadata)
    return resumed


def _check_ours(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise DeltacacheError(f"{out} is a file: the output must be a folder; choose another one")
    entries = [path.name for path in out.iterdir()] if out.exists() else []
    names = {name for name in entries if not is_temporary(name) and name not in (RAY_FOLDER, LOCK_FILE)}
    strangers = sorted(names - _OURS)
    if strangers or (names and not (out / "checkpoints").is_dir()):
        raise DeltacacheError(
            f"{out} holds something else ({', '.join(strangers or sorted(names))}): the output must be a new "
            "or empty folder, or that of a run to go on with; choose another one"
        )


def _check_same_run(resumed: Resumed[ModelT], metadata: Mapping[str, Any]) -> None:
    before, now = {**_BEFORE_THERE_WAS, **flatten(resumed.metadata["config"])}, flatten(metadata["config"])
    changed = [
        f"{name} was {before.get(name)}, now {now.get(name)}"
        for name in sorted((before.keys() | now.keys()) - FREE_ON_RESUME)
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise MismatchError(
            f"{resumed.folder} was trained with another config ({'; '.join(changed)}): --resume goes on with "
            "the same one; put these back or choose another output folder"
        )
    _check_same_rates(resumed, metadata)
    batch_before, batch_now = resumed.metadata.get("effective_batch"), metadata["effective_batch"]
    if batch_before != batch_now:
        raise MismatchError(
            f"{resumed.folder} was trained with an effective batch of {batch_before}, now it is {batch_now}: batch x "
            "accumulation x workers must stay the same; change --batch-size or --accumulation so that it does"
        )
    compared = metadata.keys() & resumed.metadata.keys() - {
        "config",
        "code_version",
        "effective_batch",
        "backbone",  # its id; the weights are compared
    }
    for name in sorted(compared):
        if metadata[name] != resumed.metadata[name]:
            raise MismatchError(
                f"{resumed.folder} was trained on other data ({name} was {resumed.metadata[name]}, now "
                f"{metadata[name]}): --resume goes on with the same data; give those or choose "
                "another output folder"
            )


def _check_same_rates(resumed: Resumed[ModelT], metadata: Mapping[str, Any]) -> None:
    """Refuse a schedule by which the steps that are done would have had other rates."""
    before, now = resumed.metadata["config"]["training"], metadata["config"]["training"]
    if all(before.get(name) == now.get(name) for name in _SCHEDULE):
        return
    begun = resumed.metadata.get("started_from") or {}
    first = begun["step"] if begun.get("start") == "everything" else 0

    def rate(training: Mapping[str, Any], step: int) -> float:
        return warmup_cosine(
            step, now["learning_rate"], training["warmup_steps"], training.get("decay_steps")
        )

    other = next((s for s in range(first, resumed.step) if rate(before, s) != rate(now, s)), None)
    if other is not None:
        was, is_now = (", ".join(f"{name} {each.get(name)}" for name in _SCHEDULE) for each in (before, now))
        raise MismatchError(
            f"{resumed.folder} was trained with {was}, now they are {is_now}: step {other} had another rate than this "
            "schedule gives it. --resume continues a schedule: give --warmup-steps and --decay-steps (in a file "
            "training.warmup_steps and training.decay_steps) as they were, or choose another output folder"
        )


def continued_schedule(
    out: Path, training: TrainingConfig, *, warmup_given: bool, decay_given: bool
) -> TrainingConfig:
    """``training`` for ``--resume``: what is not given of the schedule stays what it was in the run at ``out``.

    Raises:
        DeltacacheError: it would go on at rate 0, for its decay has begun and ends before the steps do.
    """
    checkpoints = finished_checkpoints(out)
    try:
        before = json.loads((checkpoints[-1] / CONFIG_FILE).read_bytes())["config"]["training"]
        done, warmup, decay = steps_of(checkpoints[-1]), before["warmup_steps"], before.get("decay_steps")
    except (IndexError, OSError, ValueError, KeyError, TypeError):
        return training  # no checkpoint yet, or a damaged one: reading it says so
    changes = {} if warmup_given else {"warmup_steps": warmup}
    if not decay_given and (decay is None or done > warmup):
        if decay is not None and training.steps > decay and done < training.steps:
            raise DeltacacheError(
                f"{out} has {done:,} steps, and its rate goes down to 0 at step {decay:,}: further steps up to "
                f"{training.steps:,} would change nothing. Give --steps {decay} at most, or begin a longer run in "
                "another folder"
            )
        changes["decay_steps"] = decay
    return training.model_copy(update=changes)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
