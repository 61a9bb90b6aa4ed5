"""What finishing and rerunning cost on the dataset's side: python benchmarks/finished_dataset.py VIDEOS.

Simulates plan and receipts of a feature dataset of so many videos (no shard data: nothing reads them) and folds
the receipts as extract-features does while it runs. Then, each in a process of its own, it does what extract-features
does before the first shard, after the last one, and when it is run again, and times each step. The source's listing
is not counted: sources are drawn one by one as they are asked for.

``--folded`` makes millions of clips in minutes: parts are drawn instead of folded, and the receipts of their shards
are empty files, which nothing could read.

Requests of a rerun to an object store: tests/pipeline/test_remote_storage.py counts them at its server.
"""

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import pyarrow as pa

from deltacache.pipeline.datasets.changes import changed_videos, describe, same_videos
from deltacache.pipeline.datasets.dataset import finish_dataset, open_dataset, prepare_dataset
from deltacache.pipeline.datasets.plan import PlannedShards, ShardTask, grow_plan, open_plan
from deltacache.pipeline.datasets.receipts import (
    RECEIPTS,
    SHARDS,
    FileRecord,
    Receipt,
    SourceRecord,
    receipt_bytes,
    receipt_path,
)
from deltacache.pipeline.datasets.writing import (
    PARTS,
    SHARDS_A_PART,
    Folding,
    checked_receipts,
    finished_summary,
    part_name,
)
from deltacache.pipeline.inputs.sources import VideoSource
from deltacache.pipeline.storage.files import crc32c_of_npy, sealed_table
from deltacache.pipeline.storage.storage import dataset_root
from deltacache.schemas.clips import clip_id_of
from deltacache.schemas.datasets import BackboneCard, DatasetCard, SamplingSettings
from deltacache.schemas.tables import FAILURES_SCHEMA, INDEX_SCHEMA, PART_SCHEMA, SOURCES_SCHEMA

FRAMES, GRID, HIDDEN = 8, (16, 16), 768
Times = dict[str, tuple[float, ...]]
"""Of each step wall-clock and processor seconds; of memory GiB."""
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


class Sources(Collection[VideoSource]):
    """What ``find_videos`` gives for a folder of so many videos, made as it is asked for."""

    def __init__(self, videos: int) -> None:
        self._videos = videos

    def __len__(self) -> int:
        return self._videos

    def __contains__(self, video: object) -> bool:
        return any(video == each for each in self)

    def __iter__(self) -> Iterator[VideoSource]:
        for number in range(self._videos):
            name = f"class-{number // 15_000:03d}/clip_{number:09d}_000010.mp4"
            yield VideoSource(
                video_id=f"clip_{number:09d}_000010-{number:010x}",
                video_uri=name,
                path="/videos",
                size_bytes=1_000_000 + len(name),
                version="1700000000000000000",
            )


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


def drawn_part(tasks: list[ShardTask]) -> pa.Table:
    """A part of these shards as folding their receipts would make it."""
    rng = np.random.default_rng(int(tasks[0].shard_id[:5]))
    videos = [(task.shard_id, video) for task in tasks for video in task.videos]
    rows = [(shard, video, view) for shard, video in videos for view in range(video.views)]
    row_starts = np.cumsum([0, *(sum(video.views for video in task.videos) for task in tasks)])
    count = len(rows)
    starts = pa.array(np.arange(0, (count + 1) * FRAMES, FRAMES, dtype=np.int32))
    times = np.sort(rng.random((count, FRAMES), np.float32) * 2, axis=1)
    clips = pa.StructArray.from_arrays(
        [
            pa.array([clip_id_of(video.video_id, view) for _, video, view in rows]),
            pa.array([video.video_uri for _, video, _ in rows]),
            pa.array([view for _, _, view in rows], pa.int32()),
            pa.array([shard for shard, _, _ in rows]),
            pa.array(np.arange(count) - np.repeat(row_starts[:-1], np.diff(row_starts)), pa.int32()),
            pa.ListArray.from_arrays(starts, pa.array((times * 30).astype(np.int32).reshape(-1))),
            pa.ListArray.from_arrays(starts, pa.array(times.reshape(-1))),
            pa.ListArray.from_arrays(
                pa.array(np.arange(0, (count + 1) * 4, 4, dtype=np.int32)),
                pa.array(rng.integers(0, 300, count * 4).astype(np.int32)),
            ),
            pa.array(rng.random(count) < 0.5),
            pa.array(["decord-seek"] * count),
            pa.array(np.zeros(count, np.int32)),
            pa.array(rng.integers(0, 1 << 32, count).astype(np.uint32)),
        ],
        fields=list(INDEX_SCHEMA),
    )
    sources = pa.StructArray.from_arrays(
        [
            pa.array([shard for shard, _ in videos]),
            pa.array([video.video_id for _, video in videos]),
            pa.array([video.video_uri for _, video in videos]),
            pa.array([video.size_bytes for _, video in videos]),
            pa.array(["1700000000000000000"] * len(videos)),
            pa.array([hashlib.sha256(video.video_uri.encode()).hexdigest() for _, video in videos]),
        ],
        fields=list(SOURCES_SCHEMA),
    )
    none = pa.StructArray.from_arrays(
        [pa.array([], field.type) for field in FAILURES_SCHEMA], fields=list(FAILURES_SCHEMA)
    )
    source_starts = np.cumsum([0, *(len(task.videos) for task in tasks)])
    return pa.Table.from_arrays(
        [
            pa.array([task.shard_id for task in tasks]),
            pa.array(np.diff(row_starts) * FRAMES * BLACK.nbytes),
            pa.ListArray.from_arrays(pa.array(row_starts, pa.int32()), clips),
            pa.ListArray.from_arrays(pa.array([0] * (len(tasks) + 1), pa.int32()), none),
            pa.ListArray.from_arrays(pa.array(source_starts, pa.int32()), sources),
        ],
        schema=PART_SCHEMA,
    )


def make(root: Path, videos: int, views: int, videos_per_shard: int, folded: bool) -> Times:
    """Write the dataset, all but its shards and tables, as extract-features would."""
    times = Times()
    prepare_dataset(root, card(), BLACK)
    with timed(times, "plan all videos, once"):
        plan = grow_plan(root, open_plan(root), Sources(videos), views, videos_per_shard)
        shards = plan.only({*plan.shard_ids})
    times["peak memory of planning, GiB"] = peak_gib()
    if folded:
        draw(root, shards)
        return times
    receipts = partial(checked_receipts, root, card=card())
    with (
        timed(times, "write and fold the receipts (while a job runs)"),
        Folding(root, plan.shard_ids, shards.clips(), receipts) as folding,
    ):
        for task in shards:
            receipt_path(root, task.shard_id).write_bytes(receipt_bytes(receipt_of(task, card().fingerprint)))
            folding.committed(task.shard_id)
    times["peak memory of folding, GiB"] = peak_gib()
    return times


def draw(root: Path, shards: PlannedShards) -> None:
    """Parts and empty receipts; real receipts of the shards at the end that are too few for a part."""
    (root / PARTS).mkdir()
    for name, group in groupby(shards, key=lambda task: part_name(task.shard_id)):
        tasks = list(group)
        for task in tasks:
            content = (
                b"" if len(tasks) == SHARDS_A_PART else receipt_bytes(receipt_of(task, card().fingerprint))
            )
            receipt_path(root, task.shard_id).write_bytes(content)
        if len(tasks) == SHARDS_A_PART:
            with sealed_table(root / PARTS / name, PART_SCHEMA) as written:
                written.add(drawn_part(tasks))


@contextmanager
def timed(times: Times, step: str) -> Iterator[None]:
    """Note the seconds of the block, and those of computing on all its threads."""
    start, computed = time.perf_counter(), time.process_time()
    yield
    times[step] = (time.perf_counter() - start, time.process_time() - computed)


def peak_gib() -> tuple[float]:
    """Of this process so far."""
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20),)


def finish(root: Path, videos: int, views: int) -> Times:
    """The end of a first run."""
    times = Times()
    with timed(times, "inspect before the tables are merged"):
        assert describe(root).planned_videos == videos
    times["peak memory of that, GiB"] = peak_gib()
    with timed(times, "finish: merge the tables"):
        assert finish_dataset(root).clips == videos * views
    times["peak memory of finishing, GiB"] = peak_gib()
    return times


def rerun(root: Path, videos: int, views: int) -> Times:
    """The same command again: nothing is new."""
    times, place = Times(), dataset_root(root)
    with timed(times, "prepare the dataset"):
        prepare_dataset(root, card(), BLACK)
    with timed(times, "open the plan and tables.json"):
        plan = open_plan(root)
        held = finished_summary(root, plan)
        assert held is not None
    with timed(times, "compare with what was found"):
        assert same_videos(place, plan, held, Sources(videos), views)
    whole = [sum(each) for each in zip(*times.values(), strict=True)]
    with timed(times, "of that, drawing the sources"):
        rest = iter(Sources(videos))
        while list(islice(rest, 1 << 16)):
            pass
    drawing = times["of that, drawing the sources"]
    times["all of a rerun, sources not counted"] = tuple(a - b for a, b in zip(whole, drawing, strict=True))
    times["peak memory of a rerun, GiB"] = peak_gib()
    return times


def grown(root: Path, videos: int, views: int) -> Times:
    """The same command with one video more: all that is compared and planned before work begins."""
    times, place, sources = Times(), dataset_root(root), Sources(videos + 1)
    plan = open_plan(root)
    held = finished_summary(root, plan)
    assert held is not None
    assert not same_videos(place, plan, held, sources, views)
    with timed(times, "one more video: compare all versions"):
        assert changed_videos(sources, place, plan, held, print) == []
    with timed(times, "one more video: extend and write the plan"):
        assert len(grow_plan(root, plan, sources, views, 32).shard_ids) == len(plan.shard_ids) + 1
    times["peak memory of that, GiB"] = peak_gib()
    return times


def opened(root: Path, videos: int, views: int) -> Times:
    """What readers of a finished dataset do first."""
    times = Times()
    with timed(times, "open_dataset"):
        dataset = open_dataset(root)
    assert len(dataset) == videos * views
    times["memory of that, GiB"] = peak_gib()
    with timed(times, "inspect"):
        assert describe(root).clips == videos * views
    with timed(times, "times of all clips"):
        assert dataset.timestamps_s.shape == (videos * views, FRAMES)
    with timed(times, "ids of all clips, as for reading one"):
        dataset._clip_id(0)
    times["peak memory with these, GiB"] = peak_gib()
    return times


STEPS = {"make": make, "finish": finish, "open": opened, "rerun": rerun, "grown": grown}


def main() -> None:
    """Make the dataset, then measure in processes of their own, so that peaks of memory are theirs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("videos", type=int)
    parser.add_argument("--views", type=int, default=1)
    parser.add_argument("--videos-per-shard", type=int, default=32)
    parser.add_argument("--folded", action="store_true", help="draw parts instead of folding receipts")
    parser.add_argument("--folder", type=Path, help="where the dataset is kept; default: a temporary folder")
    parser.add_argument("--step", choices=STEPS, help="one step alone, on a dataset in --folder")
    given = parser.parse_args()
    if given.step is not None:
        root, sizes = given.folder / "features", [given.videos, given.views]
        if given.step == "make":
            sizes += [given.videos_per_shard, given.folded]
        print(json.dumps(STEPS[given.step](root, *sizes)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        for step in STEPS:
            command = [sys.executable, __file__, *sys.argv[1:], "--step", step, "--folder", str(folder)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            for name, values in json.loads(done.stdout).items():
                print("".join(f"{value:10.2f}" for value in values).ljust(22), name, flush=True)
        held = {
            name: sum(path.stat().st_size for path in (folder / "features").glob(pattern))
            for name, pattern in {
                "plan": "plan.parquet",
                "receipts": f"{RECEIPTS}/*",
                "parts": "parts/*",
                "tables": "[ifs]*.parquet",
            }.items()
        }
        print(*(f"{size / 1e6:10.1f}             MB of {name}" for name, size in held.items()), sep="\n")


if __name__ == "__main__":
    main()
