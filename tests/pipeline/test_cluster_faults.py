"""Faults of workers, through a real Ray: processes that die, errors that come again, workers that do not start."""

import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from small_datasets import BLACK, FRAMES, GRID, HIDDEN, small_card
from upath import UPath
from video_maker import write_video

from deltacache.pipeline.cluster.session import cluster
from deltacache.pipeline.cluster.shards import DecodePlan, Events, _Ahead, run_shards
from deltacache.pipeline.datasets.dataset import finish_dataset, open_dataset, prepare_dataset, write_plan
from deltacache.pipeline.datasets.plan import extend_plan, shard_tasks
from deltacache.pipeline.decoding.work import DecodeSettings
from deltacache.pipeline.inputs.sources import find_videos
from deltacache.pipeline.storage import files as atomic
from deltacache.pipeline.storage.storage import set_patience
from deltacache.pipeline.work.attempts import Attempts, Kind, Work
from deltacache.pipeline.work.placement import DecodeShare, Placement
from deltacache.pipeline.work.shard_work import ShardResult
from deltacache.pipeline.work.workers import ShardWorker, VideoShardWorker
from deltacache.schemas.clips import FeatureClip, PixelClip
from deltacache.schemas.datasets import DatasetCard, SamplingSettings
from deltacache.schemas.errors import DeltacacheError
from deltacache.schemas.jobs import ClusterSettings, DecodeLimits
from shared_ray import SharedRay

SIZE = 32


@dataclass
class StubEncoder:
    """Tokens that are the mean pixel; dies, raises or refuses with videos of certain names.

    ``full`` is a folder of marks: the first six batches in whatever process find no memory.
    """

    dies: tuple[str, ...] = ()
    raises: tuple[str, ...] = ()
    refuses: tuple[str, ...] = ()
    marks: Path | None = None
    full: Path | None = None
    batch_clips: int = 2

    def encode(self, clips: Sequence[PixelClip]) -> list[FeatureClip]:
        if self.full is not None and clips[0].clip_id != "probe-0" and len(list(self.full.iterdir())) < 6:
            (self.full / f"{os.getpid()}-{time.monotonic_ns()}").touch()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")
        for clip in clips:
            if clip.video_uri in self.dies:
                os._exit(3)
            if clip.video_uri in self.raises:
                raise ArithmeticError(f"no tokens of {clip.video_uri}")
            if clip.video_uri in self.refuses:
                raise DeltacacheError("the disk is full")
            if self.marks is not None and clip.clip_id != "probe-0" and clip.view == 0:
                self._die_once(clip)
        shape = (FRAMES, GRID[0] * GRID[1], HIDDEN)
        return [
            FeatureClip(c.clip_id, np.full(shape, c.pixels.mean(), np.float16), c.timestamps_s) for c in clips
        ]

    def _die_once(self, clip: PixelClip) -> None:
        """Die the first time that a clip comes: as if workers were killed at random."""
        assert self.marks is not None
        mark = self.marks / clip.clip_id
        if clip.video_uri.startswith("video-1") and not mark.exists():
            mark.touch()
            os._exit(3)


def build(root: UPath, card: DatasetCard, encoder: StubEncoder) -> ShardWorker:
    return VideoShardWorker(root, card, encoder)


def build_on_a_failing_disk(root: UPath, card: DatasetCard, errors: Path) -> ShardWorker:
    """The first ten shards that are flushed are lost, in whatever process: as with a network disk that is away."""
    plain = atomic.sync

    def sync(path: Path) -> None:
        number = len(list(errors.iterdir()))
        if path.name.endswith(".tar") and number < 10:
            (errors / f"{number}-{os.getpid()}").touch()
            raise OSError(errno.EIO, "Input/output error")
        plain(path)

    atomic.sync = sync
    set_patience(2)
    return build(root, card, StubEncoder())


def build_nothing() -> ShardWorker:
    raise DeltacacheError("the weights are gated")


@pytest.fixture(scope="module")
def placement(shared_ray: SharedRay) -> Iterator[Placement]:
    shared_ray.stop()
    with pytest.MonkeyPatch.context() as patch:
        # Workers import this file, which builds the stub, and what it imports.
        folders = f"{Path(__file__).parent}{os.pathsep}{Path(__file__).parent.parent}"
        patch.setenv("PYTHONPATH", folders, prepend=os.pathsep)
        with cluster(ClusterSettings(decoders=2, encoders=2)) as placement:
            yield placement


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for number in range(6):
        write_video(folder / f"video-{number}.mp4", frames=12)
    return folder


@dataclass
class Run:
    """A small job on the real cluster, with a stub for the encoder."""

    out: Path
    videos: Path
    placement: Placement
    lines: list[str] = field(default_factory=list)

    def __call__(self, make: Callable[[UPath, DatasetCard], Callable[[], ShardWorker]]) -> list[ShardResult]:
        sampling = SamplingSettings(frames=FRAMES, spacing_min_s=0.04, spacing_max_s=0.05)
        card = small_card("features", "webdataset", sampling=sampling, image_size=SIZE)
        root = UPath(self.out)
        prepare_dataset(root, card, BLACK)
        sources = find_videos(str(self.videos), None)
        plan = extend_plan(None, sources, 2, 3)
        write_plan(root, plan)
        decode = DecodePlan(
            DecodeSettings(SIZE, sampling, DecodeLimits()), {s.video_uri: s.path for s in sources}
        )
        tasks = shard_tasks(plan)
        events = Events(line=self.lines.append)
        results = list(
            run_shards(Attempts(tasks, Kind.COMMIT), make(root, card), decode, self.placement, events)
        )
        finish_dataset(root)
        return results

    def alone(self) -> "Run":
        """With one encoder, where nothing depends on another: each imports what takes seconds to import."""
        return replace(self, placement=replace(self.placement, encoders=1))

    def with_encoder(self, encoder: StubEncoder) -> list[ShardResult]:
        return self(lambda root, card: partial(build, root, card, encoder))


@pytest.fixture
def run(tmp_path: Path, videos: Path, placement: Placement) -> Run:
    return Run(tmp_path / "out", videos, placement)


@pytest.mark.parametrize("way", ["dies", "raises"])
def test_the_video_with_which_workers_fail_is_found_and_left_out(run: Run, way: str) -> None:
    run = run if way == "dies" else run.alone()
    results = run.with_encoder(StubEncoder(**{way: ("video-4.mp4",)}))
    dataset = open_dataset(run.out)
    assert sum(result.clips for result in results) == len(dataset) == 10
    assert dataset.failures.to_pylist() == [
        {
            "video_uri": "video-4.mp4",
            "view": None,
            "stage": "encode",
            "reason": "encode_failed",
            "message": dataset.failures["message"][0].as_py(),
        }
    ]
    assert ("ArithmeticError" if way == "raises" else "worker died") in dataset.failures["message"][0].as_py()


def test_workers_that_die_by_chance_cost_nothing(run: Run, tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    run.with_encoder(StubEncoder(marks=marks))
    dataset = open_dataset(run.out)
    assert len(dataset) == 12
    assert dataset.failures.num_rows == 0
    assert list(marks.iterdir())
    assert any("was lost" in line for line in run.lines)


def test_shards_that_a_disk_does_not_take_for_a_while_are_made_again(run: Run, tmp_path: Path) -> None:
    errors = tmp_path / "errors"
    errors.mkdir()
    set_patience(100)
    run.alone()(lambda root, card: partial(build_on_a_failing_disk, root, card, errors))
    assert len(list(errors.iterdir())) >= 10
    assert len(open_dataset(run.out)) == 12
    assert open_dataset(run.out).failures.num_rows == 0
    assert any("is tried again" in line and "Input/output error" in line for line in run.lines)


def test_memory_that_another_program_takes_for_a_while_costs_no_video(run: Run, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    set_patience(100)
    run.alone().with_encoder(StubEncoder(full=full))
    assert len(list(full.iterdir())) >= 6
    assert len(open_dataset(run.out)) == 12
    assert open_dataset(run.out).failures.num_rows == 0
    assert any("is tried again (out of memory on the GPU: " in line for line in run.lines)


def test_what_a_worker_refuses_ends_the_job_with_its_message(run: Run) -> None:
    with pytest.raises(DeltacacheError, match="the disk is full"):
        run.alone().with_encoder(StubEncoder(refuses=("video-2.mp4",)))


def test_an_encoder_that_cannot_be_built_ends_the_job_with_its_message(run: Run) -> None:
    with pytest.raises(DeltacacheError, match="the weights are gated"):
        run.alone()(lambda root, card: build_nothing)


def test_a_fault_of_the_encoder_is_not_blamed_on_videos(run: Run) -> None:
    every = tuple(f"video-{number}.mp4" for number in range(6))
    with pytest.raises(DeltacacheError, match="so the videos are not at fault: ArithmeticError"):
        run.alone().with_encoder(StubEncoder(raises=every))


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        (
            {"gpus_per_encoder": 1.0},
            r"no encoder found room within 3 s \(--wait-for-nodes\): 2 wait for a node with 1 GPU",
        ),
        (
            {"cpus_per_encoder": 1.5},
            r"no CPU to decode on for \d+ s \(--wait-for-nodes\): 1 node has none beside",
        ),
    ],
)
def test_room_that_is_lost_is_waited_for_up_to_the_limit(
    run: Run, monkeypatch: pytest.MonkeyPatch, lost: dict[str, float], said: str
) -> None:
    """As after the nodes with GPUs, or with CPUs, have gone: encoders that fit nowhere, or that leave no CPU."""
    monkeypatch.setattr("deltacache.pipeline.cluster.shards.SAY_S", 0.5)
    run.placement = replace(run.placement, wait_s=3.0, **lost)
    if "cpus_per_encoder" in lost:  # whose processes may take longer to start than the limit
        monkeypatch.setattr(
            "deltacache.pipeline.cluster.shards._Pool._check_somebody_is_there", lambda self: None
        )
    with pytest.raises(DeltacacheError, match=said):
        run.with_encoder(StubEncoder())


def test_decoding_runs_ahead_within_its_share_and_in_the_plans_order(
    videos: Path, placement: Placement
) -> None:
    """Three shards of two videos, one a group: two at once, four in flight; what is begun has the right of way."""
    sources = find_videos(str(videos), None)
    located = {source.video_uri: source.path for source in sources}
    shards = [Work(Kind.COMMIT, task) for task in shard_tasks(extend_plan(None, sources, 1, 2))]
    sampling = SamplingSettings(frames=FRAMES, spacing_min_s=0.04, spacing_max_s=0.05)
    ahead = _Ahead(DecodeSettings(SIZE, sampling, DecodeLimits()), 1, DecodeShare(at_once=2, in_flight=4))

    def in_flight() -> int:
        return sum(len(shard.asked) for shard in ahead._shards.values())

    for ticket, work in enumerate(shards):
        ahead.add(ticket, work, located)
    assert in_flight() == 2  # no more are decoded at once
    decoded = []
    for ticket, work in enumerate(shards):
        for group in ahead.groups(ticket):
            decoded += [source.video_uri for source in group.sources]
            assert in_flight() <= 4
            assert len(ahead._running) <= 2
        if ticket == 0:
            # One that was never expected, as when videos are tried alone, gets its group although all are taken.
            ahead.add(9, replace(work, alone=True), located)
            assert [source.video_uri for group in ahead.groups(9) for source in group.sources] == decoded
    assert decoded == [video.video_uri for work in shards for video in work.task.videos]
    assert in_flight() == 0
    ahead.add(1, shards[1], located)  # overtaken by its own end: nothing is decoded for nobody
    assert in_flight() == 0
