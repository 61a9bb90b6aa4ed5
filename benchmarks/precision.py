"""What bfloat16 costs in accuracy: patch tokens of a ViT-B against float32, and in time.

Relative error: norm of the difference over the norm of the float32 tokens, over noise images. "all bfloat16" casts the
whole model, as older versions did; "autocast" is what deltacache computes. With outliers, some channels of the residual
stream are scaled, as trained ViTs have a few that are far larger than the others.

    python benchmarks/precision.py --images 8 --image-size 256
"""

import argparse
import copy
import time

import torch

from deltacache.models.backbone import Backbone
from encoder import backbone_named

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


def main() -> None:
    """Compare with and without outlier channels."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=256)
    asked = parser.parse_args()
    for outliers in (False, True):
        compare(asked.images, asked.image_size, outliers)


if __name__ == "__main__":
    main()
