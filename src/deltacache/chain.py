"""``deltacache run CONFIG.yaml``: every stage in turn; finished stages are skipped.

The output folder holds ``features/train``, ``features/test``, ``tokenizer``, ``deltas``, ``worlds/<name>``
and ``evaluation``; what is trained in stages leaves all but the last in ``stages``. Each stage decides by
its own rules whether it is finished, so a stopped chain continues where it was, and a changed setting is
rejected by the stage it belongs to.
"""

import json
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from deltacache.evaluate.clips.run import evaluate_clips
from deltacache.evaluate.output import METRICS
from deltacache.evaluate.settings import ClipEvaluation, clip_evaluation
from deltacache.models.checkpoints import CONFIG_FILE
from deltacache.pipeline.jobs.offline import extract_features, tokenize_features, videos_to_add
from deltacache.pipeline.storage.files import remove
from deltacache.schemas.arguments import merged
from deltacache.schemas.clips import check_id
from deltacache.schemas.configs import TokenizerConfig, WorldConfig, tokenizer_preset, world_preset
from deltacache.schemas.datasets import Frozen, Horizons
from deltacache.schemas.errors import DeltacacheError, MismatchError
from deltacache.schemas.hub import dataset_place
from deltacache.schemas.jobs import ChainStage, ExtractionSettings, TokenizeSettings
from deltacache.schemas.progress import Reporter
from deltacache.schemas.texts import bytes_text, counted
from deltacache.train.checkpoints import finished_checkpoints, steps_of
from deltacache.train.setup import TrainingRequest, check_same_settings
from deltacache.train.workers.launch import launch
from deltacache.train.workers.trainable import Workers

# ----------------------------------------------------------------------------------------------------
# Training in stages within a chain: each begins with what the one before it left (method section 2).
# ----------------------------------------------------------------------------------------------------


_HINT = "the chain is not finished: run the same command to continue"


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
        raise ValueError(f"stages {', '.join(names)}: give each its own name")
    for position, (name, start) in enumerate(stages):
        if (start == "random") != (position == 0):
            raise ValueError(
                f"stage {name} has training.start {start}: the first stage is random, and each later stage "
                "starts with weights or everything of the previous stage"
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


class EvaluationPlan(Frozen):
    """What ``evaluate`` is asked at the end of a chain."""

    context: int = Field(default=4, ge=1)
    horizons: Horizons = (1, 3)
    samples: int = Field(default=20, ge=1)
    seed: int = Field(default=0, ge=0)
    futures: Path | None = None


class ChainConfig(Frozen):
    """The content of CONFIG.yaml: the same settings as the single commands take."""

    train_videos: ExtractionSettings
    test_videos: ExtractionSettings
    tokenizer: TokenizerStages | AnyTokenizerConfig
    worlds: dict[str, WorldStages | AnyWorldConfig] = Field(min_length=1)
    evaluation: EvaluationPlan = EvaluationPlan()
    device: str = "auto"
    workers: int = Field(default=1, ge=1, description="of a training; they share its batch")

    @property
    def trainers(self) -> Workers:
        """Who trains: several workers on the cluster of the training videos, if it has an address."""
        cluster = self.train_videos.cluster
        return Workers(
            self.workers, cluster.ray_address if self.workers > 1 else None, cluster.wait_for_nodes_s
        )

    @property
    def tokenizer_stages(self) -> tuple[TokenizerStage, ...]:
        """The stages of the tokenizer: one if it has no others."""
        if isinstance(self.tokenizer, TokenizerStages):
            return self.tokenizer.stages
        return (TokenizerStage(name="only", config=self.tokenizer),)

    def world_stages(self, name: str) -> tuple[WorldStage, ...]:
        """The stages of a world model: one if it has no others."""
        world = self.worlds[name]
        return world.stages if isinstance(world, WorldStages) else (WorldStage(name="only", config=world),)


@dataclass(frozen=True, slots=True)
class ChainPaths:
    """Where each stage of a chain writes."""

    out: Path

    @property
    def train_features(self) -> Path:
        """Patch tokens of the training videos."""
        return self.out / "features" / "train"

    def stage_features(self, image_size: int | None) -> Path:
        """Patch tokens of the training videos at the size of an earlier stage; ``None`` for the last one's."""
        if image_size is None:
            return self.train_features
        return self.out / "features" / f"train-{image_size}px"

    def stage_folders(
        self, last: Path, stages: Sequence[TokenizerStage] | Sequence[WorldStage]
    ) -> list[Path]:
        """Where each stage of the model that ends up in ``last`` is trained."""
        earlier = self.out / "stages" / last.relative_to(self.out)
        return [*(earlier / stage.name for stage in stages[:-1]), last]

    @property
    def test_features(self) -> Path:
        """Patch tokens of the test videos."""
        return self.out / "features" / "test"

    @property
    def tokenizer(self) -> Path:
        """The trained tokenizer."""
        return self.out / "tokenizer"

    @property
    def deltas(self) -> Path:
        """Delta tokens of the training videos."""
        return self.out / "deltas"

    @property
    def evaluation(self) -> Path:
        """Tables and report."""
        return self.out / "evaluation"

    def world(self, name: str) -> Path:
        """The trained world model called ``name``."""
        return self.out / "worlds" / check_id(name, "world name")


def _with_videos_here(config: ChainConfig) -> ChainConfig:
    """Sources that are names of the hub are downloaded when the chain runs, not when its file is read."""
    train, test = (
        videos.model_copy(update={"source": str(dataset_place(videos.source))})
        for videos in (config.train_videos, config.test_videos)
    )
    return config.model_copy(update={"train_videos": train, "test_videos": test})


def run_chain(
    config: ChainConfig, out: Path, reporter: Reporter, from_stage: ChainStage | None = None
) -> ChainPaths:
    """Run every stage that is not finished yet.

    Args:
        from_stage: what this stage and those after it made is removed when its turn comes, and made again.

    Raises:
        DeltacacheError: a stage refused its input or settings; what earlier stages made is kept. Trainings whose
            settings changed, those with steps left from which something was made, and videos that were added to a
            source since something was made of it, are refused before anything is done.
    """
    config = _with_videos_here(config)
    paths = ChainPaths(out)
    evaluation = _evaluation(config, paths)  # refuses what evaluation could not use before hours of training
    made_from: dict[ChainStage, list[Path]] = {
        "tokenizer": [out / "stages" / "tokenizer", paths.tokenizer],
        "deltas": [paths.deltas],
        "worlds": [out / "stages" / "worlds", out / "worlds"],
        "evaluation": [paths.evaluation],
    }
    redone = list(made_from)[list(made_from).index(from_stage) :] if from_stage else []
    _check_trainings(config, paths, set(redone))
    _check_videos(config, paths, set(redone))

    def begin(stage: ChainStage) -> None:
        """Remove what is made again only now: what the stages before refuse has then cost nothing."""
        if stage == from_stage:
            for folder in (each for later in redone for each in made_from[later] if each.exists()):
                reporter.line(f"--from-stage {from_stage}: {folder} is deleted and made again")
                remove(folder)

    features, test = paths.train_features, paths.test_features
    with _timed("features of the training videos", reporter):
        extract_features(config.train_videos, features, reporter)
    stages = config.tokenizer_stages
    sizes = {stage.image_size: paths.stage_features(stage.image_size) for stage in stages}
    for size, folder in sizes.items():
        if size is not None:
            with _timed(f"features of the training videos at {size} px", reporter):
                extract_features(
                    config.train_videos.model_copy(update={"image_size": size}), folder, reporter
                )
    with _timed("features of the test videos", reporter):
        extract_features(config.test_videos, test, reporter)
    begin("tokenizer")
    with _timed("tokenizer", reporter):
        folders = paths.stage_folders(paths.tokenizer, stages)
        data = [sizes[stage.image_size] for stage in stages]
        train_stages("tokenizer", stages, data, folders, config.device, config.trainers, reporter)
    begin("deltas")
    with _timed("delta tokens", reporter):
        job = TokenizeSettings(
            features=str(features),
            tokenizer=paths.tokenizer,
            precision=_models_precision(config),
            changed_videos=config.train_videos.changed_videos,
            cluster=config.train_videos.cluster,
        )
        tokenize_features(job, paths.deltas, reporter)
    begin("worlds")
    for name in config.worlds:
        with _timed(f"world model {name}", reporter):
            world = config.world_stages(name)
            folders = paths.stage_folders(paths.world(name), world)
            data = [paths.deltas] * len(world)
            train_stages("world", world, data, folders, config.device, config.trainers, reporter)
    begin("evaluation")
    with _timed("evaluation", reporter):
        evaluate_clips(evaluation, reporter)
    return paths


def _models_precision(config: ChainConfig) -> Literal["auto", "float32"]:
    """Of tokenizer and world models: exact if the features are asked to be."""
    return "float32" if config.train_videos.precision == "float32" else "auto"


def _check_trainings(config: ChainConfig, paths: ChainPaths, redone: set[ChainStage]) -> None:
    """Refuse trainings that cannot go on with these settings, and such as would leave behind what was made of them.

    Args:
        redone: stages whose outputs are about to be removed.
    """
    later: list[tuple[ChainStage, Path]] = [
        ("deltas", paths.deltas),
        *(("worlds", folder) for folder in sorted((paths.out / "worlds").glob("*"))),
        ("evaluation", paths.evaluation),
    ]
    trainings: list[tuple[ChainStage, Sequence[TokenizerStage] | Sequence[WorldStage], Path]] = [
        ("tokenizer", config.tokenizer_stages, paths.tokenizer),
        *(("worlds", config.world_stages(name), paths.world(name)) for name in config.worlds),
    ]
    for kind, stages, last in trainings:
        for stage in stages:
            stage.config.training.shared_by(config.trainers.count)  # refuses what does not split
        if kind in redone:
            continue
        folders = paths.stage_folders(last, stages)
        used_by: list[tuple[ChainStage, Path]] = [
            (stage, folder) for stage, folder in later if kind == "tokenizer" or stage == "evaluation"
        ]
        for place, (stage, folder) in enumerate(zip(stages, folders, strict=True)):
            checkpoints = finished_checkpoints(folder)
            done, steps = steps_of(checkpoints[-1]) if checkpoints else 0, stage.config.training.steps
            if checkpoints:
                _check_goes_on(checkpoints[-1], stage.config, kind)
            following: list[tuple[ChainStage, Path]] = [(kind, each) for each in folders[place + 1 :]]
            used = [each for by, each in (*following, *used_by) if by not in redone and each.exists()]
            if done < steps and used and not _stopped_early(checkpoints, stage.config):
                again = kind if folder != last else "deltas" if kind == "tokenizer" else "evaluation"
                raise MismatchError(
                    f"{folder} has {done:,} of {steps:,} steps, but {', '.join(map(str, used))} "
                    f"{'was' if len(used) == 1 else 'were'} made from it, and would not follow if it "
                    "were trained further. Put training.steps back, choose another output folder, or give "
                    f"--from-stage {again}, which deletes the outputs from that stage on and makes them again"
                )


def _stopped_early(checkpoints: Sequence[Path], config: TokenizerConfig | WorldConfig) -> bool:
    """Whether the newest checkpoint is the last one, since the patience of its validation ended."""
    if not checkpoints or config.data.patience is None:
        return False
    try:
        recorded = json.loads((checkpoints[-1] / CONFIG_FILE).read_bytes())
    except (OSError, ValueError):
        return False  # damaged: reading it says so
    return (recorded.get("validation") or {}).get("waited", 0) >= config.data.patience


def _check_videos(config: ChainConfig, paths: ChainPaths, redone: set[ChainStage]) -> None:
    """Refuse videos and views that were added since something was made that would have to be made again with them.

    The stage that made it refuses them too, but only after the extraction of their features.
    """
    trained: list[tuple[str, Path]] = []
    if "tokenizer" not in redone:
        folders = paths.stage_folders(paths.tokenizer, config.tokenizer_stages)
        trained += [("tokenizer", each) for each in folders if finished_checkpoints(each)]
    for name in config.worlds if "worlds" not in redone else ():
        folders = paths.stage_folders(paths.world(name), config.world_stages(name))
        trained += [("worlds", each) for each in folders if finished_checkpoints(each)]
    evaluated: list[tuple[str, Path]] = []
    if (paths.evaluation / METRICS).exists() and "evaluation" not in redone:
        evaluated += [("evaluation", paths.evaluation)]
    checks: list[tuple[ExtractionSettings, Path, list[tuple[str, Path]]]] = [
        (config.train_videos, paths.train_features, trained),
        (config.test_videos, paths.test_features, evaluated),
    ]
    for videos, features, made in checks:
        if made and (added := videos_to_add(videos, features)):
            stage, folder = made[0]
            raise MismatchError(
                f"{features} would gain clips of {counted(len(added), 'video')}, such as {added[0]} (new in "
                f"{videos.source}, or with more views), but {folder} was made without them and cannot take them up. "
                "Leave them out (exclude_list, views), choose another output folder, or give --from-stage "
                f"{stage}, which deletes the outputs from that stage on and makes them again"
            )


def _check_goes_on(checkpoint: Path, config: TokenizerConfig | WorldConfig, kind: ChainStage) -> None:
    """Refuse settings by which the training that left this checkpoint cannot go on, or has gone too far."""
    again = f"give --from-stage {kind}, which deletes these trainings and what was made from them, and makes both again"
    done, steps = steps_of(checkpoint), config.training.steps
    if done > steps:
        raise MismatchError(
            f"{checkpoint.parents[1]} was trained for {counted(done, 'step', form=',')}, but "
            f"training.steps is {steps:,}, and steps "
            f"cannot be undone: put training.steps back, choose another output folder, or {again}"
        )
    effective_batch = config.training.batch_size * (config.training.accumulation or 1)  # whoever shares it
    now = {"config": config.model_dump(mode="json"), "effective_batch": effective_batch}
    try:
        check_same_settings(checkpoint, json.loads((checkpoint / CONFIG_FILE).read_bytes()), now)
    except (OSError, ValueError, KeyError, TypeError):
        return  # damaged: reading it says so
    except MismatchError as error:
        raise MismatchError(f"{error}, or {again}") from error


def _evaluation(config: ChainConfig, paths: ChainPaths) -> ClipEvaluation:
    return clip_evaluation(
        out=paths.evaluation,
        # absolute, or what is not made yet would be taken for a name of the hub
        features=paths.test_features.absolute(),
        tokenizer=paths.tokenizer.absolute(),
        worlds=tuple(paths.world(name).absolute() for name in config.worlds),
        device=config.device,
        precision=_models_precision(config),
        **config.evaluation.model_dump(),
    )


@contextmanager
def _timed(name: str, reporter: Reporter) -> Iterator[None]:
    """Say how long a stage took and the most memory this process has used so far."""
    start = time.perf_counter()
    yield
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    reporter.line(
        f"[{name}: {time.perf_counter() - start:.1f} s, peak memory of this process {bytes_text(peak)}]"
    )
