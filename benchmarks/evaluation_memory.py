"""Peak memory of ``evaluate``, ``report`` and ``compare`` on a feature dataset of many clips.

    python benchmarks/evaluation_memory.py work/ --clips 100000
    python benchmarks/evaluation_memory.py work/ --clips 2000 --sums 100000      minutes instead of hours
    python benchmarks/evaluation_memory.py work/ --clips 100000 --no-models

Draws tiny clips (7 frames of 4 patches of 16 numbers, a video each, or --views of one) and tiny models into ``work/``,
evaluates them twice with other seeds, writes the page of one and compares both. Every step is a process of its own, so
that its peak is its own. Goal: at most 1 GiB each at 100,000 clips.

Nearly all the time goes into passes of the models, of which nothing stays but sums. With ``--sums N`` the tables of
both evaluations are made again from the sums of N clips, each like one of those that were evaluated, by the code that
``evaluate`` makes them with; ``--no-models`` reads and scores all clips, but only the copied frame and the truth.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from deltacache import DatasetWriter
from deltacache.evaluate.output import RunStamp, read_metrics, read_samples
from deltacache.evaluate.statistics import TableWriter, statistics_of
from deltacache.models.checkpoints import load_tokenizer, save_model
from deltacache.models.deltatok import DeltaTok
from deltacache.models.worlds.deltaworld import DeltaWorld
from deltacache.pipeline.storage.files import crc32c_of_npy
from deltacache.schemas.datasets import BackboneCard, DatasetCard, SamplingSettings

FRAMES, PATCHES, HIDDEN = 7, 4, 16
MOST_GIB = 1.0


def draw(root: Path, clips: int, views: int) -> None:
    """A feature dataset and models."""
    black = np.zeros((PATCHES, HIDDEN), np.float16)
    backbone = BackboneCard(
        id="drawn",
        weights_sha256="b" * 64,
        patch_size=16,
        hidden_size=HIDDEN,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
    )
    card = DatasetCard(
        kind="features",
        store="webdataset",
        backbone=backbone,
        image_size=32,
        patch_grid=(2, 2),
        hidden_size=HIDDEN,
        sampling=SamplingSettings(frames=FRAMES),
        black_crc32c=crc32c_of_npy(black),
        code_version="0",
    )
    features = root / "features"
    rng = np.random.default_rng(0)
    times = np.arange(FRAMES, dtype=np.float32) / 5
    with DatasetWriter(features, card, black, views=views, videos_per_shard=2000) as out:
        for number in range(clips // views):
            drawn = rng.normal(size=(views, FRAMES, PATCHES, HIDDEN)).cumsum(1).astype(np.float16)
            out.write(f"video{number:07d}.mp4", [(clip, times) for clip in drawn])
    torch.manual_seed(0)
    made_from = {"backbone_sha256": "b" * 64, "patch_grid": [2, 2], "hidden_size": HIDDEN}
    save_model(root / "tokenizer", DeltaTok(HIDDEN, 2, 1, 1), "tokenizer", made_from)
    fingerprint = load_tokenizer(root / "tokenizer").fingerprint
    save_model(root / "world", DeltaWorld(HIDDEN, 2, 1), "world", {"tokenizer_fingerprint": fingerprint})


def multiply(small: Path, out: Path, clips: int) -> None:
    """The evaluation ``small`` with the tables of ``clips`` sequences, each like one of its own."""
    shutil.copytree(small, out)
    first = read_metrics(small).to_pylist()[0]
    columns = ("run_id", "dataset", "context", "seed", "backbone", "code_version", "created_at")
    sizes = {"image_size": (first["image_size"], first["image_width"])}
    stamp = RunStamp(**{name: first[name] for name in columns}, **sizes)
    counted = set(read_samples(small)["num_samples"].to_pylist())
    table = pq.read_table(small / "statistics.parquet")
    own = len(set(table["sequence_id"].to_pylist()))
    with TableWriter(out, lambda _: stamp, lambda _: max(counted)) as tables:
        for start in range(0, clips, own):
            kept = {f"video{number:07d}.mp4" for number in range(min(own, clips - start))}
            for each in statistics_of(table):  # read again: held, they would be the largest part
                if each.group in kept:
                    names = {"sequence_id": f"{start}-{each.sequence_id}", "group": f"{start}-{each.group}"}
                    fewer = counted if each.series.aggregation != "single" else {each.series.num_samples}
                    tables.add(
                        replace(each, series=replace(each.series, num_samples=count), **names)
                        for count in fewer
                    )
    tables.finish(lambda _: 0)


def peak_of(name: str, *command: str) -> float:
    """Peak memory in GiB of a Python process with these arguments."""
    started = time.perf_counter()
    child = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"{name} failed")
    peak = usage.ru_maxrss / 2**20
    print(f"{name:9} {peak:.2f} GiB at the most, {time.perf_counter() - started:.0f} s", flush=True)
    return peak


def run(*command: str) -> float:
    """The same of a command of deltacache."""
    return peak_of(command[0], "-m", "deltacache", *command)


def main() -> None:
    """Print peaks; exit code 1 where one is above the goal."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--clips", type=int, default=100_000)
    parser.add_argument("--views", type=int, default=1)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--sums", type=int, help="make the tables of so many clips")
    parser.add_argument("--no-models", action="store_true")
    parser.add_argument("--multiply", nargs=2, type=Path, metavar=("SMALL", "OUT"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.multiply:
        multiply(*asked.multiply, asked.sums)
        return
    root = asked.work
    if not (root / "world").exists():
        root.mkdir(parents=True, exist_ok=True)
        draw(root, asked.clips, asked.views)
    models = ("--device", "cpu")
    if not asked.no_models:
        models += ("--tokenizer", str(root / "tokenizer"), "--world", str(root / "world"))
    data = ("--data", f"clips={root / 'features'}", "--samples", str(asked.samples), "--examples", "1")
    peaks = [
        run("evaluate", str(root / f"out{seed}"), *data, *models, "--seed", str(seed)) for seed in (0, 1)
    ]
    outs = [str(root / f"out{seed}") for seed in (0, 1)]
    if asked.sums:
        larger = [str(root / f"sums{seed}") for seed in (0, 1)]
        for small, large in zip(outs, larger, strict=True):
            shutil.rmtree(large, ignore_errors=True)
            peaks.append(
                peak_of("tables", __file__, str(root), "--sums", str(asked.sums), "--multiply", small, large)
            )
        outs = larger
    peaks.append(run("report", outs[0]))
    peaks.append(run("compare", *outs))
    sys.exit(max(peaks) > MOST_GIB)


if __name__ == "__main__":
    main()
