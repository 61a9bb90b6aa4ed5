"""What world models may minimise in place of best-of-many: the energy score of samples, and flow matching.

Both reward futures that come as often as they do in the data; docs/objectives.md compares them.
"""

import math

import torch
from torch import Tensor, nn

from deltacache.models.blocks import GeluMlp, initialise, split_heads

# K samples, M tokens of a frame, D hidden (of tokens), W width, h heads


def energy_score(samples: Tensor, truth: Tensor) -> Tensor:
    """(...) of samples (..., K, N) of a truth (..., N): their mean distance to it less half that to each other.

    The fair form (Gneiting & Raftery 2007; Ferro 2014): the mean over the K (K - 1) pairs of different samples, so that
    its expectation does not depend on K, and is least where samples are distributed as the truth is. Distances are root
    mean squares over the N numbers, in float32 or better.
    """
    count, numbers = samples.shape[-2:]
    if count < 2:
        raise ValueError("the energy score needs two or more samples: give more candidates")
    exact = torch.promote_types(samples.dtype, torch.float32)
    samples, truth = samples.to(exact), truth.to(exact)
    to_truth = torch.linalg.vector_norm(samples - truth[..., None, :], dim=-1).mean(-1)
    # Neither all differences, which are K times as large as the samples, nor products, which lose small distances.
    between = torch.cdist(samples, samples, compute_mode="donot_use_mm_for_euclid_dist").sum((-2, -1))
    return (to_truth - between / (2 * count * (count - 1))) / math.sqrt(numbers)


_TIME_OCTAVES = 6


class FlowHead(nn.Module):
    """Carries noise to the tokens of a frame, given what the predictor says of it (Lipman et al. 2023).

    Paths are straight: at time t, from 0 to 1, a token x with noise e is at (1 - t) e + t x and moves with x - e, whose
    mean given where it is, t and the predictor's state is what this network learns. The tokens of one frame attend to
    each other, so that they go to the same future.
    """

    def __init__(
        self, hidden_size: int, width: int, num_heads: int, num_layers: int, *, several: bool
    ) -> None:
        super().__init__()
        self.token_proj = nn.Linear(hidden_size, width)
        self.state_proj = nn.Linear(hidden_size, width)
        self.time_proj = nn.Sequential(
            nn.Linear(2 * _TIME_OCTAVES, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.blocks = nn.ModuleList(
            _FlowBlock(width, num_heads if several else None) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.velocity = nn.Linear(width, hidden_size)
        initialise(self)

    def forward(self, tokens: Tensor, state: Tensor, times: Tensor) -> Tensor:
        """Velocity (..., M, D) of tokens (..., M, D) at times (...); ``state`` broadcasts to them."""
        octaves = 2.0 ** torch.arange(_TIME_OCTAVES, device=times.device, dtype=times.dtype)
        angles = math.pi * times[..., None] * octaves
        given = (
            self.state_proj(state) + self.time_proj(torch.cat((angles.cos(), angles.sin()), -1))[..., None, :]
        )
        hidden = self.token_proj(tokens) + given
        for block in self.blocks:
            hidden = block(hidden, given)
        return self.velocity(self.norm(hidden))

    def loss(self, truth: Tensor, state: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """Squared error of the velocity, and the tokens (..., M, D) that it leads to, for noise (..., M, D)."""
        at = times[..., None, None]
        tokens = torch.lerp(noise, truth.expand_as(noise), at.expand_as(noise))
        velocity = self(tokens, state, times).to(tokens.dtype)
        return (velocity - (truth - noise)).square().mean(), tokens + (1 - at) * velocity

    def transport(self, noise: Tensor, state: Tensor, steps: int) -> Tensor:
        """Tokens (..., M, D) from noise (..., M, D), by ``steps`` steps of Heun's method: two velocities each."""
        tokens = noise
        for step in range(steps):
            now, then = (tokens.new_full(tokens.shape[:-2], at / steps) for at in (step, step + 1))
            first = self(tokens, state, now)
            second = self(tokens + first / steps, state, then)
            tokens = tokens + (first + second) / (2 * steps)
        return tokens


class _FlowBlock(nn.Module):
    """Attention among the tokens of a frame, where there are several, then an MLP; both see state and time."""

    def __init__(self, width: int, num_heads: int | None) -> None:
        super().__init__()
        self.num_heads = num_heads
        if num_heads is not None:
            self.norm1 = nn.LayerNorm(width)
            self.qkv_proj = nn.Linear(width, 3 * width)
            self.out_proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = GeluMlp(width, 4 * width)

    def forward(self, hidden: Tensor, given: Tensor) -> Tensor:
        """(..., M, W) to the same."""
        if self.num_heads is not None:
            whole = self.qkv_proj(self.norm1(hidden) + given).flatten(0, -3)
            queries, keys, values = (split_heads(part, self.num_heads) for part in whole.chunk(3, -1))
            mixed = nn.functional.scaled_dot_product_attention(queries, keys, values)
            hidden = hidden + self.out_proj(mixed.transpose(1, 2).flatten(2)).view_as(hidden)
        return hidden + self.mlp(self.norm2(hidden) + given)
