"""The cross-attention predictor that DeltaWorld and DINO-world share (method section 1)."""

# B batch, Q queries, T tokens, D hidden

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from deltacache.models.blocks import CrossAttentionBlock, KeysValues
from deltacache.models.rope import Rotation

Memory = list[KeysValues]
"""Every block's keys and values of past tokens."""


class Predictor(nn.Module):
    """Cross-attention blocks, LayerNorm, linear head: ``width`` within, tokens of ``token_size`` in and out."""

    def __init__(
        self,
        token_size: int,
        width: int,
        num_heads: int,
        num_layers: int,
        mlp_ratio: float,
        layer_scale_init: float,
    ) -> None:
        super().__init__()
        self.head_dim = width // num_heads
        self.blocks = nn.ModuleList(
            CrossAttentionBlock(width, num_heads, int(mlp_ratio * width), layer_scale_init, token_size)
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, token_size)

    def remember(self, tokens: Tensor, rotation: Rotation) -> Memory:
        """Every block's keys and values of past tokens (B, T, D) at positions that broadcast to (B, 1, T, R)."""
        blocks = cast(Iterable[CrossAttentionBlock], self.blocks)
        return [block.remember(tokens, rotation) for block in blocks]

    def forward(
        self,
        queries: Tensor,
        rotation: Rotation,
        past: Sequence[KeysValues],
        visible: Tensor | None = None,
    ) -> Tensor:
        """Tokens (B, Q, D) for queries (B, Q, width); ``visible`` (Q, T) masks the past, None shows all of it."""
        hidden = queries
        for block, keys_values in zip(self.blocks, past, strict=True):
            hidden = block(hidden, rotation, keys_values, visible)
        return self.head(self.norm(hidden))


def append(past: Sequence[KeysValues], new: Sequence[KeysValues]) -> Memory:
    """Each block's memory with further tokens behind the ones it has."""
    return [
        KeysValues(torch.cat((old.keys, add.keys), dim=2), torch.cat((old.values, add.values), dim=2))
        for old, add in zip(past, new, strict=True)
    ]


def first_tokens(past: Sequence[KeysValues], count: int) -> Memory:
    """Each block's memory of the first ``count`` tokens."""
    return [KeysValues(each.keys[:, :, :count], each.values[:, :, :count]) for each in past]


def repeat_batch(past: Sequence[KeysValues], times: int) -> Memory:
    """Each block's memory with every row of the batch ``times`` in turn."""
    return [KeysValues(*(part.repeat_interleave(times, 0) for part in each)) for each in past]


def frame_positions(rotation: Rotation, step: int, count: int) -> Rotation:
    """Positions of the ``count`` tokens of one of the frames."""
    return rotation.map(lambda part: part[:, :, step * count : (step + 1) * count])
