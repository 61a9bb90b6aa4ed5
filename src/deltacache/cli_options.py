"""Options and arguments of the commands, by the names that several share."""

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

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
        "frames and tars of videos; here or on s3://, gs://, https://."
    ),
]
OutArg = Annotated[
    Path, typer.Argument(help="Output folder; an unfinished one is continued.", callback=local_folder)
]
DatasetOutArg = Annotated[
    str, typer.Argument(help="Output folder, here or on s3://, gs://; an unfinished one is continued.")
]
BackboneOpt = Annotated[
    str | None, typer.Option(help="Hub id, Hugging Face directory, or 'tiny'. [default: DINOv3 ViT-B/16]")
]
DryRunOpt = Annotated[bool, typer.Option("--dry-run", help="Print what would be made and stop.")]
TrainingDryRunOpt = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Measure a few steps, say what the training would take here, and write nothing."
    ),
]
AddressOpt = Annotated[
    str | None,
    typer.Option(help="HOST:6379 of the Ray cluster to run on. [default: a local Ray that starts by itself]"),
]
WaitOpt = Annotated[
    float, typer.Option(min=0, help="Seconds to wait for a cluster to have room; 0: refuse at once.")
]
TrainSeedOpt = Annotated[int | None, typer.Option(min=0, help="Seed. [default: the preset's]")]
StageOpt = Annotated[
    str | None, typer.Option(help="Stage of the preset, see docs/training.md. [default: the first]")
]
SetOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Any key of the preset, such as training.learning_rate=3e-4; may be repeated (docs/training.md).",
    ),
]
InitFromOpt = Annotated[
    Path | None,
    typer.Option(help="Start with the weights of this training output or released file, at step 0."),
]
ContinueFromOpt = Annotated[
    Path | None,
    typer.Option(help="Start with weights, optimizer and step of this training output: a cool-down."),
]
EigenListOpt = Annotated[
    Path | None, typer.Option(help="Eigen test list. [default: eigen_test_files.txt in KITTI's root]")
]
EvaluationCacheOpt = Annotated[
    Path | None, typer.Option(help="Keep the benchmarks' patch tokens here, for the next model.")
]
EvaluationWorkersOpt = Annotated[
    int | None, typer.Option(min=1, help="Processes that share the benchmarks. [default: this one]")
]
ResumeOpt = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in OUT.")]
DeviceOpt = Annotated[str, typer.Option(help="auto (CUDA if there is one), cpu, cuda or mps.")]
PrecisionOpt = Annotated[
    Precision,
    typer.Option(
        help="What backbone, tokenizer and world model compute products in; auto: bfloat16 on GPUs, else float32."
    ),
]
SeedOpt = Annotated[int, typer.Option(min=0, help="All random choices follow from it.")]
PresetOpt = Annotated[
    str,
    typer.Option(
        help="Recipe to start from: released, paper, tiny, others (docs/training.md), or a YAML file."
    ),
]
AccumulationOpt = Annotated[
    int | None, typer.Option(min=1, help="Passes that make one step. [default: as few as fit in memory]")
]
WorkersOpt = Annotated[
    int, typer.Option(min=1, help="Processes that train one model, one GPU each; see docs/training.md.")
]
DepthMapsOpt = Annotated[
    Path | None, typer.Option(help="Folder of depth maps, <split>/<city>/<frame>..., see docs/foresight.md.")
]
