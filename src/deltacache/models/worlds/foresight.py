"""DINO-Foresight: a masked transformer with separable attention on the patch tokens of five frames (Table D)."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltacache.models.masked_transformer import MaskedTransformer, PlainAttention, Residual, dropout_mlp
from deltacache.models.world_model import Grid, Kind


class SeparableBlock(nn.Module):
    """Attention over the frames of each patch, then over the patches of each frame, then an MLP."""

    def __init__(self, width: int, num_heads: int, mlp_width: int, dropout: float) -> None:
        super().__init__()
        self.temporal = Residual(width, PlainAttention(width, num_heads, dropout))
        self.spatial = Residual(width, PlainAttention(width, num_heads, dropout))
        self.mlp = Residual(width, dropout_mlp(width, mlp_width, dropout))

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, N, W) to the same."""
        over_time = self.temporal(hidden.transpose(1, 2)).transpose(1, 2)
        return self.mlp(self.spatial(over_time))


class Foresight(MaskedTransformer):
    """The baseline of Table D.

    Positions are learned: a third of the width each for the frame, the row and the column. Those of rows and
    columns are held for ``position_grid`` and stretched to other grids, linearly.
    """

    trains_on: ClassVar[Kind] = "features"

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_layers: int,
        *,
        position_grid: Sequence[int] = (16, 32),
        **common: Any,
    ) -> None:
        super().__init__(hidden_size, num_heads, num_layers, **common)
        if self.width < 3 or len(position_grid) != 2 or min(position_grid) < 1:
            raise ValueError(f"width {self.width} and position_grid {position_grid} hold no rows and columns")
        self.arguments["position_grid"] = list(position_grid)
        third = self.width // 3
        rows, columns = position_grid
        self.time_embed = nn.Parameter(torch.empty(self.context + 1, self.width - 2 * third))
        self.row_embed = nn.Parameter(torch.empty(rows, third))
        self.column_embed = nn.Parameter(torch.empty(columns, third))
        for table in (self.time_embed, self.row_embed, self.column_embed):
            nn.init.trunc_normal_(table, std=0.02)

    @property
    def label(self) -> str:
        return "dino_foresight"

    def block(self) -> nn.Module:
        return SeparableBlock(self.width, self.num_heads, self.mlp_width, self.dropout)

    def positions(self, grid: Grid | None) -> Tensor:
        """(C+1, N, W)."""
        if grid is None:
            raise ValueError("patch tokens need the grid of patches they lie on: (rows, columns)")
        rows, columns = grid
        shape = (len(self.time_embed), rows, columns, -1)
        parts = (
            self.time_embed[:, None, None],
            _stretched(self.row_embed, rows)[None, :, None],
            _stretched(self.column_embed, columns)[None, None],
        )
        return torch.cat([part.expand(shape) for part in parts], dim=-1).flatten(1, 2)


def _stretched(table: Tensor, count: int) -> Tensor:
    """(n, d) interpolated to (``count``, d)."""
    if len(table) == count:
        return table
    return F.interpolate(table.T[None], size=count, mode="linear", align_corners=False)[0].T
