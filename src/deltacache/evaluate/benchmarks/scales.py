"""What is counted at the label's pixels."""

import torch
from torch import Tensor

from deltacache.schemas.benchmarks import IGNORE

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
