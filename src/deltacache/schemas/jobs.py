"""Settings of the offline jobs: what a command line turns into and what is saved beside its output."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from deltacache.schemas.arguments import Flag
from deltacache.schemas.datasets import (
    AskedPrecision,
    Frozen,
    ImageSize,
    Layers,
    SamplingSettings,
    sides,
    size_text,
)

DEFAULT_BACKBONE = "facebook/dinov3-vitb16-pretrain-lvd1689m"
WAIT_FOR_NODES_S = 600.0


class ClusterSettings(Frozen):
    """Where the work runs. Changes no number in the output."""

    ray_address: Annotated[str | None, Flag(default="a local Ray")] = Field(
        default=None, description="HOST:6379 of the Ray cluster to run on."
    )
    wait_for_nodes_s: Annotated[float, Flag("wait_for_nodes")] = Field(
        default=WAIT_FOR_NODES_S,
        ge=0,
        description="Seconds to wait until the cluster has room; 0: do not wait.",
    )
    encoders: Annotated[int | None, Flag(default="one per GPU, or per core")] = Field(
        default=None, ge=1, description="Encoder processes."
    )
    gpus_per_encoder: Annotated[float | None, Flag(default="1 if there are any")] = Field(
        default=None, ge=0, description="GPUs per encoder."
    )
    decoders: Annotated[int | None, Flag(default="the remaining CPUs")] = Field(
        default=None, ge=1, description="Decoding processes."
    )


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
    backbone: Annotated[str, Flag(default="DINOv3 ViT-B/16")] = Field(
        default=DEFAULT_BACKBONE, description="Hub id, Hugging Face directory, or 'tiny'."
    )
    layers: Annotated[Layers, Flag(default="the last hidden state")] = Field(
        default=None, description="Blocks whose outputs are joined, counted from 0, such as 2,5,8,11."
    )
    pca: Annotated[Path | None, Flag()] = Field(
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

    @model_validator(mode="after")
    def _not_too_small(self) -> Self:
        if min(sides(self.image_size)) < 16:
            raise ValueError(
                f"image size {size_text(self.image_size)} is too small: give at least 16 pixels per side"
            )
        return self


class TokenizeSettings(Frozen):
    """From a feature dataset to delta tokens."""

    features: str
    tokenizer: Path
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
    tokenizer: Path
