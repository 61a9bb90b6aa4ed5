"""Distances between predicted and true patch tokens. Shapes: N patches, D hidden."""

import torch
from torch import Tensor
from torch.nn import functional

SMOOTH_L1_BETA = 0.1
FEATURE_METRICS = ("smooth_l1", "mse", "cosine")
"""The last dimension of ``feature_metrics``. The first two are losses, the last a similarity."""


def feature_metrics(prediction: Tensor, target: Tensor) -> Tensor:
    """Score ``prediction`` (..., N, D) against ``target`` (..., N, D), which broadcasts.

    Returns:
        (..., 3) float64 in the order of ``FEATURE_METRICS``: smooth-L1 with beta 0.1 and squared error,
        each a mean over patches and hidden, and the cosine similarity of a patch, mean over patches.
    """
    prediction, target = torch.broadcast_tensors(prediction, target)
    smooth = functional.smooth_l1_loss(prediction, target, reduction="none", beta=SMOOTH_L1_BETA)
    squared = (prediction - target).square()
    return torch.stack(
        [
            smooth.mean((-2, -1), dtype=torch.float64),
            squared.mean((-2, -1), dtype=torch.float64),
            cosine_similarity(prediction, target).mean(-1),
        ],
        dim=-1,
    )


def cosine_similarity(prediction: Tensor, target: Tensor) -> Tensor:
    """Cosine between vectors (..., D), accumulated in float64 so that a vector with itself gives 1."""
    dot = (prediction * target).sum(-1, dtype=torch.float64)
    squares = prediction.square().sum(-1, dtype=torch.float64) * target.square().sum(-1, dtype=torch.float64)
    return dot / squares.sqrt().clamp_min(torch.finfo(torch.float64).tiny)


def token_distance(tokens: Tensor, others: Tensor) -> Tensor:
    """Euclidean distance over all patch tokens of a frame: (..., N, D) against (..., N, D)."""
    return (tokens - others).square().sum((-2, -1), dtype=torch.float64).sqrt()
