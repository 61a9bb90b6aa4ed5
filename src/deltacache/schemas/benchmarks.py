"""The published benchmarks (method section 3): their names, tasks, classes and labelled sequences."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

BenchmarkName = Literal["vspw", "cityscapes", "kitti"]
Task = Literal["segmentation", "depth"]

BENCHMARKS: tuple[BenchmarkName, ...] = get_args(BenchmarkName)
BENCHMARK_TASK: Mapping[BenchmarkName, Task] = MappingProxyType(
    {"vspw": "segmentation", "cityscapes": "segmentation", "kitti": "depth"}
)
CLASSES: Mapping[BenchmarkName, int] = MappingProxyType({"vspw": 124, "cityscapes": 19})
IGNORE = 255
"""Class id of pixels that count nowhere; invalid depth is 0 metres."""

SPACING_S: Mapping[BenchmarkName, float] = MappingProxyType({"vspw": 0.2, "cityscapes": 0.1875, "kitti": 0.2})
MIN_DEPTH_M = 1e-3
MAX_DEPTH_M = 80.0
DEPTH_BINS = 256


@dataclass(frozen=True, slots=True)
class LabelledSequence:
    """Frames of one sequence, oldest first; the last one is the labelled target.

    Attributes:
        sequence_id: safe as a file name; the same whatever the number of frames.
        group: the unit that intervals are over: VSPW's video, Cityscapes' city, KITTI's drive.
        frames: paths of pictures.
        label: path of the last frame's label.
        spacing_s: seconds between frames.
    """

    sequence_id: str
    group: str
    frames: tuple[str, ...]
    label: str
    spacing_s: float

    def __post_init__(self) -> None:
        if not self.frames:
            raise ValueError(f"{self.sequence_id}: a sequence needs at least its target frame")
        if self.spacing_s <= 0:
            raise ValueError(f"{self.sequence_id}: spacing {self.spacing_s} s must be positive")
