"""How a prediction of the labelled frame is judged: by its features, and by what heads read off them.

Shapes: N patches, D hidden, h x w patches of a frame, K numbers a patch of a head, H x W pixels of the label.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from deltacache.evaluate.benchmarks.scales import depth_totals, segmentation_totals
from deltacache.evaluate.metrics import feature_metrics
from deltacache.models.deltatok import Grid
from deltacache.models.heads import DepthHead, SegmentationHead

MOVABLE = tuple(range(11, 19))
"""Cityscapes' train ids of what moves: person, rider, car, truck, bus, train, motorcycle, bicycle."""


@dataclass(frozen=True)
class Labels:
    """Of one frame: class ids (H, W), relative or metric depth (H, W); None where it is not scored."""

    classes: Tensor | None
    depth: Tensor | None


@dataclass(frozen=True)
class Heads:
    """What reads labels off features; None where it is not scored."""

    segmentation: SegmentationHead | None
    depth: DepthHead | None
    grid: Grid

    @torch.inference_mode()
    def totals(self, prediction: Tensor, truth: Tensor, labels: Labels) -> Iterator[tuple[str, np.ndarray]]:
        """Yield task and sums of ``pooled`` of one predicted frame (N, D)."""
        yield "features", np.concatenate([[1.0], feature_metrics(prediction, truth).cpu().numpy()])
        if self.segmentation is not None and labels.classes is not None:
            classes = self._at_label(self.segmentation, prediction, labels.classes).argmax(1)[0]
            totals = segmentation_totals(classes, labels.classes, self.segmentation.classes)
            yield "segmentation", totals.cpu().numpy()
        if self.depth is not None and labels.depth is not None:
            depth = self._at_label(self.depth, prediction, labels.depth)[0, 0]
            yield "depth", depth_totals(depth, labels.depth).cpu().numpy()

    def _at_label(self, head: SegmentationHead | DepthHead, tokens: Tensor, label: Tensor) -> Tensor:
        """(1, K, H, W)."""
        small = head(tokens.T[None].unflatten(2, self.grid))
        return functional.interpolate(small, size=tuple(label.shape), mode="bilinear", align_corners=False)


def movable_totals(totals: np.ndarray) -> np.ndarray:
    """Of the sums of segmentation (..., 3 C) those of the classes that move."""
    parts = np.split(totals, 3, axis=-1)
    return np.concatenate([part[..., list(MOVABLE)] for part in parts], axis=-1)
