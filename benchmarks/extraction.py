"""End-to-end extraction against the ceiling that the stages' own CPU costs allow on the same cores.

    python benchmarks/extraction.py VIDEOS --backbone tiny --image-size 128 --videos 2000
    python benchmarks/extraction.py VIDEOS --backbone random-vitb16 --image-size 256 --videos 40

In one run: decode alone, forward alone, the whole job, decode alone, forward alone again. Every stage uses all
cores, as the job does: as many processes as cores, one thread each. With rates D and F (clips per second) the
ceiling is 1 / (1 / D + 1 / F). The job's clock starts when its encoders are ready; what came before is printed.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import torch
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from deltacache.models.backbone import load_backbone
from deltacache.pipeline.datasets.plan import PlannedVideo
from deltacache.pipeline.decoding.work import DecodeSettings, decode_group, groups_of
from deltacache.pipeline.inputs.sources import VideoSource, find_videos
from deltacache.pipeline.jobs.offline import extract_features
from deltacache.pipeline.work.encoders import build_feature_encoder
from deltacache.pipeline.work.shard_work import measure_forward
from deltacache.schemas.datasets import SamplingSettings
from deltacache.schemas.jobs import DecodeLimits, ExtractionSettings
from deltacache.terminal import terminal_reporter

CORES = os.cpu_count() or 1


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("videos_folder", type=Path)
    parser.add_argument(
        "--backbone", default="tiny", help="tiny, random-vitb16, or what extract-features takes"
    )
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument(
        "--videos", type=int, default=1000, help="the folder's videos are linked to so many names"
    )
    parser.add_argument("--views", type=int, default=1)
    parser.add_argument("--videos-per-shard", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=20, help="of each measurement of a stage alone")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="deltacache-benchmark-") as folder:
        run(arguments, Path(folder))


def run(arguments: argparse.Namespace, folder: Path) -> None:
    """One run in ``folder``."""
    backbone = random_vitb16(folder) if arguments.backbone == "random-vitb16" else arguments.backbone
    many = link(arguments.videos_folder, folder / "videos", arguments.videos)
    settings = ExtractionSettings(
        source=str(many),
        backbone=backbone,
        image_size=arguments.image_size,
        views=arguments.views,
        videos_per_shard=arguments.videos_per_shard,
        max_failed_fraction=1.0,
    )
    sources = find_videos(str(many), None)
    alone: dict[str, list[float]] = {"decode": [], "forward": []}

    def measure_alone() -> None:
        alone["decode"].append(at_once(decode_rate, settings, sources, arguments.seconds))
        alone["forward"].append(at_once(forward_rate, settings, sources, arguments.seconds))

    measure_alone()
    out = folder / "features"
    extract_features(settings, out, terminal_reporter())
    measure_alone()
    decode, forward = (sum(rates) / len(rates) for rates in alone.values())
    figures = json.loads((out / "throughput.json").read_text())
    ceiling = 1 / (1 / decode + 1 / forward)
    print(f"{CORES} cores, {arguments.backbone} at {arguments.image_size} px, {figures['clips']} clips")
    print(f"decode alone    {decode:8.2f} clips/s  ({', '.join(f'{rate:.2f}' for rate in alone['decode'])})")
    print(
        f"forward alone   {forward:8.2f} clips/s  ({', '.join(f'{rate:.2f}' for rate in alone['forward'])})"
    )
    print(f"ceiling         {ceiling:8.2f} clips/s")
    print(f"end to end      {figures['clips_per_s']:8.2f} clips/s over {figures['wall_s']:.0f} s")
    print(f"ratio           {figures['clips_per_s'] / ceiling:8.3f}")
    print(f"starting        {figures['start_s']:8.1f} s, of which Ray {figures['ray_start_s']:.1f} s")


def link(videos: Path, folder: Path, count: int) -> Path:
    """A folder of ``count`` names of the videos."""
    folder.mkdir()
    files = [file.resolve() for file in sorted(videos.iterdir()) if file.is_file()]
    for number, file in zip(range(count), cycle(files), strict=False):
        (folder / f"{number:06d}-{file.name}").symlink_to(file)
    return folder


def random_vitb16(folder: Path) -> str:
    """A DINOv3 ViT-B/16 with random weights: the cost of the released one without its licence."""
    config = DINOv3ViTConfig(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, patch_size=16
    )
    torch.manual_seed(0)
    DINOv3ViTModel(config).save_pretrained(folder / "vitb16")
    return str(folder / "vitb16")


Rate = Callable[[ExtractionSettings, list[VideoSource], float], float]


def at_once(rate: Rate, settings: ExtractionSettings, sources: list[VideoSource], seconds: float) -> float:
    """The sum of what one process a core reaches, all at the same time."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(CORES) as pool:
        # Stretches of the list, not every second video: each process must get the same mix of videos.
        share = -(-len(sources) // CORES)
        parts = [sources[core * share : (core + 1) * share] for core in range(CORES)]
        return sum(pool.starmap(rate, [(settings, part, seconds) for part in parts]))


def decode_rate(settings: ExtractionSettings, sources: list[VideoSource], seconds: float) -> float:
    """Clips a second of one decoder."""
    decode = DecodeSettings(settings.image_size, SamplingSettings(), DecodeLimits())
    videos = [PlannedVideo(s.video_id, s.video_uri, s.size_bytes, 0, settings.views) for s in sources]
    locations = {source.video_uri: source.path for source in sources}
    groups = groups_of(videos, decode)
    decode_group(groups[0], locations, decode, {})
    start, clips = time.perf_counter(), 0
    for group in cycle(groups):
        clips += len(decode_group(group, locations, decode, {}).clips)
        if time.perf_counter() - start > seconds:
            break
    return clips / (time.perf_counter() - start)


def forward_rate(settings: ExtractionSettings, sources: list[VideoSource], seconds: float) -> float:
    """Clips a second of one encoder with one thread."""
    torch.set_num_threads(1)
    load_backbone(settings.backbone)
    encoder = build_feature_encoder(settings.backbone, "cpu", frames=settings.sampling.frames)
    return measure_forward(encoder, settings.sampling.frames, settings.image_size, seconds)


if __name__ == "__main__":
    main()
