"""The ``deltacache`` command: parse, build, call. What is done lies in the rooms behind it."""

import os
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import typer
from typer.main import get_command

from deltacache import __version__
from deltacache.cli_options import (
    AccumulationOpt,
    AddressOpt,
    AllowSchemeOpt,
    AugmentOpt,
    BackboneOpt,
    BatchOpt,
    BlackFirstOpt,
    Changed,
    ChangedOpt,
    ClipFormat,
    ColumnOpt,
    ContinueFromOpt,
    DatasetOutArg,
    DecayOpt,
    DecodersOpt,
    DepthMapsOpt,
    DeviceOpt,
    DinoV2Opt,
    DryRunOpt,
    Dtype,
    DtypeOpt,
    DuplicatesOpt,
    EigenListOpt,
    EncodersOpt,
    EvaluationCacheOpt,
    EvaluationWorkersOpt,
    ExcludeOpt,
    FailedOpt,
    ForesightTask,
    FrameRateOpt,
    FrameSizeOpt,
    FramesOpt,
    FromStage,
    GpusOpt,
    HeadPreset,
    HeadsOpt,
    HeadTarget,
    ImageSizeOpt,
    InitFromOpt,
    KeepOpt,
    LayersOpt,
    LogOpt,
    OutArg,
    Padding,
    PcaOpt,
    Precision,
    PrecisionOpt,
    PresetOpt,
    ProbeOpt,
    Query,
    Rate,
    ResumeOpt,
    RetryForOpt,
    RetryOpt,
    SaveOpt,
    SeedOpt,
    ShardOpt,
    SourceArg,
    SpacingOpt,
    StageOpt,
    StepsOpt,
    Store,
    StoreOpt,
    TemporaryShareOpt,
    TimeoutOpt,
    TrainingDryRunOpt,
    TrainingPrecisionOpt,
    TrainingSplit,
    TrainSeedOpt,
    ViewsOpt,
    WaitOpt,
    WandbOpt,
    WarmupOpt,
    WholeSizeOpt,
    WorkersOpt,
)
from deltacache.cli_parsing import (
    absolute,
    as_trained,
    backbone_source,
    changed,
    cluster_settings,
    extraction_settings,
    named_paths,
    parsed_horizons,
    refuse_video_flags,
    scheduled,
    training_settings,
    usage_errors,
    whole_frame_settings,
    with_name,
    world_path,
)
from deltacache.schemas.errors import DeltacacheError
from deltacache.schemas.secrets import without_secrets

app = typer.Typer(
    help="Cache DINOv3 patch tokens and delta tokens once, then train and evaluate world models.",
    no_args_is_help=True,
    add_completion=False,
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
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of a refused command.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    _state["debug"] = debug


@app.command("extract-features")
def extract_features(
    source: SourceArg,
    out: DatasetOutArg,
    backbone: BackboneOpt = None,
    layers: LayersOpt = None,
    pca: PcaOpt = None,
    image_size: FrameSizeOpt = "512",
    frames: FramesOpt = 8,
    views: ViewsOpt = 1,
    spacing: SpacingOpt = (0.04, 0.3333),
    augment: AugmentOpt = True,
    duplicates: DuplicatesOpt = True,
    store: StoreOpt = Store.webdataset,
    dtype: DtypeOpt = Dtype.float16,
    precision: PrecisionOpt = Precision.auto,
    videos_per_shard: ShardOpt = 32,
    seed: SeedOpt = 0,
    exclude_list: ExcludeOpt = None,
    column: ColumnOpt = None,
    max_failed_fraction: FailedOpt = 0.05,
    retry_failed: RetryOpt = False,
    changed_videos: ChangedOpt = Changed.refuse,
    decode_timeout: TimeoutOpt = 300.0,
    frames_per_second: FrameRateOpt = None,
    retry_for: RetryForOpt = 300.0,
    temporary_share: TemporaryShareOpt = 0.5,
    allow_scheme: AllowSchemeOpt = None,
    dry_run: DryRunOpt = False,
    ray_address: AddressOpt = None,
    wait_for_nodes: WaitOpt = 600.0,
    encoders: EncodersOpt = None,
    gpus_per_encoder: GpusOpt = None,
    decoders: DecodersOpt = None,
) -> None:
    """Decode videos and cache the patch tokens of a frozen backbone.

    Example: deltacache extract-features videos/ features/ --backbone tiny --image-size 256 --views 2
    """
    from deltacache.chain.terminal import terminal_reporter
    from deltacache.pipeline.jobs import offline as jobs

    settings = extraction_settings(locals())
    if dry_run:
        from deltacache.pipeline.jobs.preview import preview_extraction

        reporter = terminal_reporter()
        reporter.line(preview_extraction(settings, absolute(out), reporter.line))
        return
    jobs.extract_features(settings, absolute(out), terminal_reporter())


@app.command("fit-pca")
def fit_pca(
    features: Annotated[str, typer.Argument(help="Feature dataset, here or on s3://, gs://.")],
    out: Annotated[Path, typer.Argument(help="Folder for the PCA, new or empty.")],
    components: Annotated[int, typer.Option(min=1, help="Channels that are left.")] = 1152,
    frames: Annotated[
        int | None, typer.Option(min=1, help="Frames to take, spread evenly. [default: all]")
    ] = None,
    device: DeviceOpt = "auto",
) -> None:
    """Fit a PCA on standardised patch tokens, streamed shard by shard, for --pca of extract-features.

    Example: deltacache fit-pca features/ pca/ --components 1152
    """
    from deltacache.chain.terminal import terminal_reporter
    from deltacache.pipeline.jobs import pca_fit

    pca_fit.fit_pca(absolute(features), out, components, terminal_reporter(), frames=frames, device=device)


@app.command("train-tokenizer")
def train_tokenizer(
    features: Annotated[str, typer.Argument(help="Feature dataset, here or on s3://, gs://.")],
    out: OutArg,
    preset: PresetOpt = "released",
    steps: StepsOpt = None,
    warmup_steps: WarmupOpt = None,
    decay_steps: DecayOpt = None,
    batch_size: BatchOpt = None,
    accumulation: AccumulationOpt = None,
    seed: TrainSeedOpt = None,
    save_every: SaveOpt = None,
    keep: KeepOpt = None,
    log_every: LogOpt = None,
    probe_every: ProbeOpt = None,
    stage: StageOpt = None,
    init_from: InitFromOpt = None,
    continue_from: ContinueFromOpt = None,
    black_first_fraction: BlackFirstOpt = None,
    heads: HeadsOpt = None,
    tokens_per_frame: Annotated[
        int | None, typer.Option(min=1, max=64, help="Delta tokens of a frame. [default: the preset's, 1]")
    ] = None,
    precision: TrainingPrecisionOpt = None,
    wandb: WandbOpt = None,
    workers: WorkersOpt = 1,
    ray_address: AddressOpt = None,
    wait_for_nodes: WaitOpt = 600.0,
    dry_run: TrainingDryRunOpt = False,
    resume: ResumeOpt = False,
    device: DeviceOpt = "auto",
) -> None:
    """Train DeltaTok: one token for the change between two frames.

    Example: deltacache train-tokenizer features/ tokenizer/ --preset tiny --steps 2000
    """
    from deltacache.chain.terminal import terminal_reporter
    from deltacache.schemas.configs import tokenizer_preset
    from deltacache.train.setup import TrainingRequest
    from deltacache.train.workers.launch import launch
    from deltacache.train.workers.trainable import Workers

    config = tokenizer_preset(preset, stage)
    training = training_settings(config.training, locals())
    model = changed(config.model, num_heads=heads, tokens_per_frame=tokens_per_frame)
    config = changed(config, model=model, training=training, black_first_fraction=black_first_fraction)
    request = TrainingRequest(
        absolute(features), out, config, resume, device, init_from or continue_from, dry_run=dry_run
    )
    launch("tokenizer", request, terminal_reporter(), Workers(workers, ray_address, wait_for_nodes))


@app.command()
def tokenize(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="Feature dataset, or videos as for extract-features.")],
    out: DatasetOutArg,
    tokenizer: Annotated[Path, typer.Option(help="Output of train-tokenizer, or a released checkpoint.")],
    backbone: BackboneOpt = None,
    layers: LayersOpt = None,
    pca: PcaOpt = None,
    image_size: Annotated[
        str | None,
        typer.Option(help="Side of square frames, or height x width. [default: the tokenizer's, else 512]"),
    ] = None,
    frames: FramesOpt = 8,
    views: ViewsOpt = 1,
    spacing: Annotated[
        tuple[float, float] | None,
        typer.Option(help="Shortest and longest time between frames in seconds. [default: the tokenizer's]"),
    ] = None,
    augment: AugmentOpt = True,
    duplicates: DuplicatesOpt = True,
    store: StoreOpt = Store.webdataset,
    precision: PrecisionOpt = Precision.auto,
    videos_per_shard: ShardOpt = 32,
    seed: SeedOpt = 0,
    exclude_list: ExcludeOpt = None,
    column: ColumnOpt = None,
    max_failed_fraction: FailedOpt = 0.05,
    retry_failed: RetryOpt = False,
    changed_videos: ChangedOpt = Changed.refuse,
    decode_timeout: TimeoutOpt = 300.0,
    frames_per_second: FrameRateOpt = None,
    retry_for: RetryForOpt = 300.0,
    temporary_share: TemporaryShareOpt = 0.5,
    allow_scheme: AllowSchemeOpt = None,
    ray_address: AddressOpt = None,
    wait_for_nodes: WaitOpt = 600.0,
    encoders: EncodersOpt = None,
    gpus_per_encoder: GpusOpt = None,
    decoders: DecodersOpt = None,
) -> None:
    """Turn a feature dataset, or videos directly, into delta tokens.

    From videos it takes the flags of extract-features, and patch tokens never touch the disk. Backbone, layers, size
    and spacing are those that the tokenizer was trained with, unless given.

    Example: deltacache tokenize features/ deltas/ --tokenizer tokenizer/
    """
    from deltacache.chain.terminal import terminal_reporter
    from deltacache.pipeline.datasets.preparation import is_dataset
    from deltacache.pipeline.jobs import offline as jobs
    from deltacache.schemas.jobs import TokenizeSettings, TokenizeVideosSettings

    flags = locals()
    if is_dataset(absolute(source)):
        refuse_video_flags(context, source)
        job = TokenizeSettings(
            features=absolute(source),
            tokenizer=tokenizer.absolute(),
            store=store.value,
            precision=precision.value,
            changed_videos=changed_videos.value,
            cluster=cluster_settings(flags),
        )
        jobs.tokenize_features(job, absolute(out), terminal_reporter())
    else:
        settings = extraction_settings(as_trained(flags))
        videos = TokenizeVideosSettings(videos=settings, tokenizer=tokenizer.absolute())
        jobs.tokenize_videos(videos, absolute(out), terminal_reporter())


@app.command("train-world")
def train_world(
    source: Annotated[
        str,
        typer.Argument(
            help="Delta dataset, here or on s3://, gs://; a feature dataset for models of patch tokens (DINO-world)."
        ),
    ],
    out: OutArg,
    preset: PresetOpt = "released",
    query: Annotated[
        Query | None,
        typer.Option(help="Noise (best of many), or one learned query. [default: the preset's, noise]"),
    ] = None,
    candidates: Annotated[
        int | None, typer.Option(min=1, help="K of best-of-many. [default: the preset's]")
    ] = None,
    steps: StepsOpt = None,
    warmup_steps: WarmupOpt = None,
    decay_steps: DecayOpt = None,
    batch_size: BatchOpt = None,
    accumulation: AccumulationOpt = None,
    seed: TrainSeedOpt = None,
    save_every: SaveOpt = None,
    keep: KeepOpt = None,
    log_every: LogOpt = None,
    probe_every: ProbeOpt = None,
    stage: StageOpt = None,
    init_from: InitFromOpt = None,
    continue_from: ContinueFromOpt = None,
    heads: HeadsOpt = None,
    precision: TrainingPrecisionOpt = None,
    wandb: WandbOpt = None,
    workers: WorkersOpt = 1,
    ray_address: AddressOpt = None,
    wait_for_nodes: WaitOpt = 600.0,
    dry_run: TrainingDryRunOpt = False,
    resume: ResumeOpt = False,
    device: DeviceOpt = "auto",
) -> None:
    """Train a world model, such as DeltaWorld on delta tokens: predict the next frame, best of K candidates.

    Example: deltacache train-world deltas/ world/ --preset tiny --candidates 32 --steps 1000
    """
    from deltacache.chain.terminal import terminal_reporter
    from deltacache.schemas.configs import world_preset
    from deltacache.train.setup import TrainingRequest
    from deltacache.train.workers.launch import launch
    from deltacache.train.workers.trainable import Workers

    config = world_preset(preset, stage)
    training = training_settings(config.training, locals())
    if query is Query.learned and candidates is None:
        candidates = 1
    if query is Query.noise and config.model.query == "learned" and candidates is None:
        raise typer.BadParameter(
            f"--query noise: preset {preset} has one candidate; give --candidates K as well"
        )
    model = changed(config.model, num_heads=heads, query=None if query is None else query.value)
    config = changed(config, training=training, model=model, candidates=candidates)
    request = TrainingRequest(
        absolute(source), out, config, resume, device, init_from or continue_from, dry_run=dry_run
    )
    launch("world", request, terminal_reporter(), Workers(workers, ray_address, wait_for_nodes))


@app.command("train-systems")
def train_systems(
    features: Annotated[
        str,
        typer.Argument(help="Feature dataset that all systems are trained from, here or on s3://, gs://."),
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
    """Train several world models on the same features, for one table; finished ones are skipped.

    Example: deltacache train-systems features/ systems/ --preset tiny-table2
    """
    from deltacache.chain.systems import systems_preset
    from deltacache.chain.systems import train_systems as train
    from deltacache.chain.terminal import terminal_reporter
    from deltacache.train.workers.trainable import Workers

    config = systems_preset(preset).changed(seed, accumulation)
    train(
        config,
        absolute(features),
        out,
        Workers(workers, ray_address, wait_for_nodes),
        device,
        terminal_reporter(),
    )


@app.command("compare-systems")
def compare_systems(
    out: Annotated[Path, typer.Argument(help="Output of train-systems; the table is written there.")],
    features: Annotated[str, typer.Argument(help="Feature dataset that the systems were trained from.")],
    data: Annotated[
        list[str],
        typer.Option(
            help="NAME=PATH, may be repeated: vspw, cityscapes or kitti; clips and a feature dataset."
        ),
    ],
    evaluation: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the evaluation; the table goes there too, if it is another than the default. "
            "[default: OUT/evaluation]"
        ),
    ] = None,
    head: Annotated[list[str] | None, typer.Option(help="NAME=FILE: the linear head of a benchmark.")] = None,
    backbone: BackboneOpt = None,
    image_size: Annotated[
        int | None, typer.Option(min=16, help="Side of the crops in pixels. [default: that of FEATURES]")
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="Frames that are seen.")] = 4,
    horizons: Annotated[str, typer.Option(help="Steps after the context, such as 1,3.")] = "1,3",
    samples: Annotated[int, typer.Option(min=1, help="Futures sampled for each sequence.")] = 20,
    seed: SeedOpt = 0,
    futures: Annotated[
        Path | None, typer.Option(help="Of clips: CSV or Parquet of true futures: adds mode coverage.")
    ] = None,
    kitti_split: EigenListOpt = None,
    cache: EvaluationCacheOpt = None,
    measure: Annotated[
        bool, typer.Option(help="Time and memory of a training step, on this machine.")
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
    from deltacache.chain.systems import open_systems
    from deltacache.chain.systems_costs import CostPlan
    from deltacache.chain.systems_table import compare_systems as compare
    from deltacache.chain.terminal import terminal_reporter
    from deltacache.evaluate.settings import CLIPS
    from deltacache.evaluate.settings import evaluation as evaluation_settings
    from deltacache.pipeline.datasets.dataset import open_dataset

    config, paths = open_systems(out)
    card = open_dataset(absolute(features), "features").card
    own_size = card.image_size if isinstance(card.image_size, int) else None
    named, steps = named_paths("--data", data), parsed_horizons(horizons)
    given = backbone_source(backbone) if backbone else None
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
    compare(out, absolute(features), settings, plan, terminal_reporter())


@app.command("train-head")
def train_head(
    head: Annotated[HeadTarget, typer.Argument(help="Benchmark of a linear head, or rgb for pictures.")],
    root: Annotated[
        Path,
        typer.Argument(help="Root of the benchmark in its published layout; for rgb any folder of pictures."),
    ],
    out: OutArg,
    backbone: BackboneOpt = None,
    image_size: ImageSizeOpt = 512,
    preset: Annotated[HeadPreset, typer.Option(help="Recipe to start from.")] = HeadPreset.released,
    split: Annotated[
        TrainingSplit,
        typer.Option(help="Frames to learn from; val are those that are scored, for trials only."),
    ] = TrainingSplit.train,
    kitti_split: Annotated[
        Path | None,
        typer.Option(
            help="List of KITTI's training frames; those of test drives are left out. [default: its train/ depth maps]"
        ),
    ] = None,
    kitti_test: Annotated[
        Path | None,
        typer.Option(
            help="List of KITTI's test frames: all of their drives are left out. With --split val, the frames to learn "
            "from. [default: eigen_test_files.txt in ROOT; needed]"
        ),
    ] = None,
    flip: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of mirrored frames. [default: the preset's]")
    ] = None,
    steps: StepsOpt = None,
    warmup_steps: WarmupOpt = None,
    decay_steps: DecayOpt = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Frames of a step, two crops each. [default: the preset's]")
    ] = None,
    seed: TrainSeedOpt = None,
    save_every: SaveOpt = None,
    log_every: LogOpt = None,
    precision: PrecisionOpt = Precision.auto,
    dry_run: TrainingDryRunOpt = False,
    resume: ResumeOpt = False,
    device: DeviceOpt = "auto",
) -> None:
    """Train a benchmark's linear head, or a decoder to pictures, on features of a frozen backbone.

    Example: deltacache train-head cityscapes Cityscapes/ head-cityscapes/ --image-size 512
    """
    from deltacache.chain.terminal import terminal_reporter
    from deltacache.pipeline.work.encoders import resolve_precision
    from deltacache.schemas.heads import head_preset, rgb_preset
    from deltacache.schemas.jobs import DEFAULT_BACKBONE
    from deltacache.train.heads.setup import HeadRequest
    from deltacache.train.heads.training import train_head as train_linear_head
    from deltacache.train.heads.training import train_rgb_decoder

    for flag, listed in (("--kitti-split", kitti_split), ("--kitti-test", kitti_test)):
        if listed is not None and head is not HeadTarget.kitti:
            raise typer.BadParameter(f"{flag} concerns kitti, not {head.value}: leave it out")
    if head is HeadTarget.rgb and split is not TrainingSplit.train:
        raise typer.BadParameter("--split concerns benchmarks: rgb learns from all pictures below ROOT")
    lists = (kitti_split, kitti_test)
    source = backbone_source(backbone or DEFAULT_BACKBONE)
    request = HeadRequest(root, out, source, resume, device, *lists, dry_run=dry_run)
    seen = {
        "image_size": image_size,
        "split": split.value,
        "flip": flip,
        "precision": resolve_precision(device, precision.value),
    }
    asked = {"batch_size": batch_size, "seed": seed, "save_every": save_every, "log_every": log_every}
    if head is HeadTarget.rgb:
        decoder = rgb_preset(preset.value)
        training = changed(scheduled(decoder.training, locals()), precision=precision.value, **asked)
        decoder = changed(decoder, training=training, frames=changed(decoder.frames, **seen))
        train_rgb_decoder(request, decoder, terminal_reporter())
        return
    config = head_preset(head.value, preset.value)
    training = changed(scheduled(config.training, locals()), **asked)
    config = changed(config, training=training, frames=changed(config.frames, **seen))
    train_linear_head(request, config, terminal_reporter())


@app.command()
def evaluate(
    out: Annotated[Path, typer.Argument(help="Folder for metrics.parquet, sequences.parquet, report.html.")],
    data: Annotated[
        list[str],
        typer.Option(
            help="NAME=PATH, may be repeated: vspw, cityscapes or kitti and its root; clips and a feature dataset."
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
    image_size: ImageSizeOpt = 512,
    context: Annotated[int, typer.Option(min=1, help="Frames that are seen.")] = 4,
    horizons: Annotated[str, typer.Option(help="Steps after the context, such as 1,3.")] = "1,3",
    samples: Annotated[int, typer.Option(min=1, help="Futures sampled for each sequence.")] = 20,
    seed: SeedOpt = 0,
    futures: Annotated[
        Path | None,
        typer.Option(help="Of clips: CSV or Parquet (video_uri, scene, outcome): adds mode coverage."),
    ] = None,
    predictions: Annotated[
        list[str] | None,
        typer.Option(help="NAME=DIR: futures of a video generator (export-contexts); may be repeated."),
    ] = None,
    kitti_split: EigenListOpt = None,
    rgb_decoder: Annotated[
        Path | None,
        typer.Option(help="Output of train-head rgb, or a released decoder: pictures of futures."),
    ] = None,
    cache: EvaluationCacheOpt = None,
    examples: Annotated[
        int, typer.Option(min=0, max=32, help="Sequences of each data set kept for pictures.")
    ] = 4,
    precision: PrecisionOpt = Precision.auto,
    workers: EvaluationWorkersOpt = None,
    ray_address: AddressOpt = None,
    wait_for_nodes: WaitOpt = 600.0,
    device: DeviceOpt = "auto",
) -> None:
    """Score reconstructions and sampled futures; writes Parquet tables and a report.

    Example: deltacache evaluate results/ --data vspw=VSPW/ --head vspw=head.bin --tokenizer tokenizer/ --world world/
    """
    from deltacache.chain.results import evaluate_and_show
    from deltacache.chain.terminal import terminal_reporter
    from deltacache.evaluate.settings import evaluation
    from deltacache.schemas.jobs import DEFAULT_BACKBONE

    worlds = [world_path(text) for text in world or []]
    settings = evaluation(
        named_paths("--data", data),
        heads=named_paths("--head", head or []),
        out=out,
        backbone=backbone_source(backbone or DEFAULT_BACKBONE),
        tokenizer=tokenizer[0] if tokenizer else None,
        more_tokenizers=tuple((tokenizer or [])[1:]),
        worlds=tuple(path for _, path in worlds),
        architectures={str(path): name for name, path in worlds if name},
        image_size=image_size,
        context=context,
        horizons=parsed_horizons(horizons),
        samples=samples,
        seed=seed,
        futures=futures,
        predictions=named_paths("--predictions", [with_name(text) for text in predictions or []]),
        kitti_split=kitti_split,
        rgb_decoder=rgb_decoder,
        cache=cache,
        examples=examples,
        precision=precision.value,
        workers=workers,
        ray_address=ray_address,
        wait_for_nodes_s=wait_for_nodes,
        device=device,
    )
    evaluate_and_show(settings, terminal_reporter())


@app.command("train-foresight-head")
def train_foresight_head(
    task: Annotated[ForesightTask, typer.Argument(help="What the head tells.")],
    root: Annotated[Path, typer.Argument(help="Cityscapes in its published layout.")],
    out: OutArg,
    backbone: DinoV2Opt = None,
    layers: LayersOpt = None,
    pca: PcaOpt = None,
    image_size: WholeSizeOpt = "448x896",
    depth: DepthMapsOpt = None,
    preset: Annotated[HeadPreset, typer.Option(help="Recipe to start from.")] = HeadPreset.released,
    split: Annotated[
        TrainingSplit, typer.Option(help="Frames to learn from; val are those that are scored.")
    ] = TrainingSplit.train,
    steps: StepsOpt = None,
    warmup_steps: WarmupOpt = None,
    decay_steps: DecayOpt = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Frames of a step.")] = None,
    seed: TrainSeedOpt = None,
    save_every: SaveOpt = None,
    log_every: LogOpt = None,
    precision: PrecisionOpt = Precision.auto,
    dry_run: TrainingDryRunOpt = False,
    resume: ResumeOpt = False,
    device: DeviceOpt = "auto",
) -> None:
    """Train a linear head on features of whole frames of Cityscapes, for evaluate-foresight.

    Example: deltacache train-foresight-head segmentation Cityscapes/ head/ --layers 2,5,8,11 --pca pca/
    """
    from deltacache.chain.terminal import terminal_reporter
    from deltacache.schemas.foresight import foresight_head
    from deltacache.train.heads.foresight import train_foresight_head as train

    with usage_errors():
        config = foresight_head(task.value, preset.value, whole_frame_settings(locals()), depth)
    training = changed(
        scheduled(config.training, locals()),
        batch_size=batch_size,
        seed=seed,
        save_every=save_every,
        log_every=log_every,
    )
    config = changed(config, training=training, split=split.value)
    reporter = terminal_reporter()
    train(root, out, config, resume=resume, device=device, reporter=reporter, dry_run=dry_run)


@app.command("evaluate-foresight")
def evaluate_foresight(
    root: Annotated[Path, typer.Argument(help="Cityscapes in its published layout.")],
    out: Annotated[Path, typer.Argument(help="Folder for metrics.parquet and sequences.parquet.")],
    backbone: DinoV2Opt = None,
    layers: LayersOpt = None,
    pca: PcaOpt = None,
    image_size: WholeSizeOpt = "448x896",
    tokenizer: Annotated[
        Path | None, typer.Option(help="Output of train-tokenizer on such features.")
    ] = None,
    world: Annotated[
        list[Path] | None, typer.Option(help="Output of train-world; may be given twice.")
    ] = None,
    head: Annotated[Path | None, typer.Option(help="Segmentation head of train-foresight-head.")] = None,
    depth_head: Annotated[Path | None, typer.Option(help="Depth head of train-foresight-head.")] = None,
    depth: DepthMapsOpt = None,
    context: Annotated[int, typer.Option(min=1, help="Frames that are seen.")] = 4,
    horizons: Annotated[str, typer.Option(help="Steps of three frames; 1 is short, 3 mid-term.")] = "1,3",
    seed: SeedOpt = 0,
    examples: Annotated[int, typer.Option(min=0, max=32, help="Sequences kept for pictures.")] = 4,
    precision: PrecisionOpt = Precision.auto,
    device: DeviceOpt = "auto",
) -> None:
    """Score futures of whole frames of Cityscapes by DINO-Foresight's protocol (the paper's Table D).

    Example: deltacache evaluate-foresight Cityscapes/ results/ --layers 2,5,8,11 --pca pca/ --world world/ --head head/
    """
    from deltacache.chain.results import evaluate_and_show
    from deltacache.chain.terminal import terminal_reporter
    from deltacache.schemas.foresight import ForesightEvaluation

    with usage_errors():
        settings = ForesightEvaluation(
            out=out,
            root=root,
            features=whole_frame_settings(locals()),
            tokenizer=tokenizer,
            worlds=tuple(world or ()),
            segmentation_head=head,
            depth_head=depth_head,
            depth=depth,
            context=context,
            horizons=parsed_horizons(horizons),
            seed=seed,
            examples=examples,
            device=device,
        )
    evaluate_and_show(settings, terminal_reporter())


@app.command("export-contexts")
def export_contexts(
    out: OutArg,
    data: Annotated[
        list[str], typer.Option(help="NAME=PATH, may be repeated: vspw, cityscapes or kitti and its root.")
    ],
    horizons: Annotated[str, typer.Option(help="Steps after the context, such as 1,3.")] = "1,3",
    context: Annotated[int, typer.Option(min=1, help="Context frames of the evaluation.")] = 4,
    frames: Annotated[int, typer.Option(min=1, help="Frames that the generator sees.")] = 9,
    padding: Annotated[
        Padding, typer.Option(help="As they are, or 512 high in 640 x 1024 as Cosmos takes them.")
    ] = Padding.plain,
    rate: Annotated[Rate, typer.Option(help="Frames as recorded, or one a step of the evaluation.")] = (
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
    from deltacache.chain.terminal import terminal_reporter
    from deltacache.evaluate.generators import export

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


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Outputs of evaluate; several are shown side by side.")],
    out: Annotated[
        Path | None,
        typer.Option(help="The page. [default: report.html in RUN; of several ./report.html]"),
    ] = None,
) -> None:
    """Write one page about an evaluation, or about several side by side.

    Example: deltacache report results/ other-results/ --out report.html
    """
    from deltacache.evaluate.report.page import write_page

    typer.echo(f"report: {write_page(runs, out)}")


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="Output of evaluate.")],
    b: Annotated[Path, typer.Argument(help="Output of evaluate on the same data.")],
    every_metric: Annotated[
        bool, typer.Option("--every-metric", help="Not only the main ones of each task.")
    ] = False,
) -> None:
    """Say in which numbers B is better or worse than A, with intervals of the paired differences.

    Example: deltacache compare results/ other-results/
    """
    from rich.console import Console

    from deltacache.evaluate.comparing.compare import compare_runs
    from deltacache.evaluate.comparing.tables import print_comparison

    print_comparison(compare_runs(a, b), Console(), every_metric=every_metric)


@app.command()
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
    from deltacache.chain.described import describe_output, write_pictures

    typer.echo(describe_output(path))
    if pictures is not None:
        typer.echo(f"pictures: {write_pictures(path, pictures)}")


@app.command()
def verify(
    path: Annotated[str, typer.Argument(help="Feature or delta dataset, here or on s3://, gs://.")],
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Drop exactly what is damaged, so that the next run makes it again."),
    ] = False,
) -> None:
    """Read every shard of a dataset and check sizes, checksums, index and receipts.

    Example: deltacache verify features/
    """
    from deltacache.chain.terminal import terminal_reporter
    from deltacache.pipeline.datasets.repair import repair_dataset
    from deltacache.pipeline.datasets.verification import verify_dataset

    reporter = terminal_reporter()
    if repair:
        typer.echo(str(repair_dataset(absolute(path), reporter)))
        return
    problems = verify_dataset(absolute(path), reporter)
    for problem in problems:
        typer.echo(str(problem))
    if problems:
        raise DeltacacheError(
            f"{path}: {len(problems)} problems, listed above. `deltacache verify {path} --repair` drops what is "
            "damaged, and the command that made the dataset makes it again"
        )
    typer.echo(f"{path}: no damage found")


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="YAML of the whole chain; see docs/chain.md.")],
    out: OutArg,
    from_stage: Annotated[
        FromStage | None,
        typer.Option(help="Remove what this stage and those after it made, and make it again."),
    ] = None,
) -> None:
    """Run the whole chain; finished stages are skipped.

    Example: deltacache run chain.yaml out/
    """
    from deltacache.chain.results import show_results
    from deltacache.chain.run import ChainConfig, run_chain
    from deltacache.chain.terminal import terminal_reporter
    from deltacache.schemas.configs import load_config

    reporter = terminal_reporter()
    paths = run_chain(
        load_config(config, ChainConfig), out, reporter, from_stage.value if from_stage else None
    )
    show_results(paths.evaluation, reporter)


@app.command()
def demo(
    out: Annotated[Path, typer.Argument(help="Output folder; an unfinished demo is continued.")],
    seed: SeedOpt = 0,
) -> None:
    """Run the whole chain on videos it draws itself: tiny models, CPU, minutes.

    Example: deltacache demo demo-output/
    """
    from deltacache.chain.demo import run_demo
    from deltacache.chain.terminal import terminal_reporter

    run_demo(out, seed, terminal_reporter())


@app.command()
def doctor(
    output: Annotated[
        str | None, typer.Option(help="Folder that commands would write, whose disk is looked at too.")
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
        typer.Option(min=1, help="Videos that the hours are for. [default: Kinetics-700's 545,000]"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    device: DeviceOpt = "auto",
) -> None:
    """Say what this machine has, what is missing and how to get it; run it first, and paste it into a report.

    Exit code 1 if something is broken without which no command works. No passwords, tokens or user names of urls
    are printed.

    Example: deltacache doctor --measure --output /data/features
    """
    import json
    from dataclasses import asdict

    from deltacache.chain.doctor.facts import examine
    from deltacache.chain.doctor.shown import examination_text, measurement_text

    found = examine(output)
    if not as_json:
        typer.echo(examination_text(found))
    measured = None
    if measure:
        from deltacache.chain.doctor.measured import KINETICS_VIDEOS
        from deltacache.chain.doctor.measured import measure as measure_rates
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


@app.command()
def flops(
    preset: Annotated[
        str,
        typer.Option(
            help="Recipe, such as released, paper, dino-world-large, table2; or a YAML of one or of systems."
        ),
    ] = "released",
    backbone: Annotated[
        str, typer.Option(help="vits16, vitb16, vitl16, …, tiny, or a folder with a config.json.")
    ] = "vitb16",
    image_size: Annotated[
        str, typer.Option(help="Pixels of a crop: 256, or rows x columns: 448x896.")
    ] = "256",
    context: Annotated[int, typer.Option(min=1, help="Frames that are seen.")] = 4,
    horizon: Annotated[int, typer.Option(min=1, help="Frames that are predicted.")] = 3,
    samples: Annotated[int, typer.Option(min=1, help="Futures.")] = 20,
    crops: Annotated[int, typer.Option(min=1, help="Crops of an image.")] = 2,
    frames: Annotated[int, typer.Option(min=2, help="Frames of a training clip.")] = 8,
    candidates: Annotated[
        int | None, typer.Option(min=1, help="K of best-of-many. [default: the preset's]")
    ] = None,
    hidden_size: Annotated[
        int | None, typer.Option(min=1, help="Width of the tokens. [default: the backbone's]")
    ] = None,
    heads: Annotated[
        int | None,
        typer.Option(
            min=1, help="Attention heads. [default: the preset's; of 64 dims where tokens have another width]"
        ),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time and memory on this machine, with random weights.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Clips of a measured training step.")] = 1,
    device: DeviceOpt = "auto",
) -> None:
    """Count what the paper's systems compute: the parts, all futures of an image, a training step (Tables 2 and B).

    Example: deltacache flops --preset released --image-size 256 --candidates 16
    """
    from deltacache.chain.costs import CostRequest, count_costs
    from deltacache.chain.costs_shown import costs_text
    from deltacache.chain.terminal import terminal_reporter

    with usage_errors():
        request = CostRequest(
            preset=preset,
            backbone=backbone_source(backbone),
            hidden_size=hidden_size,
            heads=heads,
            image_size=image_size,  # pyright: ignore[reportArgumentType]
            context=context,
            horizon=horizon,
            samples=samples,
            crops=crops,
            frames=frames,
            candidates=candidates,
            batch_size=batch_size,
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
        typer.echo(
            "error: out of memory on the GPU: free memory there, make the work smaller (--batch-size, --image-size, "
            f"--samples: what the command has), or give --device cpu. PyTorch says: {str(error).splitlines()[0]}",
            err=True,
        )
        sys.exit(1)
    except SystemExit as ended:
        if ended.code == 130:  # Ctrl-C
            typer.echo("stopped; the same command goes on where it was (training: with --resume)", err=True)
        raise
