"""Linear heads on patch tokens: classes and depth (method section 1)."""

# B batch, D hidden, h rows and w columns of patches, C classes

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltacache.models.checkpoints import LoadedModel, load_model, recorded_config
from deltacache.schemas.benchmarks import DEPTH_BINS, MAX_DEPTH_M, MIN_DEPTH_M, Task
from deltacache.schemas.errors import CheckpointError

_DEPTH_FLOOR = 0.1  # added to every bin, so that some is always left to normalise by


class SegmentationHead(nn.Module):
    """BatchNorm and a 1 x 1 convolution."""

    def __init__(self, hidden_size: int, classes: int) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {"hidden_size": hidden_size, "classes": classes}
        self.hidden_size, self.classes = hidden_size, classes
        self.bn = nn.BatchNorm2d(hidden_size)
        self.head = nn.Conv2d(hidden_size, classes, kernel_size=1)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, C, h, w) of features (B, D, h, w)."""
        return self.head(self.bn(features))


class DepthHead(nn.Module):
    """The same to logits of depth bins, whose normalised weights give an expected depth."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {"hidden_size": hidden_size}
        self.hidden_size = hidden_size
        self.bn = nn.BatchNorm2d(hidden_size)
        self.head = nn.Conv2d(hidden_size, DEPTH_BINS, kernel_size=1)

    def forward(self, features: Tensor) -> Tensor:
        """Metres (B, 1, h, w) of features (B, D, h, w)."""
        weights = self.head(self.bn(features)).relu() + _DEPTH_FLOOR
        shares = weights / weights.sum(dim=1, keepdim=True)
        bins = torch.linspace(MIN_DEPTH_M, MAX_DEPTH_M, DEPTH_BINS, device=shares.device, dtype=shares.dtype)
        return torch.einsum("bkhw,k->bhw", shares, bins)[:, None]


def load_head(path: Path, task: Task) -> LoadedModel[SegmentationHead] | LoadedModel[DepthHead]:
    """Read a head from a checkpoint folder, a training output or a released file, strictly.

    Raises:
        CheckpointError: missing, damaged, or of another kind.
    """
    recorded = recorded_config(path)
    if recorded is not None and recorded["kind"] == "head":
        found = "segmentation" if "classes" in recorded["arguments"] else "depth"
        if found != task:
            raise CheckpointError(f"{path} is a head of {found}: give a head of {task}")
    if task == "depth":
        return load_model(path, "head", DepthHead, _depth_arguments)
    return load_model(path, "head", SegmentationHead, _segmentation_arguments)


def _segmentation_arguments(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    classes, hidden_size = _convolution(shapes)
    if classes == DEPTH_BINS:
        raise CheckpointError(
            f"is a head of depth (its {DEPTH_BINS} numbers per patch are bins of depth): give a head of segmentation"
        )
    return {"hidden_size": hidden_size, "classes": classes}


def _depth_arguments(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    bins, hidden_size = _convolution(shapes)
    if bins != DEPTH_BINS:
        raise CheckpointError(
            f"gives {bins} numbers per patch, a depth head {DEPTH_BINS}: give a head of depth"
        )
    return {"hidden_size": hidden_size}


def _convolution(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """Output and input channels."""
    shape = shapes.get("head.weight", ())
    if len(shape) != 4:
        raise CheckpointError("holds no linear head: expected head.weight of a convolution, and bn.*")
    return shape[0], shape[1]
