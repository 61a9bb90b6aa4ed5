"""Delta tokens of true frames, and futures sampled after them.

Shapes: B sequences, X crops of all of them, T frames, S samples, h steps, N patches, D hidden.
"""

import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from deltacache.evaluate.benchmarks.loading import LoadedSequence
from deltacache.evaluate.inputs import Models, Tokenizer, World
from deltacache.evaluate.metrics import feature_metrics
from deltacache.evaluate.predictions import RolloutProtocol
from deltacache.models.deltatok import DeltaTok, Grid
from deltacache.models.futures import decode_future, decode_steps, sequence_generator
from deltacache.schemas.benchmarks import BenchmarkName

# ----------------------------------------------------------------------------------------------------
# Sampled futures of one crop, compared at the one step that is scored.
#
# Shapes: S samples, H horizon, N patches, D hidden.
# ----------------------------------------------------------------------------------------------------


_DECODED_NUMBERS = 2**26  # of patch tokens decoded at a time: 256 MiB in float32


@dataclass(frozen=True, repr=False)
class Ensemble:
    """The last step of every sample.

    Attributes:
        samples: (S, N, D).
        metrics: (S, 3) of ``feature_metrics``.
    """

    samples: Tensor
    metrics: Tensor

    @property
    def best(self) -> int:
        """The sample with the lowest smooth-L1 to the truth."""
        return int(self.metrics[:, 0].argmin())

    def first(self, count: int) -> "Ensemble":
        """The first samples alone."""
        return Ensemble(self.samples[:count], self.metrics[:count])

    @property
    def mean(self) -> Tensor:
        """(N, D) features averaged over the samples."""
        return self.samples.mean(0)


def decode_last(model: DeltaTok, last: Tensor, deltas: Tensor, grid: Grid) -> Tensor:
    """The last frames (S, N, D) of futures (S, H, D) after the frame (N, D), some samples at a time."""
    frames = []
    for chunk in deltas.split(max(1, _DECODED_NUMBERS // last.numel())):
        *_, decoded = decode_steps(model, last[None], chunk[None], grid)
        frames.append(decoded[0])
    return torch.cat(frames)


def ensemble_of(samples: Tensor, truth: Tensor) -> Ensemble:
    """Compare samples (S, N, D) with the true frame (N, D)."""
    return Ensemble(samples, feature_metrics(samples, truth))


# ----------------------------------------------------------------------------------------------------
# Where the time and memory of an evaluation go.
# ----------------------------------------------------------------------------------------------------


PARTS = ("waiting", "backbone", "encoder", "predictor", "decoder", "heads", "features", "samples", "pictures")
"""What a worker does one after the other. Frames are decoded beside it, in threads: ``decode_s``.

``features`` compares predicted with true features, ``samples`` all samples with the truth and each other;
``pictures`` is all that is done for the report's examples.
"""

Advance = Callable[[int], None]
"""Told how many more sequences are done."""


def tell_nobody(sequences: int) -> None:
    """Of a process without a terminal."""
    del sequences


@dataclass(slots=True)
class Timing:
    """Seconds by part, of one worker or of several added up.

    Attributes:
        decode_s: of all threads that decode frames and labels.
        peak_bytes: the most that a worker's process ever had in memory.
        peak_gpu_bytes: the most that its tensors had on the GPU.
    """

    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    decode_s: float = 0.0
    total_s: float = 0.0
    sequences: int = 0
    peak_bytes: int = 0
    peak_gpu_bytes: int = 0

    @contextmanager
    def part(self, name: str, device: torch.device) -> Iterator[None]:
        """Count the block's time as ``name``, until the device has done what the block asked of it."""
        started = time.perf_counter()
        try:
            yield
        finally:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            self.parts[name] += time.perf_counter() - started

    def add(self, other: "Timing") -> None:
        """Add what another worker, or the same at another time, needed."""
        for name, seconds in other.parts.items():
            self.parts[name] += seconds
        self.decode_s += other.decode_s
        self.total_s += other.total_s
        self.sequences += other.sequences
        self.peak_bytes = max(self.peak_bytes, other.peak_bytes)
        self.peak_gpu_bytes = max(self.peak_gpu_bytes, other.peak_gpu_bytes)

    def measure_memory(self, device: torch.device) -> None:
        """Note the peaks so far."""
        self.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if device.type == "cuda":
            self.peak_gpu_bytes = torch.cuda.max_memory_allocated(device)

    @property
    def waiting_share(self) -> float:
        """Share of the workers' time in which they waited for frames."""
        return self.parts["waiting"] / self.total_s if self.total_s else 0.0

    def __str__(self) -> str:
        each = 1000 / max(self.sequences, 1)
        shown = ", ".join(f"{name} {seconds * each:.1f}" for name, seconds in self.parts.items() if seconds)
        return f"ms per sequence: {shown}; decoding in threads {self.decode_s * each:.1f}"


def timing_from(fields: Mapping[str, object]) -> Timing:
    """A ``Timing`` from ``dataclasses.asdict`` of one."""
    return Timing(**fields)  # pyright: ignore[reportArgumentType]


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

    def __init__(
        self, models: Models, protocol: RolloutProtocol, device: torch.device, timing: Timing
    ) -> None:
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
        width, seed = (world.model.noise_width(self.grid),), self._protocol.seed
        drawn = [
            world.model.draw_noise(width, sequence_generator(seed, f"{crop} {sample} {step}"))
            for crop in crops
            for sample in range(world.samples)
            for step in range(horizon)
        ]
        return torch.stack(drawn).unflatten(0, (len(crops), world.samples, horizon))


class CropFutures(Protocol):
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
        """Some samples at a time, so that not all are in memory."""
        with self.sampler.part("decoder"):
            return decode_last(self.tokenizer.model, self.start[crop], self.sampled[crop], self.sampler.grid)

    def first_samples(self, crop: int, count: int) -> Tensor:
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
        """Some samples at a time, so that not all are in memory."""
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
        return self._rolled_out(crop, slice(count))

    def _rolled_out(self, crop: int, samples: slice) -> Tensor:
        noise = None if self.noise is None else self.noise[crop, None, samples]
        rollout = self.world.model.rollout
        return rollout(self.context[crop, None], self.seconds[crop, None], noise, grid=self.sampler.grid)[0]
