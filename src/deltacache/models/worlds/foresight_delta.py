"""DINO-Foresight on delta tokens: plain self-attention over the five tokens of a window (Table D)."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltacache.models.masked_transformer import MaskedTransformer, PlainAttention, Residual, dropout_mlp
from deltacache.models.world_model import Grid, Kind


class JointBlock(nn.Module):
    """Attention over all tokens of a window, then an MLP."""

    def __init__(self, width: int, num_heads: int, mlp_width: int, dropout: float) -> None:
        super().__init__()
        self.attention = Residual(width, PlainAttention(width, num_heads, dropout))
        self.mlp = Residual(width, dropout_mlp(width, mlp_width, dropout))

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, M, W) to the same."""
        return self.mlp(self.attention(hidden.flatten(1, 2))).view_as(hidden)


class ForesightDelta(MaskedTransformer):
    """Four delta tokens are seen, the fifth is predicted; learned positions in the window.

    With ``tokens_per_frame`` M > 1 a learned vector a place tells the tokens of a frame apart.
    """

    trains_on: ClassVar[Kind] = "deltas"

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_layers: int,
        *,
        tokens_per_frame: int = 1,
        **common: Any,
    ) -> None:
        super().__init__(hidden_size, num_heads, num_layers, **common)
        self.arguments["tokens_per_frame"] = tokens_per_frame
        self.time_embed = nn.Parameter(torch.empty(self.context + 1, 1, self.width))
        nn.init.trunc_normal_(self.time_embed, std=0.02)
        self.place_embed = None
        if tokens_per_frame > 1:
            self.place_embed = nn.Parameter(torch.empty(tokens_per_frame, self.width))
            nn.init.trunc_normal_(self.place_embed, std=0.02)

    @property
    def label(self) -> str:
        return "dino_foresight_delta"

    def block(self) -> nn.Module:
        return JointBlock(self.width, self.num_heads, self.mlp_width, self.dropout)

    def positions(self, grid: Grid | None) -> Tensor:
        del grid
        return self.time_embed if self.place_embed is None else self.time_embed + self.place_embed
