"""What a rerun over a finished dataset costs on the dataset's side: python benchmarks/finished_dataset.py VIDEOS.

Simulates plan, receipts and tables of a feature dataset of so many videos (no shard data: nothing reads them),
then does in a new process what extract-features does before and after the work, and times each step.
"""

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from deltacache.pipeline.datasets.changes import changed_videos, recorded_videos
from deltacache.pipeline.datasets.dataset import (
    finish_dataset,
    finished_shards,
    open_dataset,
    prepare_dataset,
)
from deltacache.pipeline.datasets.inspection import describe
from deltacache.pipeline.datasets.plan import ShardTask, extend_plan, read_plan, shard_tasks, write_plan
from deltacache.pipeline.datasets.receipts import SHARDS, FileRecord, Receipt, SourceRecord, write_receipt
from deltacache.pipeline.inputs.sources import VideoSource, video_id_of
from deltacache.pipeline.storage.checksums import crc32c_of_npy
from deltacache.pipeline.storage.storage import dataset_root
from deltacache.schemas.clips import clip_id_of
from deltacache.schemas.datasets import BackboneCard, DatasetCard, SamplingSettings

FRAMES, GRID, HIDDEN = 8, (16, 16), 768
BLACK = np.zeros((GRID[0] * GRID[1], HIDDEN), np.float16)


def card() -> DatasetCard:
    """Of a ViT-B at 256 px."""
    return DatasetCard(
        kind="features",
        store="webdataset",
        backbone=BackboneCard(
            id="vitb",
            weights_sha256="5e" * 32,
            patch_size=16,
            hidden_size=HIDDEN,
            image_mean=(0.5, 0.5, 0.5),
            image_std=(0.2, 0.2, 0.2),
        ),
        image_size=256,
        patch_grid=GRID,
        hidden_size=HIDDEN,
        sampling=SamplingSettings(frames=FRAMES),
        black_crc32c=crc32c_of_npy(BLACK),
        code_version="0",
    )


def found_sources(videos: int) -> list[VideoSource]:
    """What ``find_videos`` gives for a folder of so many videos."""
    names = (f"class-{number % 700:03d}/clip_{number:07d}_000010.mp4" for number in range(videos))
    return [
        VideoSource(
            video_id=video_id_of(name),
            video_uri=name,
            path=f"/videos/{name}",
            size_bytes=1_000_000 + len(name),
            version="1700000000000000000",
        )
        for name in names
    ]


def receipt_of(task: ShardTask, fingerprint: str) -> Receipt:
    """As ``write_shard`` would make it; every 50th video is refused for the failures' sake."""
    file = f"{SHARDS}/shard-{task.shard_id}.tar"
    ids = [clip_id_of(video.video_id, view) for video in task.videos for view in range(video.views)]
    uris = [video.video_uri for video in task.videos for _ in range(video.views)]
    rows = [
        {
            "clip_id": clip_id,
            "video_uri": uri,
            "view": int(clip_id[-3:]),
            "shard": task.shard_id,
            "row": row,
            "frame_indices": list(range(3, 3 + 5 * FRAMES, 5)),
            "timestamps_s": [float(np.float32(0.1 + 0.1668 * frame)) for frame in range(FRAMES)],
            "crop": [11, 17, 220, 301],
            "flip": row % 2 == 1,
            "decoder": "decord-seek",
            "duplicate_frames": 0,
            "crc32c": 3_000_000_000 + row,
        }
        for row, (clip_id, uri) in enumerate(zip(ids, uris, strict=True))
    ]
    clip_bytes = FRAMES * BLACK.nbytes
    return Receipt(
        shard_id=task.shard_id,
        fingerprint=fingerprint,
        files={file: FileRecord(len(ids) * (clip_bytes + 4096), 3_000_000_001)},
        arrays={row["clip_id"]: {"patch_tokens": row["crc32c"], "timestamps_s": 7} for row in rows},
        clips=tuple(rows),
        failures=(),
        token_file=file,
        token_offsets=tuple(2048 + row * (clip_bytes + 4096) for row in range(len(ids))),
        frame_stride=BLACK.nbytes,
        sources=tuple(
            SourceRecord(
                video.video_id,
                video.video_uri,
                video.size_bytes,
                video.first_view,
                video.views,
                "1700000000000000000",
                hashlib.sha256(video.video_uri.encode()).hexdigest(),
            )
            for video in task.videos
        ),
    )


def make(root: Path, videos: int, views: int, videos_per_shard: int) -> None:
    """Write the dataset, all but its shards."""
    prepare_dataset(root, card(), BLACK)
    plan = extend_plan(None, found_sources(videos), views, videos_per_shard)
    write_plan(root, plan)
    for task in shard_tasks(plan):
        write_receipt(root, receipt_of(task, card().fingerprint))


@contextmanager
def timed(times: dict[str, float], step: str) -> Iterator[None]:
    """Add the seconds of the block to ``times``."""
    start = time.perf_counter()
    yield
    times[step] = round(time.perf_counter() - start, 3)


def measure(root: Path, videos: int, views: int, videos_per_shard: int) -> dict[str, float]:
    """Seconds of each step of a rerun, their sum, and the peak memory of this process in GiB."""
    sources, times = found_sources(videos), dict[str, float]()
    with timed(times, "prepare the dataset"):
        prepare_dataset(root, card(), BLACK)
    with timed(times, "read the plan"):
        plan = read_plan(root)
    with timed(times, "extend the plan by what was found"):
        plan = extend_plan(plan, sources, views, videos_per_shard)
    with timed(times, "write the plan (unchanged)"):
        write_plan(root, plan)
    with timed(times, "pending shards"):
        done = finished_shards(root)
        assert all(task.shard_id in done for task in shard_tasks(plan))
    with timed(times, "compare all versions"):
        assert changed_videos(sources, recorded_videos(dataset_root(root))) == []
    with timed(times, "finish the dataset (merged already)"):
        finish_dataset(root)
    with timed(times, "open the dataset"):
        assert len(open_dataset(root)) == videos * views
    times["all of a rerun"] = round(sum(times.values()), 3)
    with timed(times, "inspect"):
        assert describe(root).clips == videos * views
    times["peak memory, GiB"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20), 3)
    return times


def unmerged(root: Path, videos: int) -> dict[str, float]:
    """The same dataset before its tables were merged: inspecting it, and merging."""
    times = dict[str, float]()
    with timed(times, "inspect before the tables are merged"):
        assert describe(root).planned_videos == videos
    with timed(times, "merge the tables"):
        finish_dataset(root)
    times["peak memory of both, GiB"] = round(
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20), 3
    )
    return times


def main() -> None:
    """Make the dataset, then measure in processes of their own, so that peaks of memory are theirs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("videos", type=int)
    parser.add_argument("--views", type=int, default=1)
    parser.add_argument("--videos-per-shard", type=int, default=32)
    parser.add_argument("--step", choices=["unmerged", "rerun"], help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step == "unmerged":
        print(json.dumps(unmerged(given.root, given.videos)))
    elif given.step == "rerun":
        print(json.dumps(measure(given.root, given.videos, given.views, given.videos_per_shard)))
    else:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder, "features")
            make(root, given.videos, given.views, given.videos_per_shard)
            for step in ("unmerged", "rerun"):
                command = [sys.executable, __file__, *sys.argv[1:], "--step", step, "--root", str(root)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                for name, value in json.loads(done.stdout).items():
                    print(f"{value:10.3f}  {name}")


if __name__ == "__main__":
    main()
