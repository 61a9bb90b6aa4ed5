"""What a head says about patch tokens, compared with the label at its own resolution.

Shapes: C crops, S samples, N patches, D hidden, K numbers per pixel of the head, H' x W' a half of the label.
"""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from deltacache.evaluate.metrics import finite_of_head
from deltacache.models.deltatok import Grid
from deltacache.pipeline.benchmarks.frames import CropSplit, upsample, upsample_crop
from deltacache.schemas.benchmarks import IGNORE, Task

# ----------------------------------------------------------------------------------------------------
# What is counted at the label's pixels.
# ----------------------------------------------------------------------------------------------------


_CLOSE = 1.25


def segmentation_totals(classes: Tensor, labels: Tensor, count: int) -> Tensor:
    """Sums of ``pooled``'s segmentation, (3 ``count``,) float64, from class ids of equal shape."""
    valid = labels != IGNORE
    predicted, labelled = classes[valid].long(), labels[valid].long()
    parts = (labelled[predicted == labelled], predicted, labelled)
    return torch.cat([torch.bincount(part, minlength=count) for part in parts]).double()


def depth_totals(depth: Tensor, truth: Tensor) -> Tensor:
    """Sums of ``pooled``'s depth, (4,) float64, from metres of equal shape; truth is 0 where it is not known."""
    valid = truth > 0
    predicted, known = depth[valid].double(), truth[valid].double()
    error = (predicted - known).abs()
    close = torch.maximum(predicted / known, known / predicted) < _CLOSE
    sums = (error.square().sum(), (error / known).sum(), close.sum())
    return torch.stack([valid.sum().double(), *(each.double() for each in sums)])


_CHUNK_NUMBERS = 2**26  # upsampled logits held at a time: 256 MiB in float32


class LabelScorer(Protocol):
    """A seam: a head and the way in which its maps are judged."""

    task: Task

    @abstractmethod
    def totals(self, tokens: Tensor, split: CropSplit, label: Tensor) -> Tensor:
        """Sums of ``pooled`` for one prediction (C, N, D) of a frame labelled (C, H', W')."""
        ...

    @abstractmethod
    def covered(self, samples: Tensor, split: CropSplit, label: Tensor, crop: int) -> Tensor:
        """(2,) float64: valid pixels of a half (H', W'), and those of them that the samples (S, N, D) cover."""
        ...

    @abstractmethod
    def maps(self, tokens: Tensor, side: int) -> Tensor:
        """Maps (S, side, side) of whole crops (S, N, D), for pictures: uint8 class ids, or float16 metres."""
        ...


class _Head:
    """A head applied to tokens."""

    def __init__(self, head: nn.Module, grid: Grid) -> None:
        self._head, self._grid = head, grid

    def __call__(self, tokens: Tensor) -> Tensor:
        """(B, N, D) to (B, K, h, w)."""
        return finite_of_head(self._head(tokens.transpose(1, 2).unflatten(2, self._grid)))

    def chunks(self, samples: Tensor, split: CropSplit, half: tuple[int, int], crop: int) -> Iterator[Tensor]:
        """Maps (s, K, H', W') of a few samples (S, N, D) at a time."""
        small = self(samples)
        numbers = small.shape[1] * max(half) ** 2
        for chunk in small.split(max(1, _CHUNK_NUMBERS // numbers)):
            yield upsample_crop(chunk, split, half, crop)

    def square(self, tokens: Tensor, side: int) -> Iterator[Tensor]:
        """Maps (s, K, side, side) of whole crops."""
        whole = CropSplit((side, side), wide=False)
        yield from self.chunks(tokens, whole, (side, side), 0)


class SegmentationScorer:
    """Classes: intersection and union; a vote covers a pixel if any sample has its true class there."""

    task: Task = "segmentation"

    def __init__(self, head: nn.Module, grid: Grid, classes: int) -> None:
        self._head, self._classes = _Head(head, grid), classes

    def totals(self, tokens: Tensor, split: CropSplit, label: Tensor) -> Tensor:
        small, half = self._head(tokens), _half(label)
        # Crop by crop: logits of both side by side would be copied into another memory format, ten times as slow
        classes = [upsample_crop(each[None], split, half, crop).argmax(1) for crop, each in enumerate(small)]
        return segmentation_totals(torch.cat(classes), label, self._classes)

    def covered(self, samples: Tensor, split: CropSplit, label: Tensor, crop: int) -> Tensor:
        hit = torch.zeros_like(label, dtype=torch.bool)
        for logits in self._head.chunks(samples, split, _half(label), crop):
            hit |= (logits.argmax(1) == label).any(0)
        valid = label != IGNORE
        return torch.stack([valid.sum(), (hit & valid).sum()]).double()

    def maps(self, tokens: Tensor, side: int) -> Tensor:
        return torch.cat([logits.argmax(1).byte() for logits in self._head.square(tokens, side)])


class DepthScorer:
    """Metres: errors; a vote covers a pixel if its true depth lies between the samples' extremes."""

    task: Task = "depth"

    def __init__(self, head: nn.Module, grid: Grid) -> None:
        self._head = _Head(head, grid)

    def totals(self, tokens: Tensor, split: CropSplit, label: Tensor) -> Tensor:
        return depth_totals(upsample(self._head(tokens), split, _half(label))[:, 0], label)

    def covered(self, samples: Tensor, split: CropSplit, label: Tensor, crop: int) -> Tensor:
        above, below = torch.zeros_like(label, dtype=torch.bool), torch.zeros_like(label, dtype=torch.bool)
        for depth in self._head.chunks(samples, split, _half(label), crop):
            above |= (depth[:, 0] >= label).any(0)
            below |= (depth[:, 0] <= label).any(0)
        valid = label > 0
        return torch.stack([valid.sum(), (above & below & valid).sum()]).double()

    def maps(self, tokens: Tensor, side: int) -> Tensor:
        return torch.cat([depth[:, 0].half() for depth in self._head.square(tokens, side)])


def _half(label: Tensor) -> tuple[int, int]:
    return label.shape[-2], label.shape[-1]
