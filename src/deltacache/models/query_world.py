"""World models that ask the past by queries: what DeltaWorld and DINO-world have in common (method section 1)."""

# B batch, T frames, P = T - 1 predicted frames, D hidden, K candidates, S samples, C context, H horizon
# M tokens of a frame: one delta token, several, or all patches; Z noise

from abc import abstractmethod
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from deltacache.models.blocks import (
    Memory,
    Predictor,
    Rotation,
    append,
    check_heads,
    first_tokens,
    frame_positions,
    initialise,
    repeat_batch,
    smooth_l1,
)
from deltacache.models.devices import in_precision
from deltacache.models.selection import Selection, select_winners, select_winning_frames
from deltacache.models.world_model import IN_FULL, Grid, WorldLoss, WorldModel


class Places(NamedTuple):
    """Which token of a frame: vectors (M, D) added to past tokens, and (M, Z) to queries."""

    of_tokens: Tensor
    of_queries: Tensor


class QueryWorld(WorldModel):
    """A query for each token of the next frame attends to the tokens of the frames before it.

    ``query`` noise gives many futures: one vector a frame, shared by all of its tokens; learned gives a single one.
    ``width`` is that of the blocks, where it is not the tokens'.
    """

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
        width: int | None = None,
    ) -> None:
        super().__init__()
        self.noise_size = width or hidden_size
        check_heads(self.noise_size, num_heads, multiple=2, least=6)
        self.arguments: dict[str, Any] = {
            "hidden_size": hidden_size,
            "num_heads": num_heads,
            "num_layers": num_layers,
            "mlp_ratio": mlp_ratio,
            "query": query,
            "noise_std": noise_std,
            "layer_scale_init": layer_scale_init,
            "width": width,
        }
        self.hidden_size, self.noise_std = hidden_size, noise_std
        self.mlp_width = int(mlp_ratio * self.noise_size)
        self.predictor = Predictor(
            hidden_size, self.noise_size, num_heads, num_layers, mlp_ratio, layer_scale_init
        )
        self.q_embed = nn.Embedding(1, self.noise_size) if query == "learned" else None
        initialise(self)

    @abstractmethod
    def rotation(self, seconds: Tensor, grid: Grid | None) -> Rotation:
        """Positions (B, 1, F M, R) of all tokens of F frames at times (B, F)."""

    @abstractmethod
    def tokens_of_a_frame(self, grid: Grid | None) -> int:
        """M."""

    @property
    def places(self) -> Places | None:
        """Where positions do not tell the tokens of a frame apart."""
        return None

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
        """Smooth-L1 of the best of ``candidates``.

        Frame t sees the frames before it. Only the winners run with gradients; ``selection`` says how they are found.
        A learned query has one candidate and needs no noise.
        """
        frames, seconds = self._frames(tokens, grid), _since_start(timestamps_s)
        targets = frames[:, 1:]
        past = self.remember(frames[:, :-1], seconds[:, :-1], grid)
        rotation = self.rotation(seconds[:, 1:], grid)
        if self.q_embed is None:
            shape = (*targets.shape[:2], candidates, self.noise_size)
            noise = self._candidates(shape, noise, generator)
            winners = self._winners(noise, rotation, past, targets, beta, selection)
            queries = noise.gather(2, winners[:, :, None, None].expand(-1, -1, 1, self.noise_size))[:, :, 0]
        else:
            if candidates != 1:
                raise ValueError(f"a learned query has one candidate, not {candidates}")
            winners = torch.zeros(targets.shape[:2], dtype=torch.long, device=targets.device)
            queries = self.q_embed.weight.expand(*targets.shape[:2], -1)
        prediction = self._predict_frames(queries, rotation, past, targets.shape[2])
        loss = smooth_l1(prediction, targets, beta).mean()
        return WorldLoss(loss, prediction.view(tokens[:, 1:].shape), winners)

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
        """Each predicted frame joins the context of the next."""
        context = self._frames(context_tokens, grid)
        batch, seen, count, _ = context.shape
        horizon = timestamps_s.shape[1] - seen
        queries = self._rollout_queries(noise, batch, horizon)  # (B, S, H, Z)
        samples = queries.shape[1]
        seconds = _since_start(timestamps_s)
        past = repeat_batch(self.remember(context, seconds[:, :seen], grid), samples)
        seconds = seconds[:, seen:].repeat_interleave(samples, 0)
        predicted: list[Tensor] = []
        for step, query in enumerate(queries.flatten(0, 1).unbind(dim=1)):
            now = seconds[:, step : step + 1]
            frame = self.predictor(self._spread(query, count), self.rotation(now, grid), past)  # (B S, M, D)
            predicted.append(frame)
            if step + 1 < horizon:
                past = append(past, self.remember(frame[:, None], now, grid))
        futures = torch.stack(predicted, dim=1).unflatten(0, (batch, samples))
        return futures.view(batch, samples, horizon, *context_tokens.shape[2:])

    def remember(self, frames: Tensor, seconds: Tensor, grid: Grid | None = None) -> Memory:
        """Every block's keys and values of past frames (B, F, M, D) at times (B, F)."""
        tokens = frames if self.places is None else frames + self.places.of_tokens
        return self.predictor.remember(tokens.flatten(1, 2), self.rotation(seconds, grid))

    def _frames(self, tokens: Tensor, grid: Grid | None) -> Tensor:
        """(B, F, M, D) of tokens in either form."""
        frames = tokens[:, :, None] if tokens.dim() == 3 else tokens
        if frames.dim() != 4 or frames.shape[2] != self.tokens_of_a_frame(grid):
            raise ValueError(
                f"tokens are {tuple(tokens.shape)}, but a frame of this {type(self).__name__} is "
                f"{self.tokens_of_a_frame(grid)} tokens"
            )
        return frames

    def _spread(self, queries: Tensor, count: int) -> Tensor:
        """(..., M, Z) queries of the tokens of frames whose own are (..., Z)."""
        spread = queries[..., None, :].expand(*queries.shape[:-1], count, -1)
        return spread if self.places is None else spread + self.places.of_queries

    def _winners(
        self,
        noise: Tensor,
        rotation: Rotation,
        past: Memory,
        targets: Tensor,
        beta: float,
        selection: Selection,
    ) -> Tensor:
        """Index (B, P) of the candidate whose whole frame has the least loss."""
        if targets.shape[2] == 1 and self.places is None:
            return select_winners(self.predictor, noise, rotation, past, targets[:, :, 0], beta, selection)
        return select_winning_frames(
            self.predictor, noise, self._spread, rotation, past, targets, beta, selection
        )

    def _predict_frames(self, queries: Tensor, rotation: Rotation, past: Memory, count: int) -> Tensor:
        """Frames (B, P, M, D) for queries (B, P, Z), each from the frames before it."""
        spread = self._spread(queries, count)
        if count == 1:
            return self.predictor(spread[:, :, 0], rotation, past, _causal(queries))[:, :, None]
        # Frame by frame needs no mask: half the products, and kernels that never hold the scores.
        frames = [
            self.predictor(spread[:, step], frame_positions(rotation, step, count), first_tokens(past, seen))
            for step, seen in enumerate(range(count, (spread.shape[1] + 1) * count, count))
        ]
        return torch.stack(frames, dim=1)

    def _candidates(
        self, shape: tuple[int, ...], noise: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        """The given noise (B, P, K, Z), or fresh one of that ``shape``."""
        if noise is None:
            if generator is None:
                raise ValueError("a noise query needs noise, or a generator to draw it from")
            return self.draw_noise(shape, generator)
        if noise.shape != shape:
            raise ValueError(f"noise is {tuple(noise.shape)}, expected {shape}: (B, T-1, K, Z)")
        return noise

    def _rollout_queries(self, noise: Tensor | None, batch: int, horizon: int) -> Tensor:
        if self.q_embed is not None:
            if noise is not None:
                raise ValueError("a learned query takes no noise")
            return self.q_embed.weight.expand(batch, 1, horizon, -1)
        if noise is None:
            raise ValueError("a noise query needs noise (B, S, H, Z): take it from draw_noise")
        if noise.shape[0] != batch or noise.shape[2] != horizon:
            raise ValueError(f"noise is {tuple(noise.shape)}, expected ({batch}, S, {horizon}, Z)")
        return noise


def _since_start(timestamps_s: Tensor) -> Tensor:
    """Seconds since the first frame: RoPE is relative, and small angles keep their float32 digits."""
    return timestamps_s - timestamps_s[:, :1]


def _causal(frames: Tensor) -> Tensor:
    """Mask (P, P): the query of target p sees the tokens of frames 0..p, which come before it."""
    steps = frames.shape[1]
    return torch.ones(steps, steps, dtype=torch.bool, device=frames.device).tril()
