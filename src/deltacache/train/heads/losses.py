"""What heads descend. Nothing here needs a downloaded network.

Shapes: B pictures, C crops, K classes, H x W pixels; M crops of a batch, h x w patches, H' x W' a half of a label.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from deltacache.pipeline.benchmarks.upsampling import upsample_rows
from deltacache.schemas.benchmarks import IGNORE
from deltacache.train.heads.data import LabelledCrops

_LOG_FLOOR = 1e-3
_MEAN_SHARE = 0.15
_STRIDES = (1, 2, 4, 8)
_STRIP_LOGITS = 1 << 20  # 4 MiB
_STRIP_LOGITS_GPU = 1 << 25  # 128 MiB: there starting kernels costs the time


class DepthLosses(NamedTuple):
    """The parts of a depth loss: two of log depth, and the root of the mean squared error in metres."""

    silog: Tensor
    gradient: Tensor
    rmse: Tensor


def segmentation_loss(logits: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
    """Cross-entropy, mean over all valid pixels of (C, K, H, W) logits against (C, H, W) ids; 0 without any."""
    sums = [
        functional.cross_entropy(each, label.long(), ignore_index=IGNORE, reduction="sum")
        for each, label in zip(logits, labels, strict=True)
    ]
    valid = torch.stack([(label != IGNORE).sum() for label in labels]).sum()
    return torch.stack(sums).sum() / valid.clamp_min(1)


def segmentation_loss_by_rows(logits: Tensor, frames: Sequence[LabelledCrops]) -> Tensor:
    """``segmentation_loss`` of logits (M, K, h, w) upsampled to the labels, up to rounding.

    Logits at the labels' size exist for a strip of rows at a time, whose gradient is taken at once: memory does not
    depend on the size and the number of the labels. Not to be differentiated twice.
    """
    valid = torch.stack([(each.label != IGNORE).sum() for each in frames]).sum()
    total = _SumByRows.apply(logits, frames)
    assert isinstance(total, Tensor)  # apply is not typed
    return total / valid.clamp_min(1)


def depth_losses(depths: Sequence[Tensor], labels: Sequence[Tensor]) -> DepthLosses:
    """Scale-invariant, gradient and metric loss of metres (C, H, W) against labels, 0 where these are not known.

    The first is AdaBins' (Bhat et al. 2021) as DINOv2 and DINOv3 use it: sqrt(var d + 0.15 mean² d) over all
    valid pixels, d = log difference. The second is MegaDepth's (Li and Snavely 2018): absolute differences of d
    between neighbours at strides 1, 2, 4 and 8.
    """
    differences = [
        torch.where(label > 0, (depth + _LOG_FLOOR).log() - (label + _LOG_FLOOR).log(), 0.0)
        for depth, label in zip(depths, labels, strict=True)
    ]
    known = torch.cat([each[label > 0] for each, label in zip(differences, labels, strict=True)])
    if len(known) == 0:
        nothing = torch.stack([each.sum() for each in differences]).sum()
        return DepthLosses(nothing, nothing, nothing)
    mean = known.mean()
    variance = (known - mean).square().mean()
    silog = (variance + _MEAN_SHARE * mean.square() + 1e-12).sqrt()
    sums = [
        _neighbours(each[:, ::stride, ::stride], (label > 0)[:, ::stride, ::stride])
        for each, label in zip(differences, labels, strict=True)
        for stride in _STRIDES
    ]
    totals, counts = (torch.stack(part).view(-1, len(_STRIDES)).sum(0) for part in zip(*sums, strict=True))
    errors = [(depth - label)[label > 0] for depth, label in zip(depths, labels, strict=True)]
    rmse = (torch.cat(errors).square().mean() + 1e-12).sqrt()
    return DepthLosses(silog, (totals / counts.clamp_min(1)).mean(), rmse)


def picture_losses(pictures: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """L1 and gradient loss of pictures (B, 3, H, W): L1 of neighbour differences at scales 1, 1/2, 1/4, 1/8."""
    error = pictures - truth
    steps: list[Tensor] = []
    for stride in _STRIDES:
        small = functional.avg_pool2d(error, stride) if min(error.shape[-2:]) >= 2 * stride else None
        if small is not None:
            steps.append(small.diff(dim=-1).abs().mean() + small.diff(dim=-2).abs().mean())
    return error.abs().mean(), torch.stack(steps).mean()


class _SumByRows(torch.autograd.Function):
    """Sum of the cross-entropy over all pixels of all crops."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, frames: Sequence[LabelledCrops]) -> Tensor:
        """The sum; its gradient is kept, which is as small as ``logits``."""
        total, gradient = logits.new_zeros(()), torch.zeros_like(logits)
        for each in frames:
            for at in range(each.start, each.stop):
                for rows in _strips(each.label, logits.shape[1]):
                    small = logits[at : at + 1].detach().requires_grad_()
                    with torch.enable_grad():
                        loss = _strip_loss(small, each, at - each.start, rows)
                    gradient[at : at + 1] += torch.autograd.grad(loss, small)[0]
                    total += loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The kept gradient, times that of the sum."""
        (gradient,) = ctx.saved_tensors
        return grad_outputs[0] * gradient, None


def _strips(label: Tensor, classes: int) -> Iterator[range]:
    """The rows of (C, H', W') in strips of about ``_STRIP_LOGITS`` numbers."""
    height, width = label.shape[-2:]
    wanted = _STRIP_LOGITS if label.device.type == "cpu" else _STRIP_LOGITS_GPU
    step = max(1, wanted // (classes * max(height, width)))  # a square of the longer side may be cut
    return (range(at, min(at + step, height)) for at in range(0, height, step))


def _strip_loss(logits: Tensor, frame: LabelledCrops, crop: int, rows: range) -> Tensor:
    """Sum of the cross-entropy over rows of one crop; ``logits`` (1, K, h, w)."""
    half = (frame.label.shape[-2], frame.label.shape[-1])
    large = upsample_rows(logits, frame.split, half, crop, rows)
    label = frame.label[crop : crop + 1, rows.start : rows.stop].long()
    return functional.cross_entropy(large, label, ignore_index=IGNORE, reduction="sum")


def _neighbours(difference: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of absolute steps between valid neighbours of (C, H, W), and their number."""
    across, down = valid[:, :, 1:] & valid[:, :, :-1], valid[:, 1:] & valid[:, :-1]
    total = (difference.diff(dim=2).abs() * across).sum() + (difference.diff(dim=1).abs() * down).sum()
    return total, across.sum() + down.sum()
