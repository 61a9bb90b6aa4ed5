"""Best-of-many selection: which candidate predicts best, without ever computing what cannot reach the argmin.

All K candidates of a frame share its few keys and its time, so the attention of a block is folded around them.
The query's rotation moves to the keys. A key, seen through the query projection, is a row of ``scoring`` that gives its
score straight from the normed query; a value, seen through the output projection and LayerScale, is a row of
``mixing`` that the residual stream takes up weighted. A query so costs two products with heads x keys rows instead of
two with D x D weights: for seven keys the MLP is 97 % of what is left.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltacache.models.blocks import (
    CrossAttentionBlock,
    KeysValues,
    Memory,
    Predictor,
    Rotation,
    first_tokens,
    frame_positions,
    rotate,
    smooth_l1,
)
from deltacache.models.devices import autocast_to

# B batch, P predicted frames, K candidates, T tokens, D hidden, h heads, d dims of a head, J = heads x keys


# Queries run in passes whose widest activation stays below this many numbers: on a CPU it shall stay in the cache
# (1,024 queries of a ViT-B), an accelerator wants large passes and a bound on memory (1 GiB in bfloat16).
_WIDEST_ON_CPU, _WIDEST_ELSEWHERE = 3 * 2**20, 2**29
_SMALL = 256
"""Narrower models gain nothing from 16-bit products on a CPU."""


@dataclass(frozen=True, slots=True)
class Selection:
    """How candidates are compared.

    Attributes:
        dtype: of the products; the residual stream stays in that of the weights. None: all in that of the weights.
        shortlist: how many of the best are compared again in the dtype of the weights, when ``dtype`` is another.
    """

    dtype: torch.dtype | None = None
    shortlist: int = 4


def selection_for(device: torch.device, hidden_size: int) -> Selection:
    """The fastest that is safe: bfloat16 on CUDA, and for large models where a CPU multiplies it.

    A CPU compares the best four again in float32, for a 40th of the time; on CUDA float32 would cost a quarter.
    """
    if device.type == "cuda":
        return Selection(torch.bfloat16, shortlist=1)
    if device.type == "cpu" and hidden_size >= _SMALL:
        can = torch.cpu.get_capabilities()
        if can.get("avx512_bf16") or can.get("amx_bf16"):
            return Selection(torch.bfloat16)
    return Selection()


@torch.no_grad()
def select_winners(
    predictor: "Scorer",
    noise: Tensor,
    rotation: Rotation,
    past: Sequence[KeysValues],
    targets: Tensor,
    beta: float,
    selection: Selection,
) -> Tensor:
    """Index (B, P) of the candidate with the least loss; for the arguments see ``FoldedPredictor.losses``."""
    with autocast_to(noise.device.type, None):
        full = predictor.head.weight.dtype
        dtype = selection.dtype or full
        losses = FoldedPredictor(predictor, dtype).losses(noise, rotation, past, targets, beta)
        best = losses.argmin(dim=-1)
        if dtype == full or selection.shortlist < 2:
            return best
        listed = losses.topk(min(selection.shortlist, losses.shape[-1]), largest=False).indices  # (B, P, k)
        few = noise.gather(2, listed[..., None].expand(-1, -1, -1, noise.shape[-1]))
        again = FoldedPredictor(predictor, full).losses(few, rotation, past, targets, beta)
        return listed.gather(2, again.argmin(dim=-1, keepdim=True))[..., 0]


class Scorer(Protocol):
    """The parts of a predictor that selection folds."""

    blocks: nn.ModuleList
    norm: nn.LayerNorm
    head: nn.Linear


class _Weights(NamedTuple):
    """One block's weights in the dtype of the products; norms and gains of LayerScale stay as they are."""

    norm1: nn.LayerNorm
    query_weight: Tensor  # (h, d, D)
    query_bias: Tensor  # (h, d)
    out_weight: Tensor  # (h, d, D)
    out_bias: Tensor  # (D,)
    gain1: Tensor  # (D,)
    norm2: nn.LayerNorm
    up: tuple[Tensor, Tensor]  # (W, D), (W,)
    down: tuple[Tensor, Tensor]  # (D, W), (D,)
    gain2: Tensor  # (D,)


class _FoldedAttention(NamedTuple):
    """One block's attention of B clips to their J = heads x keys rows."""

    scoring: Tensor  # (B, J, D)
    offset: Tensor  # (B, 1, J)
    mixing: Tensor  # (B, J, D)


class FoldedPredictor:
    """A predictor's weights, made ready for the selection of one step."""

    def __init__(self, predictor: Scorer, dtype: torch.dtype) -> None:
        self._blocks = [
            _weights(block, dtype) for block in cast(Iterable[CrossAttentionBlock], predictor.blocks)
        ]
        self._norm, self._dtype = predictor.norm, dtype
        self._head = _linear(predictor.head, dtype)
        self._width, self._hidden_size = self._blocks[0].up[0].shape

    def losses(
        self, noise: Tensor, rotation: Rotation, past: Sequence[KeysValues], targets: Tensor, beta: float
    ) -> Tensor:
        """Smooth-L1 (B, P, K) of every candidate of ``noise`` (B, P, K, D) against ``targets`` (B, P, D).

        ``rotation`` is that of the P frames, (B, 1, P, R); the query of frame p sees the first p + 1 tokens of
        ``past``. Frame by frame, so that no query meets a key that it may not see.
        """
        batch, steps, count, _ = noise.shape
        widest = _WIDEST_ON_CPU if noise.device.type == "cpu" else _WIDEST_ELSEWHERE
        rows = max(1, widest // max(self._width, self._hidden_size))
        clips, candidates = max(1, rows // count), min(rows, count)
        losses = noise.new_empty(batch, steps, count)
        for step in range(steps):
            now = Rotation(*(part[:, :, step : step + 1] for part in rotation))
            for start in range(0, batch, clips):
                some = slice(start, start + clips)
                keys = step + 1
                # Queries turned by the angle of now meet keys as queries unturned meet keys turned back by it.
                back = Rotation(now.cos[some], -now.sin[some])
                pairs = zip(self._blocks, past, strict=True)
                attentions = [
                    _fold_attention(
                        block, rotate(kept.keys[some, :, :keys], back), kept.values[some, :, :keys]
                    )
                    for block, kept in pairs
                ]
                target = targets[some, step, None]
                for first in range(0, count, candidates):
                    few = slice(first, first + candidates)
                    prediction = self._predict(noise[some, step, few], attentions)
                    losses[some, step, few] = smooth_l1(prediction, target, beta).mean(dim=-1)
        return losses

    def _predict(self, noise: Tensor, attentions: Sequence[_FoldedAttention]) -> Tensor:
        """Tokens (B, K, D) for queries (B, K, D)."""
        hidden = noise.clone()
        for block, attention in zip(self._blocks, attentions, strict=True):
            heads = block.query_bias.shape[0]
            scores = torch.baddbmm(
                attention.offset, self._normed(block.norm1, hidden), attention.scoring.mT
            )  # (B, K, J)
            weights = scores.unflatten(-1, (heads, -1)).softmax(dim=-1).flatten(-2)
            hidden = _add_product(hidden, weights, attention.mixing)
            wide = F.gelu(F.linear(self._normed(block.norm2, hidden), *block.up))
            hidden.addcmul_(F.linear(wide, *block.down), block.gain2)
        return F.linear(self._normed(self._norm, hidden), *self._head).to(noise.dtype)

    def _normed(self, norm: nn.LayerNorm, hidden: Tensor) -> Tensor:
        return norm(hidden).to(self._dtype)


def _add_product(hidden: Tensor, weights: Tensor, mixing: Tensor) -> Tensor:
    """``hidden + weights @ mixing``, in place."""
    if hidden.dtype == weights.dtype:
        return hidden.baddbmm_(weights, mixing)
    hidden += torch.bmm(weights, mixing)
    return hidden


def _weights(block: CrossAttentionBlock, dtype: torch.dtype) -> _Weights:
    heads = (block.attention.num_heads, -1)
    query, out, mlp = block.attention.q_proj, block.attention.out_proj, block.mlp
    return _Weights(
        norm1=block.norm1,
        query_weight=query.weight.to(dtype).unflatten(0, heads),
        query_bias=query.bias.to(dtype).unflatten(0, heads),
        out_weight=out.weight.to(dtype).mT.unflatten(0, heads),
        out_bias=out.bias.to(dtype),
        gain1=block.layer_scale1.lambda1.to(dtype),
        norm2=block.norm2,
        up=_linear(mlp.up_proj, dtype),
        down=_linear(mlp.down_proj, dtype),
        gain2=block.layer_scale2.lambda1,
    )


def _linear(layer: nn.Linear, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return layer.weight.to(dtype), layer.bias.to(dtype)


def _fold_attention(block: _Weights, keys: Tensor, values: Tensor) -> _FoldedAttention:
    """Of keys, turned back, and values, (B, h, T, d)."""
    heads, head_dim, _ = block.query_weight.shape
    keys = (keys * head_dim**-0.5).to(block.query_weight.dtype)
    offset = (keys * block.query_bias[:, None]).sum(dim=-1)
    # The weights of a head sum to 1, so its rows can carry its share of the bias.
    mixing = (_through(values.to(keys.dtype), block.out_weight) + block.out_bias / heads) * block.gain1
    return _FoldedAttention(
        scoring=_through(keys, block.query_weight).flatten(1, 2),
        offset=offset.flatten(1)[:, None],
        mixing=mixing.flatten(1, 2),
    )


def _through(states: Tensor, weight: Tensor) -> Tensor:
    """(B, h, T, d) times (h, d, D): (B, h, T, D), as one product a head."""
    batch, _, tokens, _ = states.shape
    product = torch.bmm(states.transpose(0, 1).flatten(1, 2), weight)  # (h, B T, D)
    return product.unflatten(1, (batch, tokens)).transpose(0, 1)


# ----------------------------------------------------------------------------------------------------
# Best-of-many where a frame is many tokens: a candidate is one noise vector, shared by all of them.
#
# Keys are too many to fold (see ``selection``); all candidates of a frame are queries of one product instead,
# so that its keys are never copied.
# ----------------------------------------------------------------------------------------------------


# B batch, P predicted frames, K candidates, M tokens of a frame, D hidden


_WIDEST_FRAMES_ON_CPU, _WIDEST_FRAMES_ELSEWHERE = 2**24, 2**29
"""Numbers of the widest activation of a pass."""

Spread = Callable[[Tensor, int], Tensor]
"""From queries of frames (..., D) to those of their M tokens (..., M, D)."""


@torch.no_grad()
def select_winning_frames(
    predictor: Predictor,
    noise: Tensor,
    spread: Spread,
    rotation: Rotation,
    past: Memory,
    targets: Tensor,
    beta: float,
    selection: Selection,
) -> Tensor:
    """Index (B, P) of the candidate of ``noise`` (B, P, K, D) whose frame is nearest to ``targets`` (B, P, M, D).

    ``rotation`` is that of all tokens, (B, 1, P M, R); frame p sees the first p + 1 frames of ``past``.
    """
    count = targets.shape[2]
    winners: list[Tensor] = []
    for step in range(targets.shape[1]):
        now = frame_positions(rotation, step, count)
        seen = first_tokens(past, (step + 1) * count)
        target = targets[:, step, None]

        def losses(few: Tensor, dtype: torch.dtype | None) -> Tensor:
            return _losses(predictor, spread(few, count), now, seen, target, beta, dtype)  # noqa: B023

        found = losses(noise[:, step], selection.dtype)
        if selection.dtype is not None and 1 < selection.shortlist < found.shape[1]:
            listed = found.topk(selection.shortlist, largest=False).indices  # (B, k)
            few = noise[:, step].gather(1, listed[..., None].expand(-1, -1, noise.shape[-1]))
            best = losses(few, None).argmin(dim=1, keepdim=True)
            winners.append(listed.gather(1, best)[:, 0])
        else:
            winners.append(found.argmin(dim=1))
    return torch.stack(winners, dim=1)


def _losses(
    predictor: Predictor,
    queries: Tensor,
    now: Rotation,
    past: Memory,
    target: Tensor,
    beta: float,
    dtype: torch.dtype | None,
) -> Tensor:
    """Smooth-L1 (B, K) of frames for queries (B, K, M, D) against (B, 1, M, D)."""
    batch, _, count, hidden = queries.shape
    device = queries.device.type
    widest = _WIDEST_FRAMES_ON_CPU if device == "cpu" else _WIDEST_FRAMES_ELSEWHERE
    width = max(block.mlp.up_proj.out_features for block in predictor.blocks)  # pyright: ignore
    size = max(1, widest // (batch * count * max(width, hidden)))
    losses: list[Tensor] = []
    with autocast_to(device, dtype):
        for some in queries.split(size, dim=1):
            times = some.shape[1]
            positions = now.map(lambda part: part.repeat(1, 1, times, 1))  # noqa: B023
            frames = predictor(some.flatten(1, 2), positions, past).unflatten(1, some.shape[1:3])
            losses.append(smooth_l1(frames.to(target.dtype), target, beta).mean(dim=(2, 3)))
    return torch.cat(losses, dim=1)
