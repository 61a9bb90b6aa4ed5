"""An evaluation of benchmarks whose inputs have been opened and checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from deltacache import __version__
from deltacache.evaluate import opening
from deltacache.evaluate.benchmarks.blocks import Block, blocks_of
from deltacache.evaluate.benchmarks.opening import Inputs, load_inputs
from deltacache.evaluate.examples import spread
from deltacache.evaluate.generators.futures import GeneratedFutures, open_generators
from deltacache.evaluate.rows import RunStamp
from deltacache.evaluate.settings import BenchmarkEvaluation
from deltacache.models.devices import choose_device
from deltacache.pipeline.benchmarks.layouts import benchmark_sequences
from deltacache.pipeline.benchmarks.windows import FrameCounts, SequenceSet
from deltacache.pipeline.encoders import resolve_precision
from deltacache.pipeline.parallel import in_threads
from deltacache.schemas.benchmarks import BenchmarkName, LabelledSequence
from deltacache.schemas.fingerprints import fingerprint_of

_STAT_THREADS = 8
_NOT_NUMBERS = {"out", "data", "heads", "clips", "tokenizer", "worlds", "backbone", "kitti_split", "cache"}
_NOT_NUMBERS |= {"workers", "ray_address", "device", "rgb_decoder"}


@dataclass(frozen=True)
class BenchmarkRun:
    """What is to be done.

    Attributes:
        settings: with ``auto`` resolved, so that every process computes alike.
        sequences: of each benchmark, in order.
        clips: the feature dataset that goes into the same tables.
        generated: how many samples each video generator has.
        notes: what was left out, in words.
    """

    settings: BenchmarkEvaluation
    inputs: Inputs
    sequences: dict[BenchmarkName, tuple[LabelledSequence, ...]]
    blocks: tuple[Block, ...]
    clips: opening.Run | None
    generated: Mapping[str, int]
    notes: tuple[str, ...]
    run_id: str
    created_at: datetime

    @property
    def sequence_count(self) -> int:
        """Of all benchmarks."""
        return sum(map(len, self.sequences.values()))

    def samples_of(self, method: str) -> int:
        """How many futures of each sequence a method has."""
        return self.generated.get(method, self.settings.samples)

    def stamp(self, dataset: str) -> RunStamp:
        """Columns that all rows of one benchmark share."""
        backbone = self.inputs.backbone
        return RunStamp(
            run_id=self.run_id,
            dataset=dataset,
            context=self.settings.context,
            image_size=self.settings.image_size,
            seed=self.settings.seed,
            backbone=f"{backbone.id}@{backbone.weights_sha256[:16]}",
            code_version=__version__,
            created_at=self.created_at,
        )


def open_benchmarks(settings: BenchmarkEvaluation) -> BenchmarkRun:
    """Open what ``settings`` names; see ``engine.evaluate_benchmarks`` for what is refused."""
    precision = resolve_precision(choose_device(settings.device), settings.precision)
    settings = settings.model_copy(update={"precision": precision})
    counts = FrameCounts(settings.frame_counts)
    found: dict[BenchmarkName, SequenceSet] = {
        name: benchmark_sequences(name, root, counts, settings.kitti_split if name == "kitti" else None)
        for name, root in settings.data.items()
    }
    sequences: dict[BenchmarkName, tuple[LabelledSequence, ...]] = {
        name: each.sequences for name, each in found.items()
    }
    generators = open_generators(settings)
    for each in generators:
        for name, of_benchmark in sequences.items():
            each.check_covers(name, of_benchmark, settings.context, settings.horizons)
    clips = opening.open_run(settings.clips) if settings.clips else None
    inputs = load_inputs(settings, "cpu" if settings.workers else None)
    blocks = tuple(
        block
        for name, each in sequences.items()
        for block in blocks_of(name, each, _examples(each, settings.examples))
    )
    return BenchmarkRun(
        settings=settings,
        inputs=inputs,
        sequences=sequences,
        blocks=blocks,
        clips=clips,
        generated={each.name: each.samples for each in generators},
        notes=tuple(_notes(settings, found)) + (clips.notes if clips else ()),
        run_id=_run_id(settings, inputs, sequences, clips, generators),
        created_at=datetime.now(UTC),
    )


def _examples(sequences: Sequence[LabelledSequence], count: int) -> frozenset[str]:
    """Evenly over the sequences that go furthest."""
    longest = max(len(each.frames) for each in sequences)
    rows = [row for row, each in enumerate(sequences) if len(each.frames) == longest]
    return frozenset(sequences[row].sequence_id for row in spread(rows, count))


def _notes(settings: BenchmarkEvaluation, found: dict[BenchmarkName, SequenceSet]) -> list[str]:
    notes = []
    for name, each in found.items():
        notes.extend(f"{name}: {count} dropped: {reason}" for reason, count in each.dropped.items())
        for horizon, frames in zip(settings.horizons, settings.frame_counts, strict=True):
            short = sum(len(sequence.frames) < frames for sequence in each.sequences)
            if short:
                notes.append(
                    f"{name}: {short} of {len(each.sequences)} sequences have fewer than {frames} frames: not "
                    f"scored at horizon {horizon}"
                )
        if name not in settings.heads:
            notes.append(f"{name}: no head, so features alone are scored")
    return notes


def _run_id(
    settings: BenchmarkEvaluation,
    inputs: Inputs,
    sequences: dict[BenchmarkName, tuple[LabelledSequence, ...]],
    clips: opening.Run | None,
    generators: Sequence[GeneratedFutures],
) -> str:
    """Follows from the numbers that went in: not from paths, the workers, the device or the clock."""
    models = inputs.models
    made_from = {
        "settings": settings.model_dump(mode="json", exclude=_NOT_NUMBERS),
        "backbone": inputs.backbone.weights_sha256,
        "rounded_to_float16": settings.cache is not None,
        "heads": inputs.heads,
        "tokenizer": models.tokenizer.fingerprint if models.tokenizer else None,
        "worlds": [world.method.world for world in models.worlds],
        "data": {name: _content(each) for name, each in sequences.items()},
        "clips": clips.stamp.run_id if clips else None,
        "generated": {each.name: fingerprint_of({"files": each.content}) for each in generators},
        "code_version": __version__,
    }
    return fingerprint_of(made_from)


def _content(sequences: Sequence[LabelledSequence]) -> str:
    """Of names and sizes of all files: reading them whole would take as long as the evaluation."""

    def sizes(each: LabelledSequence) -> list[object]:
        files = [Path(path) for path in (*each.frames, each.label)]
        return [each.sequence_id, *([path.name, path.stat().st_size] for path in files)]

    return fingerprint_of({"files": list(in_threads(sizes, sequences, threads=_STAT_THREADS))})
