"""FLOP of a training step of one clip: best-of-many is K forwards to choose, and one with its backward to learn."""

# B batch, T frames, P = T - 1 predicted frames, K candidates, M tokens of a frame, D hidden, Z noise

from dataclasses import dataclass

import torch
from torch import Tensor

from deltacache.models.costs.counting import count_flops
from deltacache.models.costs.parts import META, rebuilt, tokens_shape
from deltacache.models.query_world import QueryWorld
from deltacache.models.selection_frames import select_winning_frames
from deltacache.models.world_model import IN_FULL, Grid, WorldModel

_BETA = 0.1


@dataclass(frozen=True, slots=True)
class StepFlops:
    """FLOP of a step a clip, from cached tokens.

    Attributes:
        selection: every candidate of every frame through the whole predictor, the method's plain definition.
        learning: the winners with gradient: forward and backward.
        here: all that a step of this package multiplies; it chooses with fewer products (``models/selection``).
    """

    selection: int
    learning: int
    here: int

    @property
    def plain(self) -> int:
        """The step by the method's definition."""
        return self.selection + self.learning


def training_step_flops(world: WorldModel, frames: int, grid: Grid, candidates: int) -> StepFlops:
    """Of one clip of ``frames`` frames; ``candidates`` matter where futures are random.

    The plain definition is known of models with queries; of others what they do is what is asked.
    """
    here = _step(rebuilt(world), frames, grid, candidates)
    if not (isinstance(world, QueryWorld) and world.stochastic):
        return StepFlops(0, here, here)
    learning = _step(rebuilt(world, query="learned"), frames, grid, 1)
    folded = world.tokens_of_a_frame(grid) == 1 and world.places is None
    selection = _plain_selection(world, frames, grid, candidates) if folded else here - learning
    return StepFlops(selection, learning, here)


def _step(model: WorldModel, frames: int, grid: Grid, candidates: int) -> int:
    tokens = torch.empty(tokens_shape(model, 1, frames, grid), device=META)
    seconds = torch.empty(1, frames, device=META)
    noise = None
    if model.stochastic:
        noise = torch.empty(1, frames - 1, candidates, model.noise_size, device=META)

    def step() -> None:
        wanted = candidates if model.stochastic else 1
        result = model.training_loss(
            tokens, seconds, grid=grid, candidates=wanted, beta=_BETA, noise=noise, selection=IN_FULL
        )
        result.loss.backward()

    return count_flops(step).total


@torch.no_grad()
def _plain_selection(world: QueryWorld, frames: int, grid: Grid, candidates: int) -> int:
    model = rebuilt(world)
    count, steps = model.tokens_of_a_frame(grid), frames - 1
    seconds = torch.empty(1, steps, device=META)
    past = model.remember(torch.empty(1, steps, count, model.hidden_size, device=META), seconds, grid)
    rotation = model.rotation(seconds, grid)
    targets = torch.empty(1, steps, count, model.hidden_size, device=META)
    noise = torch.empty(1, steps, candidates, model.noise_size, device=META)

    def choose() -> Tensor:
        return select_winning_frames(model.predictor, noise, _spread, rotation, past, targets, _BETA, IN_FULL)

    return count_flops(choose).total


def _spread(queries: Tensor, count: int) -> Tensor:
    """(..., Z) to (..., M, Z): places that are added to them cost no product."""
    return queries[..., None, :].expand(*queries.shape[:-1], count, -1)
