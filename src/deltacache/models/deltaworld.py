"""DeltaWorld: predicts the next delta token from past ones; a noise query makes each future another."""

# B batch, T frames, P = T - 1 predicted frames, D hidden, K candidates, S samples, C context, H horizon

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from deltacache.models.blocks import CrossAttentionBlock, KeysValues, check_heads, initialise
from deltacache.models.losses import smooth_l1
from deltacache.models.rope import Rotation, time_rotation
from deltacache.models.selection import Selection, select_winners

_IN_FULL = Selection()


@dataclass(frozen=True, slots=True)
class WorldLoss:
    """One training step: the loss, the winners' prediction (B, P, D) and which candidate won (B, P)."""

    loss: Tensor
    prediction: Tensor
    winners: Tensor


class Predictor(nn.Module):
    """Cross-attention blocks, LayerNorm, linear head."""

    def __init__(
        self, hidden_size: int, num_heads: int, num_layers: int, mlp_width: int, layer_scale_init: float
    ) -> None:
        super().__init__()
        self.head_dim = hidden_size // num_heads
        self.blocks = nn.ModuleList(
            CrossAttentionBlock(hidden_size, num_heads, mlp_width, layer_scale_init)
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_size)
        self.head = nn.Linear(hidden_size, hidden_size)

    def remember(self, tokens: Tensor, seconds: Tensor) -> list[KeysValues]:
        """Every block's keys and values of past tokens (B, T, D) at times (B, T)."""
        rotation = time_rotation(seconds, self.head_dim)
        blocks = cast(Iterable[CrossAttentionBlock], self.blocks)
        return [block.remember(tokens, rotation) for block in blocks]

    def forward(
        self,
        queries: Tensor,
        rotation: Rotation,
        past: Sequence[KeysValues],
        visible: Tensor | None = None,
    ) -> Tensor:
        """Tokens (B, Q, D) for queries (B, Q, D); ``visible`` (Q, T) masks the past, None shows all of it."""
        hidden = queries
        for block, keys_values in zip(self.blocks, past, strict=True):
            hidden = block(hidden, rotation, keys_values, visible)
        return self.head(self.norm(hidden))


class DeltaWorld(nn.Module):
    """The world model (method section 1): ``query`` noise for many futures, learned for a single one."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_layers: int,
        *,
        mlp_ratio: float = 4.0,
        query: Literal["noise", "learned"] = "noise",
        noise_std: float = 0.02,
        layer_scale_init: float = 1e-5,
    ) -> None:
        super().__init__()
        check_heads(hidden_size, num_heads, multiple=2, least=6)
        self.arguments: dict[str, Any] = {
            "hidden_size": hidden_size,
            "num_heads": num_heads,
            "num_layers": num_layers,
            "mlp_ratio": mlp_ratio,
            "query": query,
            "noise_std": noise_std,
            "layer_scale_init": layer_scale_init,
        }
        self.hidden_size, self.noise_std = hidden_size, noise_std
        self.mlp_width = int(mlp_ratio * hidden_size)
        self.predictor = Predictor(hidden_size, num_heads, num_layers, self.mlp_width, layer_scale_init)
        self.q_embed = nn.Embedding(1, hidden_size) if query == "learned" else None
        initialise(self)

    def draw_noise(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Noise queries of ``shape`` (..., D), drawn where the generator lives, then moved to the model."""
        noise = torch.randn(tuple(shape), generator=generator, device=generator.device)
        return (noise * self.noise_std).to(self.predictor.head.weight)

    def training_loss(
        self,
        delta_tokens: Tensor,
        timestamps_s: Tensor,
        *,
        candidates: int,
        beta: float,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        selection: Selection = _IN_FULL,
    ) -> WorldLoss:
        """Teacher-forced smooth-L1 of the best of ``candidates`` for tokens (B, T, D) at times (B, T).

        Frame t sees the tokens before it. ``noise`` is (B, T-1, K, D), or drawn from ``generator``. Only
        the winners run with gradients; ``selection`` says how they are found. A learned query has one candidate
        and needs no noise.
        """
        seconds = _since_start(timestamps_s)
        targets = delta_tokens[:, 1:]
        past = self.predictor.remember(delta_tokens[:, :-1], seconds[:, :-1])
        rotation = time_rotation(seconds[:, 1:], self.predictor.head_dim)
        if self.q_embed is None:
            noise = self._candidates((*targets.shape[:2], candidates, self.hidden_size), noise, generator)
            winners = select_winners(self.predictor, noise, rotation, past, targets, beta, selection)
            queries = noise.gather(2, winners[:, :, None, None].expand(-1, -1, 1, self.hidden_size))[:, :, 0]
        else:
            if candidates != 1:
                raise ValueError(f"a learned query has one candidate, not {candidates}")
            winners = torch.zeros(targets.shape[:2], dtype=torch.long, device=targets.device)
            queries = self.q_embed.weight.expand_as(targets)
        prediction = self.predictor(queries, rotation, past, _causal(targets))
        return WorldLoss(smooth_l1(prediction, targets, beta).mean(), prediction, winners)

    @torch.no_grad()
    def rollout(self, context_deltas: Tensor, timestamps_s: Tensor, noise: Tensor | None = None) -> Tensor:
        """Futures (B, S, H, D): each predicted token joins the context of the next.

        ``context_deltas`` is (B, C, D), ``timestamps_s`` (B, C+H) in seconds, ``noise`` (B, S, H, D) with a
        vector for each step; a learned query takes none and gives S = 1.
        """
        batch, context, _ = context_deltas.shape
        horizon = timestamps_s.shape[1] - context
        queries = self._rollout_queries(noise, batch, horizon)  # (B, S, H, D)
        samples = queries.shape[1]
        seconds = _since_start(timestamps_s)
        past = self.predictor.remember(context_deltas, seconds[:, :context])
        past = [KeysValues(*(part.repeat_interleave(samples, 0) for part in block)) for block in past]
        seconds = seconds[:, context:].repeat_interleave(samples, 0)
        predicted: list[Tensor] = []
        for step, query in enumerate(queries.flatten(0, 1).split(1, dim=1)):
            now = seconds[:, step : step + 1]
            predicted.append(self.predictor(query, time_rotation(now, self.predictor.head_dim), past))
            if step + 1 < horizon:
                past = _append(past, self.predictor.remember(predicted[-1], now))
        return torch.cat(predicted, dim=1).unflatten(0, (batch, samples))

    def _candidates(
        self, shape: tuple[int, ...], noise: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        """The given noise (B, P, K, D), or fresh one of that ``shape``."""
        if noise is None:
            if generator is None:
                raise ValueError("a noise query needs noise, or a generator to draw it from")
            return self.draw_noise(shape, generator)
        if noise.shape != shape:
            raise ValueError(f"noise is {tuple(noise.shape)}, expected {shape}: (B, T-1, K, D)")
        return noise

    def _rollout_queries(self, noise: Tensor | None, batch: int, horizon: int) -> Tensor:
        if self.q_embed is not None:
            if noise is not None:
                raise ValueError("a learned query takes no noise")
            return self.q_embed.weight.expand(batch, 1, horizon, -1)
        if noise is None:
            raise ValueError("a noise query needs noise (B, S, H, D): take it from draw_noise")
        if noise.shape[0] != batch or noise.shape[2] != horizon:
            raise ValueError(f"noise is {tuple(noise.shape)}, expected ({batch}, S, {horizon}, D)")
        return noise


def _since_start(timestamps_s: Tensor) -> Tensor:
    """Seconds since the first frame: RoPE is relative, and small angles keep their float32 digits."""
    return timestamps_s - timestamps_s[:, :1]


def _causal(targets: Tensor) -> Tensor:
    """Mask (P, P): the query of target p sees the tokens of frames 0..p, which come before it."""
    steps = targets.shape[1]
    return torch.ones(steps, steps, dtype=torch.bool, device=targets.device).tril()


def _append(past: Sequence[KeysValues], new: Sequence[KeysValues]) -> list[KeysValues]:
    """Each block's memory with further tokens behind the ones it has."""
    return [
        KeysValues(torch.cat((old.keys, add.keys), dim=2), torch.cat((old.values, add.values), dim=2))
        for old, add in zip(past, new, strict=True)
    ]
