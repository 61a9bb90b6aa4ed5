"""Batches of both trainers: pairs of frames for the tokenizer, clips of tokens for the world model.

What a batch holds depends on (seed, step) alone, never on where the data lie.
B batch, C clips, T frames, N patches, D hidden.
"""

import math
import os
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import cycle, repeat
from pathlib import Path
from typing import Final, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from deltacache.pipeline.datasets.stores import token_shape
from deltacache.pipeline.storage.storage import in_threads
from deltacache.train.mixture import Clips
from deltacache.train.order import MicroBatch, Mixture, batch_items, step_rng

# ----------------------------------------------------------------------------------------------------
# Run an iterator ahead in a background thread.
# ----------------------------------------------------------------------------------------------------


ItemT = TypeVar("ItemT")


class _End:
    pass


_END: Final = _End()


def prefetch(items: Iterable[ItemT], depth: int = 2) -> Generator[ItemT]:
    """Yield ``items`` in their order while one thread computes up to ``depth`` of them ahead.

    An error in the thread is raised here, after the items before it. Closing the generator ends the thread.
    """
    iterator = iter(items)
    ahead = in_threads(lambda _: next(iterator, _END), repeat(None), threads=1, ahead=depth + 1)
    with closing(ahead):  # one thread: the order stays
        for item in ahead:
            if isinstance(item, _End):
                return
            yield item


RESIDENT_SHARE = 0.25
"""Features up to this share of the machine's memory are read once and kept."""
DELTA_SHARE = 0.5
"""The same for delta tokens, which are small."""
_AHEAD = 2
_CPU = torch.device("cpu")
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True, slots=True)
class PairBatch:
    """Two consecutive frames of B clips, (B, N, D) float32 each."""

    previous: Tensor
    current: Tensor


@dataclass(frozen=True, slots=True)
class ClipBatch:
    """B clips: ``tokens`` (B, T, ...) float32, ``timestamps_s`` (B, T) seconds from the first one.

    Tokens are (D,) a frame of one delta token, (M, D) of several, (N, D) of patches.
    """

    tokens: Tensor
    timestamps_s: Tensor


@dataclass(frozen=True, slots=True)
class PairChoice:
    """Frame ``starts[b]`` of clip ``clips[b]`` and the next; ``black[b]`` puts black in the first's place."""

    clips: np.ndarray
    starts: np.ndarray
    black: np.ndarray


@dataclass(frozen=True, slots=True)
class PairSettings:
    """How pairs are drawn: ``clips`` x ``frames`` are there to choose from, ``effective_batch`` a step."""

    clips: int
    frames: int
    effective_batch: int
    seed: int
    black_first_fraction: float
    mixture: Mixture | None = None


def choose_pairs(settings: PairSettings, part: MicroBatch) -> PairChoice:
    """The pairs of a part of a step: clips epoch by epoch, the place within the clip uniform."""
    rng = step_rng("pairs", settings.seed, part.step)  # drawn for the whole batch: the split changes nothing
    size = settings.effective_batch
    starts = rng.integers(0, settings.frames - 1, size)
    black = rng.random(size) < settings.black_first_fraction
    clips = batch_items(settings.seed, part.step, size, settings.clips, settings.mixture)
    return PairChoice(*(drawn[part.positions] for drawn in (clips, starts, black)))


class PairSource(Protocol):
    """Where pairs of frames come from."""

    def read(self, clips: np.ndarray, starts: np.ndarray) -> Iterator[np.ndarray]:
        """Frames ``starts`` and ``starts + 1`` of ``clips``, one pair after the other: (2, N, D) float16."""
        ...


class ResidentFeatures:
    """All patch tokens in memory."""

    def __init__(self, dataset: Clips) -> None:
        self._tokens = dataset.read_all()

    def read(self, clips: np.ndarray, starts: np.ndarray) -> Iterator[np.ndarray]:
        for clip, start in zip(clips.tolist(), starts.tolist(), strict=True):
            yield self._tokens[clip, start : start + 2]


class StreamedFeatures:
    """Patch tokens read from the shards when they are asked for."""

    def __init__(self, dataset: Clips) -> None:
        self._dataset = dataset

    def read(self, clips: np.ndarray, starts: np.ndarray) -> Iterator[np.ndarray]:
        return self._dataset.at_once(self._pair, zip(clips.tolist(), starts.tolist(), strict=True))

    def _pair(self, wanted: tuple[int, int]) -> np.ndarray:
        clip, start = wanted
        return self._dataset.read_frames(clip, start, start + 2)


def memory_bytes() -> int:
    """Memory of this machine, or what the control group of this process may have of it."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [_read_number(path) for path in _CGROUP_LIMITS]
    return min([physical, *(limit for limit in limits if limit is not None)])


def _read_number(path: str) -> int | None:
    try:
        text = Path(path).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None  # "max": no limit


def tokens_bytes(dataset: Clips) -> int:
    """Size of all tokens in float16."""
    return len(dataset) * math.prod(token_shape(dataset.card)) * np.dtype(np.float16).itemsize


def stored_bytes(dataset: Clips) -> int:
    """Size of all tokens in the shards."""
    size = tokens_bytes(dataset)
    if dataset.card.dtype != "int8":
        return size
    return size // 2 + 4 * size // (2 * dataset.card.hidden_size)  # and a scale in float32 for each token


def fits_in_memory(dataset: Clips, sharers: int = 1) -> bool:
    """Whether the patch tokens take at most ``RESIDENT_SHARE`` of the memory that ``sharers`` processes divide."""
    return tokens_bytes(dataset) <= RESIDENT_SHARE * memory_bytes() / sharers


def open_pairs(dataset: Clips, sharers: int = 1) -> PairSource:
    """The dataset's frames: read once and kept if they fit in memory, else read again for every batch."""
    return ResidentFeatures(dataset) if fits_in_memory(dataset, sharers) else StreamedFeatures(dataset)


def pair_batches(
    source: PairSource,
    black_patch_tokens: np.ndarray,
    settings: PairSettings,
    parts: Iterable[MicroBatch],
    device: torch.device,
) -> Generator[PairBatch]:
    """The batches of ``parts``, made ahead by a thread.

    On a CPU a batch lies in a buffer that is used again: it holds until the next one is asked for.
    """
    with closing(prefetch(_pairs(source, black_patch_tokens, settings, parts, device), _AHEAD)) as batches:
        for pairs in batches:
            previous, current = pairs.to(device, non_blocking=device.type == "cuda").float()
            yield PairBatch(previous, current)


def _pairs(
    source: PairSource,
    black: np.ndarray,
    settings: PairSettings,
    parts: Iterable[MicroBatch],
    device: torch.device,
) -> Generator[Tensor]:
    """(2, B, N, D), float32 on a CPU, for a GPU float16 in pinned memory: half to send.

    Buffers take turns, for fresh memory costs the system four times what it takes to fill it.
    """
    on_cpu, buffers = device.type == "cpu", cycle([_Buffer(device) for _ in range(_AHEAD + 1)])
    scratch = torch.empty(2, *black.shape, dtype=torch.float16)
    first = torch.from_numpy(black)
    for part, buffer in zip(parts, buffers, strict=False):
        choice = choose_pairs(settings, part)
        shape = (2, len(choice.clips), *black.shape)
        pairs = buffer.take(shape, torch.float32 if on_cpu else torch.float16)
        for row, frames in enumerate(source.read(choice.clips, choice.starts)):
            scratch.numpy()[:] = frames  # torch takes no read-only views; it stays in the cache
            pairs[:, row].copy_(scratch)
        pairs[0, torch.from_numpy(choice.black)] = first.to(pairs.dtype)
        yield pairs


class _Buffer:
    """Host memory for batches that go to ``device``.

    On a CPU it is used again as long as the shape stays. For a GPU it is another one each time, pinned for CUDA: copies
    are asynchronous, and PyTorch's allocator of pinned memory gives a block out again only when its copy has ended.
    """

    def __init__(self, device: torch.device) -> None:
        self._pinned, self._again = device.type == "cuda", device.type == "cpu"
        self._tensor = torch.empty(0)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if not self._again or self._tensor.shape != shape:
            self._tensor = torch.empty(shape, dtype=dtype, pin_memory=self._pinned)
        return self._tensor


class MappedTokens:
    """Tokens that stay in their shards: indexed by clips like an array of shape (C, T, ...)."""

    def __init__(self, dataset: Clips) -> None:
        self._dataset = dataset
        self.shape = (len(dataset), *token_shape(dataset.card))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, clips: np.ndarray) -> np.ndarray:
        """(B, T, ...) float16; each clip is verified the first time."""
        tokens = np.empty((len(clips), *self.shape[1:]), dtype=np.float16)
        frames, read = self.shape[1], self._dataset.read_frames
        found = self._dataset.at_once(lambda clip: read(clip, 0, frames), clips.tolist())
        for row, clip in enumerate(found):
            tokens[row] = clip
        return tokens


@dataclass(frozen=True, slots=True)
class ResidentClips:
    """A dataset in memory: ``tokens`` (C, T, ...) float16, ``timestamps_s`` (C, T) of their videos."""

    tokens: np.ndarray
    timestamps_s: np.ndarray


@dataclass(frozen=True, slots=True)
class MappedClips:
    """A dataset that memory does not hold."""

    tokens: MappedTokens
    timestamps_s: np.ndarray

    @classmethod
    def of(cls, dataset: Clips) -> "MappedClips":
        """Nothing is read yet."""
        return cls(MappedTokens(dataset), dataset.timestamps_s)


def open_clips(dataset: Clips, device: torch.device = _CPU, sharers: int = 1) -> ResidentClips | MappedClips:
    """All tokens in memory if they take at most ``DELTA_SHARE`` of it, else in their shards.

    ``sharers`` processes divide the memory. What a GPU cannot hold is pinned: half the time to send it there.
    """
    if not PendingClips(dataset, device, sharers).resident:
        return MappedClips.of(dataset)
    tokens = torch.from_numpy(dataset.read_all())
    if device.type == "cuda" and not _fits_on(device, tokens.nbytes):
        tokens = tokens.pin_memory()  # the pageable copy is freed here
    return ResidentClips(tokens.numpy(), dataset.timestamps_s)


@dataclass(frozen=True, slots=True)
class PendingClips:
    """A dataset whose tokens are loaded when the training needs them; see ``open_clips``."""

    dataset: Clips
    device: torch.device = _CPU
    sharers: int = 1

    @property
    def resident(self) -> bool:
        """Whether they will be loaded whole."""
        return tokens_bytes(self.dataset) <= DELTA_SHARE * memory_bytes() / self.sharers

    @property
    def bytes_to_load(self) -> int:
        """Of the memory that the model computes in."""
        size = tokens_bytes(self.dataset)
        there = self.device.type == "cpu" or _fits_on(self.device, size)
        return size if self.resident and there else 0


def _fits_on(device: torch.device, size: int) -> bool:
    """Whether they take at most half of the GPU's free memory."""
    return device.type == "cuda" and 2 * size < torch.cuda.mem_get_info(device)[0]


def place(tokens: Tensor, device: torch.device) -> Tensor:
    """Where tokens stay for a whole run: on a GPU if they take at most half of its free memory, else pinned."""
    if device.type != "cuda":
        return tokens
    return (
        tokens.to(device) if _fits_on(device, tokens.nbytes) else tokens.pin_memory()
    )  # itself if it is pinned


def clip_batches(
    clips: ResidentClips | MappedClips,
    effective_batch: int,
    seed: int,
    parts: Iterable[MicroBatch],
    device: torch.device,
    mixture: Mixture | None = None,
) -> Generator[ClipBatch]:
    """The batches of ``parts``, the same wherever the tokens lie; what is read from shards is read ahead."""
    count = len(clips.tokens)
    drawn = (batch_items(seed, part.step, effective_batch, count, mixture)[part.positions] for part in parts)
    if isinstance(clips, MappedClips):
        batches = prefetch(_read(clips.tokens, drawn, device))
    else:
        batches = _gathered(place(torch.from_numpy(clips.tokens), device), drawn, device)
    with closing(batches):
        for items, taken in batches:
            times = clips.timestamps_s[items]
            seconds = sent(times - times[:, :1], device)
            # float16 travels, and nobody waits for it: a blocking copy would wait for all that the GPU has to do.
            yield ClipBatch(taken.to(device, non_blocking=device.type == "cuda").float(), seconds)


def _read(
    tokens: MappedTokens, drawn: Iterable[np.ndarray], device: torch.device
) -> Generator[tuple[np.ndarray, Tensor]]:
    """Items with their tokens, read from the shards; pinned for a GPU."""
    for items in drawn:
        rows = torch.from_numpy(tokens[items])
        yield items, rows.pin_memory() if device.type == "cuda" else rows.float()


def _gathered(
    tokens: Tensor, drawn: Iterable[np.ndarray], device: torch.device
) -> Generator[tuple[np.ndarray, Tensor]]:
    """Items with their rows of ``tokens``, where these lie."""
    buffer = _Buffer(device)
    for items in drawn:
        if tokens.device.type == "cpu":
            rows = buffer.take((len(items), *tokens.shape[1:]), tokens.dtype)
            torch.index_select(tokens, 0, torch.from_numpy(items), out=rows)
        else:
            rows = tokens.index_select(0, sent(items, device))
        yield items, rows


def sent(what: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """``what`` on ``device``; on CUDA by an asynchronous copy from pinned memory, which nobody waits for."""
    tensor = torch.from_numpy(what) if isinstance(what, np.ndarray) else what
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
