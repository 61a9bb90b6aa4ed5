"""Patch tokens of a benchmark's crops as a feature dataset: a clip is one sequence under one crop (its view).

Sequences of different lengths lie in different datasets below the cache's folder. The name of each follows from
all that determines its numbers, so that one folder serves any number of evaluations.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deltacache.evaluate.benchmarks.benchmark_inputs import (
    BenchmarkInputs,
    feature_card,
    load_inputs,
    patch_tokens,
)
from deltacache.evaluate.benchmarks.loading import Ahead, LoadedSequence, crops_bytes, load_sequence
from deltacache.evaluate.benchmarks.sampling import Advance, tell_nobody
from deltacache.evaluate.settings import BenchmarkEvaluation
from deltacache.pipeline.benchmarks.frames import frame_shape, split_of
from deltacache.pipeline.datasets.dataset import open_dataset, write_shard
from deltacache.pipeline.datasets.plan import PlannedVideo, ShardTask, shard_id_of
from deltacache.pipeline.datasets.receipts import SourceRecord, StoredClip
from deltacache.pipeline.storage.storage import in_threads
from deltacache.schemas.benchmarks import BenchmarkName, LabelledSequence
from deltacache.schemas.clips import FeatureClip, clip_id_of
from deltacache.schemas.datasets import DatasetCard, fingerprint_of, sides

_SHARD_SEQUENCES = 32
_STAT_THREADS = 8

Item = tuple[BenchmarkName, LabelledSequence]


@dataclass(frozen=True)
class CachePlan:
    """One dataset of the cache.

    Attributes:
        shards: with the sequences of each, in the same order.
    """

    benchmark: BenchmarkName
    frames: int
    root: Path
    card: DatasetCard
    shards: tuple[tuple[ShardTask, tuple[LabelledSequence, ...]], ...]

    @property
    def shard_ids(self) -> frozenset[str]:
        """Of all shards."""
        return frozenset(task.shard_id for task, _ in self.shards)

    def work(self, missing: Set[str]) -> list["CacheShard"]:
        """What is to be done for the shards of these ids."""
        return [
            CacheShard(self.benchmark, str(self.root), self.card, task, sequences)
            for task, sequences in self.shards
            if task.shard_id in missing
        ]


@dataclass(frozen=True)
class CacheShard:
    """One shard to write."""

    benchmark: BenchmarkName
    root: str
    card: DatasetCard
    task: ShardTask
    sequences: tuple[LabelledSequence, ...]


class CachedFeatures:
    """Reads what was kept."""

    def __init__(self, root: str) -> None:
        self._dataset = open_dataset(root, "features")
        self._rows = {clip_id: row for row, clip_id in enumerate(self._dataset.clip_ids)}
        self.image_size = sides(self._dataset.card.image_size)[0]  # crops are square

    def read(self, sequence_id: str, crop: int) -> np.ndarray:
        """(T, N, D) float16.

        Raises:
            DatasetError: the shard is damaged.
        """
        frames = self._dataset.card.sampling.frames
        return self._dataset.read_frames(self._rows[clip_id_of(sequence_id, crop)], 0, frames)


def plan_caches(
    settings: BenchmarkEvaluation,
    inputs: BenchmarkInputs,
    found: dict[BenchmarkName, tuple[LabelledSequence, ...]],
) -> list[CachePlan]:
    """A dataset for each benchmark and number of frames."""
    assert settings.cache is not None
    plans = []
    for benchmark, sequences in found.items():
        by_length: dict[int, list[LabelledSequence]] = defaultdict(list)
        for each in sequences:
            by_length[len(each.frames)].append(each)
        for frames, alike in by_length.items():
            card = feature_card(settings, inputs.backbone, inputs.black, frames, benchmark, inputs.device)
            videos = _videos(benchmark, settings, alike)
            name = _name(benchmark, frames, card, videos)
            shards = tuple(_shards(videos, alike))
            plans.append(CachePlan(benchmark, frames, settings.cache / name, card, shards))
    return plans


def _videos(
    benchmark: BenchmarkName, settings: BenchmarkEvaluation, sequences: Sequence[LabelledSequence]
) -> list[PlannedVideo]:
    root = settings.data[benchmark]

    def planned(sequence: LabelledSequence) -> PlannedVideo:
        uri = f"{benchmark}/{Path(sequence.frames[-1]).relative_to(root).as_posix()}"
        size = sum(Path(frame).stat().st_size for frame in sequence.frames)
        crops = split_of(*frame_shape(benchmark, sequence.frames[-1]), settings.image_size).crops
        return PlannedVideo(sequence.sequence_id, uri, size, 0, crops)

    return list(in_threads(planned, sequences, threads=_STAT_THREADS))


def _name(benchmark: BenchmarkName, frames: int, card: DatasetCard, videos: Sequence[PlannedVideo]) -> str:
    content = [[each.video_id, each.size_bytes, each.views] for each in videos]
    key = fingerprint_of({"features": card.features_fingerprint, "sequences": content})
    return f"{benchmark}-{frames}-{key[:8]}"


def _shards(
    videos: Sequence[PlannedVideo], sequences: Sequence[LabelledSequence]
) -> Iterator[tuple[ShardTask, tuple[LabelledSequence, ...]]]:
    for ordinal, start in enumerate(range(0, len(videos), _SHARD_SEQUENCES)):
        part = slice(start, start + _SHARD_SEQUENCES)
        planned = tuple(videos[part])
        yield ShardTask(shard_id_of(ordinal, planned), planned), tuple(sequences[part])


@dataclass(frozen=True)
class CacheWorkerPlan:
    """What a process needs to know to build a ``CacheWorker``."""

    settings: BenchmarkEvaluation
    threads: int

    def worker(self, inputs: BenchmarkInputs, advance: Advance = tell_nobody) -> "CacheWorker":
        """The worker of models that are loaded; ``advance`` is told of sequences as they are done."""
        return CacheWorker(self, inputs, advance)

    def build(self, device: str) -> "CacheWorker":
        """The worker, on its own process."""
        return self.worker(load_inputs(self.settings, device if self.settings.device == "auto" else None))


class CacheWorker:
    """Computes the patch tokens of one shard after the other and commits them."""

    def __init__(
        self, plan: CacheWorkerPlan, inputs: BenchmarkInputs, advance: Advance = tell_nobody
    ) -> None:
        self._settings, self._inputs, self._advance = plan.settings, inputs, advance
        size = plan.settings.image_size
        self._frames = Ahead(self._load, plan.threads, lambda item: crops_bytes(item[1], size))

    def close(self) -> None:
        """End the threads that read frames."""
        self._frames.close()

    def run(self, item: CacheShard, following: Sequence[CacheShard] = ()) -> None:
        """Write a shard."""
        wanted: list[Item] = [(item.benchmark, each) for each in item.sequences]
        later: list[Item] = [(shard.benchmark, each) for shard in following for each in shard.sequences]
        loaded = self._frames.loaded(wanted, later)
        clips = (
            clip
            for each, video in zip(loaded, item.task.videos, strict=True)
            for clip in self._clips(item, each, video)
        )
        sources = [_source(each, video) for each, video in zip(item.sequences, item.task.videos, strict=True)]
        write_shard(Path(item.root), item.card, item.task.shard_id, clips, [], sources)

    def _load(self, key: Item) -> LoadedSequence:
        return load_sequence(*key, self._settings.image_size, labelled=False)

    def _clips(self, shard: CacheShard, loaded: LoadedSequence, video: PlannedVideo) -> Iterator[StoredClip]:
        tokens = patch_tokens(self._inputs, loaded).half().cpu().numpy()
        shape = frame_shape(shard.benchmark, loaded.sequence.frames[-1])
        times = np.arange(tokens.shape[1]) * loaded.sequence.spacing_s
        for crop in range(loaded.split.crops):
            name = clip_id_of(video.video_id, crop)
            yield StoredClip(
                clip=FeatureClip(name, tokens[crop], times.astype(np.float32)),
                video_uri=video.video_uri,
                view=crop,
                frame_indices=tuple(range(tokens.shape[1])),
                crop=loaded.split.box(crop, *shape),
                flip=False,
                decoder="opencv",
                duplicate_frames=0,
            )
        self._advance(1)


def _source(sequence: LabelledSequence, video: PlannedVideo) -> SourceRecord:
    newest = max(Path(frame).stat().st_mtime_ns for frame in sequence.frames)
    return SourceRecord(
        video.video_id, video.video_uri, video.size_bytes, video.first_view, video.views, str(newest), ""
    )
