"""Configs of ``train-head``: linear heads of the benchmarks, and the RGB decoder."""

from typing import Annotated, Literal

from pydantic import Field

from deltacache.schemas.arguments import Flag
from deltacache.schemas.benchmarks import BENCHMARK_TASK, BenchmarkName
from deltacache.schemas.configs import PRESETS, TrainingConfig, load_config
from deltacache.schemas.datasets import Frozen, Precision

HeadPreset = Literal["released", "tiny"]
HEAD_RECIPES = ("segmentation", "depth", "rgb")
"""Each is a file ``presets/<preset>/head-<recipe>.yaml``."""


class FramesConfig(Frozen):
    """Which frames, and how they are seen."""

    image_size: Annotated[int, Flag(default="512")] = Field(
        default=512, ge=16, description="Shorter side in pixels, and side of the square crops."
    )
    split: Annotated[Literal["train", "val"], Flag(default="train")] = Field(
        default="train", description="Frames to learn from; val are those that are scored, for trials only."
    )
    flip: Annotated[float, Flag()] = Field(
        default=0.5, ge=0, le=1, description="Share of frames that are mirrored."
    )
    precision: Precision = Field(default="float32", description="of the backbone")


class HeadConfig(Frozen):
    """A linear head; its class count and task follow from the benchmark."""

    benchmark: BenchmarkName | None = Field(default=None, description="set by the command")
    training: TrainingConfig
    frames: FramesConfig = FramesConfig()
    gradient_loss: float = Field(
        default=0.5, ge=0, description="weight beside the scale-invariant loss of depth"
    )
    rmse_loss: float = Field(default=0.0, ge=0, description="weight of depth's error in metres beside both")


class RgbModelConfig(Frozen):
    """RAE's decoder; width, patch and image size follow from the backbone and the frames."""

    width: int = 1152
    layers: int = 28
    num_heads: int = 16
    mlp_width: int = 4096


class RgbConfig(Frozen):
    """The RGB decoder."""

    model: RgbModelConfig
    training: TrainingConfig
    frames: FramesConfig = FramesConfig()
    gradient_loss: float = Field(default=1.0, ge=0, description="weight beside L1")


def head_preset(benchmark: BenchmarkName, name: HeadPreset) -> HeadConfig:
    """``released`` (DINOv3's probes) or ``tiny`` (a minute on a CPU) for a benchmark."""
    config = load_config(PRESETS / name / f"head-{BENCHMARK_TASK[benchmark]}.yaml", HeadConfig)
    return config.model_copy(update={"benchmark": benchmark})


def rgb_preset(name: HeadPreset) -> RgbConfig:
    """``released`` (RAE's ViT-XL) or ``tiny`` (minutes on a CPU)."""
    return load_config(PRESETS / name / "head-rgb.yaml", RgbConfig)
