"""AdamW as all trainers use it: groups, clipping, rate, and no update from what is not finite."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from deltacache.models.optimizer_groups import decay_groups
from deltacache.schemas.configs import TrainingConfig


def make_optimizer(
    model: nn.Module, config: TrainingConfig, state: dict[str, Any] | None = None
) -> torch.optim.AdamW:
    """AdamW with weight decay on Linear and Conv weights only; moments and step count are taken from ``state``.

    Weight decay and rate are those of ``config``, also when ``state`` is that of a stage with others.
    """
    groups = [dict(group) for group in decay_groups(model, config.weight_decay)]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
    if state is not None:
        decays = [group["weight_decay"] for group in optimizer.param_groups]
        optimizer.load_state_dict(state)
        for group, decay in zip(optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> float:
    """Give every group the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float | None) -> Tensor:
    """Scale the gradients to a norm of at most ``limit`` and return their norm before that."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = get_total_norm(gradients, foreach=True)
    if limit is not None:
        clip_grads_with_norm_(parameters, limit, norm, foreach=True)
    return norm


class FiniteGuard:
    """From the first loss or norm on that is not finite, fused AdamW changes nothing any more.

    The optimizer's own kernel reads the flag on the device (it is there for loss scaling), so that nobody
    waits for a GPU at every step, and the state before the bad step can still be saved when it is noticed.
    """

    def __init__(self, optimizer: torch.optim.AdamW, device: torch.device) -> None:
        self._bad = torch.zeros((), device=device)
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        optimizer.found_inf = self._bad  # type: ignore[attr-defined]

    def look_at(self, loss: Tensor, norm: Tensor) -> None:
        """Before each update."""
        finite = loss.isfinite() & norm.isfinite()
        self._bad.copy_(torch.maximum(self._bad, (~finite).float()))
