"""From predicted delta tokens back to patch tokens."""

# B batch, S samples, H horizon, N patches, D hidden

import torch
from torch import Tensor

from deltacache.models.deltatok import DeltaTok, Grid


@torch.no_grad()
def decode_future(tokenizer: DeltaTok, last_patch_tokens: Tensor, delta_tokens: Tensor, grid: Grid) -> Tensor:
    """Patch tokens (B, S, H, N, D) of futures (B, S, H, D) that all start at one frame (B, N, D).

    Each step is decoded from the one before; nothing is encoded again.
    """
    batch, samples, horizon, _ = delta_tokens.shape
    current = last_patch_tokens.repeat_interleave(samples, dim=0)  # (B S, N, D)
    frames: list[Tensor] = []
    for delta in delta_tokens.flatten(0, 1).unbind(dim=1):
        current = tokenizer.decode(delta, current, grid)
        frames.append(current)
    return torch.stack(frames, dim=1).view(batch, samples, horizon, *last_patch_tokens.shape[1:])
