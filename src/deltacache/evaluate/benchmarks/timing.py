"""Where the time and memory of an evaluation go."""

import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

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
        return f"ms a sequence: {shown}; decoding in threads {self.decode_s * each:.1f}"


def timing_from(fields: Mapping[str, object]) -> Timing:
    """A ``Timing`` from ``dataclasses.asdict`` of one."""
    return Timing(**fields)  # pyright: ignore[reportArgumentType]
