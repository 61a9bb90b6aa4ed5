"""What every trainer does before the loop: data checks, output folder, what it goes on from, seeded weights."""

import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch

from deltacache import __version__
from deltacache.models.checkpoints import CONFIG_FILE, Kind, LoadedModel, SavedModel
from deltacache.models.deltatok import DeltaTok
from deltacache.models.devices import shapes_only
from deltacache.models.world_model import WorldModel
from deltacache.pipeline.storage.files import is_temporary, remove_leftovers, replacing
from deltacache.pipeline.storage.locking import LOCK_FILE, dataset_lock
from deltacache.pipeline.storage.storage import AnyPath
from deltacache.schemas.configs import (
    DataChoice,
    HeadConfig,
    RgbConfig,
    TokenizerConfig,
    TrainingConfig,
    WorldConfig,
    WorldModelConfig,
    save_config,
)
from deltacache.schemas.errors import CheckpointError, DeltacacheError, MismatchError, SettingsError
from deltacache.schemas.foresight import ForesightHeadConfig
from deltacache.schemas.hub import origin_of, origins
from deltacache.schemas.jobs import DataPart
from deltacache.schemas.progress import Reporter
from deltacache.schemas.texts import counted
from deltacache.train.checkpoints import (
    BEST,
    Resumed,
    checkpoint_folder,
    finished_checkpoints,
    load_newest,
    read_checkpoint,
    steps_of,
)
from deltacache.train.loop import Run, split_of
from deltacache.train.mixture import (
    ChosenClips,
    Clips,
    choose_clips,
    clips_record,
    describe_clips,
    ids_of,
    mixture_of,
    require_alike,
)
from deltacache.train.optimizer import warmup_cosine
from deltacache.train.order import seed_of
from deltacache.train.validation import BestSoFar, Validation, Validator
from deltacache.train.workers.group import ProcessGroup, SingleProcess

# ----------------------------------------------------------------------------------------------------
# The output folder of a run: whose it is, and whether a run may start or go on in it.
# ----------------------------------------------------------------------------------------------------


_SCHEDULE = ("warmup_steps", "decay_steps")
FREE_ON_RESUME = frozenset(
    f"training.{name}"
    for name in (
        *("steps", "save_every", "log_every", "keep", "probe_every", "probe_clips"),
        *("wandb", "trackers", "project", "run_name"),
        *("batch_size", "accumulation"),  # their product with the number of workers must stay
        *_SCHEDULE,  # the rates of the steps that are done must stay
    )
) | {"data.validate_every", "data.patience"}
"""What may change between a run and its continuation: none of these changes what a step has computed."""
_BEFORE_THERE_WAS = {
    "training.precision": "auto",
    "selection": "auto",
    "rollout_steps": 1,
    "context_noise": 0.0,
    "model.objective": "best_of_many",
    "model.flow_layers": WorldModelConfig().flow_layers,
    "model.flow_steps": WorldModelConfig().flow_steps,
    "data.split_seed": DataChoice().split_seed,
    "data.validate_clips": DataChoice().validate_clips,
}
"""What runs of older versions did, whose configs do not say it."""

NOTHING_DONE = -1
"""In place of a step: there is no checkpoint."""
STORAGE_LAG_S = 60.0
RAY_FOLDER = ".ray-train"
"""Ray Train's own notes, while several workers train."""
_OURS = frozenset(
    {"checkpoints", "config.yaml", "curves.parquet", "curves.png", "tensorboard", "wandb", "mlflow.db", BEST}
)
SavedModelT = TypeVar("SavedModelT", bound=SavedModel)


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
    load: Callable[[Path], LoadedModel[SavedModelT]],
    metadata: Mapping[str, Any],
    *,
    resume: bool,
    dry_run: bool = False,
) -> Resumed[SavedModelT] | None:
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
    out: Path, load: Callable[[Path], LoadedModel[SavedModelT]], metadata: Mapping[str, Any], step: int
) -> Resumed[SavedModelT] | None:
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
            "or empty folder, or that of a run to continue; choose another one"
        )


def check_same_settings(folder: Path, before: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Refuse settings that would make another model than those that the checkpoint in ``folder`` was trained with.

    Args:
        before, metadata: what the checkpoint's ``config.json`` says, and what it would say now, at least ``config`` and
            ``effective_batch``.

    Raises:
        MismatchError: the first that differs.
    """
    now = flatten(metadata["config"])
    was = {name: value for name, value in _BEFORE_THERE_WAS.items() if name in now}
    was |= flatten(before["config"])
    changed = [
        f"{name} was {was.get(name)}, now {now.get(name)}"
        for name in sorted((was.keys() | now.keys()) - FREE_ON_RESUME)
        if was.get(name) != now.get(name)
    ]
    if changed:
        raise MismatchError(
            f"{folder} was trained with another config ({'; '.join(changed)}): --resume continues with "
            "the same config; restore these settings or choose another output folder"
        )
    _check_same_rates(folder, before, metadata)
    batch_before, batch_now = before.get("effective_batch"), metadata["effective_batch"]
    if batch_before != batch_now:
        raise MismatchError(
            f"{folder} was trained with an effective batch of {batch_before}, now it is {batch_now}: batch x "
            "accumulation x workers must stay the same; change --batch-size or --accumulation so that it does"
        )


def _check_same_run(resumed: Resumed[SavedModelT], metadata: Mapping[str, Any]) -> None:
    check_same_settings(resumed.folder, resumed.metadata, metadata)
    compared = metadata.keys() & resumed.metadata.keys() - {
        "config",
        "code_version",
        "effective_batch",
        "validation",  # how it stood
        "dataset_names",  # their content is compared
        "backbone",  # its id; the weights are compared
        "sources",  # where things came from; what they hold is compared
    }
    for name in sorted(compared):
        if metadata[name] != resumed.metadata[name]:
            raise MismatchError(
                f"{resumed.folder} was trained on other data ({name} was {resumed.metadata[name]}, now "
                f"{metadata[name]}): --resume continues with the same data; give those or choose "
                "another output folder"
            )


def _check_same_rates(folder: Path, resumed: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Refuse a schedule by which the steps that are done would have had other rates."""
    before, now = resumed["config"]["training"], metadata["config"]["training"]
    if all(before.get(name) == now.get(name) for name in _SCHEDULE):
        return
    begun = resumed.get("started_from") or {}
    first = begun["step"] if begun.get("start") == "everything" else 0

    def rate(training: Mapping[str, Any], step: int) -> float:
        return warmup_cosine(
            step, now["learning_rate"], training["warmup_steps"], training.get("decay_steps")
        )

    other = next((s for s in range(first, steps_of(folder)) if rate(before, s) != rate(now, s)), None)
    if other is not None:
        was, is_now = (", ".join(f"{name} {each.get(name)}" for name in _SCHEDULE) for each in (before, now))
        raise MismatchError(
            f"{folder} was trained with {was}, now they are {is_now}: step {other} had another rate than this "
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
                f"{out} has {counted(done, 'step', form=',')}, and its rate goes down to 0 at step "
                f"{decay:,}: further steps up to "
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


# ----------------------------------------------------------------------------------------------------
# What a stage takes from the stage before it: weights alone, or everything (method section 2).
# ----------------------------------------------------------------------------------------------------


Start = Literal["random", "weights", "everything"]
ModelT = TypeVar("ModelT", DeltaTok, WorldModel)

_FREE_ARGUMENTS = frozenset({"rope_rescale", "layer_scale_init", "noise_std", "objective", "flow_steps"})
"""Arguments that may differ from those of the stage before: they concern training, not what weights mean."""
_COMPARED = ("architecture", "backbone_sha256", "hidden_size", "tokenizer_fingerprint")


@dataclass(frozen=True)
class StageBefore(Generic[SavedModelT]):
    """What to begin with: ``model`` has the weights; the rest is as for a resumed run."""

    model: SavedModelT
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
    if source := origin_of(path):
        record["source"] = source
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
            "--resume continues with the same one; give that, or choose another output folder"
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
            f"{path} does not belong to this stage ({'; '.join(dict.fromkeys(different))}): a stage continues with the "
            "same model on tokens of the same kind; change the config or give another checkpoint"
        )


ConfigT = TypeVar("ConfigT", TokenizerConfig, WorldConfig)


@dataclass(frozen=True, slots=True)
class TrainingRequest(Generic[ConfigT]):
    """What a trainer is asked for; the same for all workers.

    Attributes:
        data: the dataset's root, or several with their weights.
        resume: go on from the newest checkpoint in ``out``, if there is one.
        start_from: output of the stage before, of which ``config.training.start`` says what is taken.
        hint: how a user goes on after SIGTERM.
        dry_run: say what the training would take, and write nothing.
        validation: root of the dataset for the validation loss; without it, what the config's split holds out.
    """

    data: AnyPath | str | tuple[DataPart, ...]
    out: Path
    config: ConfigT
    resume: bool
    device: str
    start_from: Path | None = None
    hint: str = "run the same command with --resume to continue"
    dry_run: bool = False
    validation: str | None = None

    @property
    def parts(self) -> tuple[DataPart, ...]:
        """The datasets: one, or those of a mixture."""
        return self.data if isinstance(self.data, tuple) else (DataPart(path=str(self.data)),)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A training whose inputs are checked and whose output folder is claimed.

    Attributes:
        first_step: how many steps are done.
        train: does the others and returns the last checkpoint.
    """

    first_step: int
    train: Callable[[], Path]


@dataclass(frozen=True, slots=True)
class TrainingClips:
    """What is trained on, and what the validation loss is computed on, if anything."""

    train: Clips
    validation: Clips | None


def open_inputs(request: TrainingRequest[Any], kind: Literal["features", "deltas"]) -> TrainingClips:
    """Open the datasets of a training; see ``choose_clips`` and ``open_validation`` for what is refused."""
    choice = request.config.data
    train = choose_clips(request.parts, kind, choice)
    if request.validation is not None and choice.split is not None:
        raise SettingsError(
            "--split holds out videos for the validation loss, and --validate names a dataset for it: give one of both"
        )
    if request.validation is not None:
        given = choose_clips([DataPart(path=request.validation)], kind, DataChoice())
        require_alike([*(train.datasets if isinstance(train, ChosenClips) else [train]), given], grids=True)
        return TrainingClips(train, given)
    if choice.split is not None:
        return TrainingClips(train, choose_clips(request.parts, kind, choice, held_out=True))
    if choice.patience is not None:
        raise SettingsError(
            "--patience stops when the validation loss no longer falls, and there is none: give --validate or --split"
        )
    return TrainingClips(train, None)


def describe_data(clips: TrainingClips) -> Iterator[str]:
    """Lines about a mixture, a filter or a split, and about what is validated on; none for one whole dataset."""
    yield from describe_clips(clips.train)
    if clips.validation is None:
        return
    yield f"validated on {counted(len(clips.validation), 'clip', form=',')} of {clips.validation.root}"
    if isinstance(clips.validation, ChosenClips):  # what a split holds out
        return
    videos = {clip_id.rpartition("-v")[0] for clip_id in ids_of(clips.validation)}
    if both := videos.intersection(clip_id.rpartition("-v")[0] for clip_id in ids_of(clips.train)):
        yield (
            f"{len(both):,} of the {counted(len(videos), 'video', form=',')} of {clips.validation.root} are trained on "
            "too: the validation loss is not one of new videos"
        )


def check_fits(dataset: Clips, build: Callable[[], DeltaTok | WorldModel]) -> None:
    """Refuse tokens that the config's model cannot take, before anything is written.

    Raises:
        MismatchError: the width does not split into the config's heads, or the model takes other arguments.
    """
    try:
        with shapes_only():
            build()
    except ValueError as error:
        raise MismatchError(
            f"{dataset.root} holds {dataset.card.hidden_size}-wide tokens, which the config's model cannot take "
            f"({error}): give --heads or choose another preset"
        ) from error
    except TypeError as error:
        raise MismatchError(f"model.options of the config do not fit its architecture: {error}") from error


TrainerConfig = TokenizerConfig | WorldConfig | HeadConfig | RgbConfig | ForesightHeadConfig


@dataclass(frozen=True)
class OpenedRun(Generic[SavedModelT]):
    """The output folder of a training, claimed, and what the training begins with there; the same for all trainers.

    Attributes:
        metadata: what ``config.json`` of its checkpoints says, except for the step.
        resumed: what is gone on from, with ``--resume``.
        before: the stage before, in a run that starts from one.
    """

    out: Path
    config: TrainerConfig
    metadata: Mapping[str, Any]
    resumed: Resumed[SavedModelT] | None
    before: StageBefore[SavedModelT] | None = None
    group: ProcessGroup = field(default_factory=SingleProcess)
    dry_run: bool = False

    @property
    def finished(self) -> Path | None:
        """The newest checkpoint if it has all the steps already."""
        if self.resumed is None or self.resumed.step < self.config.training.steps:
            return None
        return self.resumed.folder

    @property
    def first_step(self) -> int:
        """How many steps are done."""
        begun = self.resumed or self.before
        return 0 if begun is None else begun.step

    @property
    def effective_batch(self) -> int:
        """Samples of a step, over all passes and workers."""
        return self.metadata["effective_batch"]

    def model(self, build: Callable[[], SavedModelT]) -> SavedModelT:
        """The resumed model, that of the stage before, or a new one."""
        if self.resumed is not None:
            return self.resumed.model
        return seeded(build, self.config.training.seed) if self.before is None else self.before.model

    def begin(
        self,
        reporter: Reporter,
        hint: str | None = None,
        *,
        data: "TrainingClips | None" = None,
        model: DeltaTok | WorldModel | None = None,
        device: torch.device | None = None,
    ) -> Run:
        """What the loop needs; the resolved config is saved beside what follows.

        Args:
            data: of a tokenizer or world model: says what it is, and validates ``model`` on ``device`` if it can.
        """
        if self.group.rank == 0 and not self.dry_run:
            with replacing(self.out / "config.yaml") as temporary:
                save_config(self.config, temporary)
        begun = self.resumed or self.before
        validation = None
        if data is not None and isinstance(self.config, TokenizerConfig | WorldConfig):
            for line in describe_data(data) if self.group.rank == 0 else ():
                reporter.line(
                    f"train {'world' if isinstance(self.config, WorldConfig) else 'tokenizer'}: {line}"
                )
            if data.validation is not None:
                assert model is not None  # that of the task
                assert device is not None
                choice, known = (
                    self.config.data,
                    (self.resumed.metadata if self.resumed else {}).get("validation"),
                )
                measure = Validator(
                    model, data.validation, choice.validate_clips, device, self.config.training
                )
                standing = BestSoFar(**known) if known else BestSoFar()
                validation = Validation(measure, choice.validate_every, choice.patience, standing)
        run = Run(
            self.out,
            self.config.training,
            self.metadata,
            reporter,
            first_step=self.first_step,
            optimizer_state=None if begun is None else begun.optimizer_state,
            samples_per_pass=None if self.resumed is None else self.resumed.metadata.get("samples_per_pass"),
            group=self.group,
            dry_run=self.dry_run,
            validation=validation,
            mixture=None if data is None else mixture_of(data.train),
        )
        return run if hint is None else replace(run, hint=hint)


def say_finished(what: str, finished: Path, steps: int, reporter: Reporter) -> Path:
    """Report that the run of checkpoint ``finished`` has all its ``steps``, or even more."""
    more = f", more than the {steps:,} asked for" if steps_of(finished) > steps else ""
    reporter.line(f"train {what}: {finished} has all its steps{more}, nothing to do")
    return finished


def nothing_to_do(kind: Kind, finished: Path, training: TrainingConfig, reporter: Reporter) -> Prepared:
    """For a run whose checkpoint ``finished`` has all its steps."""
    say_finished(kind, finished, training.steps, reporter)
    return Prepared(training.steps, lambda: finished)


def seeded(build: Callable[[], SavedModelT], seed: int) -> SavedModelT:
    """A new model, whose random weights depend on ``seed`` alone."""
    with torch.random.fork_rng(devices=[]):  # leaves the global generator as it was
        torch.default_generator.manual_seed(seed_of("weights", seed))
        return build()


def open_run(
    out: Path,
    config: TrainerConfig,
    kind: Kind,
    load: Callable[..., LoadedModel[SavedModelT]],
    metadata: Mapping[str, Any],
    *,
    resume: bool,
    dry_run: bool,
    group: ProcessGroup | None = None,
    stage_before: Callable[[Mapping[str, Any]], StageBefore[SavedModelT] | None] | None = None,
    start_from: Path | None = None,
) -> OpenedRun[SavedModelT]:
    """Claim the output folder of a training, and read what the training begins with.

    The first worker of ``group`` claims, the others look at what it left; see ``claim_output`` for what is refused.

    Args:
        metadata: what this run would write into a checkpoint, but for the effective batch.
        stage_before: reads the stage at ``start_from``, given the whole metadata; without it a run starts at random.
    """
    group = SingleProcess() if group is None else group
    metadata = {**metadata, "effective_batch": split_of(config.training, group).effective_batch}

    def opened(
        before: StageBefore[SavedModelT] | None, resumed: Resumed[SavedModelT] | None
    ) -> OpenedRun[SavedModelT]:
        whole = dict(metadata)
        if stage_before is not None:
            if resumed is not None:
                check_same_start(resumed.metadata, start_from)
            whole["started_from"] = (
                before.record if before else (resumed.metadata if resumed else {}).get("started_from")
            )
        return OpenedRun(out, config, whole, resumed, before, group, dry_run)

    def first() -> tuple[OpenedRun[SavedModelT], int]:
        goes_on = resume and finished_checkpoints(out)
        before = (
            stage_before(metadata) if stage_before and not goes_on else None
        )  # before anything is written
        resumed = claim_output(out, kind, load, metadata, resume=resume, dry_run=dry_run)
        return opened(before, resumed), NOTHING_DONE if resumed is None else resumed.step

    def others(step: int) -> OpenedRun[SavedModelT]:
        resumed = join_output(out, load, metadata, step)
        return opened(stage_before(metadata) if stage_before and resumed is None else None, resumed)

    return group.rank_zero_first(first, others)


def open_stage(
    request: TrainingRequest[Any],
    data: TrainingClips,
    kind: Kind,
    build: Callable[[], ModelT],
    load: Callable[..., LoadedModel[ModelT]],
    group: ProcessGroup,
) -> OpenedRun[ModelT]:
    """``open_run`` for a training on ``data`` that may start from the stage before it.

    See ``read_stage_before`` for what else is refused.
    """
    config, start_from = request.config, request.start_from

    def stage_before(metadata: Mapping[str, Any]) -> StageBefore[ModelT] | None:
        check_start(config.training.start, start_from)
        if start_from is None:
            return None
        new = seeded(build, config.training.seed)
        before = read_stage_before(config.training.start, start_from, new, load, metadata)
        if before.step >= config.training.steps:
            raise DeltacacheError(
                f"{start_from} has {counted(before.step, 'step')} and this stage ends at "
                f"{config.training.steps}: steps count "
                "those of the stage it continues; give a larger --steps"
            )
        return before

    return open_run(
        request.out,
        config,
        kind,
        load,
        run_metadata(data, config),
        resume=request.resume,
        dry_run=request.dry_run,
        group=group,
        stage_before=stage_before,
        start_from=start_from,
    )


def run_metadata(data: TrainingClips, config: TokenizerConfig | WorldConfig) -> dict[str, Any]:
    """What ``config.json`` of a checkpoint says about its making, except for the step."""
    dataset = data.train
    card = dataset.card
    metadata = {
        "config": config.model_dump(mode="json"),
        **clips_record(dataset),
        "backbone_sha256": card.backbone.weights_sha256,
        "patch_grid": list(card.patch_grid),
        "hidden_size": card.hidden_size,
        "image_size": card.model_dump(mode="json", include={"image_size"})["image_size"],
        "spacing_s": [card.sampling.spacing_min_s, card.sampling.spacing_max_s],
        "backbone": card.backbone.id,
        **card.backbone.choice,
        "code_version": __version__,
    }
    sources = dict(card.sources)
    if card.backbone.source:
        sources["backbone"] = card.backbone.source
    parts = dataset.datasets if isinstance(dataset, ChosenClips) else (dataset,)
    names = ["data"] if len(parts) == 1 else [f"data.{number}" for number in range(len(parts))]
    sources |= origins(**{name: part.root for name, part in zip(names, parts, strict=True)})
    if sources:
        metadata["sources"] = sources
    if card.kind == "deltas":
        metadata["tokenizer_fingerprint"] = card.tokenizer_fingerprint
    if isinstance(config, WorldConfig):
        metadata["architecture"] = config.model.architecture
    if isinstance(dataset, ChosenClips):
        metadata["dataset_names"] = [origin_of(each.root) or each.root.name for each in dataset.datasets]
    if data.validation is not None:
        metadata["validated_on"] = clips_record(data.validation)
    return metadata
