"""Options and arguments of the commands, by the names that several share."""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import typer
from pydantic import BaseModel

from deltacache.schemas.arguments import Argument, arguments_of, plain_type
from deltacache.schemas.datasets import parse_horizons
from deltacache.schemas.errors import SettingsError
from deltacache.schemas.secrets import without_secrets


def local_folder(folder: Path | None) -> Path | None:
    """Refuse a url where only a folder of this machine will do; a ``Path`` of it has one slash."""
    if folder is not None and re.match(r"[a-z][a-z0-9+.-]+:/", str(folder), re.IGNORECASE):
        raise typer.BadParameter(f"{without_secrets(str(folder))} is a url: give a folder of this machine")
    return folder


class Precision(StrEnum):
    """What models compute in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class HeadTarget(StrEnum):
    """What a head tells."""

    vspw = "vspw"
    cityscapes = "cityscapes"
    kitti = "kitti"
    rgb = "rgb"


class HeadPreset(StrEnum):
    """Recipes of heads in ``schemas/presets``."""

    released = "released"
    tiny = "tiny"


class ForesightTask(StrEnum):
    """What a head of Table D tells."""

    segmentation = "segmentation"
    depth = "depth"


class Padding(StrEnum):
    """How a generator takes frames."""

    plain = "plain"
    cosmos = "cosmos"


class Rate(StrEnum):
    """Which frames a generator sees and makes."""

    native = "native"
    evaluation = "evaluation"


class ClipFormat(StrEnum):
    """How clips for a generator are kept."""

    frames = "frames"
    mp4 = "mp4"


class FromStage(StrEnum):
    """From where a chain is made again."""

    tokenizer = "tokenizer"
    deltas = "deltas"
    worlds = "worlds"
    evaluation = "evaluation"


SourceArg = Annotated[
    str,
    typer.Argument(
        help="Folder (searched recursively), glob, or list (text, CSV, JSON, Parquet) of videos, zip archives of "
        "frames and tars of videos; local or on s3://, gs://, https://."
    ),
]
OutArg = Annotated[
    Path, typer.Argument(help="Output folder; an unfinished one is continued.", callback=local_folder)
]
DatasetOutArg = Annotated[
    str, typer.Argument(help="Output folder, local or on s3://, gs://; an unfinished one is continued.")
]
BackboneOpt = Annotated[
    str | None, typer.Option(help="Hub id, Hugging Face directory, or 'tiny'. [default: DINOv3 ViT-B/16]")
]
DryRunOpt = Annotated[bool, typer.Option("--dry-run", help="Print what would be computed and stop.")]
TrainingDryRunOpt = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Measure a few steps, print the estimated time and memory, and write nothing."
    ),
]
AddressOpt = Annotated[
    str | None,
    typer.Option(help="HOST:6379 of the Ray cluster to run on. [default: a local Ray]"),
]
WaitOpt = Annotated[
    float, typer.Option(min=0, help="Seconds to wait until the cluster has room; 0: do not wait.")
]
TrainSeedOpt = Annotated[
    int | None, typer.Option(min=0, help="Seed of all random choices. [default: the preset's]")
]
StageOpt = Annotated[
    str | None, typer.Option(help="Stage of the preset, see docs/training.md. [default: the first]")
]
SetOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Change any key of the preset, such as training.learning_rate=3e-4; may be repeated (docs/training.md).",
    ),
]
InitFromOpt = Annotated[
    Path | None,
    typer.Option(help="Start with the weights of this training output or released file, at step 0."),
]
ContinueFromOpt = Annotated[
    Path | None,
    typer.Option(help="Start with weights, optimizer and step of this training output, for a cool-down."),
]
EigenListOpt = Annotated[
    Path | None, typer.Option(help="Eigen test list. [default: eigen_test_files.txt in KITTI's root]")
]
EvaluationCacheOpt = Annotated[
    Path | None, typer.Option(help="Folder to cache the benchmarks' patch tokens for the next model.")
]
EvaluationWorkersOpt = Annotated[
    int | None,
    typer.Option(min=1, help="Processes over which the benchmarks are split. [default: this process]"),
]
ResumeOpt = Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint in OUT.")]
DeviceOpt = Annotated[str, typer.Option(help="auto (CUDA if there is one), cpu, cuda or mps.")]
PrecisionOpt = Annotated[
    Precision,
    typer.Option(help="Precision of matrix products; auto: bfloat16 on GPUs, else float32."),
]
SeedOpt = Annotated[int, typer.Option(min=0, help="Seed of all random choices.")]
PresetOpt = Annotated[
    str,
    typer.Option(
        help="Recipe to start from: released, paper, tiny, others (docs/training.md), or a YAML file."
    ),
]
AccumulationOpt = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Passes (micro-batches) whose gradients are accumulated into one step. [default: as few as fit in memory]",
    ),
]
WorkersOpt = Annotated[
    int, typer.Option(min=1, help="Processes that train one model, one GPU each; see docs/training.md.")
]
DepthMapsOpt = Annotated[
    Path | None, typer.Option(help="Folder of depth maps, <split>/<city>/<frame>..., see docs/foresight.md.")
]


# ----------------------------------------------------------------------------------------------------
# Values of flags that are no settings: ``NAME=PATH`` of flags that may be repeated, and horizons.
# ----------------------------------------------------------------------------------------------------


def with_name(text: str) -> str:
    return text if "=" in text else f"external={text}"


def named_paths(flag: str, texts: list[str]) -> dict[str, str]:
    """``NAME=PATH`` of a flag that may be repeated."""
    named: dict[str, str] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise typer.BadParameter(
                f"{flag} {text}: give NAME=PATH, such as {_with_guessed_name(flag, text)}"
            )
        if name in named:
            raise typer.BadParameter(f"{flag} {text}: {name} was given already ({named[name]})")
        named[name] = path
    return named


def _with_guessed_name(flag: str, text: str) -> str:
    """``/data/VSPW`` as ``vspw=/data/VSPW``; what one cannot tell is VSPW, or of a generator ``external``."""
    from deltacache.schemas.benchmarks import BENCHMARKS

    name, equals, path = text.partition("=")
    path = path if equals else name
    if equals and name:
        return f"{name}=PATH"
    if flag == "--predictions":
        return f"external={path or 'PATH'}"
    known = ("clips", *BENCHMARKS) if flag == "--data" else BENCHMARKS
    if text in known:
        return f"{text}=PATH"
    guessed = next((each for each in known if each in Path(path).name.lower()), "vspw")
    return f"{guessed}={path or 'PATH'}"


def parsed_horizons(text: str) -> tuple[int, ...]:
    """``1,3`` as numbers."""
    try:
        return parse_horizons(text)
    except ValueError as error:
        raise typer.BadParameter(f"--horizons: {error}") from None


# ----------------------------------------------------------------------------------------------------
# Flags of a command from the schema of its settings: name, type, bounds, default and help text stand there
# alone.
# ----------------------------------------------------------------------------------------------------


FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def flags_of(
    kind: type[BaseModel], *, defaults: str | Mapping[str, str] = "", without: tuple[str, ...] = ()
) -> Callable[[FunctionT], FunctionT]:
    """Give a command that ends in ``**settings`` a flag for every argument of ``kind``.

    A flag that is not given is ``None``: the schema has the defaults, and the help text shows them.

    Args:
        defaults: what the help text shows instead of the schema's defaults: for all flags, or for some by name.
        without: arguments of ``kind`` that the command does not have.
    """

    def decorate(command: FunctionT) -> FunctionT:
        own = list(inspect.signature(command).parameters.values())
        own = [each for each in own if each.kind is not inspect.Parameter.VAR_KEYWORD]
        names = {each.name for each in own} | {*without}
        added = [_parameter(each, defaults) for each in arguments_of(kind).values() if each.name not in names]
        given = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own]
        required = [each for each in given if each.default is inspect.Parameter.empty]
        optional = [each for each in given if each.default is not inspect.Parameter.empty]
        parameters = [*required, *added, *optional]
        target = cast("Any", command)
        target.__signature__ = inspect.Signature(parameters)
        target.__annotations__ = {each.name: each.annotation for each in parameters}
        return command

    return decorate


def _parameter(argument: Argument, defaults: str | Mapping[str, str]) -> inspect.Parameter:
    """An option of typer, ``None`` unless it is given."""
    value = plain_type(argument.annotation)
    dashed = f"--{argument.name.replace('_', '-')}"
    if isinstance(defaults, str):
        shown = argument.flag.default or defaults or _text(argument)
    else:
        shown = defaults.get(argument.name) or argument.flag.default or _text(argument)
    option = typer.Option(
        f"{dashed}/{argument.flag.off}" if argument.flag.off else dashed,
        help=f"{argument.help} [default: {shown}]" if shown else argument.help,
        min=argument.least if value in (int, float) else None,
        max=argument.most if value in (int, float) else None,
        show_default=False,
    )
    return inspect.Parameter(
        argument.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[value | None, option],
    )


def _text(argument: Argument) -> str:
    """The schema's default as a command line writes it; empty without one."""
    value = argument.default
    if value is None or value is False or value == ():
        return ""
    if argument.flag.off and isinstance(value, bool):
        return argument.name.replace("_", "-")
    return " ".join(f"{each:g}" for each in value) if isinstance(value, tuple) else str(value)


@contextmanager
def usage_errors() -> Iterator[None]:
    """Settings that are refused are wrong usage: exit code 2."""
    try:
        yield
    except SettingsError as error:
        flag = re.sub(r"^[a-z_]+(?=: )", lambda name: f"--{name[0].replace('_', '-')}", str(error))
        raise typer.BadParameter(flag) from error
