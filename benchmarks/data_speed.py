"""How fast training data comes: delta tokens from memory and from shards, patch tokens from the page cache.

    python benchmarks/data_speed.py

Real shards with drawn tokens, in a temporary folder. Clips of 8 x 768 float16 (12 KB), batches of 1,024 as the trainer
takes them, float32 for the model included. ``memory``: loaded once. ``mapped``: whole-epoch shuffle over WebDataset
shards that are not loaded; in its first epoch every clip is verified. Pairs of 512 px frames (3 MB a pair) from
feature shards in the page cache; GB/s of float16 that reaches the batches, in the first epoch with the checksum of
the whole clip. ``wait`` is the share of a step that waits for its batch when the step computes for ``--step-s``.
Rates are by the wall clock, in brackets a second that the process computed on any thread: others may be busy on the
same cores. ``copy`` is what bare gathering of such rows reaches in the same run.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from torch.utils.data import DataLoader

from deltacache import ClipDataset, DatasetWriter
from deltacache.pipeline.datasets.dataset import Dataset, open_dataset
from deltacache.pipeline.storage.files import crc32c_of_npy
from deltacache.schemas.datasets import BackboneCard, DatasetCard, SamplingSettings
from deltacache.train.data import (
    MappedClips,
    PairSettings,
    ResidentClips,
    StreamedFeatures,
    clip_batches,
    open_clips,
    pair_batches,
)
from deltacache.train.order import Split

FRAMES, HIDDEN, GRID = 8, 768, (32, 32)
CPU = torch.device("cpu")


def make_dataset(root: Path, kind: str, clips: int, clips_a_shard: int) -> Dataset:
    """A finished dataset of drawn tokens."""
    rng = np.random.default_rng(0)
    patches = GRID[0] * GRID[1]
    black = np.zeros((patches, HIDDEN), np.float16)
    card = DatasetCard(
        kind="features" if kind == "features" else "deltas",
        store="webdataset",
        backbone=BackboneCard(
            id="drawn",
            weights_sha256="0" * 64,
            patch_size=16,
            hidden_size=HIDDEN,
            image_mean=(0.5, 0.5, 0.5),
            image_std=(0.25, 0.25, 0.25),
        ),
        tokenizer_fingerprint=None if kind == "features" else "f" * 16,
        image_size=16 * GRID[0],
        patch_grid=GRID,
        hidden_size=HIDDEN,
        sampling=SamplingSettings(frames=FRAMES),
        black_crc32c=crc32c_of_npy(black),
        code_version="0",
    )
    shape = (FRAMES, patches, HIDDEN) if kind == "features" else (FRAMES, HIDDEN)
    drawn = rng.standard_normal((4, *shape), dtype=np.float32).astype(np.float16)
    times = np.arange(FRAMES, dtype=np.float32) / 5
    with DatasetWriter(root, card, black, videos_per_shard=clips_a_shard) as out:
        for number in range(clips):
            out.write(f"video{number:07d}.mp4", [(drawn[number % clips_a_shard % 4], times)])
    return open_dataset(root)


class Rate(NamedTuple):
    """Items a second of the wall clock, and of the time that this process computed."""

    wall: float
    cpu: float

    def __str__(self) -> str:
        return f"{self.wall:,.0f} ({self.cpu:,.0f})"


def rate(batches: Iterable[object], a_batch: int, warm: int) -> Rate:
    """Items a second, after ``warm`` batches."""
    count, wall, cpu = 0, 0.0, 0.0
    for count, _ in enumerate(batches, 1):
        if count == warm:
            wall, cpu = time.perf_counter(), time.process_time()
    items = (count - warm) * a_batch
    return Rate(items / (time.perf_counter() - wall), items / (time.process_time() - cpu))


def copy_rate() -> float:
    """Bytes a second of gathering 12 KB rows in random order, the bare operation, into memory that is there."""
    rows = torch.randint(0, 100, (20_000, FRAMES * HIDDEN), dtype=torch.int16)
    chosen, out = torch.randperm(len(rows)), torch.empty_like(rows)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        torch.index_select(rows, 0, chosen, out=out)
        best = max(best, rows.nbytes / (time.perf_counter() - start))
    return best


def measure_deltas(folder: Path, clips: int, batch: int) -> None:
    """Print clips/s from memory and from mapped shards."""
    dataset = make_dataset(folder / "deltas", "deltas", clips, 2048)
    arrays, steps = open_clips(dataset), clips // batch
    split = Split(batch)

    def run(source: ResidentClips | MappedClips, epochs: range) -> Rate:
        parts = split.parts_of(range(epochs.start * steps, epochs.stop * steps))
        return rate(clip_batches(source, batch, 0, parts, CPU), batch, 2)

    clips_of_torch = ClipDataset(dataset)
    loader = DataLoader(
        clips_of_torch, batch_size=batch, shuffle=True, drop_last=True, collate_fn=clips_of_torch.collate
    )

    def run_torch(epochs: int) -> Rate:
        return rate((each for _ in range(epochs) for each in loader), batch, 2)

    run(arrays, range(1))
    run_torch(1)
    rounds = [(run(arrays, range(at, at + 3)), run_torch(3)) for at in (1, 4, 7, 10, 13)]  # taking turns
    ours, torchs = (max(rates) for rates in zip(*rounds, strict=True))
    ratio = statistics.median(torch_rate.cpu / our_rate.cpu for our_rate, torch_rate in rounds)
    print(f"memory: {ours} clips/s (goal 300,000)")
    print(
        f"ClipDataset in a DataLoader: {torchs} clips/s, {ratio:.2f} of ours by computed seconds (goal 0.9)"
    )
    mapped = MappedClips.of(dataset)
    print(
        f"mapped: first epoch {run(mapped, range(1))} clips/s, then {run(mapped, range(1, 4))} (goal 30,000)"
    )


def measure_pairs(folder: Path, clips: int, batch: int, step_s: float) -> None:
    """Print GB/s of pairs, and the wait of a step."""
    dataset = make_dataset(folder / "features", "features", clips, 32)
    settings = PairSettings(clips, FRAMES, batch, 0, 0.0)
    split, steps = Split(batch), clips // batch
    pair_bytes = 2 * GRID[0] * GRID[1] * HIDDEN * 2

    def batches(source: StreamedFeatures, epochs: range) -> Iterator[object]:
        parts = split.parts_of(range(epochs.start * steps, epochs.stop * steps))
        return pair_batches(source, dataset.black_patch_tokens, settings, parts, CPU)

    source = StreamedFeatures(dataset)
    waits = f"{100 * _wait(batches(source, range(1)), step_s):.2f} % in the first epoch"
    source = StreamedFeatures(open_dataset(dataset.root))
    first = rate(batches(source, range(1)), batch, 4)
    later = rate(batches(source, range(1, 6)), batch, 4)
    scale = pair_bytes / 1e9
    print(
        f"pairs: first epoch {first.wall * scale:.2f} ({first.cpu * scale:.2f}) GB/s, "
        f"then {later.wall * scale:.2f} ({later.cpu * scale:.2f}) GB/s (goal 1)"
    )
    waits += f", {100 * _wait(batches(source, range(6, 8)), step_s):.2f} % later"
    print(f"wait: {waits} (goal < 2), steps of {step_s} s and {batch} pairs")


def _wait(batches: Iterator[object], step_s: float) -> float:
    """Share of the time that steps wait for their batch, the first one left out."""
    next(batches)
    waited, start = 0.0, time.perf_counter()
    while True:
        time.sleep(step_s)
        asked = time.perf_counter()
        if next(batches, None) is None:
            return waited / (asked - start)
        waited += time.perf_counter() - asked


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--delta-clips", type=int, default=40_960)
    parser.add_argument("--feature-clips", type=int, default=256)
    parser.add_argument("--delta-batch", type=int, default=1024)
    parser.add_argument("--pair-batch", type=int, default=16)
    parser.add_argument("--step-s", type=float, default=0.2, help="of the computation, slept")
    parser.add_argument(
        "--folder", type=Path, help="where the shards are written; else the system's temporary folder"
    )
    asked = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    print(f"copy: {copy_rate() / 1e9:.1f} GB/s")
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        measure_deltas(Path(folder), asked.delta_clips, asked.delta_batch)
        measure_pairs(Path(folder), asked.feature_clips, asked.pair_batch, asked.step_s)


if __name__ == "__main__":
    main()
