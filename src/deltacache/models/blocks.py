"""Pre-norm transformer blocks under the released checkpoints' parameter names."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# ----------------------------------------------------------------------------------------------------
# Rotary position embeddings: 2-D on patches (DINOv3) and 1-D on seconds (DeltaWorld).
# ----------------------------------------------------------------------------------------------------


# B batch, T tokens, N patches, R rotated dims of a head


_SLOWEST_EXPONENT, _FASTEST_EXPONENT = -2.0, 2.0  # periods of 10^-2 to 10^2 seconds


class Rotation(NamedTuple):
    """Cosines and sines of one position each, broadcastable to (..., tokens, R).

    The R dims are as many groups as ``axes``; within a group, dim i pairs with the one half a group further.
    """

    cos: Tensor
    sin: Tensor
    axes = 1

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same change of cosines and sines."""
        return type(self)(change(self.cos), change(self.sin))


class SpaceTimeRotation(Rotation):
    """A group of dims each for seconds, columns and rows."""

    axes = 3


def rotate(states: Tensor, rotation: Rotation) -> Tensor:
    """Turn the first R dims of ``states`` (..., tokens, head_dim); dims beyond R pass unchanged."""
    cos, sin = (part.to(states.dtype) for part in rotation)
    rotated_dims = cos.shape[-1]
    turning, still = states[..., :rotated_dims], states[..., rotated_dims:]
    first, second = turning.unflatten(-1, (rotation.axes, 2, -1)).unbind(dim=-2)
    partner = torch.stack((-second, first), dim=-2).flatten(-3)
    turned = turning * cos + partner * sin
    return torch.cat((turned, still), dim=-1) if still.shape[-1] else turned


def patch_rotation(
    grid: tuple[int, int], head_dim: int, theta: float, scale: Tensor | None = None
) -> Rotation:
    """Rotation (N, head_dim) of the patch centres in [-1, 1], rows first (DINOv3).

    ``scale`` multiplies the coordinates; it also says on which device the result lies.
    """
    device = scale.device if scale is not None else None
    rows, columns = (((torch.arange(n, device=device) + 0.5) / n) * 2.0 - 1.0 for n in grid)
    centres = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)
    if scale is not None:
        centres = centres * scale
    frequencies = theta ** -torch.arange(0, 1, 4 / head_dim, device=device)
    angles = 2.0 * math.pi * centres[:, :, None] * frequencies
    angles = angles.flatten(1).tile(2)
    return Rotation(angles.cos(), angles.sin())


def time_rotation(seconds: Tensor, head_dim: int) -> Rotation:
    """Rotation (B, 1, T, R) of times (B, T) in seconds, R = the largest multiple of 6 within ``head_dim``.

    Multiples of 6 keep R divisible by the three axes of the patch variant of this predictor.
    """
    half = head_dim // 6 * 3
    exponents = torch.linspace(_SLOWEST_EXPONENT, _FASTEST_EXPONENT, half, device=seconds.device)
    angles = 2.0 * math.pi * seconds[:, None, :, None] / 10.0**exponents
    angles = angles.tile(2)
    return Rotation(angles.cos(), angles.sin())


def space_time_rotation(seconds: Tensor, grid: tuple[int, int], head_dim: int) -> SpaceTimeRotation:
    """Rotation (B, 1, T N, R) of N patches, row by row, of frames at times (B, T) in seconds (DINO-world).

    A third of the turning dims each for seconds, columns and rows, the latter from -1 to 1; R is the largest
    multiple of 6 within ``head_dim``.
    """
    device, third = seconds.device, head_dim // 6
    exponents = torch.linspace(_SLOWEST_EXPONENT, _FASTEST_EXPONENT, third, device=device)
    rows, columns = (torch.linspace(-1.0, 1.0, count, device=device) for count in grid)
    down, across = (part.flatten() for part in torch.meshgrid(rows, columns, indexing="ij"))
    batch, frames = seconds.shape
    places = torch.stack((across, down), dim=-1).expand(batch, frames, -1, -1)  # (B, T, N, 2)
    times = seconds[:, :, None, None].expand(-1, -1, places.shape[2], -1)
    positions = torch.cat((times, places), dim=-1).flatten(1, 2)  # (B, T N, 3)
    angles = 2.0 * math.pi * positions[:, None, :, :, None] / 10.0**exponents
    angles = angles.tile(2).flatten(3)
    return SpaceTimeRotation(angles.cos(), angles.sin())


# B batch, Q queries, T tokens, D hidden, h heads, d dims of a head


_INIT_STD = 0.02


class LayerScale(nn.Module):
    """A learned gain for each channel of a residual branch."""

    def __init__(self, hidden_size: int, initial: float) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.full((hidden_size,), initial))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self.lambda1


class GeluMlp(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, width)
        self.down_proj = nn.Linear(width, hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(hidden)))


class SwiGluMlp(nn.Module):
    """A SiLU-gated MLP."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width)
        self.up_proj = nn.Linear(hidden_size, width)
        self.down_proj = nn.Linear(width, hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


def make_mlp(hidden_size: int, kind: Literal["gelu", "swiglu"]) -> nn.Module:
    """GELU of width 4 D, or SwiGLU of width 2/3 of that: about the same number of weights."""
    if kind == "gelu":
        return GeluMlp(hidden_size, 4 * hidden_size)
    return SwiGluMlp(hidden_size, 2 * 4 * hidden_size // 3)


class SelfAttention(nn.Module):
    """DINOv3 attention (no key bias) with the tokenizer's two options.

    ``qk_norm`` normalises queries and keys after the rotation; ``gated`` weighs each head's output by a
    sigmoid of the block's normed input.
    """

    def __init__(self, hidden_size: int, num_heads: int, *, qk_norm: bool, gated: bool) -> None:
        super().__init__()
        head_dim = hidden_size // num_heads
        self.num_heads = num_heads
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.o_proj = nn.Linear(hidden_size, hidden_size)
        self.q_norm = nn.LayerNorm(head_dim, bias=False) if qk_norm else None
        self.k_norm = nn.LayerNorm(head_dim, bias=False) if qk_norm else None
        self.attn_gate = nn.Linear(hidden_size, num_heads) if gated else None

    def forward(self, hidden: Tensor, rotation: Rotation) -> Tensor:
        """(B, T, D) to (B, T, D); ``rotation`` is (T, d)."""
        values = split_heads(self.v_proj(hidden), self.num_heads)
        queries = rotate(split_heads(self.q_proj(hidden), self.num_heads), rotation)
        keys = rotate(split_heads(self.k_proj(hidden), self.num_heads), rotation)
        if self.q_norm is not None and self.k_norm is not None:
            # Under autocast a LayerNorm answers in float32; attention refuses that beside 16-bit values.
            queries, keys = self.q_norm(queries).to(values.dtype), self.k_norm(keys).to(values.dtype)
        mixed = F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2)  # (B, T, h, d)
        if self.attn_gate is not None:
            mixed = mixed * self.attn_gate(hidden).sigmoid()[..., None]
        return self.o_proj(mixed.flatten(2))


class SelfAttentionBlock(nn.Module):
    """One ViT block of the tokenizer."""

    def __init__(
        self, hidden_size: int, attention: SelfAttention, mlp: nn.Module, layer_scale_init: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size)
        self.attention = attention
        self.layer_scale1 = LayerScale(hidden_size, layer_scale_init)
        self.norm2 = nn.LayerNorm(hidden_size)
        self.mlp = mlp
        self.layer_scale2 = LayerScale(hidden_size, layer_scale_init)

    def forward(self, hidden: Tensor, rotation: Rotation) -> Tensor:
        hidden = hidden + self.layer_scale1(self.attention(self.norm1(hidden), rotation))
        return hidden + self.layer_scale2(self.mlp(self.norm2(hidden)))


class KeysValues(NamedTuple):
    """What one cross-attention block keeps of the past: keys (already rotated) and values, (B, h, T, d)."""

    keys: Tensor
    values: Tensor


class CrossAttention(nn.Module):
    """Queries attend to past tokens; keys and values come from the raw tokens, ``token_size`` wide."""

    def __init__(self, hidden_size: int, num_heads: int, token_size: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.kv_proj = nn.Linear(token_size, 2 * hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def remember(self, tokens: Tensor, rotation: Rotation) -> KeysValues:
        """Keys and values of past tokens (B, T, D)."""
        keys, values = self.kv_proj(tokens).chunk(2, dim=-1)
        keys = rotate(split_heads(keys, self.num_heads), rotation)
        return KeysValues(keys, split_heads(values, self.num_heads))

    def forward(self, hidden: Tensor, rotation: Rotation, past: KeysValues, visible: Tensor | None) -> Tensor:
        """(B, Q, D) to (B, Q, D); ``visible`` (Q, T) says which tokens per query may see, None for all."""
        queries = rotate(split_heads(self.q_proj(hidden), self.num_heads), rotation)
        mixed = F.scaled_dot_product_attention(queries, past.keys, past.values, attn_mask=visible)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class CrossAttentionBlock(nn.Module):
    """One block of the world model's predictor."""

    def __init__(
        self, hidden_size: int, num_heads: int, mlp_width: int, layer_scale_init: float, token_size: int
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size)
        self.attention = CrossAttention(hidden_size, num_heads, token_size)
        self.layer_scale1 = LayerScale(hidden_size, layer_scale_init)
        self.norm2 = nn.LayerNorm(hidden_size)
        self.mlp = GeluMlp(hidden_size, mlp_width)
        self.layer_scale2 = LayerScale(hidden_size, layer_scale_init)

    def remember(self, tokens: Tensor, rotation: Rotation) -> KeysValues:
        """What this block keeps of past tokens (B, T, D)."""
        return self.attention.remember(tokens, rotation)

    def forward(self, hidden: Tensor, rotation: Rotation, past: KeysValues, visible: Tensor | None) -> Tensor:
        hidden = hidden + self.layer_scale1(self.attention(self.norm1(hidden), rotation, past, visible))
        return hidden + self.layer_scale2(self.mlp(self.norm2(hidden)))


def split_heads(states: Tensor, num_heads: int) -> Tensor:
    """(B, T, D) to (B, h, T, d)."""
    return states.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def check_heads(hidden_size: int, num_heads: int, *, multiple: int, least: int) -> None:
    """Refuse a width that does not split into heads which the rotation can turn."""
    head_dim, rest = divmod(hidden_size, max(1, num_heads))
    if num_heads < 1 or rest or head_dim % multiple or head_dim < least:
        raise ValueError(
            f"hidden size {hidden_size} does not split into {num_heads} heads of a multiple of {multiple} "
            f"and at least {least} dims"
        )


def initialise(module: nn.Module) -> None:
    """Linear and embedding weights from a truncated normal of std 0.02, biases 0 (method section 1)."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(part.weight, std=_INIT_STD)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)


# ----------------------------------------------------------------------------------------------------
# The cross-attention predictor that DeltaWorld and DINO-world share (method section 1).
# ----------------------------------------------------------------------------------------------------


# B batch, Q queries, T tokens, D hidden


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


# ----------------------------------------------------------------------------------------------------
# Element-wise losses: the trainers average them, the evaluation reports them per target.
# ----------------------------------------------------------------------------------------------------


def log_cosh(prediction: Tensor, target: Tensor) -> Tensor:
    """``ln cosh(error)`` as ``d + softplus(-2 d) - ln 2`` with d = abs(error), which cannot overflow."""
    distance = (prediction - target).abs()
    return distance + F.softplus(-2.0 * distance) - math.log(2.0)


def smooth_l1(prediction: Tensor, target: Tensor, beta: float) -> Tensor:
    """Quadratic below ``beta``, linear above; ``prediction`` and ``target`` broadcast."""
    distance = (prediction - target).abs()
    return (
        (distance < beta) * (0.5 * distance.square() / beta - distance + 0.5 * beta) + distance - 0.5 * beta
    )
