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


class Store(StrEnum):
    """Shard formats."""

    webdataset = "webdataset"
    zarr = "zarr"


class Dtype(StrEnum):
    """Stored precision of patch tokens."""

    float16 = "float16"
    int8 = "int8"


class Precision(StrEnum):
    """What models compute in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class Changed(StrEnum):
    """What to do about videos that were replaced behind their names."""

    refuse = "refuse"
    recompute = "recompute"


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


class TrainingSplit(StrEnum):
    """Which frames a head learns from."""

    train = "train"
    val = "val"


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


class Wandb(StrEnum):
    """Where Weights & Biases keeps a run."""

    off = "off"
    offline = "offline"
    online = "online"


class FromStage(StrEnum):
    """From where a chain is made again."""

    tokenizer = "tokenizer"
    deltas = "deltas"
    worlds = "worlds"
    evaluation = "evaluation"


class Query(StrEnum):
    """What the world model's queries start from."""

    noise = "noise"
    learned = "learned"


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
ImageSizeOpt = Annotated[int, typer.Option(min=16, help="Side of the square frames in pixels.")]
FrameSizeOpt = Annotated[
    str, typer.Option(help="Side of square frames in pixels, or height x width such as 448x896.")
]
LayersOpt = Annotated[
    str | None,
    typer.Option(help="Blocks to join, from 0, such as 2,5,8,11. [default: the last hidden state]"),
]
PcaOpt = Annotated[Path | None, typer.Option(help="Output of fit-pca, which reduces the features.")]
FramesOpt = Annotated[int, typer.Option(min=2, help="Frames a clip.")]
ViewsOpt = Annotated[int, typer.Option(min=1, help="Clips a video, each with its own crop, flip and times.")]
SpacingOpt = Annotated[
    tuple[float, float], typer.Option(help="Shortest and longest time between frames in seconds.")
]
AugmentOpt = Annotated[
    bool, typer.Option("--augment/--no-augment", help="Random start, spacing, crop and flip; else centred.")
]
DuplicatesOpt = Annotated[
    bool,
    typer.Option(
        "--duplicates/--no-duplicates", help="Repeat frames of short videos, or refuse them (too_short)."
    ),
]
StoreOpt = Annotated[Store, typer.Option(help="Shard format.")]
DtypeOpt = Annotated[
    Dtype, typer.Option(help="Stored precision; int8 has a scale per token and half the bytes.")
]
PrecisionOpt = Annotated[
    Precision,
    typer.Option(
        help="What backbone, tokenizer and world model compute products in; auto: bfloat16 on GPUs, else float32."
    ),
]
TrainingPrecisionOpt = Annotated[
    Precision | None,
    typer.Option(
        help="What products are computed in; bfloat16 also on CPUs that are fast in it. [default: the preset's, auto: "
        "bfloat16 on GPUs, else float32]"
    ),
]
RetryOpt = Annotated[bool, typer.Option("--retry-failed", help="Try the videos again that were refused.")]
ChangedOpt = Annotated[
    Changed,
    typer.Option(
        help="Videos that were replaced behind their names: refuse, or drop their shards and make them again."
    ),
]
ShardOpt = Annotated[int, typer.Option(min=1, help="Videos that are committed together.")]
SeedOpt = Annotated[int, typer.Option(min=0, help="All random choices follow from it.")]
ColumnOpt = Annotated[
    str | None,
    typer.Option(
        help="Column of a list that names the videos, by name or number. [default: by usual names and by what exists]"
    ),
]
ExcludeOpt = Annotated[
    Path | None,
    typer.Option(
        help="Text file of videos to leave out: an id, uri, name or path a line; or kinetics700-released."
    ),
]
FailedOpt = Annotated[
    float, typer.Option(min=0, max=1, help="Stop with exit code 1 when more of the videos are refused.")
]
TimeoutOpt = Annotated[
    float,
    typer.Option(min=0.1, help="Seconds that a short video may take to decode; long ones are allowed more."),
]
FrameRateOpt = Annotated[
    float | None,
    typer.Option(
        min=0.001,
        help="Of folders of frames whose names only count them (img_00001.jpg, 00001.jpg): frames a second; 1000 for "
        "names in milliseconds.",
    ),
]
RetryForOpt = Annotated[
    float,
    typer.Option(
        min=0, help="Seconds for which errors of disks and stores that may pass are tried again, with pauses."
    ),
]
TemporaryShareOpt = Annotated[
    float,
    typer.Option(
        min=0.001, max=0.999, help="Of the free temporary space, that the copy of one video may take."
    ),
]
AllowSchemeOpt = Annotated[
    list[str] | None,
    typer.Option(
        help="Open urls of this scheme too, such as sftp; repeat it. [always: s3, gs, az, abfs, http, https]"
    ),
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
EncodersOpt = Annotated[
    int | None, typer.Option(min=1, help="Encoder processes. [default: one a GPU, or a core]")
]
GpusOpt = Annotated[float | None, typer.Option(min=0, help="GPUs an encoder. [default: 1 if there are any]")]
DecodersOpt = Annotated[int | None, typer.Option(min=1, help="Decode processes. [default: the CPUs left]")]
PresetOpt = Annotated[
    str,
    typer.Option(
        help="Recipe to start from: released, paper, tiny, others (docs/training.md), or a YAML file."
    ),
]
HeadsOpt = Annotated[int | None, typer.Option(min=1, help="Attention heads. [default: the preset's]")]
StepsOpt = Annotated[
    int | None,
    typer.Option(min=1, help="Training steps, warm-up and decay in proportion. [default: the preset's]"),
]
WarmupOpt = Annotated[
    int | None,
    typer.Option(min=0, help="Steps of the warm-up. [default: the preset's, in proportion to --steps]"),
]
DecayOpt = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Step at which a cosine after the warm-up reaches 0. [default: the preset's, in proportion to --steps]",
    ),
]
BatchOpt = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Samples of a worker's step (with --accumulation: of a pass). [default: the preset's, shared by workers]",
    ),
]
TrainSeedOpt = Annotated[int | None, typer.Option(min=0, help="Seed. [default: the preset's]")]
SaveOpt = Annotated[
    int | None, typer.Option(min=1, help="Steps between checkpoints. [default: the preset's]")
]
LogOpt = Annotated[int | None, typer.Option(min=1, help="Steps between rows of the curves.")]
KeepOpt = Annotated[int | None, typer.Option(min=1, help="Checkpoints kept. [default: the preset's]")]
AccumulationOpt = Annotated[
    int | None, typer.Option(min=1, help="Passes that make one step. [default: as few as fit in memory]")
]
ProbeOpt = Annotated[
    int | None, typer.Option(min=1, help="Steps between health probes. [default: the preset's]")
]
StageOpt = Annotated[
    str | None, typer.Option(help="Stage of the preset, see docs/training.md. [default: the first]")
]
InitFromOpt = Annotated[
    Path | None,
    typer.Option(help="Start with the weights of this training output or released file, at step 0."),
]
ContinueFromOpt = Annotated[
    Path | None,
    typer.Option(help="Start with weights, optimizer and step of this training output: a cool-down."),
]
WandbOpt = Annotated[Wandb | None, typer.Option(help="Weights & Biases (pip install 'deltacache[wandb]').")]
BlackFirstOpt = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Share of pairs whose first frame is black. [default: the preset's, 0]"),
]
WorkersOpt = Annotated[
    int, typer.Option(min=1, help="Processes that train one model, one GPU each; see docs/training.md.")
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
TokenizerOpt = Annotated[
    Path | None, typer.Option(help="Output of train-tokenizer, or a released checkpoint.")
]
WholeSizeOpt = Annotated[str, typer.Option(help="Rows x columns of whole frames in pixels.")]
DinoV2Opt = Annotated[
    str | None,
    typer.Option(help="Hub id, directory, or 'tiny'. [default: DINOv2 ViT-B/14 with registers]"),
]
DepthMapsOpt = Annotated[
    Path | None, typer.Option(help="Folder of depth maps, <split>/<city>/<frame>..., see docs/foresight.md.")
]
