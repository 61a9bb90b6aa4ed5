"""What does the blocks: in this process, or on processes of a cluster. The same numbers either way."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from deltacache.evaluate.benchmarks.benchmark_inputs import (
    BenchmarkInputs,
    crop_tokens,
    load_inputs,
    patch_tokens,
)
from deltacache.evaluate.benchmarks.cached import CachedFeatures, Item
from deltacache.evaluate.benchmarks.loading import (
    Ahead,
    LoadedSequence,
    crops_bytes,
    load_cached,
    load_sequence,
)
from deltacache.evaluate.benchmarks.pictures import save_picture
from deltacache.evaluate.benchmarks.run import Block, BlockResult
from deltacache.evaluate.benchmarks.sampling import Advance, Sampler, SequenceBatch, Timing, tell_nobody
from deltacache.evaluate.benchmarks.scoring import BatchScorer
from deltacache.evaluate.generators import open_generators
from deltacache.evaluate.settings import BenchmarkEvaluation
from deltacache.evaluate.statistics import Statistic, statistics_table
from deltacache.schemas.benchmarks import BenchmarkName

_CUDA_SEQUENCES = 4  # of a batch


@dataclass(frozen=True)
class WorkerPlan:
    """What a process needs to know to build its worker.

    Attributes:
        caches: feature dataset of each benchmark and number of frames; empty without a cache.
        generated: how many samples each video generator has.
        threads: that read frames.
    """

    settings: BenchmarkEvaluation
    caches: Mapping[tuple[BenchmarkName, int], str]
    generated: Mapping[str, int]
    threads: int

    def worker(self, inputs: BenchmarkInputs, advance: Advance = tell_nobody) -> "BlockWorker":
        """The worker of models that are loaded; ``advance`` is told of sequences as they are done."""
        return BlockWorker(self, inputs, advance)

    def build(self, device: str) -> "BlockWorker":
        """The worker, on its own process."""
        return self.worker(load_inputs(self.settings, device if self.settings.device == "auto" else None))


def batch_sequences(device: torch.device) -> int:
    """Sequences that go through the models together: a few on a GPU; on a CPU one is as fast."""
    return _CUDA_SEQUENCES if device.type == "cuda" else 1


class BlockWorker:
    """Holds the models and scores one block after the other."""

    def __init__(self, plan: WorkerPlan, inputs: BenchmarkInputs, advance: Advance = tell_nobody) -> None:
        self._settings, self._inputs, self._advance = plan.settings, inputs, advance
        self._caches = {key: CachedFeatures(place) for key, place in plan.caches.items()}
        self._generators = open_generators(plan.settings)
        self._generated = plan.generated
        self._frames = Ahead(self._load, plan.threads, self._size)

    def close(self) -> None:
        """End the threads that read frames."""
        self._frames.close()

    def run(self, item: Block, following: Sequence[Block] = ()) -> BlockResult:
        """Score a block; the frames of the ``following`` ones are begun to be read meanwhile."""
        timing, started = Timing(), time.perf_counter()
        scorer = BatchScorer(
            self._inputs.models,
            self._inputs.protocol,
            self._inputs.scorers[item.dataset],
            self._inputs.device,
            timing,
        )
        statistics: list[Statistic] = []
        with TemporaryDirectory() as folder:
            for batch in self._batches(item, following, timing):
                statistics.extend(scorer.score(batch))
                with timing.part("pictures", self._inputs.device):
                    self._keep(batch, item.examples, Path(folder))
                self._advance(len(batch.sequences))
            examples = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
        timing.sequences = len(item.sequences)
        timing.total_s = time.perf_counter() - started
        timing.measure_memory(self._inputs.device)
        return BlockResult(statistics_table(statistics), timing, examples)

    def _load(self, item: Item) -> LoadedSequence:
        benchmark, sequence = item
        labelled = self._inputs.scorers[benchmark] is not None
        cache = self._caches.get((benchmark, len(sequence.frames)))
        if cache is not None:
            loaded = load_cached(benchmark, sequence, cache, labelled=labelled)
        else:
            loaded = load_sequence(benchmark, sequence, self._settings.image_size, labelled=labelled)
        if not self._generators:
            return loaded
        started, sequence = time.perf_counter(), loaded.sequence
        generated = {
            (each.name, horizon): each.load((benchmark, sequence.sequence_id, horizon), loaded.split)
            for each in self._generators
            for horizon in self._settings.horizons
            if self._settings.context + horizon <= len(sequence.frames)
        }
        seconds = loaded.seconds + time.perf_counter() - started
        return replace(loaded, generated=generated, seconds=seconds)

    def _size(self, item: Item) -> int:
        """Bytes of a sequence that is loaded, roughly: cached tokens or crops, and generated frames."""
        benchmark, sequence = item
        settings, protocol = self._settings, self._inputs.protocol
        horizons = sum(settings.context + each <= len(sequence.frames) for each in settings.horizons)
        frame = crops_bytes(sequence, settings.image_size) // len(sequence.frames)
        generated = horizons * sum(self._generated.values()) * frame
        if (benchmark, len(sequence.frames)) not in self._caches:
            return crops_bytes(sequence, settings.image_size) + generated
        return 2 * len(sequence.frames) * protocol.black.numel() * np.dtype(np.float16).itemsize + generated

    def _keep(self, batch: SequenceBatch, wanted: frozenset[str], folder: Path) -> None:
        """Keep those of the sequences that are ``wanted`` for pictures."""
        inputs = self._inputs
        sampler = Sampler(inputs.models, inputs.protocol, inputs.device, Timing())  # all of it is "pictures"
        for at, loaded in enumerate(batch.sequences):
            if loaded.sequence.sequence_id in wanted:
                frames = loaded.crops
                if frames is None:  # a cache does not hold them
                    size = self._settings.image_size
                    frames = load_sequence(batch.dataset, loaded.sequence, size, labelled=False).crops
                save_picture(batch.only(at), frames, inputs, sampler, folder)

    def _batches(self, block: Block, following: Sequence[Block], timing: Timing) -> Iterator[SequenceBatch]:
        """Sequences of equally many frames that follow each other, a few at a time."""
        items: list[Item] = [(block.dataset, sequence) for sequence in block.sequences]
        later: list[Item] = [(each.dataset, sequence) for each in following for sequence in each.sequences]
        most = batch_sequences(self._inputs.device)
        arriving = self._arriving(self._frames.loaded(items, later), timing)
        for _, alike in groupby(arriving, key=lambda loaded: len(loaded.sequence.frames)):
            while sequences := [each for _, each in zip(range(most), alike, strict=False)]:
                yield self._batch(block.dataset, sequences, timing)

    def _arriving(self, loaded: Iterator[LoadedSequence], timing: Timing) -> Iterator[LoadedSequence]:
        while True:
            with timing.part("waiting", torch.device("cpu")):
                each = next(loaded, None)
            if each is None:
                return
            timing.decode_s += each.seconds
            yield each

    def _batch(
        self, dataset: BenchmarkName, sequences: Sequence[LoadedSequence], timing: Timing
    ) -> SequenceBatch:
        first = [0]
        for loaded in sequences:
            first.append(first[-1] + loaded.split.crops)
        with timing.part("backbone", self._inputs.device):
            tokens = torch.cat([self._tokens(loaded) for loaded in sequences])
            generated = tuple(
                {key: self._encoded(crops) for key, crops in loaded.generated.items()} for loaded in sequences
            )
        return SequenceBatch(dataset, tuple(sequences), tokens, tuple(first), generated)

    def _encoded(self, crops: np.ndarray) -> Tensor:
        """Generated frames (S, C, s, s, 3) as (S, C, N, D), rounded as the true ones are with a cache."""
        tokens = crop_tokens(self._inputs, crops)
        return tokens if self._settings.cache is None else tokens.half().float()

    def _tokens(self, loaded: LoadedSequence) -> Tensor:
        """(C, T, N, D) float32 on the device."""
        if loaded.tokens is not None:
            return torch.from_numpy(loaded.tokens).to(self._inputs.device).float()
        assert loaded.crops is not None  # one of the two is there
        return patch_tokens(self._inputs, loaded)
