"""Best-of-many where a frame is many tokens: a candidate is one noise vector, shared by all of them.

Keys are too many to fold (see ``selection``); all candidates of a frame are queries of one product instead, so that
its keys are never copied.
"""

# B batch, P predicted frames, K candidates, M tokens of a frame, D hidden

from collections.abc import Callable

import torch
from torch import Tensor

from deltacache.models.devices import autocast_to
from deltacache.models.losses import smooth_l1
from deltacache.models.predictor import Memory, Predictor, first_tokens, frame_positions
from deltacache.models.rope import Rotation
from deltacache.models.selection import Selection

_WIDEST_ON_CPU, _WIDEST_ELSEWHERE = 2**24, 2**29
"""Numbers of the widest activation of a pass."""

Spread = Callable[[Tensor, int], Tensor]
"""From queries of frames (..., D) to those of their M tokens (..., M, D)."""


@torch.no_grad()
def select_winning_frames(
    predictor: Predictor,
    noise: Tensor,
    spread: Spread,
    rotation: Rotation,
    past: Memory,
    targets: Tensor,
    beta: float,
    selection: Selection,
) -> Tensor:
    """Index (B, P) of the candidate of ``noise`` (B, P, K, D) whose frame is nearest to ``targets`` (B, P, M, D).

    ``rotation`` is that of all tokens, (B, 1, P M, R); frame p sees the first p + 1 frames of ``past``.
    """
    count = targets.shape[2]
    winners: list[Tensor] = []
    for step in range(targets.shape[1]):
        now = frame_positions(rotation, step, count)
        seen = first_tokens(past, (step + 1) * count)
        target = targets[:, step, None]

        def losses(few: Tensor, dtype: torch.dtype | None) -> Tensor:
            return _losses(predictor, spread(few, count), now, seen, target, beta, dtype)  # noqa: B023

        found = losses(noise[:, step], selection.dtype)
        if selection.dtype is not None and 1 < selection.shortlist < found.shape[1]:
            listed = found.topk(selection.shortlist, largest=False).indices  # (B, k)
            few = noise[:, step].gather(1, listed[..., None].expand(-1, -1, noise.shape[-1]))
            best = losses(few, None).argmin(dim=1, keepdim=True)
            winners.append(listed.gather(1, best)[:, 0])
        else:
            winners.append(found.argmin(dim=1))
    return torch.stack(winners, dim=1)


def _losses(
    predictor: Predictor,
    queries: Tensor,
    now: Rotation,
    past: Memory,
    target: Tensor,
    beta: float,
    dtype: torch.dtype | None,
) -> Tensor:
    """Smooth-L1 (B, K) of frames for queries (B, K, M, D) against (B, 1, M, D)."""
    batch, _, count, hidden = queries.shape
    device = queries.device.type
    widest = _WIDEST_ON_CPU if device == "cpu" else _WIDEST_ELSEWHERE
    width = max(block.mlp.up_proj.out_features for block in predictor.blocks)  # pyright: ignore
    size = max(1, widest // (batch * count * max(width, hidden)))
    losses: list[Tensor] = []
    with autocast_to(device, dtype):
        for some in queries.split(size, dim=1):
            times = some.shape[1]
            positions = now.map(lambda part: part.repeat(1, 1, times, 1))  # noqa: B023
            frames = predictor(some.flatten(1, 2), positions, past).unflatten(1, some.shape[1:3])
            losses.append(smooth_l1(frames.to(target.dtype), target, beta).mean(dim=(2, 3)))
    return torch.cat(losses, dim=1)
