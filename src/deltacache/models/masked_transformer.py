"""Masked transformers: the last frame of a window is replaced by a learned vector and predicted (DINO-Foresight).

Karypidis et al. (NeurIPS 2025, arXiv 2412.11673); docs/foresight.md says where this differs from their code.
"""

# B batch, T frames, C context, H horizon, M tokens of a frame, D hidden (of tokens), W width (of blocks), h heads

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltacache.models.blocks import initialise, smooth_l1, split_heads
from deltacache.models.devices import in_precision
from deltacache.models.selection import Selection
from deltacache.models.world_model import IN_FULL, Grid, WorldLoss, WorldModel
from deltacache.schemas.errors import MismatchError
from deltacache.schemas.texts import counted


class PlainAttention(nn.Module):
    """Multi-head self-attention, all tokens seeing all others; dropout on its weights in train mode."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., T, W) to the same."""
        whole = hidden.flatten(0, -3)
        queries, keys, values = (
            split_heads(part, self.num_heads) for part in self.qkv_proj(whole).chunk(3, -1)
        )
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout)
        return self.out_proj(mixed.transpose(1, 2).flatten(2)).view_as(hidden)


class Residual(nn.Module):
    """What a pre-norm layer adds to its input."""

    def __init__(self, width: int, layer: nn.Module) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(width), layer

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.layer(self.norm(hidden))


def dropout_mlp(width: int, inner: int, dropout: float) -> nn.Module:
    """Linear, GELU, Linear, with dropout behind both."""
    return nn.Sequential(
        nn.Linear(width, inner), nn.GELU(), nn.Dropout(dropout), nn.Linear(inner, width), nn.Dropout(dropout)
    )


class MaskedTransformer(WorldModel):
    """Windows of ``context`` frames and a masked one; deterministic, so there is one future.

    Times play no part: frames have a learned position in the window, and the model learns one spacing, or
    predicts the mean over those that it was trained on. ``query`` can only be learned; ``noise_std`` and
    ``layer_scale_init`` are there because all architectures are built alike, and change nothing.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_layers: int,
        *,
        mlp_ratio: float = 4.0,
        query: Literal["learned"] = "learned",
        noise_std: float = 0.0,
        layer_scale_init: float = 1.0,
        context: int = 4,
        width: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        del noise_std, layer_scale_init
        self.width = width or hidden_size
        if query != "learned":
            raise ValueError(f"query {query!r}: a masked transformer has one learned vector; give learned")
        if num_heads < 1 or self.width % num_heads:
            raise ValueError(f"width {self.width} does not split into {num_heads} heads")
        if context < 1:
            raise ValueError(f"context {context}: a window has at least one frame that is seen")
        self.arguments: dict[str, Any] = {
            "hidden_size": hidden_size,
            "num_heads": num_heads,
            "num_layers": num_layers,
            "mlp_ratio": mlp_ratio,
            "query": query,
            "context": context,
            "width": width,
            "dropout": dropout,
        }
        self.hidden_size, self.noise_size, self.noise_std = hidden_size, hidden_size, 0.0
        self.context, self.num_heads, self.dropout = context, num_heads, dropout
        self.mlp_width = int(mlp_ratio * self.width)
        self.embed = nn.Linear(hidden_size, self.width)
        self.mask_vector = nn.Parameter(torch.empty(self.width))
        self.blocks = nn.ModuleList(self.block() for _ in range(num_layers))
        self.head = nn.Linear(self.width, hidden_size)
        initialise(self)
        nn.init.trunc_normal_(self.mask_vector, std=0.02)
        nn.init.zeros_(self.head.weight)

    @abstractmethod
    def block(self) -> nn.Module:
        """One block on hidden states (B, C+1, M, W)."""

    @abstractmethod
    def positions(self, grid: Grid | None) -> Tensor:
        """(C+1, M, W) that broadcast to it, added to the tokens of a window."""

    def training_loss(
        self,
        tokens: Tensor,
        timestamps_s: Tensor,
        *,
        grid: Grid | None = None,
        candidates: int,
        beta: float,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        selection: Selection = IN_FULL,
    ) -> WorldLoss:
        """Smooth-L1 of the last frame of every window of context + 1 frames.

        ``prediction`` and ``winners`` are of the frames that have a whole context before them: (B, T - C, ...).
        Dropout follows from ``generator``.

        Raises:
            MismatchError: a clip is shorter than a window.
        """
        del timestamps_s, selection
        if candidates != 1 or noise is not None:
            raise ValueError(f"a masked transformer has one candidate and no noise, not {candidates}")
        frames = _by_frame(tokens)
        windows = frames.shape[1] - self.context
        if windows < 1:
            raise MismatchError(
                f"clips have {counted(frames.shape[1], 'frame')}, but a window has {self.context + 1}: "
                "make the dataset with "
                f"--frames {self.context + 1} or more, or set the option context"
            )
        seen = torch.stack([frames[:, start : start + self.context] for start in range(windows)], dim=1)
        with self._dropout_from(generator, tokens.device):
            predicted = self.predict(seen.flatten(0, 1), grid).unflatten(0, seen.shape[:2])
        targets = frames[:, self.context :]
        loss = smooth_l1(predicted, targets, beta).mean()
        winners = torch.zeros(targets.shape[:2], dtype=torch.long, device=targets.device)
        return WorldLoss(loss, predicted.view(tokens[:, self.context :].shape), winners)

    @in_precision
    @torch.no_grad()
    def rollout(
        self,
        context_tokens: Tensor,
        timestamps_s: Tensor,
        noise: Tensor | None = None,
        *,
        grid: Grid | None = None,
    ) -> Tensor:
        """Each predicted frame joins the window, whose first one leaves it.

        Raises:
            MismatchError: fewer frames than a window needs.
        """
        if noise is not None:
            raise ValueError("a masked transformer takes no noise")
        seen = _by_frame(context_tokens)
        given, horizon = seen.shape[1], timestamps_s.shape[1] - seen.shape[1]
        if given < self.context:
            raise MismatchError(
                f"{given} context frames are given, but the world model looks at {self.context}: give --context "
                f"{self.context} or more"
            )
        for _ in range(horizon):
            following = self.predict(seen[:, -self.context :], grid)
            seen = torch.cat((seen, following[:, None].to(seen.dtype)), dim=1)
        return seen[:, given:].reshape(len(seen), 1, horizon, *context_tokens.shape[2:])

    def predict(self, seen: Tensor, grid: Grid | None) -> Tensor:
        """The frame (B, M, D) after ``context`` frames (B, C, M, D)."""
        embedded = self.embed(seen)
        masked = self.mask_vector.to(embedded.dtype).expand_as(embedded[:, :1])
        hidden = torch.cat((embedded, masked), dim=1) + self.positions(grid)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden[:, -1])

    @contextmanager
    def _dropout_from(self, generator: torch.Generator | None, device: torch.device) -> Iterator[None]:
        """Dropout draws from the global generator, which is seeded for the block and then as it was before."""
        if self.dropout == 0.0 or not self.training:
            yield
            return
        if generator is None:
            raise ValueError("dropout needs a generator to draw from")
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield


def _by_frame(tokens: Tensor) -> Tensor:
    """(B, T, D) or (B, T, M, D) as (B, T, M, D)."""
    return tokens[:, :, None] if tokens.dim() == 3 else tokens
