"""``export-contexts``: what a video generator needs to predict the benchmarks' labelled frames."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deltacache.evaluate.generators.clips import ClipFormat, write_clip
from deltacache.evaluate.generators.manifest import (
    MANIFEST,
    ContextEntry,
    ContextManifest,
    write_manifest,
)
from deltacache.evaluate.generators.padding import Padding, padded, placement_of
from deltacache.pipeline.benchmarks.layouts import benchmark_sequences
from deltacache.pipeline.benchmarks.reading import frame_shape, read_frame
from deltacache.pipeline.benchmarks.windows import FrameCounts, SequenceSet
from deltacache.pipeline.storage.errors import readable_errors
from deltacache.pipeline.storage.parallel import in_threads
from deltacache.schemas.benchmarks import BENCHMARKS, BenchmarkName, LabelledSequence, as_benchmark
from deltacache.schemas.errors import DatasetError, DeltacacheError
from deltacache.schemas.progress import Reporter

Rate = Literal["native", "evaluation"]
NATIVE_STEP: Mapping[BenchmarkName, int] = {"vspw": 3, "cityscapes": 3, "kitti": 2}
"""Recorded frames from one frame of the evaluation to the next."""
_THREADS = 4
_NUMBERS = re.compile(r"\d{3,}")
"""In a frame's name; the last one is that of the frame (VSPW, KITTI: all; Cityscapes: behind city and drive)."""


@dataclass(frozen=True, slots=True)
class ContextExport:
    """What is exported.

    Attributes:
        context: of the evaluation, which decides what sequences there are.
        frames: that the generator sees, the last of them ``horizon`` steps before the target.
        rate: of these and of the generated frames: as recorded, or one a step of the evaluation, of which there
            are at most ``context``.
    """

    data: Mapping[BenchmarkName, Path]
    horizons: tuple[int, ...] = (1, 3)
    context: int = 4
    frames: int = 9
    padding: Padding = "plain"
    rate: Rate = "native"
    clip_format: ClipFormat = "frames"
    kitti_split: Path | None = None


def context_export(data: Mapping[str, str], **flags: Any) -> ContextExport:
    """The export that a command line asks for.

    Raises:
        DeltacacheError: an unknown benchmark, or a horizon below 1.
    """
    roots: dict[BenchmarkName, Path] = {}
    for name, path in data.items():
        benchmark = as_benchmark(name)
        if benchmark is None:
            raise DeltacacheError(f"{name} is not known: give {', '.join(BENCHMARKS)}, as NAME=PATH")
        roots[benchmark] = Path(path)
    if min(flags["horizons"]) < 1:
        raise DeltacacheError(
            f"horizon {min(flags['horizons'])} is not after the context: give numbers from 1 up"
        )
    return ContextExport(roots, **flags)


@dataclass(frozen=True, slots=True)
class _Work:
    entry: ContextEntry
    paths: tuple[str, ...]


def export_contexts(wanted: ContextExport, out: Path, reporter: Reporter) -> Path:
    """Write a context for every sequence and horizon below ``out``; returns the manifest's path.

    Raises:
        DatasetError: ``out`` is not empty, a benchmark is incomplete, or there are too few frames.
        StorageError: the disk is full.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DatasetError(f"{out} is not empty: contexts are exported to a new folder; choose another one")
    found: dict[BenchmarkName, SequenceSet] = {
        name: _sequences(wanted, name, root) for name, root in wanted.data.items()
    }
    works = [work for name, each in found.items() for work in _works(wanted, name, each)]

    def write(work: _Work) -> None:
        frames = [padded(read_frame(work.entry.dataset, path), work.entry.place) for path in work.paths]
        target = out / work.entry.folder / "context"
        with readable_errors(out):
            write_clip(target, frames, wanted.clip_format, work.entry.frames_per_second)

    with reporter.stage("export contexts", len(works)) as stage:
        for _ in in_threads(write, works, threads=_THREADS):
            stage.advance()
    manifest = ContextManifest(padding=wanted.padding, contexts=tuple(work.entry for work in works))
    with readable_errors(out):
        write_manifest(out, manifest)
    for name, each in found.items():
        for reason, count in each.dropped.items():
            reporter.line(f"export contexts: {name}: {count} dropped: {reason}")
    shown = works[0].entry.context_frames
    reporter.line(
        f"export contexts: {len(works)} contexts of {shown} frames; put the frames that follow into "
        f"{out}/DATASET/hH/SEQUENCE/sample-00 (pictures) or sample-00.mp4, sample-01 and so on; {MANIFEST} says "
        "which frame is scored"
    )
    return out / MANIFEST


def _sequences(wanted: ContextExport, benchmark: BenchmarkName, root: Path) -> SequenceSet:
    counts = FrameCounts(tuple(sorted({wanted.context + horizon for horizon in wanted.horizons})))
    return benchmark_sequences(benchmark, root, counts, wanted.kitti_split if benchmark == "kitti" else None)


def _works(wanted: ContextExport, benchmark: BenchmarkName, found: SequenceSet) -> Iterator[_Work]:
    for horizon in sorted(set(wanted.horizons)):
        for sequence in found.sequences:
            if len(sequence.frames) >= wanted.context + horizon:
                yield _work(wanted, benchmark, sequence, horizon)


def _work(wanted: ContextExport, benchmark: BenchmarkName, sequence: LabelledSequence, horizon: int) -> _Work:
    step = NATIVE_STEP[benchmark] if wanted.rate == "native" else 1
    last = sequence.frames[-1 - horizon]
    if wanted.rate == "native":
        paths = _recorded_before(last, wanted.frames, wanted.context)
    else:
        paths = sequence.frames[-horizon - wanted.context : -horizon][-wanted.frames :]
    height, width = frame_shape(benchmark, last)
    entry = ContextEntry(
        dataset=benchmark,
        horizon=horizon,
        sequence_id=sequence.sequence_id,
        context_frames=len(paths),
        target_frame=horizon * step - 1,
        frames_per_second=step / sequence.spacing_s,
        place=placement_of(height, width, wanted.padding, benchmark),
    )
    return _Work(entry, tuple(paths))


def _recorded_before(last: str, count: int, context: int) -> tuple[str, ...]:
    """The ``count`` recorded frames up to and with ``last``: those of the numbers before it.

    Raises:
        DatasetError: one is missing.
    """
    path = Path(last)
    *_, number = _NUMBERS.finditer(path.name)
    newest, width = int(number[0]), len(number[0])
    found: list[str] = []
    for at in range(newest, newest - count, -1):
        before = path.with_name(f"{path.name[: number.start()]}{at:0{width}d}{path.name[number.end() :]}")
        if at < 0 or not before.is_file():
            fewer = f"--frames {len(found)}, or " if len(found) > 1 else ""
            raise DatasetError(
                f"{path} has {len(found)} recorded frame{'s' * (len(found) > 1)} up to it, not {count} ({before.name} "
                f"is missing): give {fewer}--rate evaluation --frames {context}, the frames that the evaluation sees"
            )
        found.append(str(before))
    return tuple(reversed(found))
