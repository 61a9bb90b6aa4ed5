"""What bfloat16 costs in accuracy, and in time: patch tokens of a ViT-B, then the models behind it and a training step.

Relative error: norm of the difference over the norm of the float32 tokens, over noise images. "all bfloat16" casts the
whole model, as older versions did; "autocast" is what deltacache computes. With outliers, some channels of the residual
stream are scaled, as trained ViTs have a few that are far larger than the others.

The models are those of the released presets, untrained, with LayerScale 0.3; the step is one of the released tokenizer
on ``--pairs`` pairs of 256 px, the fastest of three.

    python benchmarks/precision.py --images 8 --image-size 256 --pairs 4
"""

import argparse
import copy
import time

import torch

from deltacache.models.backbone import Backbone
from deltacache.train.order import MicroBatch
from encoder import backbone_named
from gpu import Updates, agreement, one_pass, steps_of

CHANNELS, SCALE = torch.arange(4) * 101 + 7, 20.0


def with_outliers(backbone: Backbone) -> None:
    """Scale a few channels of all that enters the residual stream."""
    model, channels = backbone.model, CHANNELS
    for parameter in (model.embeddings.cls_token, model.embeddings.register_tokens):
        parameter.data[..., channels] *= SCALE
    for part in (model.embeddings.patch_embeddings.weight, model.embeddings.patch_embeddings.bias):
        part.data[channels] *= SCALE
    for name, parameter in model.named_parameters():
        if name.endswith("lambda1"):  # LayerScale
            parameter.data[channels] *= SCALE


def rounded_throughout(backbone: Backbone) -> torch.nn.Module:
    """The whole model in bfloat16, but for buffers, as older versions ran it."""
    model = copy.deepcopy(backbone.model)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


@torch.no_grad()
def compare(images: int, size: int, outliers: bool) -> None:
    """Print a line for each way to compute."""
    exact, mixed = backbone_named("vitb"), backbone_named("vitb")
    for backbone in (exact, mixed):
        for name, parameter in backbone.model.named_parameters():
            if name.endswith(
                "lambda1"
            ):  # random models begin with 1, trained ones have less in the first blocks
                parameter.data.fill_(1.0)
        if outliers:
            with_outliers(backbone)
    old, mixed = rounded_throughout(exact), mixed.to_precision("bfloat16_autocast")
    generator = torch.Generator().manual_seed(1)
    frames = torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8, generator=generator)
    pixels = ((frames / 255.0 - exact.mean) / exact.std).bfloat16()
    prefix = 1 + exact.model.config.num_register_tokens
    ways = {
        "float32": lambda: exact.patch_tokens(frames),
        "all bfloat16": lambda: old(pixels).last_hidden_state.float()[:, prefix:],
        "autocast": lambda: mixed.patch_tokens(frames),
    }
    truth = exact.patch_tokens(frames)
    for name, forward in ways.items():
        forward()
        start = time.process_time()
        tokens = forward()
        used = time.process_time() - start
        error = ((tokens - truth).norm() / truth.norm()).item()
        others = torch.ones(truth.shape[-1], dtype=torch.bool).index_fill_(0, CHANNELS, False)
        small = ((tokens - truth)[..., others].norm() / truth[..., others].norm()).item()
        print(
            f"{name:13} outliers x {SCALE if outliers else 1:<4g} relative error {error:.4f}, without the outlier "
            f"channels {small:.4f}; {used / images:.2f} CPU-seconds an image"
        )


def training_step(pairs: int) -> None:
    """Print seconds a pair of the released tokenizer's step in both precisions."""
    cpu = torch.device("cpu")
    for precision in ("float32", "bfloat16"):
        step = steps_of(cpu, "tokenizer", "released", "256px", 256, pairs)
        training = step.config.training.model_copy(update={"precision": precision})
        step = step._replace(config=step.config.model_copy(update={"training": training}))
        updates, taken = Updates(step, cpu), list[float]()
        for at in range(4):
            start = time.perf_counter()
            updates.update(one_pass(step, cpu, MicroBatch(at, 0, pairs)))
            taken.append((time.perf_counter() - start) / pairs)
        print(
            f"tokenizer step, {pairs} pairs at 256 px, {precision}: {min(taken[1:]):.2f} s per pair",
            flush=True,
        )


def main() -> None:
    """Compare with and without outlier channels."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=4)
    asked = parser.parse_args()
    for outliers in (False, True):
        compare(asked.images, asked.image_size, outliers)
    for row in agreement(torch.device("cpu"), small=False):
        print(f"{row.what}: {row.value} {row.about}", flush=True)
    training_step(asked.pairs)


if __name__ == "__main__":
    main()
