"""Host arrays through a forward pass and back, from several threads at once.

On CUDA each thread has a lane: a stream and pinned memory of its own. While one thread waits for its numbers or
writes them, the device works for the other. B clips of a forward pass.
"""

import threading
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from deltacache.schemas.texts import counted

Forward = Callable[..., tuple[Tensor, ...]]


class OverlappedForward:
    """The lanes of one device. What a forward pass reads beside its arguments must be on the device already."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._own = threading.local()
        self._seen: set[tuple[tuple[int, ...], ...]] = set()
        self._first = threading.Lock()
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # weights may still be on their way, in another stream

    def run(
        self, arrays: Sequence[Sequence[np.ndarray]], size: int, forward: Forward
    ) -> list[tuple[np.ndarray, ...]]:
        """Results of each clip: ``forward`` of the stacks of ``arrays``, filled up with zeros to ``size`` clips.

        Args:
            arrays: for each argument of ``forward``, the array of every clip, of equal shapes.
            size: B; the results of what was filled up are dropped.
            forward: arguments (B, ...) on the device to results (B, ...) on the device.

        Raises:
            ValueError: more than ``size`` clips, or arrays of different counts, shapes or types.
        """
        clips = len(arrays[0])
        if clips == 0:
            return []
        _check(arrays, size)
        if self._device.type == "cuda":
            results = self._on_cuda(arrays, size, forward)
        else:
            with self._first:  # one at a time: a second one would only share the core
                inputs = [
                    _filled(torch.from_numpy(np.empty((size, *given[0].shape), given[0].dtype)), given)
                    for given in arrays
                ]
                results = [result.contiguous() for result in forward(*inputs)]
        outputs = [output.numpy() for output in results]
        return [tuple(output[clip] for output in outputs) for clip in range(clips)]

    def _on_cuda(self, arrays: Sequence[Sequence[np.ndarray]], size: int, forward: Forward) -> list[Tensor]:
        if not hasattr(self._own, "lane"):
            self._own.lane = _Lane(torch.cuda.Stream(self._device))
        lane = self._own.lane
        with torch.cuda.device(self._device), torch.cuda.stream(lane.stream):
            inputs = [
                _filled(lane.pinned(place, (size, *given[0].shape), given[0].dtype), given).to(
                    self._device, non_blocking=True
                )
                for place, given in enumerate(arrays)
            ]
            results = self._forward(inputs, forward)
            # Pinned memory comes from torch's cache of it, and goes back there with the last clip.
            outputs = [torch.empty(r.shape, dtype=r.dtype, pin_memory=True) for r in results]
            for output, result in zip(outputs, results, strict=True):
                output.copy_(result, non_blocking=True)
            done = torch.cuda.Event(blocking=True)  # waits without keeping a core busy
            done.record(lane.stream)
        done.synchronize()
        return outputs

    def _forward(self, inputs: list[Tensor], forward: Forward) -> tuple[Tensor, ...]:
        """The first forward of each shape alone: models keep tensors (rotary coordinates) that it computes,
        and another stream would read them too early."""
        shapes = tuple(tuple(one.shape) for one in inputs)
        if shapes in self._seen:
            return forward(*inputs)
        with self._first:
            results = forward(*inputs)
            torch.cuda.synchronize(self._device)
            self._seen.add(shapes)
        return results


class _Lane:
    """Of one thread: a stream, and pinned memory for its inputs, free again once its results are there."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream
        self._pinned: dict[int, Tensor] = {}

    def pinned(self, place: int, shape: tuple[int, ...], dtype: np.dtype) -> Tensor:
        """Memory for the argument at ``place``, the same each time while its shape is."""
        wanted = torch.from_numpy(np.empty(0, dtype)).dtype
        held = self._pinned.get(place)
        if held is None or held.shape != shape or held.dtype != wanted:
            held = self._pinned[place] = torch.empty(shape, dtype=wanted, pin_memory=True)
        return held


def _filled(stack: Tensor, given: Sequence[np.ndarray]) -> Tensor:
    """Copy the clips into ``stack``, zeros behind them."""
    into = stack.numpy()
    for place, array in enumerate(given):
        into[place] = array
    into[len(given) :] = 0
    return stack


def _check(arrays: Sequence[Sequence[np.ndarray]], size: int) -> None:
    if len(arrays[0]) > size:
        raise ValueError(
            f"{counted(len(arrays[0]), 'clip is', 'clips are')} more than the {size} of a forward pass: "
            "give fewer at once"
        )
    for given in arrays:
        kinds = {(array.shape, array.dtype) for array in given}
        if len(kinds) > 1 or len(given) != len(arrays[0]):
            raise ValueError(
                f"clips of one forward pass must have the same shapes and dtypes, got "
                f"{sorted(map(str, kinds))} for {len(given)} of {counted(len(arrays[0]), 'clip')}"
            )
