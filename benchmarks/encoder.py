"""How much of the pure forward rate an encoder keeps, from frames in memory to tokens in memory.

    python benchmarks/encoder.py --backbone vitb --image-size 256 512
    python benchmarks/encoder.py --backbone tiny --image-size 128 --device cpu --threads 1 --torch-threads 1

Pure forward: the model called again and again on one batch that lies on the device, normalised and in its precision.
End to end: uint8 frames on the host to tokens on the host, by ``FeatureEncoder`` from as many threads as the
extraction uses; every clip's tokens are dropped at once. Both in turn, several times, so that neither has the better
moments of the machine; the ratio is that of their medians. On a CPU, rates are of a second of its time, whatever else
runs there: with ``--torch-threads 1``, those of one core. ``vitb`` and the like are DINOv3's sizes with random
weights. Needs torch, transformers, numpy, pydantic and safetensors, and no other dependency of deltacache.
"""

import argparse
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from deltacache.models.backbone import IMAGENET, Backbone, load_backbone
from deltacache.models.devices import choose_device
from deltacache.pipeline.work.encoders import FeatureEncoder, default_batch_clips, resolve_precision
from deltacache.schemas.clips import CropBox, PixelClip

_SIZES: dict[str, dict[str, Any]] = {
    "vits": {
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
    },
    "vitb": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
    "vitl": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
}


def backbone_named(name: str) -> Backbone:
    """``tiny``, a directory or hub id, or a DINOv3 size with random weights."""
    if name not in _SIZES:
        return load_backbone(name)
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    torch.manual_seed(0)
    config = DINOv3ViTConfig(**_SIZES[name], patch_size=16, num_register_tokens=4, image_size=224)
    return Backbone(DINOv3ViTModel(config), name, IMAGENET)


def clips_of(count: int, frames: int, image_size: int) -> list[PixelClip]:
    """Clips of noise."""
    rng = np.random.default_rng(0)
    shape, crop = (frames, image_size, image_size, 3), CropBox(0, 0, image_size, image_size)
    times, indices = np.arange(frames, dtype=np.float32), tuple(range(frames))
    drawn = [rng.integers(0, 256, shape, dtype=np.uint8) for _ in range(count)]
    return [
        PixelClip(f"clip-{number}", "noise", 0, pixels, times, indices, crop, False, "none", 0)
        for number, pixels in enumerate(drawn)
    ]


def pure_forward(
    backbone: Backbone, clips: list[PixelClip], device: torch.device
) -> Callable[[float], float]:
    """A function from seconds to measure to clips/s of the bare model."""
    frames = torch.from_numpy(np.concatenate([clip.pixels for clip in clips])).to(device).permute(0, 3, 1, 2)
    pixels = ((frames / 255.0 - backbone.mean) / backbone.std).contiguous()
    pixels = pixels.to(next(backbone.model.parameters()).dtype)

    @torch.inference_mode()
    def measure(seconds: float) -> float:
        backbone.model(pixels)
        _finish(device)
        clock = clock_of(device)
        start, rounds = clock(), 0
        while rounds < 2 or clock() - start < seconds:
            backbone.model(pixels)
            rounds += 1
            if rounds % 8 == 0:
                _finish(device)
        _finish(device)
        return rounds * len(clips) / (clock() - start)

    return measure


def end_to_end(
    encoder: FeatureEncoder, clips: list[PixelClip], threads: int, clock: Callable[[], float]
) -> Callable[[float], float]:
    """A function from seconds to measure to clips/s of the encoder, called by several threads."""

    def measure(seconds: float) -> float:
        ready, counts = threading.Barrier(threads + 1), [0] * threads

        def work(place: int) -> None:
            encoder.encode(clips)
            ready.wait()
            start = clock()
            while counts[place] < 2 or clock() - start < seconds:
                encoder.encode(clips)
                counts[place] += 1

        workers = [threading.Thread(target=work, args=(place,)) for place in range(threads)]
        for worker in workers:
            worker.start()
        ready.wait()
        start = clock()
        for worker in workers:
            worker.join()
        return sum(counts) * len(clips) / (clock() - start)

    return measure


def clock_of(device: torch.device) -> Callable[[], float]:
    """Seconds that pass, or on a CPU those that this process computed."""
    return time.perf_counter if device.type == "cuda" else time.process_time


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Measure and print a row an image size."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backbone", default="vitb", help="tiny, vits, vitb, vitl, a directory or a hub id")
    parser.add_argument("--image-size", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--frames", type=int, default=8, help="frames per clip")
    parser.add_argument(
        "--batch-clips", type=int, help="clips per forward pass; else as the extraction chooses"
    )
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--precision", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--dtype", default="float16", choices=["float16", "int8"])
    parser.add_argument("--threads", type=int, default=2, help="that call the encoder at once")
    parser.add_argument("--torch-threads", type=int, help="of torch on a CPU; else its default")
    parser.add_argument("--seconds", type=float, default=5.0, help="of one measurement")
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    if asked.torch_threads:
        torch.set_num_threads(asked.torch_threads)
    device = choose_device(asked.device)
    precision = resolve_precision(device, asked.precision)
    batch = asked.batch_clips or default_batch_clips(device, asked.frames)
    backbone = backbone_named(asked.backbone).to_precision(precision)
    encoder = FeatureEncoder(backbone, device, batch, asked.dtype)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {asked.threads} calling threads, tokens {asked.dtype}")
    print("| backbone | px | precision | clips x frames | pure, clips/s | end to end, clips/s | ratio |")
    print("|---|---|---|---|---|---|---|")
    for image_size in asked.image_size:
        clips = clips_of(batch, asked.frames, image_size)
        pure = pure_forward(backbone, clips, device)
        whole = end_to_end(encoder, clips, asked.threads, clock_of(device))
        pairs = [(pure(asked.seconds), whole(asked.seconds)) for _ in range(asked.repeats)]
        forward, encoded = (statistics.median(rates) for rates in zip(*pairs, strict=True))
        print(
            f"| {asked.backbone} | {image_size} | {precision} | {batch} x {asked.frames} | {forward:.2f} | "
            f"{encoded:.2f} | {encoded / forward:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
