"""The validation loss of a training: the metric of ``evaluate`` on clips that are not trained on.

B clips, T frames, N patches, D hidden, S samples, C context, H horizon.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from deltacache.models.deltatok import DeltaTok
from deltacache.models.devices import forward_precision
from deltacache.models.futures import SMOOTH_L1_BETA, sequence_generator
from deltacache.models.world_model import WorldModel
from deltacache.schemas.configs import TrainingConfig
from deltacache.schemas.datasets import TrainingPrecision
from deltacache.train.mixture import Clips
from deltacache.train.order import probe_items
from deltacache.train.probes import eval_mode

CONTEXT, HORIZONS, SAMPLES, SEED = 4, (1, 3), 20, 0
"""Those of ``evaluate`` without flags."""
_CLIPS_A_PASS = 8


@dataclass(frozen=True, slots=True)
class BestSoFar:
    """How a validation stands; every checkpoint records it.

    Attributes:
        step: of the newest loss.
        waited: validations since the best one.
    """

    step: int | None = None
    loss: float | None = None
    best_step: int | None = None
    best_loss: float | None = None
    waited: int = 0

    def after(self, step: int, loss: float) -> "BestSoFar":
        """With one more loss; only a lower one is better."""
        if loss < (math.inf if self.best_loss is None else self.best_loss):
            return BestSoFar(step, loss, step, loss)
        return BestSoFar(step, loss, self.best_step, self.best_loss, self.waited + 1)


@dataclass
class Validation:
    """What the loop knows of it.

    Attributes:
        measure: the loss of the model as it is.
        every: steps between two losses.
        patience: losses in a row without a lower one, after which the training ends.
    """

    measure: Callable[[], float]
    every: int
    patience: int | None = None
    standing: BestSoFar = field(default_factory=BestSoFar)

    def add(self, step: int) -> bool:
        """Measure after ``step`` steps; whether this is the best one so far. One that is not finite is never best."""
        self.standing = self.standing.after(step, self.measure())
        return self.standing.best_step == step

    @property
    def over(self) -> bool:
        """Whether its patience has ended."""
        return self.patience is not None and self.standing.waited >= self.patience

    @property
    def record(self) -> dict[str, float | int | None]:
        """For a checkpoint."""
        return asdict(self.standing)


class Validator:
    """The loss of ``wanted`` clips, always the same, in eval mode.

    A tokenizer: smooth-L1 of every frame after the first, reconstructed from the true frame before it and its token
    (``deltatok_one_step`` of ``evaluate``). A world model: smooth-L1 of the best of 20 futures 1 and 3 steps after a
    context of 4 frames, in the space of the tokens that it predicts; shorter clips have a shorter context.
    """

    def __init__(
        self,
        model: DeltaTok | WorldModel,
        clips: Clips,
        wanted: int,
        device: torch.device,
        config: TrainingConfig,
    ) -> None:
        self._model, self._clips, self._device = model, clips, device
        self._precision: TrainingPrecision = config.precision
        self._rows = probe_items(SEED, wanted, len(clips))

    @cached_property
    def _seconds(self) -> np.ndarray:
        """(C, T) since the first frame of each clip that is validated on."""
        times = self._clips.timestamps_s[self._rows]
        return times - times[:, :1]

    @cached_property
    def _ids(self) -> list[str]:
        ids = self._clips.clip_ids
        return [ids[row] for row in self._rows.tolist()]

    def __call__(self) -> float:
        losses: list[Tensor] = []
        clips, frames, grid = self._clips, self._clips.card.sampling.frames, self._clips.card.patch_grid
        with torch.no_grad(), eval_mode(self._model), forward_precision(self._device, self._precision):
            for at in range(0, len(self._rows), _CLIPS_A_PASS):
                part = slice(at, at + _CLIPS_A_PASS)
                read = clips.at_once(lambda row: clips.read_frames(row, 0, frames), self._rows[part].tolist())
                tokens = torch.from_numpy(np.stack(list(read))).to(self._device).float()
                if isinstance(self._model, DeltaTok):
                    losses.append(_reconstruction(self._model, tokens, grid))
                else:
                    seconds = torch.from_numpy(self._seconds[part]).to(self._device)
                    losses.append(_best_future(self._model, tokens, seconds, self._ids[part], grid))
        return torch.cat(losses).mean().item()


def _reconstruction(model: DeltaTok, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B,) of clips (B, T, N, D), float64."""
    frames = [
        _score(model.decode(model.encode(before, after, grid), before, grid).float(), after, 1)
        for before, after in zip(tokens.unbind(1)[:-1], tokens.unbind(1)[1:], strict=True)
    ]
    return torch.stack(frames).mean(0)


def _best_future(
    model: WorldModel, tokens: Tensor, seconds: Tensor, clip_ids: list[str], grid: tuple[int, int]
) -> Tensor:
    """(B,) of clips (B, T, ...), float64."""
    context = max(1, min(CONTEXT, tokens.shape[1] - HORIZONS[-1]))
    horizons = [horizon for horizon in HORIZONS if context + horizon <= tokens.shape[1]]
    noise = None
    if model.stochastic:
        shape = (SAMPLES, horizons[-1], model.noise_width(grid))
        drawn = [model.draw_noise(shape, sequence_generator(SEED, clip_id)) for clip_id in clip_ids]
        noise = torch.stack(drawn).to(tokens.device)
    futures = model.rollout(
        tokens[:, :context], seconds[:, : context + horizons[-1]], noise, grid=grid
    ).float()
    best = [
        _score(futures[:, :, horizon - 1], tokens[:, None, context + horizon - 1], 2).amin(1)
        for horizon in horizons
    ]
    return torch.stack(best).mean(0)


def _score(prediction: Tensor, truth: Tensor, leading: int) -> Tensor:
    """Smooth-L1, a mean over all but the ``leading`` dimensions."""
    prediction, truth = torch.broadcast_tensors(prediction, truth)
    each = functional.smooth_l1_loss(prediction, truth, reduction="none", beta=SMOOTH_L1_BETA)
    return each.flatten(leading).mean(leading, dtype=torch.float64)
