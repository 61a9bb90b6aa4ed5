"""What ``predict`` is asked: futures of one video, as tensors, as a page and as a movie."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from deltacache.schemas.arguments import Flag
from deltacache.schemas.benchmarks import BenchmarkName
from deltacache.schemas.datasets import AskedPrecision, Frozen, ImageSize, Layers
from deltacache.schemas.hub import DatasetPlace, ModelPath
from deltacache.schemas.jobs import Context, Device, Seed

_AS_TRAINED = "what the models were trained on"


class PredictionSettings(Frozen):
    """From a video, or a clip of a feature dataset, to sampled futures."""

    video: DatasetPlace = Field(description="a video (file, url, folder of frames), or a feature dataset")
    out: Path
    tokenizer: Annotated[ModelPath | None, Flag()] = Field(
        default=None, description="Output of train-tokenizer, a released checkpoint, or a name on the hub."
    )
    world: Annotated[ModelPath, Flag(takes=str)] = Field(
        description="Output of train-world, [ARCHITECTURE=]FILE as released, or a name on the hub."
    )
    architecture: str | None = Field(default=None, description="of a world model whose file does not say it")
    heads: Annotated[dict[BenchmarkName, ModelPath], Flag("head")] = Field(
        default={},
        description="NAME=FILE, may be repeated: linear head of vspw, cityscapes or kitti; adds classes or depth.",
    )
    rgb_decoder: Annotated[ModelPath | None, Flag()] = Field(
        default=None, description="Output of train-head rgb, or a released decoder; adds pictures of futures."
    )
    clip: Annotated[str | None, Flag(default="the first")] = Field(
        default=None, description="Id or number of the clip, if VIDEO is a feature dataset."
    )
    at_s: Annotated[float | None, Flag("at", default="as late as all steps still lie within the video")] = (
        Field(
            default=None,
            ge=0,
            allow_inf_nan=False,
            description="Time of the last context frame, in seconds from the video's first frame.",
        )
    )
    context: Context = 4
    steps: Annotated[int, Flag()] = Field(default=8, ge=1, le=1024, description="Frames to predict.")
    spacing_s: Annotated[float | None, Flag("spacing", default=_AS_TRAINED)] = Field(
        default=None, gt=0, allow_inf_nan=False, description="Seconds between frames."
    )
    samples: Annotated[int, Flag()] = Field(default=20, ge=1, description="Futures to sample.")
    seed: Seed = 0
    backbone: Annotated[str | None, Flag(default=_AS_TRAINED)] = Field(
        default=None, description="Name on the hub, Hugging Face directory, or 'tiny'."
    )
    layers: Layers = None
    pca: Annotated[ModelPath | None, Flag()] = Field(
        default=None, description="Output of fit-pca, if the models were trained on reduced tokens."
    )
    image_size: Annotated[ImageSize | None, Flag(default=_AS_TRAINED)] = Field(
        default=None, description="Side of square frames in pixels, or height x width such as 448x896."
    )
    frames_per_second: Annotated[float | None, Flag()] = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Frames per second of a folder of frames whose names only count.",
    )
    movie: Annotated[Literal["mp4", "gif"], Flag()] = Field(
        default="mp4", description="Format of the movie beside the page."
    )
    device: Device = "auto"
    precision: Annotated[AskedPrecision, Flag(choices=("auto", "float32", "bfloat16"))] = Field(
        default="auto",
        description="Precision of matrix products; auto: bfloat16 on GPUs, else float32.",
    )
