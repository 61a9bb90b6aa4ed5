"""From predicted delta tokens back to patch tokens."""

# B batch, S samples, H horizon, N patches, D hidden

from collections.abc import Iterator

import torch
from torch import Tensor

from deltacache.models.deltatok import DeltaTok, Grid


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
