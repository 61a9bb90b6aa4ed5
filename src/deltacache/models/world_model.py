"""The contract of a world model: what training and evaluation ask of it, whatever it is made of.

An architecture is one file in ``deltacache/models/worlds``, found by its name. It holds one subclass of ``WorldModel``;
``docs/worlds.md`` shows the smallest one.
"""

# B batch, T frames, C context, H horizon, K candidates, S samples, M tokens of a frame, D hidden, Z noise

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from deltacache.models.devices import InPrecision
from deltacache.models.selection import Selection
from deltacache.models.weights import ModelCard

Grid = tuple[int, int]  # rows, columns of patches
Kind = Literal["deltas", "features"]
IN_FULL = Selection()


@dataclass(frozen=True, slots=True)
class WorldLoss:
    """One training step.

    Attributes:
        loss: to minimise.
        prediction: (B, T-1, ...) tokens of the frames after the first, in the form of the input.
        winners: (B, T-1) which candidate won.
    """

    loss: Tensor
    prediction: Tensor
    winners: Tensor


class WorldModel(InPrecision, ABC):
    """Predicts the tokens of later frames from those of earlier ones.

    Tokens of a clip are (B, T, D) where a frame is one token, and (B, T, M, D) where it is M: delta tokens of a
    tokenizer with several, or the N patch tokens. Times are seconds; only differences count.

    Attributes:
        trains_on: which dataset holds its tokens.
        label: what tables call it.
        arguments: of the constructor, from which a checkpoint builds it again; ``query`` among them says whether
            it is given noise.
        hidden_size: D of its tokens.
        noise_size: how long a vector of noise is, unless ``noise_width`` says otherwise.
        card: where a checkpoint was loaded by ``deltacache.load_world``.
    """

    card: ModelCard | None = None

    trains_on: ClassVar[Kind]
    arguments: dict[str, Any]
    hidden_size: int
    noise_size: int
    noise_std: float

    @property
    @abstractmethod
    def label(self) -> str:
        """The method's name in ``metrics.parquet``."""

    @property
    def stochastic(self) -> bool:
        """Whether futures differ by noise; else there is one."""
        return self.arguments.get("query") == "noise"

    def draw_noise(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Noise of ``shape`` (..., Z), drawn where the generator lives, then moved to the model."""
        noise = torch.randn(tuple(shape), generator=generator, device=generator.device)
        weights = next(self.parameters())
        # Weights that were rounded for products in bfloat16 say nothing of what the noise is added to.
        dtype = weights.dtype if self._products is None else torch.float32
        return (noise * self.noise_std).to(weights.device, dtype)

    def noise_width(self, grid: Grid | None = None, *, training: bool = False) -> int:
        """Z of frames on this grid of patches, in a rollout or in training."""
        del grid, training
        return self.noise_size

    @abstractmethod
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
        """Teacher-forced loss of clips (B, T, ...) at times (B, T).

        Args:
            grid: rows and columns of patches, of features.
            candidates: K of best-of-many, or of another objective; 1 without noise.
            beta: of smooth-L1.
            noise: (B, T-1, K, Z), Z = ``noise_width(grid, training=True)``, or drawn from ``generator``.
        """

    @abstractmethod
    def rollout(
        self,
        context_tokens: Tensor,
        timestamps_s: Tensor,
        noise: Tensor | None = None,
        *,
        grid: Grid | None = None,
    ) -> Tensor:
        """Futures (B, S, H, ...) after a context (B, C, ...), for times (B, C+H) of all of it.

        Marked with ``in_precision`` it computes in bfloat16 where an evaluation does, else always in float32.

        Args:
            noise: (B, S, H, Z), Z = ``noise_width(grid)``: a vector for each sample and step; ``None``, and S = 1,
                where nothing is random.
        """
