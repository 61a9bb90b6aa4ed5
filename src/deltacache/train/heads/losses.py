"""What heads descend. Nothing here needs a downloaded network.

Shapes: B pictures, C crops, K classes, H x W pixels; M crops of a batch, h x w patches, H' x W' a half of a label.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from deltacache.pipeline.benchmarks.frames import resized_rows, upsample_rows
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


def segmentation_loss_by_rows(logits: Tensor, frames: Sequence[LabelledCrops]) -> Tensor:
    """Cross-entropy of logits (M, K, h, w) upsampled to the labels, mean over all valid pixels; 0 without any.

    Of a frame that is cut the crops are upsampled to its halves, of a whole one to its label.

    Logits at the labels' size exist for a strip of rows at a time, whose gradient is taken at once: memory does not
    depend on the size and the number of the labels. Not to be differentiated twice.
    """
    pieces = [piece for frame in frames for piece in _pieces(frame)]
    valid = torch.stack([(piece.label != IGNORE).sum() for piece in pieces]).sum()
    total = _SumByRows.apply(logits, pieces)
    assert isinstance(total, Tensor)  # apply is not typed
    return total / valid.clamp_min(1)


def depth_losses(depths: Sequence[Tensor], labels: Sequence[Tensor]) -> DepthLosses:
    """Scale-invariant, gradient and metric loss of metres (C, H, W) against labels, 0 where these are not known.

    The first is AdaBins' (Bhat et al. 2021) as DINOv2 and DINOv3 use it: sqrt(var d + 0.15 mean² d) over all
    valid pixels, d = log difference. The second is MegaDepth's (Li and Snavely 2018): absolute differences of d
    between neighbours at strides 1, 2, 4 and 8.
    """
    known = [label > 0 for label in labels]
    # Sums over all pixels, those that are not known as zeros: to gather the others a GPU would have to be waited for.
    count = torch.stack([each.sum() for each in known]).sum().clamp_min(1)

    def mean(values: Sequence[Tensor]) -> Tensor:
        masked = [torch.where(there, each, 0.0).sum() for there, each in zip(known, values, strict=True)]
        return torch.stack(masked).sum() / count

    differences = [
        torch.where(there, (depth + _LOG_FLOOR).log() - (label + _LOG_FLOOR).log(), 0.0)
        for there, depth, label in zip(known, depths, labels, strict=True)
    ]
    average = mean(differences)
    variance = mean([(each - average).square() for each in differences])
    any_known = torch.stack([each.any() for each in known]).any()
    silog = any_known * (variance + _MEAN_SHARE * average.square() + 1e-12).sqrt()
    sums = [
        _neighbours(each[:, ::stride, ::stride], there[:, ::stride, ::stride])
        for each, there in zip(differences, known, strict=True)
        for stride in _STRIDES
    ]
    totals, counts = (torch.stack(part).view(-1, len(_STRIDES)).sum(0) for part in zip(*sums, strict=True))
    squares = [(depth - label).square() for depth, label in zip(depths, labels, strict=True)]
    rmse = any_known * (mean(squares) + 1e-12).sqrt()
    return DepthLosses(silog, (totals / counts.clamp_min(1)).mean(), rmse)


def picture_losses(pictures: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """L1 and gradient loss (B,) of pictures (B, 3, H, W): L1 of neighbour differences at scales 1, 1/2, 1/4, 1/8."""
    error = pictures - truth
    steps: list[Tensor] = []
    for stride in _STRIDES:
        small = functional.avg_pool2d(error, stride) if min(error.shape[-2:]) >= 2 * stride else None
        if small is not None:
            across, down = (small.diff(dim=dim).abs().flatten(1).mean(1) for dim in (-1, -2))
            steps.append(across + down)
    return error.abs().flatten(1).mean(1), torch.stack(steps).mean(0)


class _Piece(NamedTuple):
    """What one picture's logits are held against.

    Attributes:
        number: of the picture in the batch.
        label: (H', W').
        rows: from logits (1, K, h, w) to some rows of them at the label's size, (1, K, R, W').
    """

    number: int
    label: Tensor
    rows: Callable[[Tensor, range], Tensor]


def _pieces(frame: LabelledCrops) -> Iterator[_Piece]:
    size = (frame.label.shape[-2], frame.label.shape[-1])
    for crop, label in enumerate(frame.label):

        def rows_of(small: Tensor, rows: range, crop: int = crop) -> Tensor:
            if frame.split is None:
                return resized_rows(small, size, rows)
            return upsample_rows(small, frame.split, size, crop, rows)

        yield _Piece(frame.start + crop, label, rows_of)


class _SumByRows(torch.autograd.Function):
    """Sum of the cross-entropy over all pixels of all pieces."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, pieces: Sequence[_Piece]) -> Tensor:
        """The sum; its gradient is kept, which is as small as ``logits``."""
        total, gradient = logits.new_zeros(()), torch.zeros_like(logits)
        for piece in pieces:
            at = slice(piece.number, piece.number + 1)
            for rows in _strips(piece.label, logits.shape[1]):
                small = logits[at].detach().requires_grad_()
                with torch.enable_grad():
                    # Sum of the cross-entropy of logits (1, K, R, W') against (R, W').
                    loss = functional.cross_entropy(
                        piece.rows(small, rows),
                        piece.label[rows.start : rows.stop][None].long(),
                        ignore_index=IGNORE,
                        reduction="sum",
                    )
                gradient[at] += torch.autograd.grad(loss, small)[0]
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
    """The rows of (H', W') in strips of about ``_STRIP_LOGITS`` numbers."""
    height, width = label.shape
    wanted = _STRIP_LOGITS if label.device.type == "cpu" else _STRIP_LOGITS_GPU
    step = max(1, wanted // (classes * max(height, width)))  # a square of the longer side may be cut
    return (range(at, min(at + step, height)) for at in range(0, height, step))


def _neighbours(difference: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of absolute steps between valid neighbours of (C, H, W), and their number."""
    across, down = valid[:, :, 1:] & valid[:, :, :-1], valid[:, 1:] & valid[:, :-1]
    total = (difference.diff(dim=2).abs() * across).sum() + (difference.diff(dim=1).abs() * down).sum()
    return total, across.sum() + down.sum()
