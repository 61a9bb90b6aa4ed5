"""Element-wise losses: the trainers average them, the evaluation reports them per target."""

import math

from torch import Tensor
from torch.nn import functional as F


def log_cosh(prediction: Tensor, target: Tensor) -> Tensor:
    """``ln cosh(error)`` as ``d + softplus(-2 d) - ln 2`` with d = abs(error), which cannot overflow."""
    distance = (prediction - target).abs()
    return distance + F.softplus(-2.0 * distance) - math.log(2.0)


def smooth_l1(prediction: Tensor, target: Tensor, beta: float) -> Tensor:
    """Quadratic below ``beta``, linear above; ``prediction`` and ``target`` broadcast."""
    distance = (prediction - target).abs()
    return (
        (distance < beta) * (0.5 * distance.square() / beta - distance + 0.5 * beta) + distance - 0.5 * beta
    )
