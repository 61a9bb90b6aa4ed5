"""From patches back to the label's pixels, the same in training and evaluation (method section 3).

Shapes: C crops, K numbers a place, h x w patches, H' x W' pixels of a label half, R of its rows.
"""

import torch
from torch import Tensor
from torch.nn import functional

from deltacache.pipeline.benchmarks.geometry import Split


def upsample(predictions: Tensor, split: Split, half: tuple[int, int]) -> Tensor:
    """Predictions (C, K, h, w) of the crops at the size of the label's halves: (C, K, H', W')."""
    crops = [upsample_crop(each[None], split, half, crop) for crop, each in enumerate(predictions)]
    return torch.cat(crops)


def upsample_crop(predictions: Tensor, split: Split, half: tuple[int, int], crop: int) -> Tensor:
    """Predictions (B, K, h, w) of one crop at the size of its half of the label: (B, K, H', W').

    Crops that overlap reach beyond their half: they are upsampled to a square of the half's longer side,
    which is then cut at the end that belongs to the crop.
    """
    if not split.overlap:
        return _resize(predictions, half)
    side, (height, width) = max(half), half
    square = _resize(predictions, (side, side))
    if crop == 0:
        return square[:, :, :height, :width]
    return square[:, :, side - height :, side - width :]


def upsample_rows(predictions: Tensor, split: Split, half: tuple[int, int], crop: int, rows: range) -> Tensor:
    """``rows`` of what ``upsample_crop`` gives, up to rounding, without the others: (B, K, R, W')."""
    side, (height, width) = max(half), half
    size = (side, side) if split.overlap else half
    top, left = (size[0] - height, size[1] - width) if crop else (0, 0)
    wanted = range(top + rows.start, top + rows.stop)
    return resized_rows(predictions, size, wanted)[..., left : left + width]


def resized_rows(predictions: Tensor, size: tuple[int, int], rows: range) -> Tensor:
    """``rows`` of predictions (B, K, h, w) resized bilinearly to H', W', up to rounding: (B, K, R, W')."""
    patches = predictions.shape[2]
    exact = torch.promote_types(predictions.dtype, torch.float32)
    at = torch.arange(rows.start, rows.stop, dtype=exact, device=predictions.device)
    source = ((at + 0.5) * (patches / size[0]) - 0.5).clamp_min(0)  # the places of align_corners=False
    above = source.long().clamp_max(patches - 1)
    share = (source - above).to(predictions.dtype)[:, None]
    upper, lower = predictions[:, :, above], predictions[:, :, (above + 1).clamp_max(patches - 1)]
    return _resize(torch.lerp(upper, lower, share), (len(rows), size[1]))


def _resize(predictions: Tensor, size: tuple[int, int]) -> Tensor:
    return functional.interpolate(predictions, size=size, mode="bilinear", align_corners=False)
