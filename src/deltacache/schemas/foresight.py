"""Settings of Table D's evaluation and heads: whole frames of Cityscapes, features of several layers, a PCA."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from deltacache.schemas.arguments import Flag
from deltacache.schemas.benchmarks import Task
from deltacache.schemas.configs import PRESETS, HeadConfig, HeadPreset, TrainingConfig, load_config
from deltacache.schemas.datasets import Frozen, Horizons, ImageSize, Layers, Precision
from deltacache.schemas.hub import ModelPath
from deltacache.schemas.jobs import Context, Device

DINOV2 = "facebook/dinov2-with-registers-base"
DATASET = "foresight"
"""In tables: Cityscapes as whole frames. Its numbers and those of the two crops are not of one scale."""
PAPER_SIZE = (448, 896)
DepthMaps = Annotated[
    Path | None,
    Flag(default="none"),
    Field(description="Folder of depth maps, <split>/<city>/<frame>..., see docs/foresight.md."),
]


class FrameFeatureConfig(Frozen):
    """How whole frames become patch tokens."""

    backbone: Annotated[str, Flag(default="DINOv2 ViT-B/14 with registers")] = Field(
        default=DINOV2, description="Name on the hub, Hugging Face directory, or 'tiny'."
    )
    layers: Annotated[Layers, Flag(default="the last hidden state")] = Field(
        default=None, description="Blocks whose outputs are joined, counted from 0, such as 2,5,8,11."
    )
    pca: Annotated[ModelPath | None, Flag(default="none")] = Field(
        default=None, description="Output of fit-pca, which reduces the tokens."
    )
    image_size: Annotated[ImageSize, Flag(default="448x896")] = Field(
        default=PAPER_SIZE, description="Height x width of whole frames in pixels."
    )
    precision: Precision = Field(default="float32", description="of the backbone")


class ForesightHeadConfig(Frozen):
    """A linear head on such features."""

    task: Task
    training: TrainingConfig
    features: FrameFeatureConfig
    split: Annotated[Literal["train", "val"], Flag(default="train")] = Field(
        default="train", description="Frames to train on; val are the scored frames."
    )
    depth: DepthMaps = None
    flip: float = Field(default=0.5, ge=0, le=1, description="share of frames that are mirrored")
    gradient_loss: float = Field(default=0.5, ge=0, description="weight beside depth's scale-invariant loss")
    rmse_loss: float = Field(default=0.0, ge=0, description="weight of depth's absolute error beside both")

    @model_validator(mode="after")
    def _depth_needs_maps(self) -> Self:
        if (self.task == "depth") != (self.depth is not None):
            raise ValueError(
                "a head of depth, and no other, learns from depth maps: give --depth DIR with it alone"
            )
        return self


class ForesightEvaluation(Frozen):
    """Short and mid-term futures of Cityscapes' labelled frames, scored on whole frames."""

    out: Path
    root: Path = Field(description="Cityscapes in its published layout")
    features: FrameFeatureConfig = FrameFeatureConfig()
    tokenizer: Annotated[ModelPath | None, Flag()] = Field(
        default=None, description="Output of train-tokenizer on features of whole frames."
    )
    worlds: Annotated[tuple[ModelPath, ...], Flag("world")] = Field(
        default=(), description="Output of train-world; may be repeated."
    )
    segmentation_head: Annotated[ModelPath | None, Flag("head")] = Field(
        default=None, description="Segmentation head of train-foresight-head."
    )
    depth_head: Annotated[ModelPath | None, Flag()] = Field(
        default=None, description="Depth head of train-foresight-head."
    )
    depth: DepthMaps = None
    context: Context = 4
    horizons: Annotated[Horizons, Flag(default="1,3")] = Field(
        default=(1, 3), min_length=1, description="Steps of three frames each; 1 is short-term, 3 mid-term."
    )
    seed: Annotated[int, Flag()] = Field(
        default=0, ge=0, description="Part of the run id only; no number depends on it."
    )
    examples: Annotated[int, Flag()] = Field(
        default=4, ge=0, le=32, description="Sequences kept for the report's pictures."
    )
    device: Device = "auto"

    @model_validator(mode="after")
    def _depth_needs_both(self) -> Self:
        if (self.depth_head is None) != (self.depth is None):
            raise ValueError(
                "depth is scored by a head against maps: give --depth-head and --depth, or neither"
            )
        return self

    @property
    def tokenizers(self) -> tuple[Path, ...]:
        """The one there is, or none."""
        return () if self.tokenizer is None else (self.tokenizer,)

    @property
    def heads(self) -> dict[Task, Path]:
        """Those that are given, by what they tell."""
        given: dict[Task, Path | None] = {"segmentation": self.segmentation_head, "depth": self.depth_head}
        return {task: path for task, path in given.items() if path is not None}


def foresight_head(
    task: Task, preset: HeadPreset, features: FrameFeatureConfig, depth: Path | None
) -> ForesightHeadConfig:
    """The recipe of the benchmarks' linear heads (``presets/<preset>/head-<task>.yaml``) for these features."""
    recipe = load_config(PRESETS / preset / f"head-{task}.yaml", HeadConfig)
    return ForesightHeadConfig(
        task=task,
        training=recipe.training,
        features=features,
        depth=depth,
        flip=recipe.frames.flip,
        gradient_loss=recipe.gradient_loss,
        rmse_loss=recipe.rmse_loss,
    )
