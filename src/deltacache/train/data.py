"""Batches of both trainers: pairs of frames for the tokenizer, clips of delta tokens for the world model.

What a batch holds depends on (seed, step) alone, never on where the data lie.
B batch, C clips, T frames, N patches, D hidden.
"""

import math
import os
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from deltacache.pipeline.dataset import Dataset, DeltaArrays
from deltacache.pipeline.stores import token_shape
from deltacache.train.order import batch_items, step_rng
from deltacache.train.prefetch import prefetch

RESIDENT_SHARE = 0.25
"""Features up to this share of the machine's memory are read once and kept."""


@dataclass(frozen=True, slots=True)
class PairBatch:
    """Two consecutive frames of B clips, (B, N, D) float32 each."""

    previous: Tensor
    current: Tensor


@dataclass(frozen=True, slots=True)
class DeltaBatch:
    """B clips: ``delta_tokens`` (B, T, D) float32, ``timestamps_s`` (B, T) seconds from the first one."""

    delta_tokens: Tensor
    timestamps_s: Tensor


@dataclass(frozen=True, slots=True)
class PairChoice:
    """Frame ``starts[b]`` of clip ``clips[b]`` and the next; ``black[b]`` puts black in the first's place."""

    clips: np.ndarray
    starts: np.ndarray
    black: np.ndarray


@dataclass(frozen=True, slots=True)
class PairSettings:
    """How pairs are drawn: ``clips`` x ``frames`` are there to choose from."""

    clips: int
    frames: int
    batch_size: int
    seed: int
    black_first_fraction: float


def choose_pairs(settings: PairSettings, step: int) -> PairChoice:
    """The pairs of one step: clips epoch by epoch, the place within the clip uniform."""
    rng = step_rng("pairs", settings.seed, step)
    size = settings.batch_size
    starts = rng.integers(0, settings.frames - 1, size)
    black = rng.random(size) < settings.black_first_fraction
    return PairChoice(batch_items(settings.seed, step, size, settings.clips), starts, black)


class PairSource(Protocol):
    """Where pairs of frames come from."""

    def read(self, clips: np.ndarray, starts: np.ndarray) -> Tensor:
        """Frames ``starts`` and ``starts + 1`` of ``clips``: (B, 2, N, D) float16."""
        ...


class ResidentFeatures:
    """All patch tokens in memory."""

    def __init__(self, dataset: Dataset) -> None:
        self._frames = dataset.card.sampling.frames
        self._rows = torch.from_numpy(dataset.read_all()).flatten(0, 1)

    def read(self, clips: np.ndarray, starts: np.ndarray) -> Tensor:
        """See ``PairSource``."""
        first = clips * self._frames + starts
        rows = torch.from_numpy(np.stack([first, first + 1], axis=1))
        return self._rows.index_select(0, rows.flatten()).unflatten(0, rows.shape)


class StreamedFeatures:
    """Patch tokens read from the shards when they are asked for."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def read(self, clips: np.ndarray, starts: np.ndarray) -> Tensor:
        """See ``PairSource``."""
        wanted = zip(clips.tolist(), starts.tolist(), strict=True)
        return torch.from_numpy(np.stack(list(self._dataset.at_once(self._pair, wanted))))

    def _pair(self, wanted: tuple[int, int]) -> np.ndarray:
        clip, start = wanted
        return self._dataset.read_frames(clip, start, start + 2)


def memory_bytes() -> int:
    """Physical memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def fits_in_memory(dataset: Dataset) -> bool:
    """Whether the patch tokens take at most ``RESIDENT_SHARE`` of the memory."""
    size = len(dataset) * math.prod(token_shape(dataset.card)) * np.dtype(np.float16).itemsize
    return size <= RESIDENT_SHARE * memory_bytes()


def open_pairs(dataset: Dataset) -> PairSource:
    """The dataset's frames: read once and kept if they fit in memory, else read again for every batch."""
    return ResidentFeatures(dataset) if fits_in_memory(dataset) else StreamedFeatures(dataset)


def pair_batches(
    source: PairSource,
    black_patch_tokens: np.ndarray,
    settings: PairSettings,
    steps: range,
    device: torch.device,
) -> Generator[PairBatch]:
    """The batches of ``steps``; what must be read from shards is read ahead by a thread."""
    pairs = _pairs(source, torch.from_numpy(black_patch_tokens), settings, steps)
    with closing(prefetch(pairs) if isinstance(source, StreamedFeatures) else pairs) as batches:
        for previous, current in batches:
            yield PairBatch(previous.to(device).float(), current.to(device).float())


def _pairs(
    source: PairSource, black: Tensor, settings: PairSettings, steps: range
) -> Generator[tuple[Tensor, Tensor]]:
    for step in steps:
        choice = choose_pairs(settings, step)
        pairs = source.read(choice.clips, choice.starts)
        pairs[torch.from_numpy(choice.black), 0] = black
        yield pairs[:, 0], pairs[:, 1]


def delta_batches(
    arrays: DeltaArrays, batch_size: int, seed: int, steps: range, device: torch.device
) -> Generator[DeltaBatch]:
    """The batches of ``steps``; all delta tokens stay in memory, on a GPU if they fit into half of it."""
    tokens = torch.from_numpy(arrays.delta_tokens)
    times = torch.from_numpy(arrays.timestamps_s - arrays.timestamps_s[:, :1])
    if device.type == "cuda" and 2 * tokens.nbytes < torch.cuda.mem_get_info(device)[0]:
        tokens, times = tokens.to(device), times.to(device)
    for step in steps:
        items = torch.from_numpy(batch_items(seed, step, batch_size, len(tokens))).to(tokens.device)
        yield DeltaBatch(
            tokens.index_select(0, items).to(device).float(), times.index_select(0, items).to(device)
        )
