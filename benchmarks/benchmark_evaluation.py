"""Time and memory of an evaluation of VSPW by part, and what a cache of patch tokens saves the second model.

Random weights of the given width: only the time matters. Data: any folder in VSPW's layout; drawn, if there is none.

    python benchmarks/benchmark_evaluation.py VSPW OUT --hidden 384 --layers 12 --image-size 256 --samples 20
    python benchmarks/benchmark_evaluation.py DRAWN OUT --horizons 1,2,4,8,16 --videos 4 --frames 64
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from deltacache.evaluate.benchmarks.engine import evaluate_benchmarks
from deltacache.evaluate.settings import benchmark_evaluation
from deltacache.models.checkpoints import load_tokenizer, save_model
from deltacache.models.deltatok import DeltaTok
from deltacache.models.heads import SegmentationHead
from deltacache.models.worlds.deltaworld import DeltaWorld
from deltacache.schemas.benchmarks import CLASSES
from deltacache.schemas.progress import SilentReporter


def main() -> None:
    """Evaluate four times: bounds alone and all methods, each without and with a filled cache."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("vspw", type=Path)
    parser.add_argument("out", type=Path)
    for name, default in (("hidden", 384), ("layers", 12), ("image-size", 256), ("samples", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("videos", 4), ("frames", 64), ("height", 480), ("examples", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--horizons", default="1,3")
    options = parser.parse_args()
    if not options.vspw.exists():
        draw_vspw(options.vspw, options.videos, options.frames, options.height)
    models = make_models(options.out / "models", options.hidden, options.layers)
    every = {"tokenizer": models / "tokenizer", "worlds": (models / "world",)}
    for name, more in (("bounds", {}), ("all methods", every)):
        for cached in (False, True):
            shutil.rmtree(options.out / "run", ignore_errors=True)
            settings = benchmark_evaluation(
                out=options.out / "run",
                data={"vspw": options.vspw},
                heads={"vspw": models / "head"},
                backbone=str(models / "backbone"),
                image_size=options.image_size,
                horizons=tuple(map(int, options.horizons.split(","))),
                samples=options.samples,
                examples=options.examples,
                cache=options.out / "cache" if cached else None,
                **more,
            )
            if cached and not (options.out / "cache").exists():
                started = time.perf_counter()
                evaluate_benchmarks(settings, SilentReporter())
                print(f"filling the cache and {name}: {time.perf_counter() - started:.1f} s")
                shutil.rmtree(options.out / "run")
            evaluate_benchmarks(settings, SilentReporter())
            print(f"{name}, {'cached' if cached else 'from frames'}: {_report(options.out / 'run')}")


def draw_vspw(root: Path, videos: int, frames: int, height: int) -> None:
    """Videos of 16 : 9 noise that moves sideways, with masks of four classes."""
    rng, width = np.random.default_rng(0), 16 * height // 9
    for video in range(videos):
        wide = rng.integers(0, 256, (height, width + frames, 3), dtype=np.uint8)
        classes = np.repeat(rng.integers(1, 5, (height, 1), dtype=np.uint8), width, axis=1)
        folders = [root / "data" / f"video{video}" / name for name in ("origin", "mask")]
        for folder in folders:
            folder.mkdir(parents=True)
        for number in range(frames):
            cv2.imwrite(str(folders[0] / f"{number:08d}.jpg"), wide[:, number : number + width])
            cv2.imwrite(str(folders[1] / f"{number:08d}.png"), classes)
    (root / "val.txt").write_text("\n".join(f"video{video}" for video in range(videos)) + "\n")


def make_models(folder: Path, hidden: int, layers: int) -> Path:
    """A backbone, a tokenizer, a world model and a head that fit each other."""
    if folder.exists():
        return folder
    torch.manual_seed(0)
    heads = hidden // 64
    config = DINOv3ViTConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        patch_size=16,
        num_register_tokens=4,
    )
    DINOv3ViTModel(config).save_pretrained(folder / "backbone")
    save_model(folder / "tokenizer", DeltaTok(hidden, heads, layers, layers), "tokenizer", {})
    fingerprint = load_tokenizer(folder / "tokenizer").fingerprint
    world = DeltaWorld(hidden, heads, layers)
    save_model(folder / "world", world, "world", {"tokenizer_fingerprint": fingerprint})
    save_model(folder / "head", SegmentationHead(hidden, CLASSES["vspw"]), "head", {})
    return folder


def _report(run: Path) -> str:
    timing = json.loads((run / "timing.json").read_text())
    each = timing["sequences"]
    parts = ", ".join(f"{name} {1000 * seconds / each:.0f}" for name, seconds in timing["parts"].items())
    return (
        f"{1000 * timing['total_s'] / each:.0f} ms per sequence ({parts}; "
        f"threads decode {1000 * timing['decode_s'] / each:.0f}), "
        f"waiting {100 * timing['waiting_share']:.0f} %, peak {timing['peak_bytes'] / 1e6:.0f} MB, "
        f"GPU {timing['peak_gpu_bytes'] / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    main()
