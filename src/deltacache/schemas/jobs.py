"""Settings of the offline jobs: what a command line turns into and what is saved beside its output."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast, get_args

from pydantic import Field, field_validator, model_validator

from deltacache.schemas.arguments import Flag
from deltacache.schemas.benchmarks import BENCHMARKS, BenchmarkName
from deltacache.schemas.datasets import (
    AskedPrecision,
    Frozen,
    Horizons,
    ImageSize,
    Layers,
    SamplingSettings,
    SideRule,
    sides,
    size_text,
)
from deltacache.schemas.hub import DatasetPlace, ModelPath, TrainingPath

DEFAULT_BACKBONE = "facebook/dinov3-vitb16-pretrain-lvd1689m"
WAIT_FOR_NODES_S = 600.0

# ----------------------------------------------------------------------------------------------------
# Settings that several commands have: their bounds and help texts stand here once.
# ----------------------------------------------------------------------------------------------------

Backbone = Annotated[
    str,
    Flag(default="DINOv3 ViT-B/16"),
    Field(
        description="Name on the hub, Hugging Face directory, 'tiny', or package.module:factory (docs/backbones.md)."
    ),
]
RayAddress = Annotated[
    str | None,
    Flag(default="a local Ray"),
    Field(description="HOST:6379 of the Ray cluster to run on."),
]
WaitForNodes = Annotated[
    float,
    Flag("wait_for_nodes"),
    Field(ge=0, description="Seconds to wait until the cluster has room; 0: do not wait."),
]
Encoders = Annotated[
    int | None,
    Flag(default="one per GPU, or per core"),
    Field(
        ge=0,
        description="Encoder processes; 0: encode and decode in this process, without Ray, for a few videos or a "
        "debugger.",
    ),
]
Device = Annotated[str, Flag(), Field(description="auto (CUDA if there is one), cpu, cuda or mps.")]
Seed = Annotated[int, Flag(), Field(ge=0, description="Seed of all random choices.")]
Context = Annotated[int, Flag(), Field(ge=1, description="Context frames that the model sees.")]
EigenList = Annotated[
    Path | None,
    Flag(default="eigen_test_files.txt in KITTI's root"),
    Field(description="Eigen test list."),
]


# ----------------------------------------------------------------------------------------------------
# Extraction and tokenization.
# ----------------------------------------------------------------------------------------------------


class ClusterSettings(Frozen):
    """Where the work runs. Changes no number in the output."""

    ray_address: RayAddress = None
    wait_for_nodes_s: WaitForNodes = WAIT_FOR_NODES_S
    encoders: Encoders = None
    gpus_per_encoder: Annotated[float | None, Flag(default="1 if there are any")] = Field(
        default=None, ge=0, description="GPUs per encoder."
    )
    decoders: Annotated[int | None, Flag(default="the remaining CPUs")] = Field(
        default=None, ge=1, description="Decoding processes."
    )

    @model_validator(mode="after")
    def _nothing_beside_this_process(self) -> Self:
        beside = {"--decoders": self.decoders, "--ray-address": self.ray_address}
        given = [flag for flag, value in beside.items() if value is not None]
        if self.encoders == 0 and given:
            raise ValueError(
                f"--encoders 0 works in this process alone: leave {' and '.join(given)} out, or ask for encoders"
            )
        return self


class DecodeLimits(Frozen):
    """What one video may cost before it is given up."""

    timeout_s: Annotated[float, Flag("decode_timeout")] = Field(
        default=300.0,
        ge=0.1,
        description="Seconds allowed for decoding a short video; long videos get more.",
    )
    memory_bytes: int = Field(default=8 << 30, gt=0)
    temporary_share: Annotated[float, Flag()] = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="Share of the free temporary space that the copy of one video may take.",
    )
    retry_s: Annotated[float, Flag("retry_for")] = Field(
        default=300.0,
        ge=0,
        description="Seconds for which temporary errors of disks and stores are retried, with pauses.",
    )


class ExtractionSettings(Frozen):
    """From videos to patch tokens."""

    source: str
    backbone: Backbone = DEFAULT_BACKBONE
    layers: Annotated[Layers, Flag(default="the last hidden state")] = Field(
        default=None, description="Blocks whose outputs are joined, counted from 0, such as 2,5,8,11."
    )
    pca: Annotated[ModelPath | None, Flag()] = Field(
        default=None, description="Output of fit-pca, which reduces the tokens."
    )
    image_size: Annotated[ImageSize, Flag()] = Field(
        default=512, description="Side of square frames in pixels, or height x width such as 448x896."
    )
    views: Annotated[int, Flag()] = Field(
        default=1, ge=1, le=1000, description="Clips per video, each with its own crop, flip and times."
    )
    sampling: SamplingSettings = SamplingSettings()
    store: Annotated[Literal["webdataset", "zarr"], Flag()] = Field(
        default="webdataset", description="Shard format."
    )
    dtype: Annotated[Literal["float16", "int8"], Flag()] = Field(
        default="float16", description="Stored precision; int8 has a scale per token and half the bytes."
    )
    precision: Annotated[AskedPrecision, Flag(choices=("auto", "float32", "bfloat16"))] = Field(
        default="auto",
        description="Precision of matrix products; auto: bfloat16 on GPUs, else float32.",
    )
    videos_per_shard: Annotated[int, Flag()] = Field(
        default=32, ge=1, description="Videos per shard; a shard is committed as a whole."
    )
    exclude_list: Annotated[Path | None, Flag()] = Field(
        default=None,
        description="Text file of videos to leave out, one id, uri, name or path per line; or kinetics700-released.",
    )
    side_arrays: Annotated[str | None, Flag()] = Field(
        default=None,
        description="CSV or Parquet with video_uri, time_s and columns that are stored for each frame (docs/data.md).",
    )
    side_rule: Annotated[tuple[str, ...], Flag()] = Field(
        default=(),
        description="COLUMN=RULE: which row a frame gets: previous (default; nearest of LeRobot datasets), nearest or "
        "linear; may be repeated.",
    )
    cameras: Annotated[tuple[str, ...], Flag("camera", default="the only one")] = Field(
        default=(),
        description="Key of a camera of a LeRobot dataset (docs/data.md), such as observation.images.top; may be "
        "repeated.",
    )
    column: Annotated[str | None, Flag(default="detected from column names and existing files")] = Field(
        default=None, description="Column of a list that holds the videos, by name or number."
    )
    allow_schemes: Annotated[
        tuple[str, ...], Flag("allow_scheme", default="only s3, gs, az, abfs, http and https")
    ] = Field(default=(), description="Allow urls of this scheme too, such as sftp; may be repeated.")
    max_failed_fraction: Annotated[float, Flag()] = Field(
        default=0.05,
        ge=0,
        le=1,
        description="Fraction of videos that may be rejected; above it, stop with exit code 1.",
    )
    retry_failed: Annotated[bool, Flag()] = Field(default=False, description="Try rejected videos again.")
    changed_videos: Annotated[Literal["refuse", "recompute"], Flag()] = Field(
        default="refuse",
        description="If a video was replaced under the same name: refuse to run, or recompute its shard.",
    )
    limits: DecodeLimits = DecodeLimits()
    cluster: ClusterSettings = ClusterSettings()

    @property
    def side_rules(self) -> dict[str, SideRule]:
        """By column."""
        return {
            name: cast("SideRule", rule) for name, _, rule in (text.partition("=") for text in self.side_rule)
        }

    @model_validator(mode="after")
    def _rules_of_side_arrays(self) -> Self:
        for text in self.side_rule:
            name, _, rule = text.partition("=")
            if not name or rule not in get_args(SideRule):
                raise ValueError(
                    f"side_rule {text!r}: give COLUMN=RULE, the rule {', '.join(get_args(SideRule))}"
                )
        return self

    @model_validator(mode="after")
    def _windows_instead_of_views(self) -> Self:
        if self.sampling.windows is not None and self.views != 1:
            raise ValueError(f"windows all takes every clip of a video: leave --views {self.views} out")
        if self.sampling.windows is not None and self.store != "webdataset":
            raise ValueError(
                f"windows all is stored in WebDataset shards only: leave --store {self.store} out"
            )
        return self

    @model_validator(mode="after")
    def _not_too_small(self) -> Self:
        if min(sides(self.image_size)) < 16:
            raise ValueError(
                f"image size {size_text(self.image_size)} is too small: give at least 16 pixels per side"
            )
        return self


class TokenizeSettings(Frozen):
    """From a feature dataset to delta tokens."""

    features: DatasetPlace
    tokenizer: ModelPath
    store: Annotated[Literal["webdataset", "zarr"], Flag()] = Field(
        default="webdataset", description="Shard format."
    )
    precision: Annotated[AskedPrecision, Flag(choices=("auto", "float32", "bfloat16"))] = Field(
        default="auto",
        description="What the tokenizer computes products in; auto: bfloat16 on GPUs, else float32.",
    )
    changed_videos: Annotated[Literal["refuse", "recompute"], Flag()] = Field(
        default="refuse",
        description="If features now come from other videos: refuse to run, or recompute their shards.",
    )
    retry_s: Annotated[float, Flag("retry_for")] = Field(
        default=300.0,
        ge=0,
        description="Seconds for which temporary errors of disks and stores are retried, with pauses.",
    )
    cluster: ClusterSettings = ClusterSettings()


class TokenizeVideosSettings(Frozen):
    """Straight from videos to delta tokens: patch tokens never touch the disk."""

    videos: ExtractionSettings
    tokenizer: ModelPath


class PcaSettings(Frozen):
    """``fit-pca``: from a feature dataset to principal components."""

    components: Annotated[int, Flag()] = Field(default=1152, ge=1, description="Channels to keep.")
    frames: Annotated[int | None, Flag(default="all")] = Field(
        default=None, ge=1, description="Frames to take, spread evenly."
    )
    device: Device = "auto"


class DemoSettings(Frozen):
    """``demo``: the whole chain on drawn videos."""

    seed: Seed = 0
    odds: Annotated[float, Flag()] = Field(
        default=0.5, ge=0, le=1, description="Probability that the shape turns left; else it turns right."
    )


class PushSettings(Frozen):
    """``push``: an output to the hub."""

    path: Path
    repo: str
    private: Annotated[bool, Flag()] = Field(
        default=False, description="Make the repository private; one that is public is refused."
    )
    evaluation: Annotated[DatasetPlace | None, Flag()] = Field(
        default=None, description="Output of evaluate, whose metrics go into the card of a model."
    )
    training_state: Annotated[bool, Flag()] = Field(
        default=False, description="Upload the optimizer's state too, for --continue-from."
    )


class DoctorSettings(Frozen):
    """``doctor``: what is looked at and measured."""

    output: Annotated[str | None, Flag()] = Field(
        default=None, description="Folder that commands would write to; its disk is checked too."
    )
    measure: Annotated[bool, Flag()] = Field(
        default=False,
        description="Measure rates for at most a minute, and say how long the published chains would take here.",
    )
    videos: Annotated[int | None, Flag(default="Kinetics-700's 545,000")] = Field(
        default=None, ge=1, description="Number of videos for the estimated hours."
    )
    device: Device = "auto"


# ----------------------------------------------------------------------------------------------------
# How a training is started: what is not in its recipe.
# ----------------------------------------------------------------------------------------------------


class DataPart(Frozen):
    """One dataset of a training.

    Attributes:
        weight: in a mixture; without weights every clip comes up equally often.
        where: filter of its clips, in place of the training's.
    """

    path: DatasetPlace
    weight: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    where: str | None = None


class DataMixture(Frozen):
    """The content of a YAML file that lists the datasets of a training."""

    datasets: tuple[DataPart, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _all_or_none(self) -> Self:
        weighted = [part.weight is not None for part in self.datasets]
        if any(weighted) and not all(weighted):
            bare = next(part.path for part in self.datasets if part.weight is None)
            raise ValueError(
                f"{bare} has no weight, but other datasets have one: give all of them a weight, or none"
            )
        return self


ChainStage = Literal["tokenizer", "deltas", "worlds", "evaluation"]
"""Stages of ``run`` that may be made again, in their order; each uses those before it."""


class Launch(Frozen):
    """``train-tokenizer`` and ``train-world``, beside the recipe."""

    preset: Annotated[str, Flag()] = Field(
        default="released",
        description="Recipe to start from: released, paper, tiny, others (docs/training.md), or a YAML file.",
    )
    stage: Annotated[str | None, Flag(default="the first")] = Field(
        default=None, description="Stage of the preset, see docs/training.md."
    )
    assignments: Annotated[tuple[str, ...], Flag(option="--set")] = Field(
        default=(),
        description="Change any key of the preset, such as training.learning_rate=3e-4; may be repeated "
        "(docs/training.md).",
    )
    init_from: Annotated[ModelPath | None, Flag()] = Field(
        default=None,
        description="Start with the weights of this training output or released file, at step 0.",
    )
    continue_from: Annotated[TrainingPath | None, Flag()] = Field(
        default=None,
        description="Start with weights, optimizer and step of this training output, for a cool-down.",
    )
    validation: Annotated[
        DatasetPlace | None, Flag("validate", default="the videos that --split holds out")
    ] = Field(
        default=None,
        description="Dataset of the same kind for the validation loss; the best checkpoint is kept in OUT/best.",
    )
    resume: Annotated[bool, Flag()] = Field(
        default=False, description="Continue from the newest checkpoint in OUT."
    )
    workers: Annotated[int, Flag()] = Field(
        default=1, ge=1, description="Processes that train one model, one GPU each; see docs/training.md."
    )
    ray_address: RayAddress = None
    wait_for_nodes_s: WaitForNodes = WAIT_FOR_NODES_S
    dry_run: Annotated[bool, Flag()] = Field(
        default=False,
        description="Measure a few steps, print the estimated time and memory, and write nothing.",
    )
    device: Device = "auto"

    @model_validator(mode="after")
    def _one_beginning(self) -> Self:
        if self.init_from and self.continue_from:
            raise ValueError("give --init-from or --continue-from, not both")
        return self


class HeadLaunch(Launch):
    """``train-head`` and ``train-foresight-head``, beside the recipe."""

    preset: Annotated[str, Flag(choices=("released", "tiny"))] = Field(
        default="released", description="Recipe to start from."
    )
    backbone: Backbone = DEFAULT_BACKBONE
    kitti_split: Annotated[Path | None, Flag(default="the depth maps in train/")] = Field(
        default=None, description="List of KITTI's training frames; test drives are left out."
    )
    kitti_test: Annotated[Path | None, Flag(default="eigen_test_files.txt in ROOT, which must exist")] = (
        Field(
            default=None,
            description="List of KITTI's test frames, whose drives are left out. With --split val, the frames to train "
            "on.",
        )
    )
    precision: Annotated[AskedPrecision, Flag(choices=("auto", "float32", "bfloat16"))] = Field(
        default="auto",
        description="Precision of matrix products; auto: bfloat16 on GPUs, else float32.",
    )


class SystemsLaunch(Launch):
    """``train-systems``, beside the list of systems."""

    preset: Annotated[str, Flag()] = Field(
        default="table2", description="table2 (Tables 2 and C), tiny-table2, tiny-tokens, or a YAML file."
    )
    assignments: Annotated[tuple[str, ...], Flag(option="--set")] = Field(
        default=(),
        description="Change any key of the preset, such as systems.dino-world.world.candidates=16; may be repeated.",
    )
    encoders: Encoders = None
    seed: Annotated[int | None, Flag(default="the preset's")] = Field(
        default=None, ge=0, description="Seed of every training."
    )
    accumulation: Annotated[int | None, Flag(default="as few as fit in memory")] = Field(
        default=None,
        ge=1,
        description="Passes (micro-batches) whose gradients are accumulated into one step.",
    )


# ----------------------------------------------------------------------------------------------------
# Evaluation beside ``evaluate``, and costs.
# ----------------------------------------------------------------------------------------------------


class ComparisonSettings(Frozen):
    """``compare-systems``, beside the evaluation of the systems."""

    evaluation: Annotated[Path | None, Flag(default="OUT/evaluation")] = Field(
        default=None,
        description="Folder of the evaluation; if it is not the default, the table is written there too.",
    )
    measure: Annotated[bool, Flag(off="--no-measure")] = Field(
        default=True, description="Measure time and memory of a training step on this machine."
    )
    batch_size: Annotated[int, Flag()] = Field(default=8, ge=1, description="Clips of the measured step.")


class ContextExport(Frozen):
    """``export-contexts``: what a video generator is given."""

    data: Annotated[dict[BenchmarkName, Path], Flag()] = Field(
        description="NAME=PATH, may be repeated: vspw, cityscapes or kitti with its root."
    )
    horizons: Annotated[Horizons, Flag(default="1,3")] = Field(
        default=(1, 3), min_length=1, description="Steps after the context, such as 1,3."
    )
    context: Annotated[int, Flag()] = Field(
        default=4,
        ge=1,
        description="Context frames of the evaluation, which decide what sequences there are.",
    )
    frames: Annotated[int, Flag()] = Field(
        default=9,
        ge=1,
        description="Frames that the generator sees, the last of them the horizon before the target.",
    )
    padding: Annotated[Literal["plain", "cosmos"], Flag()] = Field(
        default="plain", description="Frames as they are, or 512 high in 640 x 1024 for Cosmos."
    )
    rate: Annotated[Literal["native", "evaluation"], Flag()] = Field(
        default="native",
        description="Frames as recorded, or one per step of the evaluation (then at most --context).",
    )
    clip_format: Annotated[Literal["frames", "mp4"], Flag(option="--format")] = Field(
        default="frames", description="Pictures or videos."
    )
    kitti_split: EigenList = None

    @field_validator("data", mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        unknown = [name for name in data if name not in BENCHMARKS]
        if unknown:
            raise ValueError(f"{unknown[0]} is not known: give {', '.join(BENCHMARKS)}, as NAME=PATH")
        return data


class CostRequest(Frozen):
    """``flops``: which systems are counted, and for what."""

    preset: Annotated[str, Flag()] = Field(
        default="released",
        description="Preset, such as released, paper, dino-world-large, table2; or a YAML file of a recipe or of "
        "systems.",
    )
    assignments: Annotated[tuple[str, ...], Flag(option="--set")] = Field(
        default=(),
        description="Any key of the systems, such as systems.delta-tokens.world.model.num_layers=6; may be repeated.",
    )
    backbone: Annotated[str, Flag()] = Field(
        default="vitb16", description="vits16, vitb16, vitl16, …, tiny, or a folder with a config.json."
    )
    hidden_size: Annotated[int | None, Flag(default="the backbone's")] = Field(
        default=None, ge=1, description="Width of the tokens, where a PCA changes it."
    )
    heads: Annotated[
        int | None, Flag(default="the preset's; heads of 64 dims if tokens have another width")
    ] = Field(default=None, ge=1, description="Attention heads of all models; must divide their width.")
    image_size: Annotated[tuple[int, int], Flag(takes=str, default="256")] = Field(
        default=(256, 256), description="Pixels of a crop: 256, or rows x columns: 448x896."
    )
    context: Context = 4
    horizon: Annotated[int, Flag()] = Field(default=3, ge=1, description="Frames to predict.")
    samples: Annotated[int, Flag()] = Field(default=20, ge=1, description="Futures to sample.")
    crops: Annotated[int, Flag()] = Field(
        default=2, ge=1, description="Crops per image; the evaluation protocol has two."
    )
    frames: Annotated[int, Flag()] = Field(default=8, ge=2, description="Frames per training clip.")
    candidates: Annotated[int | None, Flag(default="the preset's")] = Field(
        default=None, ge=1, description="Number of candidates, K of best-of-many."
    )
    measure: Annotated[bool, Flag()] = Field(
        default=False, description="Measure time and memory on this machine, with random weights."
    )
    batch_size: Annotated[int, Flag()] = Field(
        default=1, ge=1, description="Clips of a measured training step."
    )
    device: Device = "auto"

    @field_validator("image_size", mode="before")
    @classmethod
    def _as_text(cls, size: Any) -> Any:
        """``256`` or ``448x896``."""
        if not isinstance(size, str):
            return size
        sides = size.split("x")
        return sides * 2 if len(sides) == 1 else sides
