"""What is drawn at which step: pure functions of (seed, step, position in the effective batch).

So a resumed run continues exactly, and neither the number of workers nor of passes changes what is drawn.

B batch size, C clips.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from deltacache.schemas.datasets import canonical_json


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Positions ``start`` to ``stop - 1`` of the effective batch of a step: one forward and backward pass."""

    step: int
    start: int
    stop: int

    @property
    def positions(self) -> slice:
        """To cut this part out of what is drawn for the whole batch."""
        return slice(self.start, self.stop)


@dataclass(frozen=True, slots=True)
class Split:
    """How the effective batch of a step is shared out: over ``workers``, and for each over passes in turn.

    All parts have the same size, so the mean of their losses is that of the whole batch.
    """

    batch_size: int
    accumulation: int = 1
    workers: int = 1
    rank: int = 0

    @property
    def effective_batch(self) -> int:
        """Samples of one optimizer step."""
        return self.batch_size * self.accumulation * self.workers

    def parts(self, step: int) -> Iterator[MicroBatch]:
        """What worker ``rank`` computes of a step."""
        for turn in range(self.accumulation):
            start = (turn * self.workers + self.rank) * self.batch_size
            yield MicroBatch(step, start, start + self.batch_size)

    def parts_of(self, steps: range) -> Iterator[MicroBatch]:
        """The parts of these steps, in order."""
        for step in steps:
            yield from self.parts(step)

    def __str__(self) -> str:
        return (
            f"{self.effective_batch:,} (batch {self.batch_size:,} x accumulation {self.accumulation:,} "
            f"x workers {self.workers})"
        )


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed from what it is for, such as ``seed_of("noise", seed, step)``."""
    digest = hashlib.sha256(canonical_json(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def step_rng(purpose: str, seed: int, step: int) -> np.random.Generator:
    """The numpy generator of one step, for one purpose."""
    return np.random.Generator(np.random.PCG64(seed_of(purpose, seed, step)))


def step_generator(purpose: str, seed: int, step: int, device: torch.device) -> torch.Generator:
    """The torch generator of one step, for one purpose. Draws differ between kinds of device."""
    return torch.Generator(device).manual_seed(seed_of(purpose, seed, step))


NOISE_BLOCK = 16
"""Positions that share a generator: fewer calls than one a position, little drawn in vain where a pass is smaller."""


def normal_draws(
    purpose: str,
    seed: int,
    part: MicroBatch,
    effective_batch: int,
    shape: tuple[int, ...],
    device: torch.device,
) -> Tensor:
    """Standard normal numbers (B, *shape) for the positions of ``part``, the same for every split of the batch.

    The effective batch is cut into blocks of ``NOISE_BLOCK`` positions, and each block is drawn whole by one call:
    a prefix of a block has other numbers on a GPU than the block has.

    Raises:
        ValueError: ``part`` reaches beyond the effective batch.
    """
    if part.stop > effective_batch:
        raise ValueError(f"positions up to {part.stop} of an effective batch of {effective_batch}")
    draws = torch.empty((part.stop - part.start, *shape), device=device)
    generator = torch.Generator(device)
    for block in range(part.start // NOISE_BLOCK, -(-part.stop // NOISE_BLOCK)):
        begin, end = block * NOISE_BLOCK, min((block + 1) * NOISE_BLOCK, effective_batch)
        first, last = max(begin, part.start), min(end, part.stop)
        rows = draws[first - part.start : last - part.start]
        generator.manual_seed(seed_of(purpose, seed, part.step, block))
        if (first, last) == (begin, end):
            rows.normal_(generator=generator)
        else:
            rows.copy_(
                rows.new_empty((end - begin, *shape)).normal_(generator=generator)[
                    first - begin : last - begin
                ]
            )
    return draws


_ROUNDS = 12
_ONE, _TWO = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)  # of SplitMix64


@lru_cache(maxsize=8)
def _keys(purpose: str, seed: int, epoch: int) -> np.ndarray:
    return step_rng(purpose, seed, epoch).integers(2**64, size=_ROUNDS, dtype=np.uint64)


def shuffled(purpose: str, seed: int, epoch: int, count: int, places: np.ndarray) -> np.ndarray:
    """What stands at ``places`` of ``range(count)`` in random order, int64: a bijection without an array of ``count``.

    A Feistel network on a grid of at least ``count`` cells, nearly square, adding a hash of the column to the row and
    of the row to the column in turn (Black and Rogaway 2002, section 5); who lands beyond ``count`` goes on from there.
    """
    rows = math.isqrt(count - 1) + 1
    columns = -(-count // rows)

    def network(cells: np.ndarray) -> np.ndarray:
        row, column = np.divmod(cells, np.uint64(columns))
        for turn, key in enumerate(_keys(purpose, seed, epoch)):
            kept, size = (row, columns) if turn % 2 else (column, rows)
            mixed = (kept + key) * _ONE
            mixed = (mixed ^ (mixed >> np.uint64(27))) * _TWO
            shift = ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(32)) * np.uint64(size) >> np.uint64(32)
            if turn % 2:
                column = (column + shift) % np.uint64(columns)
            else:
                row = (row + shift) % np.uint64(rows)
        return row * np.uint64(columns) + column

    items = network(places.astype(np.uint64))
    while len(beyond := np.flatnonzero(items >= count)):
        items[beyond] = network(items[beyond])
    return items.astype(np.int64)


def batch_items(
    seed: int, step: int, batch_size: int, count: int, mixture: "Mixture | None" = None
) -> np.ndarray:
    """Which of ``count`` items form the batch of ``step``, (B,) int64.

    Batches are cut from one endless sequence, epoch after epoch, so every item appears once an epoch
    and no batch is short. Any worker can take any part of a batch. The items of a mixture's parts follow each other.
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    if mixture is not None:
        return mixture.items(seed, positions)
    return _of_epochs("order", seed, count, positions)


def _of_epochs(purpose: str, seed: int, count: int, positions: np.ndarray) -> np.ndarray:
    """What stands at increasing ``positions`` of an endless sequence of shuffled epochs."""
    epochs, places = np.divmod(positions, count)
    items = np.empty(len(positions), dtype=np.int64)
    for epoch in np.unique(epochs).tolist():
        chosen = epochs == epoch
        items[chosen] = shuffled(purpose, seed, epoch, count, places[chosen])
    return items


@dataclass(frozen=True, eq=False)
class Mixture:
    """Parts that are drawn with fixed shares, whatever their sizes.

    Of every ``sum(shares)`` positions in a row, part i has exactly ``shares[i]``, spread evenly. Each part goes through
    its own items epoch after epoch, so what is drawn is a function of the seed and the position alone.

    Attributes:
        counts: items of each part.
        shares: whole numbers without a common divisor.
    """

    counts: tuple[int, ...]
    shares: tuple[int, ...]

    @cached_property
    def _period(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each position of a period: its part, and how many positions before it have the same one."""
        parts = np.repeat(np.arange(len(self.shares)), self.shares)
        ranks = np.concatenate([np.arange(share) for share in self.shares])
        order = np.argsort((ranks + 0.5) / np.asarray(self.shares)[parts], kind="stable")
        return parts[order], ranks[order]

    def items(self, seed: int, positions: np.ndarray) -> np.ndarray:
        """The items at increasing ``positions``; those of part i begin at ``sum(counts[:i])``."""
        parts, ranks = self._period
        periods, places = np.divmod(positions, len(parts))
        chosen, items = parts[places], np.empty(len(positions), dtype=np.int64)
        for part, (count, share) in enumerate(zip(self.counts, self.shares, strict=True)):
            mine = chosen == part
            own = periods[mine] * share + ranks[places[mine]]
            items[mine] = _of_epochs(f"order of part {part}", seed, count, own) + sum(self.counts[:part])
        return items

    def drawn(self, positions: int) -> np.ndarray:
        """How many of the first ``positions`` each part has, int64."""
        parts, _ = self._period
        periods, rest = divmod(positions, len(parts))
        return periods * np.asarray(self.shares) + np.bincount(parts[:rest], minlength=len(self.shares))


def probe_items(seed: int, wanted: int, count: int) -> np.ndarray:
    """Which of ``count`` items are probed, always the same ``wanted`` or, if there are fewer, all: (P,) int64."""
    return shuffled("probe clips", seed, 0, count, np.arange(min(wanted, count)))
