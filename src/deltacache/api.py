"""The front door: what ``import deltacache`` offers. The commands are thin layers over these functions.

Every function that works for long takes a ``reporter``; without one it is silent. Errors that a user can do something
about are ``DeltacacheError``.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from deltacache.evaluate.settings import BenchmarkEvaluation, ClipEvaluation, evaluation
from deltacache.schemas.arguments import arguments_of, build, changed_by, fields_of, taken, takes
from deltacache.schemas.configs import (
    CANDIDATES,
    HeadConfig,
    RgbConfig,
    TokenizerConfig,
    WorldConfig,
    WorldModelConfig,
    head_preset,
    load_config,
    rgb_preset,
    tokenizer_preset,
    world_preset,
)
from deltacache.schemas.errors import DeltacacheError, SettingsError
from deltacache.schemas.foresight import ForesightHeadConfig, FrameFeatureConfig
from deltacache.schemas.hub import dataset_place, model_path, output_place, refuse_output
from deltacache.schemas.jobs import (
    DEFAULT_BACKBONE,
    DataMixture,
    DataPart,
    ExtractionSettings,
    HeadLaunch,
    Launch,
    PushSettings,
    TokenizeSettings,
    TokenizeVideosSettings,
)
from deltacache.schemas.prediction import PredictionSettings
from deltacache.schemas.progress import Reporter, SilentReporter
from deltacache.schemas.secrets import without_secrets

if TYPE_CHECKING:  # torch, Ray and Arrow are imported by what needs them
    import pyarrow as pa
    from torch import Tensor

    from deltacache.models.backbone import Backbone
    from deltacache.models.deltatok import DeltaTok
    from deltacache.models.world_model import WorldModel
    from deltacache.pipeline.datasets.dataset import Dataset

AnyPath = str | Path
TrainingData = AnyPath | Sequence[AnyPath] | Mapping[str, float]
"""A dataset, several, or several with weights."""
TrainerT = TypeVar("TrainerT", TokenizerConfig, WorldConfig, HeadConfig, RgbConfig, ForesightHeadConfig)


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A finished evaluation in its folder."""

    folder: Path

    @property
    def metrics(self) -> "pa.Table":
        """``metrics.parquet``: a row per method, metric, horizon and aggregation (docs/evaluation.md)."""
        from deltacache.evaluate.output import read_metrics

        return read_metrics(self.folder)

    @property
    def sequences(self) -> "pa.Table":
        """``sequences.parquet``: a row per sequence, with the unit that it is resampled by."""
        import pyarrow.parquet as pq

        from deltacache.evaluate.output import SEQUENCES

        return pq.read_table(self.folder / SEQUENCES)


def open_dataset(path: AnyPath, kind: str | None = None) -> "Dataset":
    """Open a finished dataset of ``extract_features`` or ``tokenize`` for reading.

    ``dataset.read(i)`` is a ``FeatureClip`` with ``patch_tokens`` (T, N, D) float16 and ``timestamps_s`` (T,), or a
    ``DeltaClip`` with ``delta_tokens`` (T, D); every read is verified against its checksum.

    Args:
        kind: ``features`` or ``deltas``; another one is refused.

    Raises:
        DatasetError: no dataset, not finished, damaged, or of another kind.

    Example:
        >>> features = deltacache.open_dataset("features/")
        >>> features.read(0).patch_tokens.shape
        (8, 256, 384)
    """
    from deltacache.pipeline.datasets import dataset

    if kind not in (None, "features", "deltas"):
        raise SettingsError(f"Invalid kind {kind!r}: must be features or deltas.")
    return dataset.open_dataset(data_place(path), kind)  # pyright: ignore[reportArgumentType]


@takes(ExtractionSettings)
def extract_features(
    source: AnyPath, out: AnyPath, *, reporter: Reporter | None = None, **settings: Any
) -> "Dataset":
    """Decode videos and cache the patch tokens of a frozen backbone; what is finished already is left alone.

    Args:
        source: folder, glob, list or archive of videos, or a LeRobot dataset; local, ``s3://``, ``gs://``,
            ``https://``, or the name of a dataset on the hub.
        out: folder of the dataset, new or unfinished.
        settings: as the flags of ``deltacache extract-features``, such as ``views=2``.

    Raises:
        SettingsError: an unknown setting or a refused value.
        DeltacacheError: bad input, other settings than the dataset's, or too many videos that fail.

    Example:
        >>> features = deltacache.extract_features("videos/", "features/", backbone="tiny", image_size=256)
        >>> len(features)
        12
    """
    from deltacache.pipeline.jobs import offline

    job = extraction_settings(source, settings)
    offline.extract_features(job, place(out), reporter or SilentReporter())
    return open_dataset(out, "features")


def extraction_settings(source: AnyPath, settings: Mapping[str, Any]) -> ExtractionSettings:
    """Settings of ``extract_features`` from its arguments."""
    values = {**settings, "source": data_place(source)}
    if values.get("backbone") is not None:
        values["backbone"] = backbone_source(values["backbone"])
    if values.get("pca") is not None:
        values["pca"] = _model_path(values["pca"])
    if values.get("side_arrays") is not None:
        values["side_arrays"] = place(values["side_arrays"])
    return build(ExtractionSettings, values)


@takes(ExtractionSettings, without=("dtype",))
def tokenize(
    source: AnyPath, out: AnyPath, tokenizer: AnyPath, *, reporter: Reporter | None = None, **settings: Any
) -> "Dataset":
    """Turn a feature dataset, or videos directly, into delta tokens.

    From videos, patch tokens never touch the disk; backbone, layers, size and spacing are then those that the
    tokenizer was trained with, unless given.

    Args:
        source: a feature dataset, or videos as for ``extract_features``.
        out: folder of the dataset, new or unfinished.
        tokenizer: output of ``train_tokenizer``, or a released checkpoint.
        settings: as the flags of ``deltacache tokenize``.

    Raises:
        SettingsError: an unknown setting, a refused value, or one about videos where ``source`` is a dataset.
        DeltacacheError: bad input, or a tokenizer of other features.

    Example:
        >>> deltas = deltacache.tokenize("features/", "deltas/", "tokenizer/")
        >>> deltas.read(0).delta_tokens.shape
        (8, 384)
    """
    run_tokenize(tokenize_settings(source, tokenizer, settings), out, reporter or SilentReporter())
    return open_dataset(out, "deltas")


def run_tokenize(job: TokenizeSettings | TokenizeVideosSettings, out: AnyPath, reporter: Reporter) -> None:
    """Make the delta tokens, of a feature dataset or of videos."""
    from deltacache.pipeline.jobs import offline

    if isinstance(job, TokenizeSettings):
        offline.tokenize_features(job, place(out), reporter)
    else:
        offline.tokenize_videos(job, place(out), reporter)


def tokenize_settings(
    source: AnyPath, tokenizer: AnyPath, settings: Mapping[str, Any]
) -> TokenizeSettings | TokenizeVideosSettings:
    """Settings of ``tokenize`` from its arguments."""
    from deltacache.models.checkpoints import recorded_config
    from deltacache.pipeline.datasets.writing import is_dataset

    where, tokenizer = data_place(source), _model_path(tokenizer)
    given = {name: value for name, value in settings.items() if value is not None}
    if is_dataset(where):
        # A feature dataset was sampled when it was made: settings about videos would do nothing.
        of_videos = arguments_of(ExtractionSettings).keys() - arguments_of(TokenizeSettings).keys()
        idle = [f"--{name.replace('_', '-')}" for name in given if name in of_videos]
        if idle:
            raise SettingsError(
                f"{', '.join(idle)} concern videos, but {without_secrets(str(source))} is a feature dataset, which is "
                "already sampled: leave them out, or give the videos"
            )
        return build(TokenizeSettings, {**given, "features": where, "tokenizer": tokenizer})
    recorded = recorded_config(tokenizer) or {}  # a released file records nothing
    as_trained = {
        **_trained_features(tokenizer, recorded, given),
        "spacing": tuple(recorded.get("spacing_s", (0.04, 0.3333))),
    }
    videos = extraction_settings(source, {**as_trained, **given})
    if videos.sampling.windows is not None:
        raise SettingsError(
            "windows all: clips share frames only where these are stored, so they cannot be tokenized straight from "
            "videos. Run extract-features with it, then tokenize its output"
        )
    return TokenizeVideosSettings(videos=videos, tokenizer=tokenizer)


def _trained_features(
    model: Path, recorded: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, str | None]:
    """Backbone, layers and image size of the features that a model was trained on; none of them is in ``given``."""
    from deltacache.models.outside import is_python_path
    from deltacache.schemas.datasets import parse_size, size_text

    backbone = recorded.get("backbone")
    if "backbone" not in given and is_python_path(str(backbone)):
        raise DeltacacheError(
            f"{model} was trained on features of the backbone {backbone}, code outside of deltacache, which is "
            f"imported only when it is named: give --backbone {backbone}"
        )
    if "backbone" not in given and backbone is not None and backbone != "tiny" and "/" not in backbone:
        raise DeltacacheError(
            f"{model} was trained on features of the backbone in a folder {backbone!r}: give --backbone "
            "with the path of that folder"
        )
    return {
        "backbone": backbone,
        "layers": ",".join(map(str, recorded["layers"])) if recorded.get("layers") else None,
        "image_size": size_text(parse_size(recorded.get("image_size", 512))),
    }


@takes(TokenizerConfig, optional=True)
@takes(Launch)
def train_tokenizer(
    features: TrainingData, out: AnyPath, *, reporter: Reporter | None = None, **settings: Any
) -> Path:
    """Train DeltaTok, which turns the change between two frames into one token (method section 1).

    Args:
        features: a feature dataset; or several, as a list, as weights by path ``{"a/": 0.7, "b/": 0.3}``, or as a YAML
            file (docs/data.md).
        out: output folder; with ``resume`` the newest checkpoint in it is continued.
        settings: as the flags of ``deltacache train-tokenizer``. ``preset`` is ``released``, ``tiny`` or another, or a
            YAML file (docs/training.md); ``steps=2000`` and others change it, and
            ``assignments=["training.learning_rate=3e-4"]`` any of its keys. ``dry_run=True`` only measures a few steps
            and reports what the training would take here.

    Returns:
        The newest checkpoint, which ``load_tokenizer`` reads.

    Raises:
        SettingsError: an unknown setting or a refused value.
        DeltacacheError: features that the model cannot take, another run in ``out``, or a loss that is not finite.

    Example:
        >>> checkpoint = deltacache.train_tokenizer("features/", "tokenizer/", preset="tiny", steps=100)
    """
    launch, changes = taken(Launch, settings)
    config = tokenizer_settings(out, launch, changes)
    return start_training("tokenizer", features, out, config, launch, reporter or SilentReporter())


def tokenizer_settings(out: AnyPath, launch: Launch, changes: Mapping[str, Any]) -> TokenizerConfig:
    """The recipe that ``train_tokenizer`` trains by: the preset with its changes."""
    return trainer_settings(tokenizer_preset(launch.preset, launch.stage), out, launch, changes)


@takes(WorldConfig, optional=True)
@takes(Launch)
def train_world(
    source: TrainingData, out: AnyPath, *, reporter: Reporter | None = None, **settings: Any
) -> Path:
    """Train a world model that predicts the next frame, such as DeltaWorld on delta tokens.

    Args:
        source: a delta dataset; a feature dataset for models of patch tokens (DINO-world). Several as in
            ``train_tokenizer``.
        out: output folder; with ``resume`` the newest checkpoint in it is continued.
        settings: as the flags of ``deltacache train-world``: those of ``train_tokenizer``, and changes of the preset
            such as ``candidates=32``.

    Returns:
        The newest checkpoint, which ``load_world`` reads.

    Raises:
        SettingsError: an unknown setting or a refused value.
        DeltacacheError: tokens that the model cannot take, another run in ``out``, or a loss that is not finite.

    Example:
        >>> checkpoint = deltacache.train_world("deltas/", "world/", preset="tiny", candidates=32, steps=100)
    """
    launch, changes = taken(Launch, settings)
    config = world_settings(out, launch, changes)
    return start_training("world", source, out, config, launch, reporter or SilentReporter())


def world_settings(out: AnyPath, launch: Launch, changes: Mapping[str, Any]) -> WorldConfig:
    """The recipe that ``train_world`` trains by: the preset with its changes."""
    base, changes = world_preset(launch.preset, launch.stage), dict(changes)
    objective = changes.get("objective") or base.model.objective
    if objective != base.model.objective:  # what the preset says of these is for its own
        settled = WorldModelConfig(objective=objective)
        for name, value in (("noise_std", settled.noise_std), ("candidates", CANDIDATES[objective])):
            changes[name] = value if changes.get(name) is None else changes[name]
    if changes.get("candidates") is None:
        if changes.get("query") == "learned":
            changes["candidates"] = 1
        elif changes.get("query") == "noise" and base.model.query == "learned":
            raise SettingsError(
                f"--query noise: preset {launch.preset} has one candidate; give --candidates K as well"
            )
    return trainer_settings(base, out, launch, changes)


def head_settings(
    head: str, out: AnyPath, launch: HeadLaunch, changes: Mapping[str, Any]
) -> HeadConfig | RgbConfig:
    """The recipe that ``train-head`` trains by; ``head`` is a benchmark or ``rgb``."""
    from deltacache.pipeline.work.encoders import resolve_precision

    for flag, listed in (("--kitti-split", launch.kitti_split), ("--kitti-test", launch.kitti_test)):
        if listed is not None and head != "kitti":
            raise SettingsError(f"{flag} concerns kitti, not {head}: leave it out")
    if head == "rgb" and changes.get("split") not in (None, "train"):
        raise SettingsError("--split concerns benchmarks: rgb learns from all pictures below ROOT")
    preset: Any = launch.preset
    base: Any = rgb_preset(preset) if head == "rgb" else head_preset(cast("Any", head), preset)
    seen = base.frames.model_copy(update={"precision": resolve_precision(launch.device, launch.precision)})
    if head == "rgb":  # linear heads stay in float32
        changes = {**changes, "precision": launch.precision}
    return trainer_settings(base.model_copy(update={"frames": seen}), out, launch, changes)


def foresight_head_settings(
    task: Any, out: AnyPath, launch: HeadLaunch, changes: Mapping[str, Any]
) -> ForesightHeadConfig:
    """The recipe that ``train-foresight-head`` trains by."""
    from deltacache.pipeline.work.encoders import resolve_precision
    from deltacache.schemas.foresight import foresight_head

    features, changes = taken(FrameFeatureConfig, changes)
    seen = {
        "backbone": backbone_source(features.backbone),
        "precision": resolve_precision(launch.device, launch.precision),
    }
    depth, preset = changes.pop("depth", None), cast("Any", launch.preset)
    base = foresight_head(task, preset, features.model_copy(update=seen), depth)
    return trainer_settings(base, out, launch, changes)


def trainer_settings(base: TrainerT, out: AnyPath, launch: Launch, changes: Mapping[str, Any]) -> TrainerT:
    """A preset with what is asked of its schedule, its other arguments, and any of its keys (``--set``)."""
    from deltacache.train.setup import continued_schedule

    fields_of(type(base), changes)  # refuses unknown names before anything else
    rest = dict(changes)
    steps, warmup, decay = (rest.pop(name, None) for name in ("steps", "warmup_steps", "decay_steps"))
    training = base.training
    if rest.get("batch_size") is None:  # without it, workers share the recipe's batch
        training = training.shared_by(launch.workers, rest.get("accumulation"))
    training = training.in_steps(steps, warmup, decay)
    if launch.resume:  # the schedule that was begun
        given = {"warmup_given": warmup is not None, "decay_given": decay is not None}
        training = continued_schedule(Path(out), training, **given)
    if launch.init_from or launch.continue_from:
        training = training.model_copy(update={"start": "weights" if launch.init_from else "everything"})
    config = build(type(base), rest, base.model_copy(update={"training": training}))
    return changed_by(config, launch.assignments)


def start_training(
    kind: Literal["tokenizer", "world"],
    data: TrainingData,
    out: AnyPath,
    config: Any,
    launch: Launch,
    reporter: Reporter,
) -> Path:
    """Train by a recipe, in this process or with several workers; returns the newest checkpoint."""
    from deltacache.train.setup import TrainingRequest
    from deltacache.train.workers.launch import launch as train
    from deltacache.train.workers.trainable import Workers

    before = launch.init_from or launch.continue_from
    workers = Workers(launch.workers, launch.ray_address, launch.wait_for_nodes_s)
    request = TrainingRequest(
        training_data(data),
        Path(out),
        config,
        launch.resume,
        launch.device,
        before,
        dry_run=launch.dry_run,
        validation=None if launch.validation is None else data_place(launch.validation),
    )
    return train(kind, request, reporter, workers)


def training_data(data: TrainingData) -> tuple[DataPart, ...]:
    """The datasets of a training: ``PATH``, ``PATH:WEIGHT``, several of these, weights by path, or a YAML file.

    Raises:
        DeltacacheError: weights of some of them only, or a YAML file of something else.
    """
    if isinstance(data, Mapping):
        parts = [{"path": data_place(path), "weight": weight} for path, weight in data.items()]
        return build(DataMixture, {"datasets": parts}).datasets
    listed = _several(data)
    if len(listed) == 1 and str(listed[0]).endswith((".yaml", ".yml")) and Path(str(listed[0])).is_file():
        return tuple(
            part.model_copy(update={"path": data_place(part.path)})
            for part in load_config(Path(listed[0]), DataMixture).datasets
        )
    parts = [_weighted(str(each)) for each in listed]
    return build(
        DataMixture, {"datasets": [{"path": data_place(path), "weight": each} for path, each in parts]}
    ).datasets


def _weighted(text: str) -> tuple[str, float | None]:
    """Of ``PATH[:WEIGHT]``; a folder whose name ends like a weight is a path."""
    path, colon, weight = text.rpartition(":")
    number = re.fullmatch(r"\d+(\.\d*)?|\.\d+", weight)
    return (path, float(weight)) if colon and path and number and not Path(text).exists() else (text, None)


@takes(BenchmarkEvaluation)
def evaluate(
    out: AnyPath,
    data: Mapping[str, AnyPath],
    *,
    tokenizer: AnyPath | Sequence[AnyPath] = (),
    world: AnyPath | Sequence[AnyPath] = (),
    head: Mapping[str, AnyPath] | None = None,
    predictions: Mapping[str, AnyPath] | None = None,
    backbone: str | None = None,
    futures: AnyPath | None = None,
    reporter: Reporter | None = None,
    **settings: Any,
) -> Evaluated:
    """Score reconstructions and sampled futures; writes ``metrics.parquet`` and ``sequences.parquet`` to ``out``.

    Args:
        data: what is scored, by name: ``clips`` and a feature dataset; ``vspw``, ``cityscapes``, ``kitti`` and
            its root.
        tokenizer: output of ``train_tokenizer``, or a released checkpoint; several for world models on other tokens.
        world: output of ``train_world``, or ``ARCHITECTURE=FILE`` as released; one or several.
        head: linear heads of the benchmarks, by name.
        predictions: futures of video generators (``export-contexts``), by method name.
        futures: of clips: CSV or Parquet of true futures, which adds mode coverage.
        settings: ``where``, ``split`` and ``split_seed`` say which clips are scored, and others
            as the flags of ``deltacache evaluate``, such as ``samples=20``.

    Raises:
        SettingsError: an unknown setting or a refused value.
        DeltacacheError: models that do not belong together, incomplete data, or another evaluation in ``out``.

    Example:
        >>> results = deltacache.evaluate("results/", {"clips": "test-features/"}, tokenizer="tokenizer/")
        >>> results.metrics.column_names[:3]
        ['run', 'dataset', 'method']
    """
    from deltacache.evaluate.results import run_evaluation

    settings |= {
        "tokenizer": tokenizer,
        "world": world,
        "head": head,
        "predictions": predictions,
        "backbone": backbone,
        "futures": futures,
    }
    asked = evaluation_settings(out, data, settings)
    run_evaluation(asked, reporter or SilentReporter())
    return Evaluated(asked.out)


def evaluation_settings(
    out: AnyPath, data: Mapping[str, AnyPath], settings: Mapping[str, Any]
) -> ClipEvaluation | BenchmarkEvaluation:
    """Settings of ``evaluate`` from its arguments."""
    rest = dict(settings)
    chosen = {name: rest.pop(name) for name in ("where", "split", "split_seed") if name in rest}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    tokenizers = [model_path(Path(each)) for each in _several(rest.pop("tokenizer"))]
    worlds = [_world_path(str(each)) for each in _several(rest.pop("world"))]
    heads, predictions = rest.pop("head") or {}, rest.pop("predictions") or {}
    backbone, futures = rest.pop("backbone"), rest.pop("futures")
    return evaluation(
        {name: str(path) for name, path in data.items()},
        heads={name: str(path) for name, path in heads.items()},
        out=Path(out),
        backbone=backbone_source(backbone or DEFAULT_BACKBONE),
        tokenizer=tokenizers[0] if tokenizers else None,
        more_tokenizers=tuple(tokenizers[1:]),
        worlds=tuple(path for _, path in worlds),
        architectures={str(path): name for name, path in worlds if name},
        predictions={name: str(path) for name, path in predictions.items()},
        futures=None if futures is None else Path(futures),
        **chosen,
        **fields_of(BenchmarkEvaluation, rest),
    )


@dataclass(frozen=True, slots=True)
class Predicted:
    """Sampled futures of one video, in their folder."""

    folder: Path

    @property
    def page(self) -> Path:
        """``index.html``: the past and the futures side by side, as one self-contained page."""
        return self.folder / "index.html"

    @property
    def movie(self) -> Path:
        """``futures.mp4`` or ``futures.gif``."""
        return next(self.folder.glob("futures.[mg][pi][4f]"))

    def tensors(self) -> "dict[str, Tensor]":
        """All tensors of ``futures.safetensors``, float32 (docs/predict.md).

        ``future_patch_tokens`` (S, H, N, D), ``future_delta_tokens`` (S, H, D), ``context_patch_tokens`` (C, N, D),
        ``context_delta_tokens`` (C, D), ``true_patch_tokens`` (K, N, D) of the K frames that the video goes on,
        ``times_s`` (C+H,), ``spread`` (H,).
        """
        from safetensors.torch import load_file

        return load_file(self.folder / "futures.safetensors")


@takes(PredictionSettings)
def predict(
    video: AnyPath,
    out: AnyPath,
    *,
    world: AnyPath,
    tokenizer: AnyPath | None = None,
    head: Mapping[str, AnyPath] | None = None,
    backbone: str | None = None,
    reporter: Reporter | None = None,
    **settings: Any,
) -> Predicted:
    """Sample futures of one video: tensors, a self-contained page and a movie in the folder ``out``.

    Backbone, image size and spacing are those that the models were trained on, unless given.

    Args:
        video: file, url or folder of frames; or a feature dataset, of which ``clip`` names the clip.
        out: new or empty folder.
        world: output of ``train_world``, or ``ARCHITECTURE=FILE`` as released.
        tokenizer: whose delta tokens the world model predicts; a world model on patch tokens needs none.
        head: linear heads by what they were trained on: ``vspw``, ``cityscapes`` or ``kitti``.
        settings: as the flags of ``deltacache predict``, such as ``at=2.0, steps=8, samples=20``.

    Raises:
        SettingsError: an unknown setting, a refused value, or one that a feature dataset has no use for.
        DeltacacheError: a video that is too short, models that do not belong together, or ``out`` that holds something.

    Example:
        >>> futures = deltacache.predict("street.mp4", "futures/", tokenizer="tokenizer/", world="world/", at=2.0)
        >>> futures.tensors()["future_patch_tokens"].shape
        torch.Size([20, 8, 256, 384])
    """
    from deltacache.evaluate.prediction.run import predict_futures

    settings |= {"world": world, "tokenizer": tokenizer, "head": head, "backbone": backbone}
    asked = prediction_settings(video, out, settings)
    predict_futures(asked, reporter or SilentReporter())
    return Predicted(asked.out)


def prediction_settings(video: AnyPath, out: AnyPath, settings: Mapping[str, Any]) -> PredictionSettings:
    """Settings of ``predict`` from its arguments."""
    from deltacache.models.checkpoints import recorded_config
    from deltacache.pipeline.datasets.writing import is_dataset

    where = data_place(video)
    given = {name: value for name, value in settings.items() if value is not None}
    fields_of(PredictionSettings, given)  # rejects unknown names before anything is opened
    architecture, world_path = _world_path(str(given.pop("world")))
    tokenizer, heads = given.pop("tokenizer", None), given.pop("head", {})
    if "backbone" in given:
        given["backbone"] = backbone_source(given["backbone"])
    models = {
        "world": world_path,
        "architecture": architecture,
        "tokenizer": None if tokenizer is None else _model_path(tokenizer),
        "heads": {name: _model_path(path) for name, path in heads.items()},
    }
    of_video = {"image_size", "frames_per_second", "pca"}
    if is_dataset(where):
        idle = [f"--{name.replace('_', '-')}" for name in given if name in of_video]
        if idle:
            raise SettingsError(
                f"{', '.join(idle)} concern videos, but {without_secrets(where)} is a feature dataset, which is "
                "already extracted: leave them out, or give the video"
            )
        return build(PredictionSettings, {**given, **models, "video": where, "out": Path(out)})
    if "clip" in given:
        raise SettingsError(
            f"--clip names a clip of a feature dataset, but {without_secrets(where)} is not one: leave it out"
        )
    recorded = recorded_config(world_path) or {}  # a released file records nothing
    if not recorded and models["tokenizer"] is not None:
        recorded = recorded_config(models["tokenizer"]) or {}
    shortest, longest = recorded.get("spacing_s", (0.2, 0.2))
    as_trained = {
        **_trained_features(world_path, recorded, given),
        "spacing": (shortest + longest) / 2,
    }
    if as_trained["backbone"] is None:
        as_trained["backbone"] = DEFAULT_BACKBONE
    return build(PredictionSettings, {**as_trained, **given, **models, "video": where, "out": Path(out)})


def write_report(runs: AnyPath | Sequence[AnyPath], out: AnyPath | None = None) -> Path:
    """Write one self-contained HTML page about an evaluation, or about several side by side.

    Args:
        runs: outputs of ``evaluate``.
        out: the page; by default ``report.html`` in the run, or of several ``./report.html``.

    Returns:
        Where the page is.

    Raises:
        DatasetError: a folder is not the output of an evaluation, or a part of it is damaged.

    Example:
        >>> page = deltacache.write_report(["results/", "other-results/"], "comparison.html")
    """
    from deltacache.evaluate.report.page import write_page

    places = [Path(output_place(each)) for each in _several(runs)]
    return write_page(places, None if out is None else Path(out))


@takes(PushSettings)
def push(path: AnyPath, repo: str, *, reporter: Reporter | None = None, **settings: Any) -> str:
    """Upload an output with a card made from its provenance to the Hugging Face hub (docs/hub.md).

    Run again, an upload that was interrupted goes on. The hub's client reads the token (``hf auth login``).

    Args:
        path: a dataset, a training output or checkpoint, a PCA, or an evaluation.
        repo: ``OWNER/NAME``; created if it does not exist.
        settings: as the flags of ``deltacache push``, such as ``private=True``.

    Returns:
        Its name with the commit, ``hf://OWNER/NAME@commit``, which goes wherever a path does.

    Raises:
        DeltacacheError: nothing that can be pushed, a damaged dataset, a repository that holds something else, or the
            hub refuses or does not answer.

    Example:
        >>> deltacache.push("world/", "me/world", private=True, evaluation="results/")
        'hf://me/world@5c0c1f…'
    """
    from deltacache.publishing import push as upload

    asked = build(PushSettings, {**settings, "path": Path(path), "repo": repo})
    return upload(asked, reporter or SilentReporter())


def load_backbone(
    source: str = DEFAULT_BACKBONE,
    *,
    device: str = "auto",
    precision: str = "auto",
    layers: Sequence[int] | None = None,
    pca: AnyPath | None = None,
) -> "Backbone":
    """A frozen image encoder, in eval mode: ``backbone.patch_tokens(frames)``.

    ``frames`` are (B, 3, H, W) uint8 RGB, the patch tokens (B, N, D) float32; ``backbone.grid(image_size)`` has the
    rows and columns of patches, ``backbone.card`` says what it is.

    Args:
        source: hub id, Hugging Face folder, ``tiny`` (built in, random weights), or ``package.module:factory``, code of
            your own that gives a ``PatchEncoder``.
        precision: of the forward pass: ``float32``, ``bfloat16``, or ``auto``: bfloat16 on GPUs.
        layers: blocks whose outputs are joined, counted from 0; by default the last hidden state.
        pca: output of ``fit-pca``, which reduces the tokens.

    Raises:
        CheckpointError: weights that are missing, gated, damaged or do not fit their config.

    Example:
        >>> backbone = deltacache.load_backbone("tiny", device="cpu")
        >>> backbone.patch_tokens(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).shape
        torch.Size([2, 16, 384])
    """
    from deltacache.models.backbone import load_backbone as load
    from deltacache.models.devices import choose_device
    from deltacache.pipeline.work.encoders import resolve_precision

    where = choose_device(device)
    chosen = resolve_precision(where, precision)  # pyright: ignore[reportArgumentType]
    kept = None if layers is None else tuple(layers)
    return load(backbone_source(source), chosen, kept, None if pca is None else _model_path(pca)).to(where)


def load_tokenizer(path: AnyPath, *, device: str = "auto") -> "DeltaTok":
    """A trained or released DeltaTok, frozen and in eval mode, float32.

    ``encode(previous, current)`` gives delta tokens (B, D) of patch tokens (B, N, D); ``decode(delta, previous)`` gives
    patch tokens back. ``grid=(rows, columns)`` is needed where the patches form no square. ``tokenizer.card`` says what
    it was trained on.

    Args:
        path: output of ``train_tokenizer``, one of its checkpoints, or a released file.

    Raises:
        CheckpointError: no checkpoint, a damaged one, or one of something else.

    Example:
        >>> tokenizer = deltacache.load_tokenizer("tokenizer/", device="cpu")
        >>> tokenizer.encode(previous, current).shape
        torch.Size([1, 384])
    """
    from deltacache.models import checkpoints

    return _ready(checkpoints.load_tokenizer(Path(model_path(path))), device)


def load_world(path: AnyPath, *, device: str = "auto", architecture: str | None = None) -> "WorldModel":
    """A trained or released world model, frozen and in eval mode, float32.

    ``rollout(context_tokens, timestamps_s, noise)`` gives futures (B, S, H, ...) after a context (B, C, ...), for times
    (B, C+H) in seconds; ``draw_noise((B, S, H, world.noise_width()), generator)`` gives the noise. ``world.card`` says
    what it was trained on.

    Args:
        path: output of ``train_world``, one of its checkpoints, or a released file.
        architecture: of a released file that is not a DeltaWorld, such as ``dino_world``.

    Raises:
        CheckpointError: no checkpoint, a damaged one, or one of something else.

    Example:
        >>> world = deltacache.load_world("world/", device="cpu")
        >>> noise = world.draw_noise((1, 20, 4, world.noise_width()), torch.Generator().manual_seed(0))
        >>> world.rollout(context, timestamps_s, noise).shape
        torch.Size([1, 20, 4, 384])
    """
    from deltacache.models import checkpoints

    return _ready(checkpoints.load_world(Path(model_path(path)), architecture=architecture), device)


def _ready(loaded: Any, device: str) -> Any:
    from deltacache.models.devices import choose_device
    from deltacache.models.weights import ModelCard

    model = loaded.model.to(choose_device(device)).eval().requires_grad_(False)
    model.card = ModelCard(loaded.fingerprint, loaded.metadata)
    return model


def _several(paths: AnyPath | Sequence[AnyPath]) -> list[AnyPath]:
    return [paths] if isinstance(paths, str | Path) else list(paths)


def _world_path(text: str) -> tuple[str | None, Path]:
    """Of ``[ARCHITECTURE=]PATH``."""
    name, equals, path = text.partition("=")
    if equals and re.fullmatch(r"[A-Za-z_][\w.]*(:[A-Za-z_]\w*)?", name):
        return name, _model_path(path)
    return None, _model_path(text)


def _model_path(path: AnyPath) -> Path:
    """Absolute, for workers of a cluster have other working directories."""
    return Path(model_path(path)).absolute()


def data_place(source: AnyPath) -> str:
    """``place`` of what is read; the downloaded files of a name of the hub."""
    return place(dataset_place(source))


def backbone_source(name: str) -> str:
    """A folder by its absolute path, for workers of a cluster have other working directories; a hub id as it is."""
    return place(name) if Path(name).is_dir() else name


def place(source: AnyPath) -> str:
    """A local path made absolute, for workers of a cluster have other working directories; a url as it is.

    Raises:
        DeltacacheError: a url with one slash or of chained protocols, which is not a path either; one of the hub.
    """
    from deltacache.pipeline.storage.storage import refused_place

    text = str(source)
    refuse_output(text)
    if "://" in text:
        return text
    if refused := refused_place(text):
        raise DeltacacheError(refused)
    return str(Path(text).absolute())
