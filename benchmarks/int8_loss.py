"""What int8 features lose against float16 ones, on real clips.

    python benchmarks/int8_loss.py videos/ --backbone tiny vitb --image-size 256

The same clips through the same encoder in both dtypes; int8 tokens as readers get them. ``x20`` rows multiply a few
channels of the tokens by 20 before they are quantised: trained backbones have such channels, and one scale a token
then leaves fewer steps for all others. ``vitb`` and the like have random weights; their tokens say more of what int8
does to numbers than to meaning. Errors are against the float16 tokens:

- relative RMS of all tokens, of the worst token, and of the worst token without the large channels;
- feature losses (``deltacache.evaluate.metrics``) of copying a frame onto the next in float16 and in int8, and of
  the true frame in int8 against itself in float16, which is what int8 adds to ``present``.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deltacache.evaluate.metrics import feature_metrics
from deltacache.pipeline.datasets.dataset import dequantise_on_device, quantise
from deltacache.pipeline.decoding.decode import VideoJob, decode_video
from deltacache.pipeline.work.encoders import FeatureEncoder
from deltacache.schemas.clips import PixelClip
from deltacache.schemas.datasets import SamplingSettings
from deltacache.schemas.errors import VideoRefusedError
from encoder import backbone_named

_LARGE_CHANNELS = 4


def clips_of(folder: Path, image_size: int, views: int) -> list[PixelClip]:
    """Views of every video in a folder."""
    clips: list[PixelClip] = []
    for number, path in enumerate(sorted(folder.iterdir())):
        job = VideoJob(str(path), path.name, f"video-{number}", 0, views, image_size, SamplingSettings())
        try:
            clips.extend(decode_video(job))
        except VideoRefusedError as error:
            print(f"{path.name} left out: {error.message}")
    return clips


def with_large_channels(tokens: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Tokens (..., D) float16 with a few channels times ``factor``; which channels (D,) are the others."""
    chosen = torch.randperm(tokens.shape[-1], generator=torch.Generator().manual_seed(0))[:_LARGE_CHANNELS]
    scale = torch.ones(tokens.shape[-1])
    scale[chosen] = factor
    return (tokens.float() * scale).half(), scale == 1


def row(name: str, half: Tensor, others: Tensor) -> str:
    """The table's row of tokens (C, T, N, D) float16, which are quantised here."""
    exact, read = half.float(), dequantise_on_device(*quantise(half)).float()
    error = read - exact
    relative = (error.norm() / exact.norm()).item()
    worst = (error.norm(dim=-1) / exact.norm(dim=-1)).max().item()
    small = (error[..., others].norm(dim=-1) / exact[..., others].norm(dim=-1)).max().item()
    copies = feature_metrics(exact[:, :-1], exact[:, 1:]).mean((0, 1))
    copies_read = feature_metrics(read[:, :-1], read[:, 1:]).mean((0, 1))
    present = feature_metrics(read, exact).mean((0, 1))
    losses = " | ".join(
        f"{copies[k]:.5f} | {copies_read[k]:.5f} ({(copies_read[k] / copies[k] - 1) * 100:+.2f} %) | {present[k]:.1e}"
        for k in range(2)
    )
    return f"| {name} | {relative:.3%} | {worst:.2%} | {small:.2%} | {error.abs().max():.3g} | {losses} |"


def main() -> None:
    """Measure and print a row a backbone and number of large channels."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--backbone", nargs="+", default=["tiny", "vitb"], help="as for benchmarks/encoder.py"
    )
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--views", type=int, default=1)
    asked = parser.parse_args()
    clips = clips_of(asked.folder, asked.image_size, asked.views)
    print(f"{len(clips)} clips of {len(clips[0].pixels)} frames at {asked.image_size} px")
    print(
        "| backbone | error | worst token | worst, other channels | largest | smooth L1 of a copy | in int8 | "
        "of the truth | squared error of a copy | in int8 | of the truth |"
    )
    print("|---" * 11 + "|")
    for name in asked.backbone:
        encoder = FeatureEncoder(backbone_named(name), torch.device("cpu"))
        half = torch.from_numpy(np.stack([encoder.encode([clip])[0].patch_tokens for clip in clips]))
        for factor in (1.0, 20.0):
            tokens, others = with_large_channels(half, factor)
            about = (
                name if factor == 1 else f"{name}, {_LARGE_CHANNELS} of {half.shape[-1]} channels x{factor:g}"
            )
            print(row(about, tokens, others), flush=True)


if __name__ == "__main__":
    main()
