"""The released code's RoPE augmentation, replayed: which factors did it draw?

In train mode the released code multiplies the patch coordinates by one log-uniform factor in [1/2, 2] a
forward pass, in the tokenizer and, since its frozen backbone stays in train mode too, in the backbone. Two
golden files were made that way, without the factors. Each is one number against hundreds, so they can be
solved for.
"""

import copy
import itertools
from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import Tensor

from deltacache.models.backbone import Backbone
from deltacache.models.blocks import patch_rotation
from deltacache.models.deltatok import DeltaTok

STARTS, STEPS, SHIFT = 6, 10, 1e-2


def stretched_backbone(backbone: Backbone, log2_factor: float) -> Backbone:
    """``backbone`` with all patch coordinates times a factor: the same as all frequencies times it."""
    changed = copy.deepcopy(backbone)
    changed.model.rope_embeddings.inv_freq *= 2.0**log2_factor
    return changed


def stretched_deltas(
    tokenizer: DeltaTok, log2_factor: float, patch_tokens: Tensor, black: Tensor, grid: tuple[int, int]
) -> Tensor:
    """``encode_clip`` with all patch coordinates times a factor."""
    scale = torch.tensor(2.0**log2_factor)
    rotation = patch_rotation(grid, tokenizer.head_dim, tokenizer.rope_theta, scale)
    with patch.object(tokenizer, "_rotation", lambda tokens, grid, generator: rotation):
        return tokenizer.encode_clip(patch_tokens, black, grid)


def solve(difference: Callable[..., Tensor], grids: list[Tensor]) -> list[float]:
    """Arguments within [-1, 1] that make ``difference`` smallest: Gauss-Newton from the best grid points."""

    def size(point: Tensor) -> float:
        return difference(*point.tolist()).abs().max().item()

    points = [torch.tensor(point).double() for point in itertools.product(*(axis.tolist() for axis in grids))]
    found: list[Tensor] = []
    for point in sorted(points, key=size)[:STARTS]:
        found.append(_gauss_newton(difference, point))
        if size(found[-1]) < 5e-6:
            break
    return min(found, key=size).tolist()


def _gauss_newton(difference: Callable[..., Tensor], point: Tensor) -> Tensor:
    for _ in range(STEPS):
        columns = [
            difference(*(point + shift).tolist()) - difference(*(point - shift).tolist())
            for shift in SHIFT * torch.eye(len(point)).double()
        ]
        jacobian = torch.stack([column.flatten() for column in columns], dim=1).double() / (2 * SHIFT)
        now = difference(*point.tolist()).flatten().double()
        step = torch.linalg.lstsq(jacobian, now).solution
        point = (point - step).clamp(-1.0, 1.0)
        if step.abs().max() < 1e-5:
            break
    return point
