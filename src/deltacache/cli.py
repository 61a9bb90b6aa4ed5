"""The ``deltacache`` command: parse, build, call. What is done lies in the rooms behind it."""

import os
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal, TypeVar

import typer
from typer.core import TyperGroup
from typer.main import get_command

from deltacache import __version__, api
from deltacache.cli_options import (
    DatasetOutArg,
    DryRunOpt,
    OutArg,
    SourceArg,
    flags_of,
    local_folder,
    named_paths,
    settings_of,
    usage_errors,
    with_name,
)
from deltacache.evaluate.settings import BenchmarkEvaluation, ClipEvaluation
from deltacache.schemas.arguments import build, changed_by, taken
from deltacache.schemas.benchmarks import BenchmarkName, Task
from deltacache.schemas.configs import HeadConfig, TokenizerConfig, WorldConfig, config_yaml, load_config
from deltacache.schemas.datasets import Frozen
from deltacache.schemas.errors import DeltacacheError, out_of_memory_text
from deltacache.schemas.foresight import ForesightEvaluation, ForesightHeadConfig
from deltacache.schemas.hub import origin_of, output_place
from deltacache.schemas.jobs import (
    ChainStage,
    ComparisonSettings,
    ContextExport,
    CostRequest,
    DemoSettings,
    DoctorSettings,
    ExtractionSettings,
    HeadLaunch,
    Launch,
    PcaSettings,
    PushSettings,
    SystemsLaunch,
)
from deltacache.schemas.prediction import PredictionSettings
from deltacache.schemas.secrets import without_secrets
from deltacache.schemas.texts import counted

PIPELINE, TRAINING, EVALUATION, TOOLS = "Pipeline", "Training", "Evaluation", "Tools"
_PRESETS_OWN, _TOKENIZERS_OWN = "the preset's", "the tokenizer's"

_NOT_OF_HEADS = ("accumulation", "keep", "probe_every")
_OF_MANY_WORKERS = (
    "stage",
    "init_from",
    "continue_from",
    "validate",
    "workers",
    "ray_address",
    "wait_for_nodes",
)


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

FrozenT = TypeVar("FrozenT", bound=Frozen)
_UsageError: Any = typer.BadParameter.__base__  # click's, whichever click typer has
_state = {"debug": False, "show": False}


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
    from deltacache.pipeline.jobs import offline
    from deltacache.terminal import terminal_reporter

    with usage_errors():
        job = _resolved(api.extraction_settings(source, settings))
    reporter = terminal_reporter()
    if dry_run:
        from deltacache.pipeline.jobs.preview import preview_extraction

        reporter.line(preview_extraction(job, api.place(out), reporter.line))
    else:
        offline.extract_features(job, api.place(out), reporter)


@app.command("fit-pca", rich_help_panel=PIPELINE)
@flags_of(PcaSettings)
def fit_pca(
    features: Annotated[
        str, typer.Argument(help="Feature dataset, local, on s3://, gs://, or a name on the hub.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder for the PCA, new or empty.")],
    **settings: Any,
) -> None:
    """Fit a PCA on standardised patch tokens, for --pca of extract-features.

    Example: deltacache fit-pca features/ pca/ --components 1152
    """
    from deltacache.pipeline.jobs import pca_fit
    from deltacache.terminal import terminal_reporter

    with usage_errors():
        asked = _resolved(build(PcaSettings, settings))
    reporter = terminal_reporter()
    pca_fit.fit_pca(
        api.data_place(features), out, asked.components, reporter, frames=asked.frames, device=asked.device
    )


@app.command("train-tokenizer", rich_help_panel=TRAINING)
@flags_of(TokenizerConfig, defaults=_PRESETS_OWN)
@flags_of(Launch)
def train_tokenizer(
    features: Annotated[
        list[str],
        typer.Argument(
            help="Feature dataset, local, on s3://, gs://, or a name on the hub; several as PATH[:WEIGHT], or a YAML "
            "file that lists them."
        ),
    ],
    out: OutArg,
    **settings: Any,
) -> None:
    """Train DeltaTok: one token for the change between two frames.

    Example: deltacache train-tokenizer features/ tokenizer/ --preset tiny --steps 2000

    Example: deltacache train-tokenizer robots/:0.7 streets/:0.3 tokenizer/ --split 0.9 --patience 5
    """
    from deltacache.terminal import terminal_reporter

    with usage_errors():
        launch, changes = taken(Launch, settings)
        config = _resolved(api.tokenizer_settings(out, launch, changes))
    api.start_training("tokenizer", features, out, config, launch, terminal_reporter())


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
    tokenizer: Annotated[
        Path, typer.Option(help="Output of train-tokenizer, a released checkpoint, or a name on the hub.")
    ],
    **settings: Any,
) -> None:
    """Turn a feature dataset, or videos directly, into delta tokens.

    From videos it takes the flags of extract-features, and patch tokens never touch the disk. Backbone, layers, size
    and spacing are those that the tokenizer was trained with, unless given.

    Example: deltacache tokenize features/ deltas/ --tokenizer tokenizer/
    """
    from deltacache.terminal import terminal_reporter

    with usage_errors():
        job = _resolved(api.tokenize_settings(source, tokenizer, settings))
    api.run_tokenize(job, out, terminal_reporter())


@app.command("train-world", rich_help_panel=TRAINING)
@flags_of(WorldConfig, defaults=_PRESETS_OWN)
@flags_of(Launch)
def train_world(
    source: Annotated[
        list[str],
        typer.Argument(
            help="Delta dataset, local, on s3://, gs://, or a name on the hub; for models of patch tokens "
            "(DINO-world) a feature dataset. Several as PATH[:WEIGHT], or a YAML file that lists them."
        ),
    ],
    out: OutArg,
    **settings: Any,
) -> None:
    """Train a world model that predicts the next frame, such as DeltaWorld on delta tokens.

    Example: deltacache train-world deltas/ world/ --preset tiny --candidates 32 --steps 1000

    Example: deltacache train-world deltas-a/:0.7 deltas-b/:0.3 world/ --validate test-deltas/ --where "view = 0"
    """
    from deltacache.terminal import terminal_reporter

    with usage_errors():
        launch, changes = taken(Launch, settings)
        config = _resolved(api.world_settings(out, launch, changes))
    api.start_training("world", source, out, config, launch, terminal_reporter())


@app.command("train-systems", rich_help_panel=TRAINING)
@flags_of(SystemsLaunch, without=("stage", "init_from", "continue_from", "validate", "resume", "dry_run"))
def train_systems(
    features: Annotated[
        str,
        typer.Argument(help="Feature dataset that all systems are trained from, as for train-tokenizer."),
    ],
    out: OutArg,
    **settings: Any,
) -> None:
    """Train several world models on the same features to compare them; finished ones are skipped.

    Example: deltacache train-systems features/ systems/ --preset tiny-table2
    """
    from deltacache.systems.training import systems_settings
    from deltacache.systems.training import train_systems as train
    from deltacache.terminal import terminal_reporter
    from deltacache.train.workers.trainable import Workers

    with usage_errors():
        launch = build(SystemsLaunch, settings)
        config = _resolved(systems_settings(launch))
    workers = Workers(launch.workers, launch.ray_address, launch.wait_for_nodes_s)
    train(config, api.data_place(features), out, workers, launch.device, terminal_reporter(), launch.encoders)


@app.command("compare-systems", rich_help_panel=EVALUATION)
@flags_of(ComparisonSettings)
@flags_of(ClipEvaluation, only=("futures",))
@flags_of(
    BenchmarkEvaluation,
    without=("tokenizer", "world", "predictions", "examples", "rgb_decoder"),
    defaults={"backbone": "that of FEATURES", "image_size": "that of FEATURES"},
)
def compare_systems(
    out: Annotated[Path, typer.Argument(help="Output of train-systems; the table is written there.")],
    features: Annotated[str, typer.Argument(help="Feature dataset that the systems were trained from.")],
    **settings: Any,
) -> None:
    """Evaluate all systems of train-systems together and write one table of quality and cost.

    Example: deltacache compare-systems systems/ features/ --data clips=test-features/
    """
    from deltacache.systems.table import compare_systems as compare
    from deltacache.systems.table import comparison
    from deltacache.terminal import terminal_reporter

    with usage_errors():
        flags = _of_evaluation(settings)
        if flags["backbone"] is not None:
            flags["backbone"] = api.backbone_source(flags["backbone"])
        data = api.data_place(features)
        asked = _resolved(comparison(out, data, flags))
    compare(out, data, asked.evaluation, asked.costs, terminal_reporter())


@app.command("train-head", rich_help_panel=TRAINING)
@flags_of(HeadConfig, defaults=_PRESETS_OWN, without=_NOT_OF_HEADS)
@flags_of(HeadLaunch, without=_OF_MANY_WORKERS)
def train_head(
    head: Annotated[
        Literal[BenchmarkName, "rgb"], typer.Argument(help="Benchmark of a linear head, or rgb for pictures.")
    ],
    root: Annotated[
        Path,
        typer.Argument(
            help="Root of the benchmark in its published layout; for rgb, any folder of pictures."
        ),
    ],
    out: OutArg,
    **settings: Any,
) -> None:
    """Train a benchmark's linear head, or an RGB decoder, on features of a frozen backbone.

    Every step trains on two crops of each frame in the batch.

    Example: deltacache train-head cityscapes Cityscapes/ head-cityscapes/ --image-size 512
    """
    from deltacache.terminal import terminal_reporter
    from deltacache.train.heads.setup import HeadRequest
    from deltacache.train.heads.training import train_head as train_linear_head
    from deltacache.train.heads.training import train_rgb_decoder

    with usage_errors():
        launch, changes = taken(HeadLaunch, settings)
        config = _resolved(api.head_settings(head, out, launch, changes))
    request = HeadRequest(
        root,
        out,
        api.backbone_source(launch.backbone),
        launch.resume,
        launch.device,
        launch.kitti_split,
        launch.kitti_test,
        dry_run=launch.dry_run,
    )
    if isinstance(config, HeadConfig):
        train_linear_head(request, config, terminal_reporter())
    else:
        train_rgb_decoder(request, config, terminal_reporter())


@app.command(rich_help_panel=EVALUATION)
@flags_of(ClipEvaluation, only=("futures", "where", "split", "split_seed"))
@flags_of(BenchmarkEvaluation)
def evaluate(
    out: Annotated[Path, typer.Argument(help="Folder for metrics.parquet, sequences.parquet, report.html.")],
    **settings: Any,
) -> None:
    """Score reconstructions and sampled futures; writes Parquet tables and a report.

    Example: deltacache evaluate results/ --data vspw=VSPW/ --head vspw=head.bin --tokenizer tokenizer/ --world world/
    """
    from deltacache.evaluate.results import run_evaluation, show_results
    from deltacache.terminal import terminal_reporter

    with usage_errors():
        flags = _of_evaluation(settings)
        asked = _resolved(api.evaluation_settings(out, flags.pop("data"), flags))
    reporter = terminal_reporter()
    run_evaluation(asked, reporter)
    show_results(asked.out, reporter)


def _of_evaluation(flags: dict[str, Any]) -> dict[str, Any]:
    """Flags of ``evaluate`` as its function takes them."""
    several = {name: flags[name] or () for name in ("tokenizer", "world") if name in flags}
    named = {name: named_paths(f"--{name}", flags[name] or []) for name in ("data", "head")}
    if "predictions" in flags:
        given = [with_name(text) for text in flags["predictions"] or []]
        named["predictions"] = named_paths("--predictions", given)
    return {**flags, **several, **named}


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
    **settings: Any,
) -> None:
    """Sample futures of one video: tensors, a page that shows them side by side, and a movie.

    Example: deltacache predict street.mp4 futures/ --tokenizer tokenizer/ --world world/ --at 2.0 --steps 8
    """
    from deltacache.evaluate.prediction.run import predict_futures
    from deltacache.terminal import terminal_reporter

    with usage_errors():
        heads = named_paths("--head", settings["head"] or [])
        asked = _resolved(api.prediction_settings(video, out, {**settings, "head": heads}))
    predict_futures(asked, terminal_reporter())


@app.command("train-foresight-head", rich_help_panel=TRAINING)
@flags_of(ForesightHeadConfig, defaults=_PRESETS_OWN, without=_NOT_OF_HEADS)
@flags_of(HeadLaunch, without=(*_OF_MANY_WORKERS, "backbone", "kitti_split", "kitti_test"))
def train_foresight_head(
    task: Annotated[Task, typer.Argument(help="What the head predicts.")],
    root: Annotated[Path, typer.Argument(help="Cityscapes in its published layout.")],
    out: OutArg,
    **settings: Any,
) -> None:
    """Train a linear head on features of whole frames of Cityscapes, for evaluate-foresight.

    Example: deltacache train-foresight-head segmentation Cityscapes/ head/ --layers 2,5,8,11 --pca pca/
    """
    from deltacache.terminal import terminal_reporter
    from deltacache.train.heads.foresight import train_foresight_head as train

    with usage_errors():
        launch, changes = taken(HeadLaunch, {**settings, "backbone": None})
        changes["backbone"] = settings["backbone"]
        config = _resolved(api.foresight_head_settings(task, out, launch, changes))
    train(
        root,
        out,
        config,
        resume=launch.resume,
        device=launch.device,
        reporter=terminal_reporter(),
        dry_run=launch.dry_run,
    )


@app.command("evaluate-foresight", rich_help_panel=EVALUATION)
@flags_of(HeadLaunch, only=("precision",))
@flags_of(ForesightEvaluation)
def evaluate_foresight(
    root: Annotated[Path, typer.Argument(help="Cityscapes in its published layout.")],
    out: Annotated[Path, typer.Argument(help="Folder for metrics.parquet and sequences.parquet.")],
    **settings: Any,
) -> None:
    """Score futures of whole frames of Cityscapes by DINO-Foresight's protocol (the paper's Table D).

    Example: deltacache evaluate-foresight Cityscapes/ results/ --layers 2,5,8,11 --pca pca/ --world world/ --head head/
    """
    from deltacache.evaluate.results import evaluate_and_show
    from deltacache.pipeline.work.encoders import resolve_precision
    from deltacache.terminal import terminal_reporter

    precision = settings.pop("precision") or "auto"
    if settings["backbone"] is not None:
        settings["backbone"] = api.backbone_source(settings["backbone"])
    with usage_errors():
        asked = build(ForesightEvaluation, {**settings, "root": root, "out": out})
        resolved = resolve_precision(asked.device, precision)
        asked = _resolved(changed_by(asked, [f"features.precision={resolved}"]))
    evaluate_and_show(asked, terminal_reporter())


@app.command("export-contexts", rich_help_panel=EVALUATION)
@flags_of(ContextExport)
def export_contexts(out: OutArg, **settings: Any) -> None:
    """Write the context frames from which a video generator predicts the benchmarks' labelled frames.

    Example: deltacache export-contexts contexts/ --data vspw=VSPW/ --padding cosmos --format mp4
    """
    from deltacache.evaluate.generators import export_contexts as export
    from deltacache.terminal import terminal_reporter

    with usage_errors():
        data = named_paths("--data", settings["data"])
        wanted = _resolved(build(ContextExport, {**settings, "data": data}))
    export(wanted, out, terminal_reporter())


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
    typer.echo(f"report: {api.write_report(runs, out)}")


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

    print_comparison(
        compare_runs(*(Path(output_place(each)) for each in (a, b))), Console(), every_metric=every_metric
    )


@app.command(rich_help_panel=TOOLS)
@flags_of(DoctorSettings)
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False, **settings: Any
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

    with usage_errors():
        asked = _resolved(build(DoctorSettings, settings))
    found = examine(asked.output)
    if not as_json:
        typer.echo(examination_text(found))
    measured = None
    if asked.measure:
        from deltacache.doctor.measured import KINETICS_VIDEOS
        from deltacache.doctor.measured import measure as measure_rates
        from deltacache.models.devices import choose_device

        output = asked.output
        folder = Path.cwd() if output is None or "://" in output else Path(output)
        say = (lambda text: None) if as_json else (lambda text: typer.echo(f"\n{text}"))
        measured = measure_rates(choose_device(asked.device), folder, asked.videos or KINETICS_VIDEOS, say)
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
    path: Annotated[
        str,
        typer.Argument(help="Dataset, training output, model or evaluation; a path or a name on the hub."),
    ],
    pictures: Annotated[
        Path | None,
        typer.Option(help="Write a contact sheet of a feature dataset here (.png or .html)."),
    ] = None,
) -> None:
    """Say what something is, what it was made from and how large it is.

    Example: deltacache inspect features/ --pictures sheet.png
    """
    from deltacache.descriptions import describe_output, write_pictures

    place = output_place(path)
    typer.echo(describe_output(place))
    if pictures is not None:
        typer.echo(f"pictures: {write_pictures(place, pictures)}")


@app.command(rich_help_panel=TOOLS)
def verify(
    path: Annotated[
        str, typer.Argument(help="Feature or delta dataset, local, on s3://, gs://, or a name on the hub.")
    ],
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
    place = api.data_place(path)
    problems = verify_dataset(place, reporter)
    for problem in problems:
        typer.echo(str(problem))
    if problems and (name := origin_of(place)):
        raise DeltacacheError(
            f"{name}: {counted(len(problems), 'problem')}, listed above. Nothing on the hub is repaired: ask whoever "
            "pushed it to push an undamaged dataset"
        )
    if problems:
        raise DeltacacheError(
            f"{path}: {counted(len(problems), 'problem')}, listed above. `deltacache verify {path} "
            "--repair` removes what is "
            "damaged; then run the command that made the dataset again"
        )
    typer.echo(f"{path}: no damage found")


@app.command(rich_help_panel=TOOLS)
@flags_of(PushSettings)
def push(
    path: Annotated[
        Path,
        typer.Argument(
            help="Dataset, training output, checkpoint, PCA or evaluation.", callback=local_folder
        ),
    ],
    repo: Annotated[str, typer.Argument(help="OWNER/NAME on the hub; created if it does not exist.")],
    **settings: Any,
) -> None:
    """Upload an output with its card to the Hugging Face hub; run again to continue an interrupted upload.

    Log in with 'hf auth login' first.

    Example: deltacache push world/ me/world --private --evaluation results/
    """
    from deltacache.publishing import push as upload
    from deltacache.terminal import terminal_reporter

    with usage_errors():
        asked = _resolved(build(PushSettings, {**settings, "path": path, "repo": repo}))
    upload(asked, terminal_reporter())


@app.command(rich_help_panel=PIPELINE)
def run(
    config: Annotated[Path, typer.Argument(help="YAML of the whole chain; see docs/chain.md.")],
    out: OutArg,
    from_stage: Annotated[
        ChainStage | None,
        typer.Option(
            help="Delete the outputs of this stage and all later ones, and make them again. Features stay: for other "
            "features give another OUT."
        ),
    ] = None,
) -> None:
    """Run the whole chain; finished stages are skipped.

    Example: deltacache run chain.yaml out/
    """
    from deltacache.chain import ChainConfig, run_chain
    from deltacache.evaluate.results import show_results
    from deltacache.terminal import terminal_reporter

    chain = _resolved(load_config(config, ChainConfig))
    reporter = terminal_reporter()
    paths = run_chain(chain, out, reporter, from_stage)
    show_results(paths.evaluation, reporter)


@app.command(rich_help_panel=PIPELINE)
@flags_of(DemoSettings)
def demo(
    out: Annotated[Path, typer.Argument(help="Output folder; an unfinished demo is continued.")],
    **settings: Any,
) -> None:
    """Run the whole chain on synthetic videos with tiny models, in minutes on a CPU.

    Example: deltacache demo demo-output/
    """
    from deltacache.demo.demo import run_demo
    from deltacache.terminal import terminal_reporter

    with usage_errors():
        asked = _resolved(build(DemoSettings, settings))
    run_demo(out, asked.seed, terminal_reporter(), asked.odds)


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
    known = (*settings_of(app), "run")
    if command not in known:
        raise typer.BadParameter(f"{command} has no settings to show: give one of {', '.join(known)}")
    parser: Any = get_command(app)
    asked = parser.commands[command]
    _state["show"] = True
    try:
        asked.invoke(asked.make_context(command, list(context.args), parent=context.parent))
    finally:
        _state["show"] = False


def _resolved(settings: FrozenT) -> FrozenT:
    """What every command passes its settings through before it begins: ``show-config`` ends here."""
    if _state["show"]:
        typer.echo(config_yaml(settings), nl=False)
        raise typer.Exit
    return settings


@app.command(rich_help_panel=TOOLS)
@flags_of(CostRequest)
def flops(**settings: Any) -> None:
    """Count what the paper's systems compute: the parts, all futures of an image, a training step (Tables 2 and B).

    Example: deltacache flops --preset released --image-size 256 --candidates 16
    """
    with usage_errors():
        given = settings["backbone"]
        backbone = None if given is None else api.backbone_source(given)
        request = _resolved(build(CostRequest, {**settings, "backbone": backbone}))

    from deltacache.costs import costs_text, count_costs
    from deltacache.terminal import terminal_reporter

    costs = count_costs(request, request.device if request.measure else None, terminal_reporter())
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
