"""Distances between predicted and true patch tokens. Shapes: N patches, D hidden."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional

from deltacache.schemas.errors import NotFiniteError

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


def check_finite(values: Tensor, method: str, sequence: str, horizon: int) -> None:
    """Refuse a prediction by what was computed from it; ``values`` (...) may be its metrics or a head's output.

    Left in, it would vanish from means, or win: ``argmin`` prefers NaN.

    Raises:
        NotFiniteError: naming the method, the sequence and the step.
    """
    if not bool(torch.isfinite(values).all()):
        raise NotFiniteError(
            f"{method} predicts values that are not finite (NaN or infinite) for sequence {sequence}, "
            f"{horizon} step{'s' if horizon > 1 else ''} ahead: a score needs finite ones; check the model's weights, "
            "or evaluate without it"
        )


def check_finite_frames(tokens: Tensor, place: str) -> None:
    """Refuse true features (..., T, N, D) of a sequence that ``place`` names, by frame.

    Raises:
        NotFiniteError: naming the sequence and the frame.
    """
    finite = torch.isfinite(tokens).all(-1).all(-1)
    if not bool(finite.all()):
        frame = int((~finite).nonzero()[0, -1])
        raise NotFiniteError(
            f"{place}: the features of frame {frame} are not finite (NaN or infinite): nothing can be compared with "
            "them; extract them again, or check the backbone's weights"
        )


def finite_of_head(values: Tensor) -> Tensor:
    """``values`` that a head reads off finite features; ``argmax`` would take NaN for a class.

    Raises:
        NotFiniteError: they are not finite.
    """
    if not bool(torch.isfinite(values).all()):
        raise NotFiniteError("the head gives values that are not finite (NaN or infinite): check its weights")
    return values


@contextmanager
def naming(method: str, sequence: str, horizon: int) -> Iterator[None]:
    """Say of whose prediction it was that a head's values are not finite."""
    try:
        yield
    except NotFiniteError as error:
        raise NotFiniteError(f"{method}, sequence {sequence}, horizon {horizon}: {error}") from None
