"""The ``deltacache`` command: parse, build, call. What is done lies in the rooms behind it."""

import os
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, cast

import typer
from typer.core import TyperGroup
from typer.main import get_command

from deltacache import __version__, api
from deltacache.cli_options import (
    AccumulationOpt,
    AddressOpt,
    BackboneOpt,
    ClipFormat,
    ContinueFromOpt,
    DatasetOutArg,
    DepthMapsOpt,
    DeviceOpt,
    DryRunOpt,
    EigenListOpt,
    EvaluationCacheOpt,
    EvaluationWorkersOpt,
    ForesightTask,
    FromStage,
    HeadPreset,
    HeadTarget,
    InitFromOpt,
    OutArg,
    Padding,
    Precision,
    PrecisionOpt,
    PresetOpt,
    Rate,
    ResumeOpt,
    SeedOpt,
    SetOpt,
    SourceArg,
    StageOpt,
    TrainingDryRunOpt,
    TrainSeedOpt,
    WaitOpt,
    WorkersOpt,
    flags_of,
    local_folder,
    named_paths,
    parsed_horizons,
    usage_errors,
    with_name,
)
from deltacache.evaluate.settings import BenchmarkEvaluation
from deltacache.schemas.arguments import arguments_of, build, changed_by
from deltacache.schemas.configs import HeadConfig, TokenizerConfig, WorldConfig
from deltacache.schemas.errors import DeltacacheError, out_of_memory_text
from deltacache.schemas.foresight import ForesightEvaluation, ForesightHeadConfig, FrameFeatureConfig
from deltacache.schemas.jobs import DEFAULT_BACKBONE, ExtractionSettings
from deltacache.schemas.prediction import PredictionSettings
from deltacache.schemas.secrets import without_secrets

PIPELINE, TRAINING, EVALUATION, TOOLS = "Pipeline", "Training", "Evaluation", "Tools"
_PRESETS_OWN, _TOKENIZERS_OWN = "the preset's", "the tokenizer's"

_NOT_OF_HEADS = ("accumulation", "keep", "probe_every", "wandb")


class _Grouped(TyperGroup):
    """``--help`` with the commands in groups, and each summary whole."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        commands = [(name, self.commands[name]) for name in self.list_commands(ctx)]
        for panel in (PIPELINE, TRAINING, EVALUATION, TOOLS):
            rows = [
                (name, command.get_short_help_str(limit=1000))
                for name, command in commands
                if getattr(command, "rich_help_panel", None) == panel
            ]
            with formatter.section(panel):
                formatter.write_dl(rows)


app = typer.Typer(
    cls=_Grouped,
    help="Cache DINOv3 patch tokens and delta tokens once, then train and evaluate world models.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

_UsageError: Any = typer.BadParameter.__base__  # click's, whichever click typer has
_state = {"debug": False}


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of a rejected command.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    _state["debug"] = debug


@app.command("extract-features", rich_help_panel=PIPELINE)
@flags_of(ExtractionSettings)
def extract_features(
    source: SourceArg, out: DatasetOutArg, dry_run: DryRunOpt = False, **settings: Any
) -> None:
    """Decode videos and cache the patch tokens of a frozen backbone.

    Example: deltacache extract-features videos/ features/ --backbone tiny --image-size 256 --views 2
    """
    from deltacache.terminal import terminal_reporter

    reporter = terminal_reporter()
    with usage_errors():
        job = api.extraction_settings(source, settings)
    if dry_run:
        from deltacache.pipeline.jobs.preview import preview_extraction

        reporter.line(preview_extraction(job, api.place(out), reporter.line))
        return
    api.run_extraction(source, out, reporter, settings)


@app.command("fit-pca", rich_help_panel=PIPELINE)
def fit_pca(
    features: Annotated[str, typer.Argument(help="Feature dataset, local or on s3://, gs://.")],
    out: Annotated[Path, typer.Argument(help="Folder for the PCA, new or empty.")],
    components: Annotated[int, typer.Option(min=1, help="Channels to keep.")] = 1152,
    frames: Annotated[
        int | None, typer.Option(min=1, help="Frames to take, spread evenly. [default: all]")
    ] = None,
    device: DeviceOpt = "auto",
) -> None:
    """Fit a PCA on standardised patch tokens, for --pca of extract-features.

    Example: deltacache fit-pca features/ pca/ --components 1152
    """
    from deltacache.pipeline.jobs import pca_fit
    from deltacache.terminal import terminal_reporter

    pca_fit.fit_pca(api.place(features), out, components, terminal_reporter(), frames=frames, device=device)


@app.command("train-tokenizer", rich_help_panel=TRAINING)
@flags_of(TokenizerConfig, defaults=_PRESETS_OWN)
def train_tokenizer(
    features: Annotated[str, typer.Argument(help="Feature dataset, local or on s3://, gs://.")],
    out: OutArg,
    preset: PresetOpt = "released",
    stage: StageOpt = None,
    assignments: SetOpt = None,
    init_from: InitFromOpt = None,
    continue_from: ContinueFromOpt = None,
    resume: ResumeOpt = False,
    workers: WorkersOpt = 1,
    ray_address: AddressOpt = None,
    wait_for_nodes: WaitOpt = 600.0,
    dry_run: TrainingDryRunOpt = False,
    device: DeviceOpt = "auto",
    **changes: Any,
) -> None:
    """Train DeltaTok: one token for the change between two frames.

    Example: deltacache train-tokenizer features/ tokenizer/ --preset tiny --steps 2000
    """
    from deltacache.terminal import terminal_reporter

    with usage_errors():
        api.train_tokenizer(
            features,
            out,
            preset=preset,
            stage=stage,
            init_from=init_from,
            continue_from=continue_from,
            resume=resume,
            device=device,
            workers=workers,
            ray_address=ray_address,
            wait_for_nodes=wait_for_nodes,
            assignments=assignments or (),
            dry_run=dry_run,
            reporter=terminal_reporter(),
            **changes,
        )


@app.command(rich_help_panel=PIPELINE)
@flags_of(
    ExtractionSettings,
    without=("dtype",),
    defaults={
        "backbone": _TOKENIZERS_OWN,
        "layers": _TOKENIZERS_OWN,
        "image_size": f"{_TOKENIZERS_OWN}, else 512",
        "spacing": f"{_TOKENIZERS_OWN}, else 0.04 0.3333",
    },
)
def tokenize(
    source: Annotated[str, typer.Argument(help="Feature dataset, or videos as for extract-features.")],
    out: DatasetOutArg,
    tokenizer: Annotated[Path, typer.Option(help="Output of train-tokenizer, or a released checkpoint.")],
    **settings: Any,
) -> None:
    """Turn a feature dataset, or videos directly, into delta tokens.

    From videos it takes the flags of extract-features, and patch tokens never touch the disk. Backbone, layers, size
    and spacing are those that the tokenizer was trained with, unless given.

    Example: deltacache tokenize features/ deltas/ --tokenizer tokenizer/
    """
    from deltacache.terminal import terminal_reporter

    with usage_errors():
        api.run_tokenize(source, out, tokenizer, terminal_reporter(), settings)


@app.command("train-world", rich_help_panel=TRAINING)
@flags_of(WorldConfig, defaults=_PRESETS_OWN)
def train_world(
    source: Annotated[
        str,
        typer.Argument(
            help="Delta dataset, local or on s3://, gs://; for models of patch tokens (DINO-world) a feature dataset."
        ),
    ],
    out: OutArg,
    preset: PresetOpt = "released",
    stage: StageOpt = None,
    assignments: SetOpt = None,
    init_from: InitFromOpt = None,
    continue_from: ContinueFromOpt = None,
    resume: ResumeOpt = False,
    workers: WorkersOpt = 1,
    ray_address: AddressOpt = None,
    wait_for_nodes: WaitOpt = 600.0,
    dry_run: TrainingDryRunOpt = False,
    device: DeviceOpt = "auto",
    **changes: Any,
) -> None:
    """Train a world model that predicts the next frame, such as DeltaWorld on delta tokens.

    Example: deltacache train-world deltas/ world/ --preset tiny --candidates 32 --steps 1000
    """
    from deltacache.terminal import terminal_reporter

    with usage_errors():
        api.train_world(
            source,
            out,
            preset=preset,
            stage=stage,
            init_from=init_from,
            continue_from=continue_from,
            resume=resume,
            device=device,
            workers=workers,
            ray_address=ray_address,
            wait_for_nodes=wait_for_nodes,
            assignments=assignments or (),
            dry_run=dry_run,
            reporter=terminal_reporter(),
            **changes,
        )


@app.command("train-systems", rich_help_panel=TRAINING)
def train_systems(
    features: Annotated[
        str,
        typer.Argument(help="Feature dataset that all systems are trained from, local or on s3://, gs://."),
    ],
    out: OutArg,
    preset: Annotated[
        str, typer.Option(help="table2 (Tables 2 and C), tiny-table2, tiny-tokens, or a YAML file.")
    ] = "table2",
    seed: TrainSeedOpt = None,
    accumulation: AccumulationOpt = None,
    workers: WorkersOpt = 1,
    ray_address: AddressOpt = None,
    wait_for_nodes: WaitOpt = 600.0,
    device: DeviceOpt = "auto",
) -> None:
    """Train several world models on the same features to compare them; finished ones are skipped.

    Example: deltacache train-systems features/ systems/ --preset tiny-table2
    """
    from deltacache.systems.training import systems_preset
    from deltacache.systems.training import train_systems as train
    from deltacache.terminal import terminal_reporter
    from deltacache.train.workers.trainable import Workers

    config = systems_preset(preset).changed(seed, accumulation)
    train(
        config,
        api.place(features),
        out,
        Workers(workers, ray_address, wait_for_nodes),
        device,
        terminal_reporter(),
    )


@app.command("compare-systems", rich_help_panel=EVALUATION)
def compare_systems(
    out: Annotated[Path, typer.Argument(help="Output of train-systems; the table is written there.")],
    features: Annotated[str, typer.Argument(help="Feature dataset that the systems were trained from.")],
    data: Annotated[
        list[str],
        typer.Option(
            help="NAME=PATH, may be repeated: vspw, cityscapes or kitti with its root; clips with a feature dataset."
        ),
    ],
    evaluation: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the evaluation; if it is not the default, the table is written there too. "
            "[default: OUT/evaluation]"
        ),
    ] = None,
    head: Annotated[list[str] | None, typer.Option(help="NAME=FILE: the linear head of a benchmark.")] = None,
    backbone: BackboneOpt = None,
    image_size: Annotated[
        int | None, typer.Option(min=16, help="Side of the crops in pixels. [default: that of FEATURES]")
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="Context frames that the model sees.")] = 4,
    horizons: Annotated[str, typer.Option(help="Steps after the context, such as 1,3.")] = "1,3",
    samples: Annotated[int, typer.Option(min=1, help="Futures sampled per sequence.")] = 20,
    seed: SeedOpt = 0,
    futures: Annotated[
        Path | None, typer.Option(help="For clips: CSV or Parquet of true futures; adds mode coverage.")
    ] = None,
    kitti_split: EigenListOpt = None,
    cache: EvaluationCacheOpt = None,
    measure: Annotated[
        bool, typer.Option(help="Measure time and memory of a training step on this machine.")
    ] = True,
    batch_size: Annotated[int, typer.Option(min=1, help="Clips of the measured step.")] = 8,
    precision: PrecisionOpt = Precision.auto,
    workers: EvaluationWorkersOpt = None,
    ray_address: AddressOpt = None,
    wait_for_nodes: WaitOpt = 600.0,
    device: DeviceOpt = "auto",
) -> None:
    """Evaluate all systems of train-systems together and write one table of quality and cost.

    Example: deltacache compare-systems systems/ features/ --data clips=test-features/
    """
    from deltacache.evaluate.settings import CLIPS
    from deltacache.evaluate.settings import evaluation as evaluation_settings
    from deltacache.pipeline.datasets.dataset import open_dataset
    from deltacache.systems.table import CostPlan
    from deltacache.systems.table import compare_systems as compare
    from deltacache.systems.training import open_systems
    from deltacache.terminal import terminal_reporter

    config, paths = open_systems(out)
    card = open_dataset(api.place(features), "features").card
    own_size = card.image_size if isinstance(card.image_size, int) else None
    named, steps = named_paths("--data", data), parsed_horizons(horizons)
    given = api.backbone_source(backbone) if backbone else None
    settings = evaluation_settings(
        named,
        heads=named_paths("--head", head or []),
        out=evaluation or paths.evaluation,
        backbone=given or card.backbone.id,
        **paths.models(config),
        image_size=image_size or own_size or 512,
        context=context,
        horizons=steps,
        samples=samples,
        seed=seed,
        futures=futures,
        kitti_split=kitti_split,
        cache=cache,
        precision=precision.value,
        workers=workers,
        ray_address=ray_address,
        wait_for_nodes_s=wait_for_nodes,
        device=device,
    )
    crops = 1 if set(named) == {CLIPS} else 2
    measured = batch_size if measure else None
    plan = CostPlan(context, max(steps), samples, crops, measured, device, given)
    compare(out, api.place(features), settings, plan, terminal_reporter())


@app.command("train-head", rich_help_panel=TRAINING)
@flags_of(HeadConfig, defaults=_PRESETS_OWN, without=_NOT_OF_HEADS)
def train_head(
    head: Annotated[HeadTarget, typer.Argument(help="Benchmark of a linear head, or rgb for pictures.")],
    root: Annotated[
        Path,
        typer.Argument(
            help="Root of the benchmark in its published layout; for rgb, any folder of pictures."
        ),
    ],
    out: OutArg,
    backbone: BackboneOpt = None,
    preset: Annotated[HeadPreset, typer.Option(help="Recipe to start from.")] = HeadPreset.released,
    assignments: SetOpt = None,
    kitti_split: Annotated[
        Path | None,
        typer.Option(
            help="List of KITTI's training frames; test drives are left out. [default: the depth maps in train/]"
        ),
    ] = None,
    kitti_test: Annotated[
        Path | None,
        typer.Option(
            help="List of KITTI's test frames, whose drives are left out. With --split val, the frames to train "
            "on. [default: eigen_test_files.txt in ROOT, which must exist]"
        ),
    ] = None,
    precision: PrecisionOpt = Precision.auto,
    dry_run: TrainingDryRunOpt = False,
    resume: ResumeOpt = False,
    device: DeviceOpt = "auto",
    **changes: Any,
) -> None:
    """Train a benchmark's linear head, or an RGB decoder, on features of a frozen backbone.

    Every step trains on two crops of each frame in the batch.

    Example: deltacache train-head cityscapes Cityscapes/ head-cityscapes/ --image-size 512
    """
    from deltacache.pipeline.work.encoders import resolve_precision
    from deltacache.schemas.configs import head_preset, rgb_preset
    from deltacache.terminal import terminal_reporter
    from deltacache.train.heads.setup import HeadRequest
    from deltacache.train.heads.training import train_head as train_linear_head
    from deltacache.train.heads.training import train_rgb_decoder

    for flag, listed in (("--kitti-split", kitti_split), ("--kitti-test", kitti_test)):
        if listed is not None and head is not HeadTarget.kitti:
            raise typer.BadParameter(f"{flag} concerns kitti, not {head.value}: leave it out")
    if head is HeadTarget.rgb and changes["split"] not in (None, "train"):
        raise typer.BadParameter("--split concerns benchmarks: rgb learns from all pictures below ROOT")
    source = api.backbone_source(backbone or DEFAULT_BACKBONE)
    request = HeadRequest(root, out, source, resume, device, kitti_split, kitti_test, dry_run=dry_run)
    base = rgb_preset(preset.value) if head is HeadTarget.rgb else head_preset(head.value, preset.value)
    seen = base.frames.model_copy(update={"precision": resolve_precision(device, precision.value)})
    if head is HeadTarget.rgb:  # linear heads stay in float32
        changes["precision"] = precision.value
    with usage_errors():
        config = api.trainer_settings(
            cast("Any", base.model_copy(update={"frames": seen})),
            out,
            resume=resume,
            assignments=assignments or (),
            **changes,
        )
    if isinstance(config, HeadConfig):
        train_linear_head(request, config, terminal_reporter())
    else:
        train_rgb_decoder(request, config, terminal_reporter())


@app.command(rich_help_panel=EVALUATION)
@flags_of(BenchmarkEvaluation)
def evaluate(
    out: Annotated[Path, typer.Argument(help="Folder for metrics.parquet, sequences.parquet, report.html.")],
    data: Annotated[
        list[str],
        typer.Option(
            help="NAME=PATH, may be repeated: vspw, cityscapes or kitti with its root; clips with a feature dataset."
        ),
    ],
    head: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE: the linear head of a benchmark; may be repeated.")
    ] = None,
    backbone: BackboneOpt = None,
    tokenizer: Annotated[
        list[Path] | None,
        typer.Option(help="Output of train-tokenizer, or a released checkpoint; may be repeated."),
    ] = None,
    world: Annotated[
        list[str] | None,
        typer.Option(help="Output of train-world, or [ARCHITECTURE=]FILE as released; may be repeated."),
    ] = None,
    futures: Annotated[
        Path | None,
        typer.Option(help="For clips: CSV or Parquet (video_uri, scene, outcome); adds mode coverage."),
    ] = None,
    predictions: Annotated[
        list[str] | None,
        typer.Option(help="NAME=DIR: futures of a video generator (export-contexts); may be repeated."),
    ] = None,
    **settings: Any,
) -> None:
    """Score reconstructions and sampled futures; writes Parquet tables and a report.

    Example: deltacache evaluate results/ --data vspw=VSPW/ --head vspw=head.bin --tokenizer tokenizer/ --world world/
    """
    from deltacache.evaluate.results import show_results
    from deltacache.terminal import terminal_reporter

    reporter = terminal_reporter()
    with usage_errors():
        flags = {
            **settings,
            "head": head,
            "backbone": backbone,
            "tokenizer": tokenizer,
            "world": world,
            "futures": futures,
            "predictions": predictions,
        }
        results = api.evaluate(out, reporter=reporter, **_of_evaluation(data, flags))
    show_results(results.folder, reporter)


@app.command(rich_help_panel=EVALUATION)
@flags_of(PredictionSettings)
def predict(
    video: Annotated[
        str, typer.Argument(help="A video: file, url or folder of frames; or a feature dataset (--clip).")
    ],
    out: Annotated[
        Path,
        typer.Argument(help="Folder for page, movie and tensors: new or empty.", callback=local_folder),
    ],
    world: Annotated[str, typer.Option(help="Output of train-world, or [ARCHITECTURE=]FILE as released.")],
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Output of train-tokenizer, or a released checkpoint."),
    ] = None,
    head: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=FILE, may be repeated: linear head of vspw, cityscapes or kitti; adds classes or depth."
        ),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(
            help="Hub id, Hugging Face directory, or 'tiny'. [default: what the models were trained on]"
        ),
    ] = None,
    **settings: Any,
) -> None:
    """Sample futures of one video: tensors, a page that shows them side by side, and a movie.

    Example: deltacache predict street.mp4 futures/ --tokenizer tokenizer/ --world world/ --at 2.0 --steps 8
    """
    from deltacache.terminal import terminal_reporter

    with usage_errors():
        asked = _of_prediction(
            {**settings, "world": world, "tokenizer": tokenizer, "head": head, "backbone": backbone}
        )
        api.predict(video, out, reporter=terminal_reporter(), **asked)


@app.command("train-foresight-head", rich_help_panel=TRAINING)
@flags_of(ForesightHeadConfig, defaults=_PRESETS_OWN, without=_NOT_OF_HEADS)
def train_foresight_head(
    task: Annotated[ForesightTask, typer.Argument(help="What the head predicts.")],
    root: Annotated[Path, typer.Argument(help="Cityscapes in its published layout.")],
    out: OutArg,
    depth: DepthMapsOpt = None,
    preset: Annotated[HeadPreset, typer.Option(help="Recipe to start from.")] = HeadPreset.released,
    assignments: SetOpt = None,
    precision: PrecisionOpt = Precision.auto,
    dry_run: TrainingDryRunOpt = False,
    resume: ResumeOpt = False,
    device: DeviceOpt = "auto",
    **changes: Any,
) -> None:
    """Train a linear head on features of whole frames of Cityscapes, for evaluate-foresight.

    Example: deltacache train-foresight-head segmentation Cityscapes/ head/ --layers 2,5,8,11 --pca pca/
    """
    from deltacache.pipeline.work.encoders import resolve_precision
    from deltacache.schemas.foresight import foresight_head
    from deltacache.terminal import terminal_reporter
    from deltacache.train.heads.foresight import train_foresight_head as train

    of_features = {name: changes.pop(name) for name in arguments_of(FrameFeatureConfig)}
    if of_features["backbone"] is not None:
        of_features["backbone"] = api.backbone_source(of_features["backbone"])
    of_features["precision"] = resolve_precision(device, precision.value)
    with usage_errors():
        base = foresight_head(task.value, preset.value, build(FrameFeatureConfig, of_features), depth)
        config = api.trainer_settings(base, out, resume=resume, assignments=assignments or (), **changes)
    reporter = terminal_reporter()
    train(root, out, config, resume=resume, device=device, reporter=reporter, dry_run=dry_run)


@app.command("evaluate-foresight", rich_help_panel=EVALUATION)
@flags_of(ForesightEvaluation)
def evaluate_foresight(
    root: Annotated[Path, typer.Argument(help="Cityscapes in its published layout.")],
    out: Annotated[Path, typer.Argument(help="Folder for metrics.parquet and sequences.parquet.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="Output of train-tokenizer on features of whole frames.")
    ] = None,
    world: Annotated[
        list[Path] | None, typer.Option(help="Output of train-world; may be given twice.")
    ] = None,
    head: Annotated[Path | None, typer.Option(help="Segmentation head of train-foresight-head.")] = None,
    depth_head: Annotated[Path | None, typer.Option(help="Depth head of train-foresight-head.")] = None,
    depth: DepthMapsOpt = None,
    precision: PrecisionOpt = Precision.auto,
    **settings: Any,
) -> None:
    """Score futures of whole frames of Cityscapes by DINO-Foresight's protocol (the paper's Table D).

    Example: deltacache evaluate-foresight Cityscapes/ results/ --layers 2,5,8,11 --pca pca/ --world world/ --head head/
    """
    from deltacache.evaluate.results import evaluate_and_show
    from deltacache.pipeline.work.encoders import resolve_precision
    from deltacache.terminal import terminal_reporter

    if settings["backbone"] is not None:
        settings["backbone"] = api.backbone_source(settings["backbone"])
    fixed = {
        "out": out,
        "root": root,
        "tokenizer": tokenizer,
        "worlds": tuple(world or ()),
        "segmentation_head": head,
        "depth_head": depth_head,
        "depth": depth,
    }
    with usage_errors():
        asked = build(ForesightEvaluation, {**settings, **fixed})
        resolved = resolve_precision(asked.device, precision.value)
        asked = changed_by(asked, [f"features.precision={resolved}"])
    evaluate_and_show(asked, terminal_reporter())


@app.command("export-contexts", rich_help_panel=EVALUATION)
def export_contexts(
    out: OutArg,
    data: Annotated[
        list[str], typer.Option(help="NAME=PATH, may be repeated: vspw, cityscapes or kitti with its root.")
    ],
    horizons: Annotated[str, typer.Option(help="Steps after the context, such as 1,3.")] = "1,3",
    context: Annotated[int, typer.Option(min=1, help="Context frames of the evaluation.")] = 4,
    frames: Annotated[int, typer.Option(min=1, help="Frames that the generator sees.")] = 9,
    padding: Annotated[
        Padding, typer.Option(help="Frames as they are, or 512 high in 640 x 1024 for Cosmos.")
    ] = Padding.plain,
    rate: Annotated[Rate, typer.Option(help="Frames as recorded, or one per step of the evaluation.")] = (
        Rate.native
    ),
    clip_format: Annotated[ClipFormat, typer.Option("--format", help="Pictures or videos.")] = (
        ClipFormat.frames
    ),
    kitti_split: Annotated[
        Path | None, typer.Option(help="Eigen test list. [default: eigen_test_files.txt in KITTI's root]")
    ] = None,
) -> None:
    """Write the context frames from which a video generator predicts the benchmarks' labelled frames.

    Example: deltacache export-contexts contexts/ --data vspw=VSPW/ --padding cosmos --format mp4
    """
    from deltacache.evaluate import generators as export
    from deltacache.terminal import terminal_reporter

    wanted = export.context_export(
        named_paths("--data", data),
        horizons=parsed_horizons(horizons),
        context=context,
        frames=frames,
        padding=padding.value,
        rate=rate.value,
        clip_format=clip_format.value,
        kitti_split=kitti_split,
    )
    export.export_contexts(wanted, out, terminal_reporter())


@app.command(rich_help_panel=EVALUATION)
def report(
    runs: Annotated[list[Path], typer.Argument(help="Outputs of evaluate; several are shown side by side.")],
    out: Annotated[
        Path | None,
        typer.Option(help="File of the page. [default: report.html in RUN; for several runs ./report.html]"),
    ] = None,
) -> None:
    """Write one page about an evaluation, or about several side by side.

    Example: deltacache report results/ other-results/ --out report.html
    """
    from deltacache.evaluate.report.page import write_page

    typer.echo(f"report: {write_page(runs, out)}")


@app.command(rich_help_panel=EVALUATION)
def compare(
    a: Annotated[Path, typer.Argument(help="Output of evaluate.")],
    b: Annotated[Path, typer.Argument(help="Output of evaluate on the same data.")],
    every_metric: Annotated[
        bool, typer.Option("--every-metric", help="Compare all metrics of each task, not only the main ones.")
    ] = False,
) -> None:
    """Compare evaluations A and B, with intervals of the paired differences.

    Example: deltacache compare results/ other-results/
    """
    from rich.console import Console

    from deltacache.evaluate.comparing import compare_runs, print_comparison

    print_comparison(compare_runs(a, b), Console(), every_metric=every_metric)


@app.command(rich_help_panel=TOOLS)
def doctor(
    output: Annotated[
        str | None, typer.Option(help="Folder that commands would write to; its disk is checked too.")
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Measure rates for at most a minute, and say how long the published chains would take here.",
        ),
    ] = False,
    videos: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of videos for the estimated hours. [default: Kinetics-700's 545,000]"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    device: DeviceOpt = "auto",
) -> None:
    """Say what this machine has, what is missing and how to get it; run it first, and paste it into bug reports.

    Exit code 1 if something is broken without which no command works. No passwords, tokens or user names of urls
    are printed.

    Example: deltacache doctor --measure --output /data/features
    """
    import json
    from dataclasses import asdict

    from deltacache.doctor.facts import examine
    from deltacache.doctor.shown import examination_text, measurement_text

    found = examine(output)
    if not as_json:
        typer.echo(examination_text(found))
    measured = None
    if measure:
        from deltacache.doctor.measured import KINETICS_VIDEOS
        from deltacache.doctor.measured import measure as measure_rates
        from deltacache.models.devices import choose_device

        folder = Path.cwd() if output is None or "://" in output else Path(output)
        say = (lambda text: None) if as_json else (lambda text: typer.echo(f"\n{text}"))
        measured = measure_rates(choose_device(device), folder, videos or KINETICS_VIDEOS, say)
        if not as_json:
            typer.echo(f"\n{measurement_text(measured)}")
    if as_json:
        problems = [asdict(each) for each in found.problems]
        report = {**found.facts, "problems": problems, "healthy": found.healthy}
        if measured is not None:
            report["measured"] = measured.as_json()
        typer.echo(json.dumps(report, indent=2))
    if not found.healthy:
        raise typer.Exit(1)


@app.command(rich_help_panel=TOOLS)
def inspect(
    path: Annotated[str, typer.Argument(help="Dataset, training output, model or evaluation.")],
    pictures: Annotated[
        Path | None,
        typer.Option(help="Write a contact sheet of a feature dataset here (.png or .html)."),
    ] = None,
) -> None:
    """Say what something is, what it was made from and how large it is.

    Example: deltacache inspect features/ --pictures sheet.png
    """
    from deltacache.descriptions import describe_output, write_pictures

    typer.echo(describe_output(path))
    if pictures is not None:
        typer.echo(f"pictures: {write_pictures(path, pictures)}")


@app.command(rich_help_panel=TOOLS)
def verify(
    path: Annotated[str, typer.Argument(help="Feature or delta dataset, local or on s3://, gs://.")],
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Remove exactly what is damaged, so that the next run makes it again."),
    ] = False,
) -> None:
    """Read every shard of a dataset and check sizes, checksums, index and receipts.

    Example: deltacache verify features/
    """
    from deltacache.pipeline.datasets.verification import repair_dataset, verify_dataset
    from deltacache.terminal import terminal_reporter

    reporter = terminal_reporter()
    if repair:
        typer.echo(str(repair_dataset(api.place(path), reporter)))
        return
    problems = verify_dataset(api.place(path), reporter)
    for problem in problems:
        typer.echo(str(problem))
    if problems:
        raise DeltacacheError(
            f"{path}: {len(problems)} problems, listed above. `deltacache verify {path} --repair` drops what is "
            "damaged, and the command that made the dataset makes it again"
        )
    typer.echo(f"{path}: no damage found")


@app.command(rich_help_panel=PIPELINE)
def run(
    config: Annotated[Path, typer.Argument(help="YAML of the whole chain; see docs/chain.md.")],
    out: OutArg,
    from_stage: Annotated[
        FromStage | None,
        typer.Option(help="Make this stage and all later ones again."),
    ] = None,
) -> None:
    """Run the whole chain; finished stages are skipped.

    Example: deltacache run chain.yaml out/
    """
    from deltacache.chain import ChainConfig, run_chain
    from deltacache.evaluate.results import show_results
    from deltacache.schemas.configs import load_config
    from deltacache.terminal import terminal_reporter

    reporter = terminal_reporter()
    paths = run_chain(
        load_config(config, ChainConfig), out, reporter, from_stage.value if from_stage else None
    )
    show_results(paths.evaluation, reporter)


@app.command(rich_help_panel=PIPELINE)
def demo(
    out: Annotated[Path, typer.Argument(help="Output folder; an unfinished demo is continued.")],
    seed: SeedOpt = 0,
) -> None:
    """Run the whole chain on synthetic videos with tiny models, in minutes on a CPU.

    Example: deltacache demo demo-output/
    """
    from deltacache.demo.demo import run_demo
    from deltacache.terminal import terminal_reporter

    run_demo(out, seed, terminal_reporter())


@app.command(
    "show-config",
    rich_help_panel=TOOLS,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
)
def show_config(
    context: typer.Context,
    command: Annotated[
        str, typer.Argument(help="The command with its arguments and flags, as you would run it.")
    ],
) -> None:
    """Print the resolved settings of a command as YAML, without running it.

    Example: deltacache show-config train-world deltas/ world/ --preset released --set training.learning_rate=3e-4
    """
    from deltacache.schemas.configs import config_yaml

    resolvers = {
        "extract-features": lambda source, out, dry_run, **rest: api.extraction_settings(source, rest),
        "tokenize": lambda source, out, tokenizer, **rest: api.tokenize_settings(source, tokenizer, rest),
        "train-tokenizer": lambda features, **rest: api.tokenizer_settings(**_of_recipe(rest)),
        "train-world": lambda source, **rest: api.world_settings(**_of_recipe(rest)),
        "evaluate": lambda out, data, **rest: api.evaluation_settings(out, **_of_evaluation(data, rest)),
        "predict": lambda video, out, **rest: api.prediction_settings(video, out, **_of_prediction(rest)),
    }
    if command not in resolvers:
        raise typer.BadParameter(f"{command} has no settings to show: give one of {', '.join(resolvers)}")
    parser: Any = get_command(app)
    asked = parser.commands[command].make_context(command, list(context.args), parent=context.parent)
    with usage_errors():
        typer.echo(config_yaml(resolvers[command](**asked.params)), nl=False)


def _of_recipe(flags: dict[str, Any]) -> dict[str, Any]:
    """Of a trainer's flags, those that its settings depend on."""
    elsewhere = ("device", "ray_address", "wait_for_nodes", "dry_run")
    kept = {name: value for name, value in flags.items() if name not in elsewhere}
    return {**kept, "assignments": kept["assignments"] or ()}


def _of_evaluation(data: list[str], flags: dict[str, Any]) -> dict[str, Any]:
    """Flags of ``evaluate`` as its function takes them."""
    return {
        **flags,
        "data": named_paths("--data", data),
        "head": named_paths("--head", flags["head"] or []),
        "predictions": named_paths("--predictions", [with_name(text) for text in flags["predictions"] or []]),
        "tokenizer": flags["tokenizer"] or (),
        "world": flags["world"] or (),
    }


def _of_prediction(flags: dict[str, Any]) -> dict[str, Any]:
    """Flags of ``predict`` as its function takes them."""
    return {**flags, "head": named_paths("--head", flags["head"] or [])}


@app.command(rich_help_panel=TOOLS)
def flops(
    preset: Annotated[
        str,
        typer.Option(
            help="Preset, such as released, paper, dino-world-large, table2; or a YAML file of a recipe or of systems."
        ),
    ] = "released",
    backbone: Annotated[
        str, typer.Option(help="vits16, vitb16, vitl16, …, tiny, or a folder with a config.json.")
    ] = "vitb16",
    image_size: Annotated[
        str, typer.Option(help="Pixels of a crop: 256, or rows x columns: 448x896.")
    ] = "256",
    context: Annotated[int, typer.Option(min=1, help="Context frames that the model sees.")] = 4,
    horizon: Annotated[int, typer.Option(min=1, help="Frames to predict.")] = 3,
    samples: Annotated[int, typer.Option(min=1, help="Futures to sample.")] = 20,
    crops: Annotated[int, typer.Option(min=1, help="Crops per image.")] = 2,
    frames: Annotated[int, typer.Option(min=2, help="Frames per training clip.")] = 8,
    candidates: Annotated[
        int | None,
        typer.Option(min=1, help="Number of candidates, K of best-of-many. [default: the preset's]"),
    ] = None,
    hidden_size: Annotated[
        int | None, typer.Option(min=1, help="Width of the tokens. [default: the backbone's]")
    ] = None,
    heads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Attention heads. [default: the preset's; heads of 64 dims if tokens have another width]",
        ),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure time and memory on this machine, with random weights.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Clips of a measured training step.")] = 1,
    device: DeviceOpt = "auto",
) -> None:
    """Count what the paper's systems compute: the parts, all futures of an image, a training step (Tables 2 and B).

    Example: deltacache flops --preset released --image-size 256 --candidates 16
    """
    from deltacache.costs import CostRequest, costs_text, count_costs
    from deltacache.terminal import terminal_reporter

    with usage_errors():
        request = build(
            CostRequest,
            {
                "preset": preset,
                "backbone": api.backbone_source(backbone),
                "hidden_size": hidden_size,
                "heads": heads,
                "image_size": image_size,
                "context": context,
                "horizon": horizon,
                "samples": samples,
                "crops": crops,
                "frames": frames,
                "candidates": candidates,
                "batch_size": batch_size,
            },
        )
    costs = count_costs(request, device if measure else None, terminal_reporter())
    typer.echo(f"\n{costs_text(costs)}")


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As Python does, without the credentials of urls, which errors of libraries carry."""
    sys.stderr.write(without_secrets("".join(traceback.format_exception(kind, error, trace))))


def main() -> None:
    """Entry point: exit code 0 done, 1 refused or failed with one readable message, 2 wrong usage."""
    if sys.getfilesystemencoding() != "utf-8":
        # Ray, Parquet and JSON take names in UTF-8 alone; in another locale names beyond ASCII end in errors.
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "PYTHONUTF8": "1"})
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # Idle threads of a parallel sum sleep instead of spinning: on a busy machine steps are up to 15 times faster.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Ray prints a paragraph for every worker that dies; the job says what it does about it.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".*")
    sys.excepthook = _print_traceback
    try:  # not app(), which puts another hook in place of this one
        sys.exit(get_command(app)(standalone_mode=False))
    except _UsageError as error:
        error.message = without_secrets(error.message)
        error.show()
        sys.exit(error.exit_code)
    except typer.Abort:
        sys.exit(1)
    except DeltacacheError as error:
        if _state["debug"]:
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    except RuntimeError as error:
        if (
            _state["debug"] or type(error).__name__ != "OutOfMemoryError"
        ):  # torch's, which is not imported here
            raise
        typer.echo(f"error: {out_of_memory_text(error)}", err=True)
        sys.exit(1)
    except SystemExit as ended:
        if ended.code == 130:  # Ctrl-C
            typer.echo(
                "stopped; the same command continues where it stopped (training: with --resume)", err=True
            )
        raise
