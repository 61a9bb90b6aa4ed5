"""What both trainers do before the loop: device, data checks, output folder, seeded weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch

from deltacache import __version__
from deltacache.models.checkpoints import Kind, LoadedModel
from deltacache.models.deltatok import DeltaTok
from deltacache.models.world_model import WorldModel
from deltacache.pipeline.datasets.dataset import Dataset, open_dataset
from deltacache.pipeline.storage.atomic import replacing
from deltacache.pipeline.storage.storage import AnyPath
from deltacache.schemas.configs import TokenizerConfig, TrainingConfig, WorldConfig, save_config
from deltacache.schemas.errors import DatasetError, DeltacacheError, MismatchError
from deltacache.schemas.fingerprints import fingerprint_of_list
from deltacache.schemas.progress import Reporter
from deltacache.train.checkpoints import Resumed, finished_checkpoints
from deltacache.train.loop import Run, split_of
from deltacache.train.order import seed_of
from deltacache.train.outputs import NOTHING_DONE, claim_output, join_output
from deltacache.train.stages import StageBefore, check_same_start, check_start, read_stage_before
from deltacache.train.workers.group import Group

ModelT = TypeVar("ModelT", DeltaTok, WorldModel)
ConfigT = TypeVar("ConfigT", TokenizerConfig, WorldConfig)


@dataclass(frozen=True, slots=True)
class TrainingRequest(Generic[ConfigT]):
    """What a trainer is asked for; the same for all workers.

    Attributes:
        data: the dataset's root.
        resume: go on from the newest checkpoint in ``out``, if there is one.
        start_from: output of the stage before, of which ``config.training.start`` says what is taken.
        hint: how a user goes on after SIGTERM.
        dry_run: say what the training would take, and write nothing.
    """

    data: AnyPath | str
    out: Path
    config: ConfigT
    resume: bool
    device: str
    start_from: Path | None = None
    hint: str = "the same command with --resume goes on"
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class Prepared:
    """A training whose inputs are checked and whose output folder is claimed.

    Attributes:
        first_step: how many steps are done.
        train: does the others and returns the last checkpoint.
    """

    first_step: int
    train: Callable[[], Path]


def open_training_data(root: AnyPath | str, kind: Literal["features", "deltas"]) -> Dataset:
    """Open a dataset that can be trained on.

    Raises:
        DatasetError: it is not a dataset of this kind, or holds no clips.
    """
    dataset = open_dataset(root, kind)
    if len(dataset) == 0:
        raise DatasetError(
            f"{root} holds no clips: training needs at least one; {dataset.root / 'failures.parquet'} says what was "
            "refused and why, so run the command that made this dataset again with readable videos"
        )
    return dataset


def check_fits(dataset: Dataset, build: Callable[[], DeltaTok | WorldModel]) -> None:
    """Refuse tokens that the config's model cannot take, before anything is written.

    Raises:
        MismatchError: the width does not split into the config's heads, or the model takes other arguments.
    """
    try:
        with torch.device("meta"):  # shapes only
            build()
    except ValueError as error:
        raise MismatchError(
            f"{dataset.root} holds {dataset.card.hidden_size}-wide tokens, which the config's model cannot take "
            f"({error}): give --heads or choose another preset"
        ) from error
    except TypeError as error:
        raise MismatchError(f"model.options of the config do not fit its architecture: {error}") from error


@dataclass(frozen=True)
class Output(Generic[ModelT]):
    """The output folder of a run, made ready, and what the run begins with there."""

    out: Path
    config: TokenizerConfig | WorldConfig
    metadata: Mapping[str, Any]
    resumed: Resumed[ModelT] | None
    before: StageBefore[ModelT] | None
    group: Group
    dry_run: bool

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

    def model(self, build: Callable[[], ModelT]) -> ModelT:
        """The resumed model, that of the stage before, or a new one."""
        if self.resumed is not None:
            return self.resumed.model
        return seeded(build, self.config) if self.before is None else self.before.model

    def run(self, reporter: Reporter, hint: str) -> Run:
        """Begin: the resolved config is saved beside what follows."""
        if self.group.rank == 0 and not self.dry_run:
            with replacing(self.out / "config.yaml") as temporary:
                save_config(self.config, temporary)
        begun = self.resumed or self.before
        state = None if begun is None else begun.optimizer_state
        passes = None if self.resumed is None else self.resumed.metadata.get("samples_per_pass")
        return Run(
            self.out,
            self.config.training,
            self.metadata,
            reporter,
            first_step=self.first_step,
            optimizer_state=state,
            samples_per_pass=passes,
            group=self.group,
            hint=hint,
            dry_run=self.dry_run,
        )


def nothing_to_do(kind: Kind, finished: Path, training: TrainingConfig, reporter: Reporter) -> Prepared:
    """For a run whose checkpoint ``finished`` has all its steps."""
    reporter.line(f"train {kind}: {finished} has all its steps, nothing to do")
    return Prepared(training.steps, lambda: finished)


def seeded(build: Callable[[], ModelT], config: TokenizerConfig | WorldConfig) -> ModelT:
    """A new model, whose random weights depend on the config's seed alone."""
    with torch.random.fork_rng(devices=[]):  # leaves the global generator as it was
        torch.default_generator.manual_seed(seed_of("weights", config.training.seed))
        return build()


def open_output(
    request: TrainingRequest[Any],
    dataset: Dataset,
    kind: Kind,
    build: Callable[[], ModelT],
    load: Callable[..., LoadedModel[ModelT]],
    group: Group,
) -> Output[ModelT]:
    """Claim the output folder for training on ``dataset``, and read what the run begins with.

    The first worker of ``group`` claims, the others look at what it left; see ``claim_output`` and
    ``read_stage_before`` for what is refused.
    """
    out, config, start_from = request.out, request.config, request.start_from
    metadata = {
        **run_metadata(dataset, config),
        "effective_batch": split_of(config.training, group).effective_batch,
    }

    def stage_before() -> StageBefore[ModelT] | None:
        check_start(config.training.start, start_from)
        if start_from is None:
            return None
        new = seeded(build, config)
        before = read_stage_before(config.training.start, start_from, new, load, metadata)
        _check_steps_left(before, config, start_from)
        return before

    def output(before: StageBefore[ModelT] | None, resumed: Resumed[ModelT] | None) -> Output[ModelT]:
        if resumed is not None:
            check_same_start(resumed.metadata, start_from)
        record = before.record if before else (resumed.metadata if resumed else {}).get("started_from")
        metadata_now = {**metadata, "started_from": record}
        return Output(out, config, metadata_now, resumed, before, group, request.dry_run)

    def first() -> tuple[Output[ModelT], int]:
        goes_on = request.resume and finished_checkpoints(out)
        before = None if goes_on else stage_before()  # before anything is written
        resumed = claim_output(out, kind, load, metadata, resume=request.resume, dry_run=request.dry_run)
        return output(before, resumed), NOTHING_DONE if resumed is None else resumed.step

    def others(step: int) -> Output[ModelT]:
        resumed = join_output(out, load, metadata, step)
        return output(stage_before() if resumed is None else None, resumed)

    return group.first_alone(first, others)


def _check_steps_left(
    before: StageBefore[Any], config: TokenizerConfig | WorldConfig, start_from: Path
) -> None:
    if before.step >= config.training.steps:
        raise DeltacacheError(
            f"{start_from} has {before.step} steps and this stage ends at {config.training.steps}: steps count those "
            "of the stage it continues; give a larger --steps"
        )


def run_metadata(dataset: Dataset, config: TokenizerConfig | WorldConfig) -> dict[str, Any]:
    """What ``config.json`` of a checkpoint says about its making, except for the step."""
    card, ids = dataset.card, dataset.index["clip_id"]
    listed = (clip for at in range(0, len(ids), 65536) for clip in ids.slice(at, 65536).to_pylist())
    metadata = {
        "config": config.model_dump(mode="json"),
        "data_fingerprint": card.fingerprint,
        "features_fingerprint": card.features_fingerprint,
        "clips": {"count": len(dataset), "fingerprint": fingerprint_of_list("clip_ids", listed)},
        "backbone_sha256": card.backbone.weights_sha256,
        "patch_grid": list(card.patch_grid),
        "hidden_size": card.hidden_size,
        "image_size": card.model_dump(mode="json", include={"image_size"})["image_size"],
        "spacing_s": [card.sampling.spacing_min_s, card.sampling.spacing_max_s],
        "backbone": card.backbone.id,
        **card.backbone.choice,
        "code_version": __version__,
    }
    if card.kind == "deltas":
        metadata["tokenizer_fingerprint"] = card.tokenizer_fingerprint
    if isinstance(config, WorldConfig):
        metadata["architecture"] = config.model.architecture
    return metadata
