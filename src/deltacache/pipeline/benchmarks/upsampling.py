"""From patches back to the label's pixels, the same in training and evaluation (method section 3).

Shapes: C crops, K numbers a place, h x w patches, H' x W' pixels of a label half.
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


def _resize(predictions: Tensor, size: tuple[int, int]) -> Tensor:
    return functional.interpolate(predictions, size=size, mode="bilinear", align_corners=False)
