"""Pre-norm transformer blocks under the released checkpoints' parameter names."""

# B batch, Q queries, T tokens, D hidden, h heads, d dims of a head

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltacache.models.rope import Rotation, rotate

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
        """(B, Q, D) to (B, Q, D); ``visible`` (Q, T) says which tokens a query may see, None for all."""
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
