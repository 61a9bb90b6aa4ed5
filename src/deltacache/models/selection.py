"""Best-of-many selection: which candidate predicts best, without ever computing what cannot reach the argmin.

All K candidates of a frame share its few keys and its time, so the attention of a block is folded around them.
The query's rotation moves to the keys. A key, seen through the query projection, is a row of ``scoring`` that gives its
score straight from the normed query; a value, seen through the output projection and LayerScale, is a row of
``mixing`` that the residual stream takes up weighted. A query so costs two products with heads x keys rows instead of
two with D x D weights: for seven keys the MLP is 97 % of what is left.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

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
from deltacache.schemas.configs import SelectionName

# B batch, P predicted frames, K candidates, T tokens, D hidden, h heads, d dims of a head, J = heads x keys


# Queries run in passes whose widest activation stays below this many numbers. On a CPU it stays in the cache
# (2,048 queries of a ViT-B). An accelerator wants large passes and a bound on memory (1 GiB in bfloat16).
_WIDEST_ON_CPU, _WIDEST_ELSEWHERE = 6 * 2**20, 2**29
_SHARED = 2048
"""Queries of a pass on a CPU: of 1,024 oneDNN multiplies the second layer of an MLP on one thread."""
_ROOM = 32
"""On a CPU, columns after those of the normed queries, the first of ones: the bias of the MLP's first layer is a row of
its weight. There a bias costs a sixth of the product (it is written out first), 32 more columns 4 %."""
_SMALL = 256
"""Narrower models gain nothing on a CPU from 16-bit products, and little from large ones."""


@dataclass(frozen=True, slots=True)
class Selection:
    """How candidates are compared.

    Attributes:
        dtype: of the products. None: of the weights.
        shortlist: how many of the best are compared again in the dtype of the weights, when ``dtype`` is another. Where
            they are, the residual stream is in ``dtype`` too; alone the comparison keeps it in that of the weights.
    """

    dtype: torch.dtype | None = None
    shortlist: int = 4


WAYS: Mapping[SelectionName, Selection] = {
    "float32": Selection(),
    "shortlist": Selection(torch.bfloat16),
    "bfloat16": Selection(torch.bfloat16, shortlist=1),
}
"""Names of the ways that a trainer may compare candidates in."""


def ways_for(device: torch.device, hidden_size: int) -> tuple[SelectionName, ...]:
    """The ways that may be the fastest on ``device``, the likeliest first.

    On CUDA a shortlist in float32 costs a quarter of the step, so bfloat16 alone comes first. A CPU compares the best
    four again for a 40th of the time; without bfloat16 units, and for small models, it gains nothing from 16 bits.
    """
    if device.type == "cuda":
        return ("bfloat16", "shortlist", "float32")
    if device.type == "cpu" and hidden_size >= _SMALL:
        can = torch.cpu.get_capabilities()
        if can.get("avx512_bf16") or can.get("amx_bf16"):
            return ("shortlist", "float32")
    return ("float32",)


def selection_for(device: torch.device, hidden_size: int) -> Selection:
    """The likeliest of ``ways_for``: what a trainer does that has not measured."""
    return WAYS[ways_for(device, hidden_size)[0]]


@torch.no_grad()
def select_winners(
    predictor: Predictor,
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
        corrected = dtype != full and selection.shortlist > 1
        folded = FoldedPredictor(predictor, dtype, dtype if corrected else full)
        losses = folded.losses(noise, rotation, past, targets, beta)
        if not corrected:
            return losses.argmin(dim=-1)
        listed = losses.topk(min(selection.shortlist, losses.shape[-1]), largest=False).indices  # (B, P, k)
        few = noise.gather(2, listed[..., None].expand(-1, -1, -1, noise.shape[-1]))
        # For so few, folding the attention costs more than it saves: they are queries of their own, of P x k frames.
        steps, count = few.shape[1:3]
        times = rotation.map(lambda part: part.repeat_interleave(count, 2))
        visible = torch.ones(steps, steps, dtype=torch.bool, device=few.device).tril()
        prediction = predictor(few.flatten(1, 2), times, past, visible.repeat_interleave(count, 0)).view_as(
            few
        )
        again = smooth_l1(prediction, targets[:, :, None], beta).mean(dim=-1)
        return listed.gather(2, again.argmin(dim=-1, keepdim=True))[..., 0]


class _Weights(NamedTuple):
    """One block's weights in the dtype of the products, the gains of LayerScale within them; norms stay as they are."""

    norm1: nn.LayerNorm
    query_weight: Tensor  # (h, d, D)
    query_bias: Tensor  # (h, d)
    out_weight: Tensor  # (h, d, D)
    out_bias: Tensor  # (D,)
    norm2: nn.LayerNorm
    up: tuple[
        Tensor, Tensor | None
    ]  # (D, W), (W,); or (D + _ROOM, W), whose last rows are the bias and zeros, and None
    down: tuple[Tensor, Tensor]  # (W, D), (D,)


class _FoldedAttention(NamedTuple):
    """One block's attention of N targets to their J = keys x heads rows."""

    scoring: Tensor  # (N, J, D)
    offset: Tensor  # (N, J, 1)
    mixing: Tensor  # (N, J, D)


class FoldedPredictor:
    """A predictor's weights, made ready for the selection of one step.

    Args:
        predictor: whose blocks are folded.
        dtype: of the products.
        residual: dtype of the residual stream; None for that of the weights.
    """

    def __init__(self, predictor: Predictor, dtype: torch.dtype, residual: torch.dtype | None = None) -> None:
        self._blocks = [
            _weights(block, dtype) for block in cast(Iterable[CrossAttentionBlock], predictor.blocks)
        ]
        self._norm, self._dtype = predictor.norm, dtype
        self._residual = residual or predictor.head.weight.dtype
        self._head = _linear(predictor.head, dtype)
        self._width, self._hidden_size = self._blocks[0].down[0].shape

    def losses(
        self, noise: Tensor, rotation: Rotation, past: Sequence[KeysValues], targets: Tensor, beta: float
    ) -> Tensor:
        """Smooth-L1 (B, P, K) of every candidate of ``noise`` (B, P, K, D) against ``targets`` (B, P, D).

        ``rotation`` is that of the P frames, (B, 1, P, R); the query of frame p sees the first p + 1 tokens of
        ``past``. Targets go through in passes of at most as many as a frame has, frame by frame: a pass meets hardly a
        key that it may not see, and memory does not grow with the number of frames. On a CPU a pass of a wide model
        spans as many frames as it takes for ``_SHARED`` queries.
        """
        batch, steps, count, _ = noise.shape
        on_cpu = noise.device.type == "cpu"
        rows = (_WIDEST_ON_CPU if on_cpu else _WIDEST_ELSEWHERE) // max(self._width, self._hidden_size)
        targets_at_once = max(batch, _SHARED // count) if on_cpu and self._hidden_size >= _SMALL else batch
        size, candidates = max(1, min(rows // count, targets_at_once)), max(1, min(rows, count))
        size = -(-batch * steps // -(-batch * steps // size))  # passes of equal size, so that none is small
        wide = noise.new_empty(size * candidates, self._width, dtype=self._dtype)
        padded = None
        if self._blocks[0].up[1] is None:
            padded = noise.new_zeros(size * candidates, self._hidden_size + _ROOM, dtype=self._dtype)
            padded[:, self._hidden_size] = 1
        losses = noise.new_empty(batch, steps, count)
        frame_of = torch.arange(steps, device=noise.device).repeat_interleave(batch)
        clip_of = torch.arange(batch, device=noise.device).repeat(steps)
        for start in range(0, batch * steps, size):
            clips, frames = clip_of[start : start + size], frame_of[start : start + size]
            keys = min(start + size - 1, batch * steps - 1) // batch + 1
            hidden_keys = torch.arange(keys, device=noise.device) > frames[:, None]  # (N, T)
            # Queries turned by the angle of now meet keys as queries unturned meet keys turned back by it.
            cos, sin = (part[clips, 0, frames][:, None, None] for part in rotation)
            attentions = [
                _fold_attention(
                    block,
                    rotate(kept.keys[clips, :, :keys], Rotation(cos, -sin)),
                    kept.values[clips, :, :keys],
                    hidden_keys,
                )
                for block, kept in zip(self._blocks, past, strict=True)
            ]
            target = targets[clips, frames, None]  # (N, 1, D)
            for first in range(0, count, candidates):
                few = noise[clips, frames, first : first + candidates]
                prediction = self._predict(few.to(self._residual), attentions, wide, padded).to(target.dtype)
                expected = target.expand_as(prediction)
                loss = F.smooth_l1_loss(prediction, expected, reduction="none", beta=beta).mean(dim=-1)
                losses[clips, frames, first : first + candidates] = loss
        return losses

    def _predict(
        self, hidden: Tensor, attentions: Sequence[_FoldedAttention], wide: Tensor, padded: Tensor | None
    ) -> Tensor:
        """Tokens (N, K, D) for queries (N, K, D), which it writes over.

        ``wide`` (N K or more, W) is work space, and so is ``padded`` (N K or more, D + _ROOM), whose last columns are
        ones and zeros, where biases are rows of weights.
        """
        targets, count, size = hidden.shape
        rows, wide = hidden.view(-1, size), wide[: targets * count]
        narrow = rows.new_empty(rows.shape, dtype=self._dtype) if padded is None else padded[: len(rows)]
        for block, attention in zip(self._blocks, attentions, strict=True):
            heads = block.query_bias.shape[0]
            scores = torch.baddbmm(
                attention.offset, attention.scoring, self._normed(block.norm1, hidden).mT
            )  # (N, J, K): beside each other lie candidates, so that a softmax over few keys is fast
            weights = scores.unflatten(1, (-1, heads)).softmax(dim=1).flatten(1, 2).mT
            if hidden.dtype == weights.dtype:
                hidden.baddbmm_(weights, attention.mixing)
            else:
                hidden += torch.bmm(weights, attention.mixing)
            # Into memory that is there already: fresh pages for activations this wide cost as much as the GELU.
            narrow[:, :size] = block.norm2(rows)
            weight, bias = block.up
            if bias is None:
                torch.mm(narrow, weight, out=wide)
            else:
                torch.addmm(bias, narrow, weight, out=wide)
            torch.ops.aten.gelu_(wide)
            if hidden.dtype == wide.dtype:
                rows.addmm_(wide, block.down[0]).add_(block.down[1])
            else:
                rows += torch.addmm(
                    block.down[1], wide, block.down[0], out=narrow if padded is None else None
                )
        return F.linear(self._normed(self._norm, hidden), *self._head)

    def _normed(self, norm: nn.LayerNorm, hidden: Tensor) -> Tensor:
        return norm(hidden).to(self._dtype)


def _weights(block: CrossAttentionBlock, dtype: torch.dtype) -> _Weights:
    heads = (block.attention.num_heads, -1)
    query, out, mlp = block.attention.q_proj, block.attention.out_proj, block.mlp
    gain1, gain2 = block.layer_scale1.lambda1, block.layer_scale2.lambda1
    up, bias = mlp.up_proj.weight.to(dtype), mlp.up_proj.bias.to(dtype)
    if up.device.type == "cpu":
        # Cast first: casting into rows that lie apart is five times slower.
        padded = F.pad(up, (0, _ROOM))
        padded[:, up.shape[1]] = bias
        up, bias = padded, None
    return _Weights(
        norm1=block.norm1,
        query_weight=query.weight.to(dtype).unflatten(0, heads),
        query_bias=query.bias.to(dtype).unflatten(0, heads),
        out_weight=_scaled(out.weight, gain1[:, None], dtype).mT.contiguous().unflatten(0, heads),
        out_bias=_scaled(out.bias, gain1, dtype),
        norm2=block.norm2,
        up=(up.mT, bias),
        down=(
            _scaled(mlp.down_proj.weight, gain2[:, None], dtype).mT,
            _scaled(mlp.down_proj.bias, gain2, dtype),
        ),
    )


def _scaled(weight: Tensor, gain: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiplied in ``dtype``: a copy in float32 takes as long as the products of a small batch."""
    return weight.to(dtype, copy=True).mul_(gain.to(dtype))


def _linear(layer: nn.Linear, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return layer.weight.to(dtype), layer.bias.to(dtype)


def _fold_attention(block: _Weights, keys: Tensor, values: Tensor, hidden_keys: Tensor) -> _FoldedAttention:
    """Of keys, turned back, and values, (N, h, T, d); ``hidden_keys`` (N, T) says which a target may not see."""
    heads, head_dim, _ = block.query_weight.shape
    keys = (keys * head_dim**-0.5).to(block.query_weight.dtype)
    offset = (keys * block.query_bias[:, None]).sum(dim=-1).mT  # (N, T, h)
    offset = offset.masked_fill(hidden_keys[..., None], -torch.inf)
    # The weights of a head sum to 1, so its rows can carry its share of the bias.
    mixing = _through(values.to(keys.dtype), block.out_weight) + block.out_bias / heads
    return _FoldedAttention(
        scoring=_through(keys, block.query_weight).flatten(1, 2),
        offset=offset.flatten(1)[..., None],
        mixing=mixing.flatten(1, 2),
    )


def _through(states: Tensor, weight: Tensor) -> Tensor:
    """(N, h, T, d) times (h, d, D): (N, T, h, D), as one product a head."""
    targets, _, tokens, _ = states.shape
    product = torch.bmm(states.transpose(0, 1).flatten(1, 2), weight)  # (h, N T, D)
    return product.unflatten(1, (targets, tokens)).permute(1, 2, 0, 3)


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
