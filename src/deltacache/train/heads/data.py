"""Batches for heads: features of frozen backbones, their labels, and the pictures themselves.

What a batch holds depends on (seed, step) alone. Features are rounded to float16, as feature datasets hold them,
and kept when all of them fit in memory; else they are computed again whenever a frame comes up.
B frames, M crops of them, C crops of one frame, S input size, D hidden, h x w patches, H' x W' a half of the label.
"""

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deltacache.models.backbone import Backbone
from deltacache.pipeline.benchmarks.frames import CropSplit
from deltacache.pipeline.benchmarks.training_frames import LoadedFrame, TrainingFrames
from deltacache.pipeline.storage.storage import in_threads
from deltacache.schemas.datasets import Size
from deltacache.train.data import RESIDENT_SHARE, memory_bytes, prefetch, sent
from deltacache.train.order import MicroBatch, batch_items, step_rng

_BACKBONE_CROPS = 64  # of a forward pass on a GPU; on a CPU those of one frame, whatever else is in the batch
_THREADS = 8
Key = tuple[int, bool]
"""Number of a frame, and whether it is mirrored."""


@dataclass(frozen=True, slots=True)
class LabelledCrops:
    """Crops ``start`` to ``stop - 1`` of a batch are of one labelled frame; ``label`` (C, H', W').

    ``split`` is ``None`` where the frame is whole: one crop.
    """

    start: int
    stop: int
    split: CropSplit | None
    label: Tensor


@dataclass(frozen=True, slots=True)
class HeadBatch:
    """A pass, on the device.

    Attributes:
        features: (M, D, h, w) float32.
        pictures: (M, S, S, 3) uint8 if they are wanted.
        shares: (M,) of each crop in a mean over frames: a frame's crops share its weight; if pictures are wanted.
        frames: those that are labelled.
    """

    features: Tensor
    pictures: Tensor | None
    shares: Tensor | None
    frames: tuple[LabelledCrops, ...]


@dataclass(frozen=True, slots=True)
class _Known:
    """A frame with its features (C, N, D) float16: on the CPU if they are kept, else on the device."""

    loaded: LoadedFrame
    features: Tensor


def mean_file_bytes(frames: TrainingFrames, most: int = 256) -> float:
    """Bytes of a frame's files with its label's, on average over the first ``most`` frames."""
    some = frames.frames[:most]
    sizes = [
        Path(path).stat().st_size for each in some for path in (each.frame, each.label) if path is not None
    ]
    return sum(sizes) / len(some)


class HeadFrames:
    """The frames of a training, seen through a frozen backbone. What memory has room for is computed once.

    Args:
        load: reads the frame of a number, mirrored or not; called in threads.
        image_size: of what is loaded: a side of its crops, or height and width of whole frames.
        flip: the share of frames that are mirrored.
        pictures: whether batches hold the pictures.
    """

    def __init__(
        self,
        frames: TrainingFrames,
        load: Callable[[int, bool], LoadedFrame],
        image_size: Size,
        flip: float,
        backbone: Backbone,
        device: torch.device,
        *,
        pictures: bool = False,
    ) -> None:
        self._frames, self._load, self._flip, self._device = frames, load, flip, device
        self._backbone = backbone.to(device)
        self._grid = backbone.grid(image_size)
        self._pictures = pictures
        self._known: dict[Key, _Known] = {}
        self._room = RESIDENT_SHARE * memory_bytes()
        self._frame_size = 1  # bytes of a frame that is kept, known from the first one
        self._crops_a_pass = _BACKBONE_CROPS

    def batches(self, seed: int, effective_batch: int, parts: Iterable[MicroBatch]) -> Generator[HeadBatch]:
        """The batches of ``parts``; pictures are read ahead in threads."""
        with closing(prefetch(self._read(seed, effective_batch, parts))) as read:
            for keys, loaded in read:
                yield self._batch(keys, loaded)

    def computed(self, samples: int) -> int:
        """How many of so many frames go through the backbone: those beyond what memory keeps come again."""
        whole = len(self._frames.frames) * (2 if 0 < self._flip < 1 else 1)
        return min(samples, whole) if whole * self._frame_size <= self._room else samples

    @property
    def frame_bytes(self) -> float:
        """Of the files of a frame, on average over the first ones."""
        return mean_file_bytes(self._frames)

    def _read(
        self, seed: int, effective_batch: int, parts: Iterable[MicroBatch]
    ) -> Iterator[tuple[list[Key], dict[Key, LoadedFrame]]]:
        for part in parts:
            items = batch_items(seed, part.step, effective_batch, len(self._frames.frames))[part.positions]
            drawn = step_rng("flip", seed, part.step).random(effective_batch)[part.positions]
            keys = list(zip(items.tolist(), (drawn < self._flip).tolist(), strict=True))
            missing = [key for key in dict.fromkeys(keys) if key not in self._known]
            threads = min(_THREADS, os.cpu_count() or 1)
            loaded = in_threads(lambda key: self._load(*key), missing, threads=threads)
            yield keys, dict(zip(missing, loaded, strict=True))

    def _batch(self, keys: Sequence[Key], loaded: dict[Key, LoadedFrame]) -> HeadBatch:
        missing = {key: each for key, each in loaded.items() if key not in self._known}
        found = {**{key: self._known[key] for key in keys if key in self._known}, **self._seen(missing)}
        labelled, start = list[LabelledCrops](), 0
        for key in keys:
            each, crops = found[key].loaded, len(found[key].features)
            if each.label is not None:
                label = sent(each.label, self._device)
                labelled.append(LabelledCrops(start, start + crops, each.split, label))
            start += crops
        tokens = sent(torch.cat([found[key].features for key in keys]), self._device).float()
        pictures = shares = None
        if self._pictures:
            parts = [found[key].loaded.crops for key in keys]
            weights = [np.full(len(part), 1 / (len(part) * len(keys)), np.float32) for part in parts]
            pictures, shares = (sent(np.concatenate(each), self._device) for each in (parts, weights))
        return HeadBatch(tokens.transpose(1, 2).unflatten(2, self._grid), pictures, shares, tuple(labelled))

    def _seen(self, loaded: dict[Key, LoadedFrame]) -> dict[Key, _Known]:
        """Features of new frames. On a CPU frame by frame, so that they do not depend on the batch."""
        frames = list(loaded.values())
        if not frames:
            return {}
        if self._device.type == "cpu":
            features = [self._features(each.crops) for each in frames]
        else:
            whole = self._of_all(np.concatenate([each.crops for each in frames]))
            features = list(whole.split([len(each.crops) for each in frames]))
        seen: dict[Key, _Known] = {}
        for key, frame, tokens in zip(loaded, frames, features, strict=True):
            label = 0 if frame.label is None else frame.label.nbytes
            self._frame_size = tokens.nbytes + label + (frame.crops.nbytes if self._pictures else 0)
            seen[key] = _Known(frame, tokens)
            if self._frame_size <= self._room:
                self._room -= self._frame_size
                # What is kept needs no pixels, unless they are learned. The copy waits for the device, once a frame.
                kept = frame if self._pictures else LoadedFrame(frame.split, frame.crops[:0], frame.label)
                seen[key] = self._known[key] = _Known(kept, tokens.cpu())
        return seen

    def _of_all(self, crops: np.ndarray) -> Tensor:
        """``_features`` of any number of crops, in passes that are halved where they run out of memory."""
        while True:
            try:
                size = self._crops_a_pass
                return torch.cat([self._features(crops[at : at + size]) for at in range(0, len(crops), size)])
            except torch.OutOfMemoryError:
                if self._crops_a_pass == 1:
                    raise
                self._crops_a_pass //= 2
            torch.cuda.empty_cache()  # outside, the traceback has let go of what the pass had computed

    @torch.no_grad()
    def _features(self, crops: np.ndarray) -> Tensor:
        """(C, N, D) float16 of crops (C, S, S, 3), on the device."""
        pixels = sent(np.ascontiguousarray(crops), self._device).permute(0, 3, 1, 2)
        return self._backbone.patch_tokens(pixels).half()
