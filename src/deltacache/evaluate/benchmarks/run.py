"""An evaluation of benchmarks whose inputs have been opened and checked."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from deltacache import __version__
from deltacache.evaluate.benchmarks.benchmark_inputs import BenchmarkInputs, load_inputs
from deltacache.evaluate.benchmarks.sampling import Timing, timing_from
from deltacache.evaluate.clips.run import ClipRun
from deltacache.evaluate.clips.run import open_run as open_clip_run
from deltacache.evaluate.examples import examples_of
from deltacache.evaluate.generators import Answers, open_generators
from deltacache.evaluate.output import (
    EXAMPLES,
    PARTS,
    STATISTICS,
    TABLES_VERSION,
    TIMING,
    ModelRecord,
    RunStamp,
)
from deltacache.evaluate.settings import BenchmarkEvaluation
from deltacache.models.devices import choose_device
from deltacache.pipeline.benchmarks.layouts import benchmark_sequences
from deltacache.pipeline.benchmarks.windows import FrameCounts, SequenceSet
from deltacache.pipeline.storage.files import remove, remove_leftovers, replacing_folder
from deltacache.pipeline.storage.storage import in_threads
from deltacache.pipeline.work.encoders import resolve_precision
from deltacache.schemas.benchmarks import BenchmarkName, LabelledSequence
from deltacache.schemas.datasets import fingerprint_of
from deltacache.schemas.errors import DatasetError
from deltacache.schemas.texts import counted

# ----------------------------------------------------------------------------------------------------
# Fixed blocks of sequences: the unit of work, of resuming and of splitting over processes.
#
# A finished block is a folder ``parts/<dataset>-<number>`` in the output: its sums, its timing and its
# examples, written whole. What blocks there are depends on the sequences alone.
# ----------------------------------------------------------------------------------------------------


BLOCK_SEQUENCES = 16


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive sequences of one benchmark; ``examples`` are the ids of those that are kept for pictures."""

    dataset: BenchmarkName
    number: int
    sequences: tuple[LabelledSequence, ...]
    examples: frozenset[str]

    @property
    def name(self) -> str:
        """Safe as a folder's name."""
        return f"{self.dataset}-{self.number:05d}"


@dataclass(frozen=True, slots=True)
class BlockResult:
    """What a worker hands over. ``examples``: contents of files by name."""

    statistics: pa.Table
    timing: Timing
    examples: dict[str, bytes]


def blocks_of(
    dataset: BenchmarkName, sequences: Sequence[LabelledSequence], examples: frozenset[str]
) -> Iterator[Block]:
    """Cut the sequences into blocks, in order."""
    for number, start in enumerate(range(0, len(sequences), BLOCK_SEQUENCES)):
        part = tuple(sequences[start : start + BLOCK_SEQUENCES])
        kept = frozenset(each.sequence_id for each in part) & examples
        yield Block(dataset, number, part, kept)


class FinishedBlocks:
    """The finished blocks of one run. Those of another run in the same folder are refused."""

    def __init__(self, out: Path, run_id: str) -> None:
        self._folder = out / PARTS / run_id
        self._out, self._run_id = out, run_id

    def prepare(self) -> None:
        """Make the folder.

        Raises:
            DatasetError: an unfinished evaluation of other inputs is there.
        """
        others = (
            [path.name for path in self._folder.parent.iterdir() if path.name != self._run_id]
            if self._folder.parent.is_dir()
            else []
        )
        if others:
            raise DatasetError(
                f"{self._out} holds an unfinished evaluation of other inputs ({others[0]}; this one is "
                f"{self._folder.name}): choose another folder, or remove {self._folder.parent}"
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self._folder)

    def has(self, block: Block) -> bool:
        """Whether the block is finished."""
        return (self._folder / block.name).is_dir()

    def write(self, block: Block, result: BlockResult) -> None:
        """Keep a finished block, whole or not at all."""
        with replacing_folder(self._folder / block.name) as folder:
            pq.write_table(result.statistics, folder / STATISTICS)
            (folder / TIMING).write_text(json.dumps(asdict(result.timing)))
            (folder / EXAMPLES).mkdir()
            for name, content in result.examples.items():
                (folder / EXAMPLES / name).write_bytes(content)

    def statistics(self, block: Block) -> pa.Table:
        """The sums of a finished block."""
        return pq.read_table(self._folder / block.name / STATISTICS)

    def timing(self, block: Block) -> Timing:
        """What a finished block took."""
        return timing_from(json.loads((self._folder / block.name / TIMING).read_bytes()))

    def examples(self, block: Block) -> list[Path]:
        """Files of the examples of a finished block."""
        return sorted((self._folder / block.name / EXAMPLES).iterdir())

    def remove(self) -> None:
        """Remove all blocks: their tables are made."""
        remove(self._folder.parent)


# ----------------------------------------------------------------------------------------------------
# What labelled sequences are, for the id of a run: another label gives another id.
# ----------------------------------------------------------------------------------------------------


_THREADS = 16


def content_of(
    sequences: Sequence[LabelledSequence], labels_of: Callable[[LabelledSequence], Iterable[str | Path]]
) -> str:
    """Of names and sizes of all frames, which would take long to read, and of the bytes of the labels that are used."""

    def content(each: LabelledSequence) -> list[object]:
        frames = [Path(path) for path in each.frames]
        labels = [sha256(Path(path).read_bytes()).hexdigest() for path in labels_of(each)]
        return [each.sequence_id, *([path.name, path.stat().st_size] for path in frames), *labels]

    return fingerprint_of({"files": list(in_threads(content, sequences, threads=_THREADS))})


# ----------------------------------------------------------------------------------------------------
# What a reader of the numbers should know: what was left out, and what the heads were trained on.
# ----------------------------------------------------------------------------------------------------


Found = Mapping[BenchmarkName, SequenceSet]

_GROUPS: Mapping[BenchmarkName, str] = MappingProxyType(
    {"vspw": "videos", "cityscapes": "cities", "kitti": "drives"}
)
_FULL_SETS: Mapping[BenchmarkName, tuple[int, str]] = MappingProxyType(
    {"cityscapes": (500, "Cordts et al. 2016")}
)
"""Labelled sequences of the published set, where it is published how many these are."""


def notes_of(settings: BenchmarkEvaluation, found: Found, inputs: BenchmarkInputs) -> list[str]:
    """In words, for the terminal, ``notes.json`` and the report."""
    notes = [*inputs.models.notes]
    frames = dict(zip(settings.horizons, settings.frame_counts, strict=True))
    for name, each in found.items():
        notes.extend(sequence_notes(name, name, each, frames))
        if name not in settings.heads:
            notes.append(f"{name}: no head, so features alone are scored")
        else:
            notes.extend(head_notes(name, inputs.heads[name], inputs.trained_on.get(name, {})))
    return notes


def counts_of(found: Found) -> list[str]:
    """How much of each benchmark there is."""
    return [
        f"{name}: {counted(len(each.sequences), 'sequence')} with one labelled target each, of "
        f"{len({sequence.group for sequence in each.sequences})} {_GROUPS[name]}"
        for name, each in found.items()
    ]


def sequence_notes(
    dataset: str, benchmark: BenchmarkName, found: SequenceSet, frames: Mapping[int, int]
) -> Iterator[str]:
    """What was left out of a benchmark, and whether it is the published set.

    Args:
        dataset: its name in the tables.
        frames: that a sequence needs, by horizon.
    """
    count = len(found.sequences)
    yield from (f"{dataset}: {number} dropped: {reason}" for reason, number in found.dropped.items())
    for horizon, needed in frames.items():
        short = sum(len(sequence.frames) < needed for sequence in found.sequences)
        if short:
            yield (
                f"{dataset}: {short} of {count} sequences have fewer than {counted(needed, 'frame')}: not "
                "scored at horizon "
                f"{horizon}"
            )
    full, source = _FULL_SETS.get(benchmark, (count, ""))
    if count != full:
        yield (
            f"{dataset}: {counted(count, 'sequence')}, the published validation set has {full} ({source}): "
            "numbers are not comparable with published ones"
        )


def head_notes(dataset: str, head: str, trained_on: Mapping[str, Any]) -> Iterator[str]:
    """Where a head (its fingerprint) learned from what is scored."""
    split = trained_on.get("split", "train")
    if split != "train":
        yield f"{dataset}: the head {head} was trained on the {split} split: its numbers are not comparable"


_NOT_NUMBERS = {"out", "data", "heads", "clips", "tokenizer", "worlds", "backbone", "kitti_split", "cache"}
_NOT_NUMBERS |= {
    "more_tokenizers",
    "architectures",
    "workers",
    "ray_address",
    "wait_for_nodes_s",
    "device",
    "rgb_decoder",
    "predictions",
}


@dataclass(frozen=True)
class BenchmarkRun:
    """What is to be done.

    Attributes:
        settings: with ``auto`` resolved, so that every process computes alike.
        sequences: of each benchmark, in order.
        clips: the feature dataset that goes into the same tables.
        generated: how many samples each video generator has.
        notes: what was left out, and what the heads were trained on, in words.
        counts: how much of each benchmark there is, in words.
    """

    settings: BenchmarkEvaluation
    inputs: BenchmarkInputs
    sequences: dict[BenchmarkName, tuple[LabelledSequence, ...]]
    blocks: tuple[Block, ...]
    clips: ClipRun | None
    generated: Mapping[str, int]
    notes: tuple[str, ...]
    counts: tuple[str, ...]
    run_id: str
    created_at: datetime

    @property
    def sequence_count(self) -> int:
        """Of all benchmarks."""
        return sum(map(len, self.sequences.values()))

    @property
    def parts_id(self) -> str:
        """Whose finished blocks can be taken over: pictures are part of them, and follow from the decoder."""
        decoder = self.inputs.rgb_fingerprint
        return self.run_id if decoder is None else fingerprint_of({"run": self.run_id, "rgb": decoder})

    @property
    def models(self) -> ModelRecord:
        """What ``models.json`` says."""
        inputs = self.inputs
        return ModelRecord(
            backbone=inputs.backbone.weights_sha256,
            **inputs.models.fingerprints,
            heads={**inputs.heads},
            heads_trained_on={name: dict(said) for name, said in inputs.trained_on.items() if said},
            rgb_decoder=inputs.rgb_fingerprint,
            sources={"backbone": inputs.backbone.source} if inputs.backbone.source else {},
        )

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
            image_size=(self.settings.image_size, self.settings.image_size),
            seed=self.settings.seed,
            backbone=f"{backbone.id}@{backbone.weights_sha256[:16]}",
            code_version=__version__,
            created_at=self.created_at,
            trained_sizes=self.inputs.models.trained_sizes,
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
    answers = {
        each.name: each.check_covers(sequences, settings.context, settings.horizons)
        for each in open_generators(settings)
    }
    clips = open_clip_run(settings.clips) if settings.clips else None
    inputs = load_inputs(settings, "cpu" if settings.workers else None)
    blocks = tuple(
        block
        for name, each in sequences.items()
        for block in blocks_of(name, each, examples_of(each, settings.examples))
    )
    return BenchmarkRun(
        settings=settings,
        inputs=inputs,
        sequences=sequences,
        blocks=blocks,
        clips=clips,
        generated={name: each.samples for name, each in answers.items()},
        notes=tuple(notes_of(settings, found, inputs)) + (clips.notes if clips else ()),
        counts=tuple(counts_of(found)),
        run_id=_run_id(settings, inputs, sequences, clips, answers),
        created_at=datetime.now(UTC),
    )


def _run_id(
    settings: BenchmarkEvaluation,
    inputs: BenchmarkInputs,
    sequences: dict[BenchmarkName, tuple[LabelledSequence, ...]],
    clips: ClipRun | None,
    answers: Mapping[str, Answers],
) -> str:
    """Follows from the numbers that went in: not from paths, the workers, the device or the clock."""
    models = inputs.models
    made_from = {
        "settings": settings.model_dump(mode="json", exclude=_NOT_NUMBERS),
        "backbone": inputs.backbone.weights_sha256,
        "rounded_to_float16": settings.cache is not None,
        "heads": inputs.heads,
        "tokenizer": models.tokenizer.fingerprint if models.tokenizer else None,
        **models.further,
        "worlds": models.world_ids,
        **settings.models_precision,
        "data": {
            name: content_of(each, lambda one, used=name in settings.heads: [one.label] if used else [])
            for name, each in sequences.items()
        },
        "clips": clips.stamp.run_id if clips else None,
        "generated": {name: each.fingerprint for name, each in answers.items()},
        "code_version": __version__,
        "tables": TABLES_VERSION,
    }
    return fingerprint_of(made_from)
