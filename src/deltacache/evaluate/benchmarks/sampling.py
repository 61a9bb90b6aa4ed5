"""Delta tokens of true frames, and futures sampled after them.

Shapes: B sequences, X crops of all of them, T frames, S samples, h steps, N patches, D hidden.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltacache.evaluate.benchmarks.loading import LoadedSequence
from deltacache.evaluate.benchmarks.timing import Timing
from deltacache.evaluate.inputs import Models, World
from deltacache.evaluate.predictions import Protocol
from deltacache.evaluate.rollouts import sequence_generator
from deltacache.schemas.benchmarks import BenchmarkName


@dataclass(frozen=True, repr=False)
class SequenceBatch:
    """Sequences of equally many frames.

    Attributes:
        tokens: (X, T, N, D) float32 on the device.
        first: where the crops of each sequence begin in ``tokens``, and where the last ones end.
        generated: of each sequence, patch tokens (S, C, N, D) of the target as video generators made it, by the
            generator's name and the horizon.
    """

    dataset: BenchmarkName
    sequences: tuple[LoadedSequence, ...]
    tokens: Tensor
    first: tuple[int, ...]
    generated: tuple[Mapping[tuple[str, int], Tensor], ...]

    def only(self, at: int) -> "SequenceBatch":
        """The batch of one of the sequences."""
        crops = slice(self.first[at], self.first[at + 1])
        return SequenceBatch(
            self.dataset,
            (self.sequences[at],),
            self.tokens[crops],
            (0, crops.stop - crops.start),
            (self.generated[at],),
        )

    @property
    def crop_names(self) -> list[str]:
        """What the noise of each crop is drawn from."""
        return [
            f"{loaded.sequence.sequence_id} {crop}"
            for loaded in self.sequences
            for crop in range(loaded.split.crops)
        ]


class Sampler:
    """Encodes contexts and rolls world models out."""

    def __init__(self, models: Models, protocol: Protocol, device: torch.device, timing: Timing) -> None:
        self._models, self._protocol = models, protocol
        self._device, self._timing = device, timing

    def true_deltas(self, batch: SequenceBatch, horizons: Sequence[int]) -> dict[int, Tensor]:
        """Delta tokens (X, D) of true pairs, by the later frame: those that anything below needs."""
        tokenizer, frames = self._models.tokenizer, batch.tokens.shape[1]
        if tokenizer is None:
            return {}
        needed = {frames - 1}
        for horizon in horizons if self._models.worlds else ():
            needed.update(range(frames - horizon - self._protocol.context + 1, frames - horizon))
        order = sorted(needed)
        before, after = (
            batch.tokens[:, [at - 1 for at in order]].flatten(0, 1),
            batch.tokens[:, order].flatten(0, 1),
        )
        with self._timing.part("encoder", self._device):
            encoded = tokenizer.model.encode(before, after, self._protocol.grid)
        return dict(zip(order, encoded.unflatten(0, (-1, len(order))).unbind(1), strict=True))

    def roll_out(
        self,
        world: World,
        batch: SequenceBatch,
        deltas: dict[int, Tensor],
        horizon: int,
    ) -> Tensor:
        """Delta tokens (X, S, h, D) of sampled futures, after the context ``horizon`` frames before the target."""
        protocol, frames, tokenizer = self._protocol, batch.tokens.shape[1], self._models.tokenizer
        assert tokenizer is not None  # a world model has one
        start = frames - horizon - protocol.context
        with self._timing.part("encoder", self._device):
            black = protocol.black.expand_as(batch.tokens[:, start])
            first = tokenizer.model.encode(black, batch.tokens[:, start], protocol.grid)
        pairs = [deltas[at] for at in range(start + 1, start + protocol.context)]
        seconds = torch.tensor(
            [
                [loaded.sequence.spacing_s * step for step in range(protocol.context + horizon)]
                for loaded in batch.sequences
                for _ in range(loaded.split.crops)
            ],
            device=self._device,
        )
        with self._timing.part("predictor", self._device):
            noise = self._noise(world, batch.crop_names, horizon)
            return world.model.rollout(torch.stack([first, *pairs], 1), seconds, noise)

    def _noise(self, world: World, crops: Sequence[str], horizon: int) -> Tensor | None:
        """(X, S, h, D), drawn from (seed, sequence, crop, sample, step) alone."""
        if world.model.q_embed is not None:
            return None
        width, seed = (world.model.hidden_size,), self._protocol.seed
        drawn = [
            world.model.draw_noise(width, sequence_generator(seed, f"{crop} {sample} {step}"))
            for crop in crops
            for sample in range(world.samples)
            for step in range(horizon)
        ]
        return torch.stack(drawn).unflatten(0, (len(crops), world.samples, horizon))
