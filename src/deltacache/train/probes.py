"""Health probes: cheap questions that tell a model that learns from one that found a way around learning.

All ratios compare losses over the same clips, in eval mode, so that RoPE is not rescaled.
B clips or pairs, C context, T frames, N patches, D hidden, K candidates.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from deltacache.models.blocks import log_cosh, smooth_l1
from deltacache.models.deltatok import DeltaTok, Grid
from deltacache.models.world_model import WorldModel
from deltacache.train.data import ClipBatch, PairBatch

_PAIRS_A_PASS = 16
_QUERIES_A_PASS = 2048
Probes = dict[str, float]


@dataclass(frozen=True, slots=True)
class PairProbe:
    """What a tokenizer is probed with: pairs, and first frames (B, N, D) behind the black frame (N, D)."""

    pairs: PairBatch
    first_frames: Tensor
    black: Tensor


def participation_ratio(vectors: Tensor) -> float:
    """In how many directions (B, D) vectors vary: (sum of variances)^2 / sum of squares, at most min(B-1, D).

    The variances are those along the principal axes; 0 for vectors that are all the same.
    """
    centred = (vectors - vectors.mean(0)).double()
    gram = centred @ centred.T  # (B, B): the same non-zero eigenvalues as the covariance, and B is small
    squares = gram.square().sum()
    return (gram.trace().square() / squares).item() if squares > 0 else 0.0


def usage(winners: Tensor, candidates: int) -> tuple[float, int]:
    """How evenly candidates win: entropy of the shares in units of ln K (0 to 1), and how many ever win."""
    shares = torch.bincount(winners.flatten().cpu(), minlength=candidates).double() / winners.numel()
    won = shares[shares > 0]
    entropy = -(won * won.log()).sum()
    largest = torch.tensor(float(max(candidates, 2)), dtype=torch.float64).log()
    return max(0.0, (entropy / largest).item()), len(won)


@torch.no_grad()
def probe_tokenizer(
    model: DeltaTok, probe: PairProbe, grid: Grid, loss: Literal["mse", "log_cosh"]
) -> Probes:
    """Probes of a tokenizer, whose loss over the pairs each ratio is about.

    - ``copy_ratio``: reconstruction / previous frame taken for it. Below 1 it is worth its token.
    - ``z_swap_ratio``: with the token of another pair / with its own. 1: the decoder ignores the token.
    - ``zero_z_ratio``: with zeros in place of the token / with its own.
    - ``delta_rank``: participation ratio of the tokens.
    - ``black_first_ratio``: frame 1 reconstructed from black / black taken for it.
    """

    def losses(reconstruction: Tensor, target: Tensor) -> Tensor:
        each = (reconstruction - target).square() if loss == "mse" else log_cosh(reconstruction, target)
        return each.mean(dim=(1, 2)).double()

    def in_passes(run: Callable[..., Tensor], *parts: Tensor) -> Tensor:
        return torch.cat([run(*each) for each in zip(*(p.split(_PAIRS_A_PASS) for p in parts), strict=True)])

    previous, current = probe.pairs.previous, probe.pairs.current
    black = probe.black.expand_as(probe.first_frames)
    with eval_mode(model):

        def encode(before: Tensor, after: Tensor) -> Tensor:
            return model.encode(before, after, grid).float()

        def error(token: Tensor, before: Tensor, after: Tensor) -> Tensor:
            return losses(model.decode(token, before, grid).float(), after)

        tokens = in_passes(encode, previous, current)
        own = in_passes(error, tokens, previous, current).mean()
        swapped = in_passes(error, tokens.roll(1, 0), previous, current).mean()
        zero = in_passes(error, torch.zeros_like(tokens), previous, current).mean()
        first = in_passes(
            error, in_passes(encode, black, probe.first_frames), black, probe.first_frames
        ).mean()
    return {
        "copy_ratio": _ratio(own, losses(previous, current).mean()),
        "z_swap_ratio": _ratio(swapped, own),
        "zero_z_ratio": _ratio(zero, own),
        "delta_rank": participation_ratio(tokens.flatten(1)),
        "black_first_ratio": _ratio(first, losses(black, probe.first_frames).mean()),
    }


@torch.no_grad()
def probe_world(model: WorldModel, clips: ClipBatch, grid: Grid, noise: Tensor | None, beta: float) -> Probes:
    """Probes of a world model: the last frame of each clip from those before it, the best of ``noise`` (K, Z).

    All clips get the same K candidates, so that their winners can be counted; a learned query gets ``None``.

    - ``copy_ratio``: prediction / last token of the context taken for it.
    - ``z_swap_ratio``, ``zero_z_ratio``: with the context of another clip, or zeros, / with its own.
    - ``delta_rank``, ``predicted_rank``: participation ratios of the true and of the winning tokens.
    - ``query_entropy``, ``queries_winning``: how evenly the candidates win, and how many ever do.
    """
    context, target = clips.tokens[:, :-1], clips.tokens[:, -1]
    with eval_mode(model):
        own = _best_futures(model, context, clips.timestamps_s, target, grid, noise, beta)
        swapped = _best_futures(model, context.roll(1, 0), clips.timestamps_s, target, grid, noise, beta)
        zero = _best_futures(model, torch.zeros_like(context), clips.timestamps_s, target, grid, noise, beta)
    loss = own.losses.mean()
    entropy, winning = usage(own.winners, 1 if noise is None else len(noise))
    return {
        "copy_ratio": _ratio(loss, smooth_l1(context[:, -1], target, beta).mean()),
        "z_swap_ratio": _ratio(swapped.losses.mean(), loss),
        "zero_z_ratio": _ratio(zero.losses.mean(), loss),
        "delta_rank": participation_ratio(target.flatten(1)),
        "predicted_rank": participation_ratio(own.tokens.flatten(1)),
        "query_entropy": entropy,
        "queries_winning": float(winning),
    }


@dataclass(frozen=True, slots=True)
class _Futures:
    """The best candidate of each clip: its loss (B,), index (B,) and tokens (B, ...)."""

    losses: Tensor
    winners: Tensor
    tokens: Tensor


def _best_futures(
    model: WorldModel,
    context: Tensor,
    seconds: Tensor,
    target: Tensor,
    grid: Grid,
    noise: Tensor | None,
    beta: float,
) -> _Futures:
    queries_a_clip = (1 if noise is None else len(noise)) * target[0, ..., 0].numel()
    parts = (part.split(max(1, _QUERIES_A_PASS // queries_a_clip)) for part in (context, seconds, target))
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for past, times, wanted in zip(*parts, strict=True):
        queries = None if noise is None else noise[None, :, None].expand(len(past), -1, -1, -1)
        tokens = model.rollout(past, times, queries, grid=grid)[:, :, 0].float()  # (B, K, ...)
        losses = smooth_l1(tokens, wanted[:, None], beta).flatten(2).mean(dim=-1)
        best = losses.argmin(dim=1)
        rows = torch.arange(len(best), device=best.device)
        found.append((losses[rows, best], best, tokens[rows, best]))
    return _Futures(*(torch.cat(parts) for parts in zip(*found, strict=True)))


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _ratio(one: Tensor, other: Tensor) -> float:
    return (one / other.clamp_min(1e-30)).item()
