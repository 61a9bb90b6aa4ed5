"""Settings of the offline jobs: what a command line turns into and what is saved beside its output."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from deltacache.schemas.datasets import AskedPrecision, Frozen, SamplingSettings
from deltacache.schemas.images import ImageSize, sides, size_text
from deltacache.schemas.layers import Layers

DEFAULT_BACKBONE = "facebook/dinov3-vitb16-pretrain-lvd1689m"
WAIT_FOR_NODES_S = 600.0


class ClusterSettings(Frozen):
    """Where the work runs. Changes no number in the output."""

    ray_address: str | None = Field(default=None, description="None starts a local Ray")
    encoders: int | None = Field(
        default=None, ge=1, description="None: one a GPU, else one a core if memory allows"
    )
    gpus_per_encoder: float | None = Field(default=None, ge=0, description="None: 1 where there are GPUs")
    decoders: int | None = Field(default=None, ge=1, description="None: the CPUs the encoders leave")
    wait_for_nodes_s: float = Field(
        default=WAIT_FOR_NODES_S, ge=0, description="how long a cluster may take to have room"
    )


class DecodeLimits(Frozen):
    """What one video may cost before it is given up."""

    timeout_s: float = Field(default=300.0, gt=0, description="of a short video; long ones are allowed more")
    memory_bytes: int = Field(default=8 << 30, gt=0)
    temporary_share: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="of the free temporary space, that the copy of one video may take",
    )
    retry_s: float = Field(
        default=300.0, ge=0, description="for how long errors that may pass are tried again"
    )


class ExtractionSettings(Frozen):
    """From videos to patch tokens."""

    source: str
    column: str | None = Field(
        default=None,
        description="of a list of videos, by name or number; None: chosen by name and by what exists",
    )
    backbone: str = DEFAULT_BACKBONE
    layers: Layers = Field(
        default=None, description="blocks whose outputs are joined; None: the last hidden state"
    )
    pca: Path | None = Field(default=None, description="output of fit-pca that reduces the tokens")
    image_size: ImageSize = Field(default=512, description="side of a square, or height and width, in pixels")
    views: int = Field(default=1, ge=1, le=1000)
    sampling: SamplingSettings = SamplingSettings()
    store: Literal["webdataset", "zarr"] = "webdataset"
    dtype: Literal["float16", "int8"] = Field(default="float16", description="of stored patch tokens")
    precision: AskedPrecision = Field(
        default="auto", description="of the forward passes of backbone and tokenizer; auto: bfloat16 on GPUs"
    )
    videos_per_shard: int = Field(default=32, ge=1)
    exclude_list: Path | None = None
    allow_schemes: tuple[str, ...] = Field(
        default=(), description="of urls, that are opened beside s3, gs, az, abfs, http and https"
    )
    max_failed_fraction: float = Field(default=0.05, ge=0, le=1)
    retry_failed: bool = Field(default=False, description="try refused videos again")
    changed_videos: Literal["refuse", "recompute"] = Field(
        default="refuse", description="what to do about videos that were replaced behind their names"
    )
    limits: DecodeLimits = DecodeLimits()
    cluster: ClusterSettings = ClusterSettings()

    @model_validator(mode="after")
    def _not_too_small(self) -> Self:
        if min(sides(self.image_size)) < 16:
            raise ValueError(
                f"image size {size_text(self.image_size)} is too small: give at least 16 pixels a side"
            )
        return self


class TokenizeSettings(Frozen):
    """From a feature dataset to delta tokens."""

    features: str
    tokenizer: Path
    store: Literal["webdataset", "zarr"] = "webdataset"
    precision: AskedPrecision = Field(
        default="auto", description="of the tokenizer's forward pass; auto: bfloat16 on GPUs"
    )
    changed_videos: Literal["refuse", "recompute"] = Field(
        default="refuse", description="what to do about shards whose features are of other videos now"
    )
    cluster: ClusterSettings = ClusterSettings()


class TokenizeVideosSettings(Frozen):
    """Straight from videos to delta tokens: patch tokens never touch the disk."""

    videos: ExtractionSettings
    tokenizer: Path
