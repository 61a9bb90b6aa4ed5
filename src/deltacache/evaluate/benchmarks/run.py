"""An evaluation of benchmarks whose inputs have been opened and checked."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from deltacache import __version__
from deltacache.evaluate.benchmarks.blocks import Block, blocks_of
from deltacache.evaluate.benchmarks.content import content_of
from deltacache.evaluate.benchmarks.notes import counts_of, notes_of
from deltacache.evaluate.benchmarks.opening import Inputs, load_inputs
from deltacache.evaluate.clips import opening
from deltacache.evaluate.examples import examples_of
from deltacache.evaluate.generators.futures import Answers, open_generators
from deltacache.evaluate.model_record import ModelRecord
from deltacache.evaluate.rows import TABLES_VERSION, RunStamp
from deltacache.evaluate.settings import BenchmarkEvaluation
from deltacache.models.devices import choose_device
from deltacache.pipeline.benchmarks.layouts import benchmark_sequences
from deltacache.pipeline.benchmarks.windows import FrameCounts, SequenceSet
from deltacache.pipeline.work.encoders import resolve_precision
from deltacache.schemas.benchmarks import BenchmarkName, LabelledSequence
from deltacache.schemas.fingerprints import fingerprint_of

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
    inputs: Inputs
    sequences: dict[BenchmarkName, tuple[LabelledSequence, ...]]
    blocks: tuple[Block, ...]
    clips: opening.Run | None
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
    clips = opening.open_run(settings.clips) if settings.clips else None
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
    inputs: Inputs,
    sequences: dict[BenchmarkName, tuple[LabelledSequence, ...]],
    clips: opening.Run | None,
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
