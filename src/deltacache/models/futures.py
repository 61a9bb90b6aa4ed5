"""Sampled futures: their random numbers, how they are scored, and the way from delta tokens back to patch tokens."""

# B batch, S samples, H horizon, N patches, D hidden

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from deltacache.models.deltatok import DeltaTok, Grid

SMOOTH_L1_BETA = 0.1
"""Of every smooth-L1 that is a metric."""


def sequence_generator(seed: int, clip_id: str) -> torch.Generator:
    """Random numbers that depend on the seed and the clip alone, never on the batch or the order."""
    digest = hashlib.sha256(f"rollout {seed} {clip_id}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@torch.no_grad()
def decode_future(tokenizer: DeltaTok, last_patch_tokens: Tensor, delta_tokens: Tensor, grid: Grid) -> Tensor:
    """Patch tokens (B, S, H, N, D) of futures (B, S, H, D) that all start at one frame (B, N, D)."""
    return torch.stack(list(decode_steps(tokenizer, last_patch_tokens, delta_tokens, grid)), dim=2)


def decode_steps(
    tokenizer: DeltaTok, last_patch_tokens: Tensor, delta_tokens: Tensor, grid: Grid
) -> Iterator[Tensor]:
    """Yield ``decode_future``'s frames (B, S, N, D) one step after the other, so that none need be kept.

    Each step is decoded from the one before; nothing is encoded again.
    """
    batch, samples = delta_tokens.shape[:2]
    current = last_patch_tokens.repeat_interleave(samples, dim=0)  # (B S, N, D)
    for delta in delta_tokens.flatten(0, 1).unbind(dim=1):
        with torch.no_grad():
            current = tokenizer.decode(delta, current, grid)
        yield current.unflatten(0, (batch, samples))
