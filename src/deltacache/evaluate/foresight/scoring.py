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
from deltacache.evaluate.metrics import feature_metrics, finite_of_head
from deltacache.models.deltatok import Grid
from deltacache.models.heads import DepthHead, SegmentationHead


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
            classes = self._at_label(self.segmentation, prediction, labels.classes).argmax(0)
            totals = segmentation_totals(classes, labels.classes, self.segmentation.classes)
            yield "segmentation", totals.cpu().numpy()
        if self.depth is not None and labels.depth is not None:
            depth = self._at_label(self.depth, prediction, labels.depth)[0]
            yield "depth", depth_totals(depth, labels.depth).cpu().numpy()

    def _at_label(self, head: SegmentationHead | DepthHead, tokens: Tensor, label: Tensor) -> Tensor:
        """(K, H, W)."""
        return self.read(head, tokens[None], (label.shape[0], label.shape[1]))[0]

    @torch.inference_mode()
    def read(self, head: SegmentationHead | DepthHead, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """What a head says of tokens (B, N, D), upsampled to H x W: (B, K, H, W)."""
        small = finite_of_head(head(tokens.transpose(1, 2).unflatten(2, self.grid)))
        return functional.interpolate(small, size=size, mode="bilinear", align_corners=False)
