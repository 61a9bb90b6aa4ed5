"""Delta tokens of true frames, and futures sampled after them.

Shapes: B sequences, X crops of all of them, T frames, S samples, h steps, N patches, D hidden.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol as Seam

import torch
from torch import Tensor

from deltacache.evaluate.benchmarks.ensembles import decode_last
from deltacache.evaluate.benchmarks.loading import LoadedSequence
from deltacache.evaluate.benchmarks.timing import Timing
from deltacache.evaluate.clips.rollouts import sequence_generator
from deltacache.evaluate.inputs import Models, Tokenizer, World
from deltacache.evaluate.predictions import Protocol
from deltacache.models.deltatok import Grid
from deltacache.models.futures import decode_future
from deltacache.schemas.benchmarks import BenchmarkName

_CHUNK_NUMBERS = 2**25  # of patch tokens encoded at a time: 128 MiB in float32


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


TrueDeltas = Mapping[str, Mapping[int, Tensor]]
"""Delta tokens (X, ...) of true pairs of frames, by the tokenizer's fingerprint and the later frame."""


class Sampler:
    """Encodes contexts and rolls world models out."""

    def __init__(self, models: Models, protocol: Protocol, device: torch.device, timing: Timing) -> None:
        self._models, self._protocol = models, protocol
        self._device, self._timing = device, timing

    def true_deltas(self, batch: SequenceBatch, horizons: Sequence[int]) -> TrueDeltas:
        """Delta tokens of true pairs, by tokenizer and the later frame: those that anything below needs."""
        return {each.fingerprint: self._encoded(each, batch, horizons) for each in self._models.tokenizers}

    def _encoded(
        self, tokenizer: Tokenizer, batch: SequenceBatch, horizons: Sequence[int]
    ) -> dict[int, Tensor]:
        """(X, ...) of every frame that is needed; a few are encoded at a time, so that memory stays bounded."""
        frames, used = (
            batch.tokens.shape[1],
            any(world.tokenizer is tokenizer for world in self._models.worlds),
        )
        needed = set(range(frames - max(horizons), frames))
        for horizon in horizons if used else ():
            needed.update(range(frames - horizon - self._protocol.context + 1, frames - horizon))
        later, found = sorted(needed), dict[int, Tensor]()
        most = max(1, _CHUNK_NUMBERS // batch.tokens[:, 0].numel())
        for start in range(0, len(later), most):
            order = later[start : start + most]
            # A list as index would be a copy to the device, for which the host waits.
            before, after = (
                torch.stack([batch.tokens[:, at - back] for at in order], 1).flatten(0, 1) for back in (1, 0)
            )
            with self._timing.part("encoder", self._device):
                encoded = tokenizer.model.encode(before, after, self._protocol.grid)
            found.update(zip(order, encoded.unflatten(0, (-1, len(order))).unbind(1), strict=True))
        return found

    def roll_out(self, world: World, batch: SequenceBatch, deltas: TrueDeltas, horizon: int) -> "CropFutures":
        """Sampled futures of every crop, after the context ``horizon`` frames before the target."""
        frames = batch.tokens.shape[1]
        start = frames - horizon - self._protocol.context
        seconds = torch.tensor(
            [
                [loaded.sequence.spacing_s * step for step in range(self._protocol.context + horizon)]
                for loaded in batch.sequences
                for _ in range(loaded.split.crops)
            ],
            device=self._device,
        )
        noise = self._noise(world, batch.crop_names, horizon)
        context = batch.tokens[:, start : start + self._protocol.context]
        if world.tokenizer is None:
            return PatchFutures(world, context, seconds, noise, self)
        tokens = self._context_deltas(world.tokenizer, context, deltas[world.tokenizer.fingerprint], start)
        with self.part("predictor"):
            sampled = world.model.rollout(tokens, seconds, noise, grid=self.grid)
        return DeltaFutures(world.tokenizer, context[:, -1], sampled, self)

    @property
    def grid(self) -> Grid:
        """Of patches."""
        return self._protocol.grid

    def part(self, name: str) -> AbstractContextManager[None]:
        """Time spent is that of this part."""
        return self._timing.part(name, self._device)

    def _context_deltas(
        self, tokenizer: Tokenizer, context: Tensor, true: Mapping[int, Tensor], start: int
    ) -> Tensor:
        """(X, C, ...) delta tokens of a context that begins at frame ``start``, behind a black frame."""
        with self.part("encoder"):
            black = self._protocol.black.expand_as(context[:, 0])
            first = tokenizer.model.encode(black, context[:, 0], self.grid)
        pairs = [true[at] for at in range(start + 1, start + self._protocol.context)]
        return torch.stack([first, *pairs], 1)

    def _noise(self, world: World, crops: Sequence[str], horizon: int) -> Tensor | None:
        """(X, S, h, Z), drawn from (seed, sequence, crop, sample, step) alone."""
        if world.single:
            return None
        width, seed = (world.model.noise_size,), self._protocol.seed
        drawn = [
            world.model.draw_noise(width, sequence_generator(seed, f"{crop} {sample} {step}"))
            for crop in crops
            for sample in range(world.samples)
            for step in range(horizon)
        ]
        return torch.stack(drawn).unflatten(0, (len(crops), world.samples, horizon))


class CropFutures(Seam):
    """Sampled futures of the crops of a batch, as patch tokens."""

    def last(self, crop: int) -> Tensor:
        """The last step (S, N, D) of every sample."""
        ...

    def first_samples(self, crop: int, count: int) -> Tensor:
        """All steps (s, h, N, D) of the first samples."""
        ...


@dataclass(frozen=True, repr=False)
class DeltaFutures:
    """Delta tokens (X, S, h, ...), decoded from the last frame (X, N, D) of the context."""

    tokenizer: Tokenizer
    start: Tensor
    sampled: Tensor
    sampler: Sampler

    def last(self, crop: int) -> Tensor:
        """See ``CropFutures``; some samples at a time."""
        with self.sampler.part("decoder"):
            return decode_last(self.tokenizer.model, self.start[crop], self.sampled[crop], self.sampler.grid)

    def first_samples(self, crop: int, count: int) -> Tensor:
        """See ``CropFutures``."""
        some = self.sampled[crop, None, :count]
        return decode_future(self.tokenizer.model, self.start[crop, None], some, self.sampler.grid)[0]


@dataclass(frozen=True, repr=False)
class PatchFutures:
    """Predicted from contexts (X, C, N, D) when they are asked for: all of them at once would be too many."""

    world: World
    context: Tensor
    seconds: Tensor
    noise: Tensor | None
    sampler: Sampler

    def last(self, crop: int) -> Tensor:
        """See ``CropFutures``; some samples at a time."""
        steps = self.seconds.shape[1] - self.context.shape[1]
        most = max(1, _CHUNK_NUMBERS // self.world.numbers_of_patches(self.context[crop], steps))
        samples = self.world.samples
        with self.sampler.part("predictor"):
            return torch.cat(
                [
                    self._rolled_out(crop, slice(start, start + most))[:, -1]
                    for start in range(0, samples, most)
                ]
            )

    def first_samples(self, crop: int, count: int) -> Tensor:
        """See ``CropFutures``."""
        return self._rolled_out(crop, slice(count))

    def _rolled_out(self, crop: int, samples: slice) -> Tensor:
        noise = None if self.noise is None else self.noise[crop, None, samples]
        rollout = self.world.model.rollout
        return rollout(self.context[crop, None], self.seconds[crop, None], noise, grid=self.sampler.grid)[0]
