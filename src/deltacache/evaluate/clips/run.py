"""``evaluate --data clips=FEATURES``: feature-space metrics on a feature dataset, without labels.

The first ``context`` frames of a clip are seen; the target of horizon h is frame ``context + h - 1``,
counted from 0. The published benchmarks end on a labelled frame instead.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deltacache import __version__
from deltacache.evaluate import metrics as sample_sums
from deltacache.evaluate.clips.rollouts import (
    Futures,
    ScoredSamples,
    delta_tokens,
    roll_out,
    sample_statistics,
    score_samples,
)
from deltacache.evaluate.clips.scenes import (
    NOTHING_REACHED,
    CheckedScene,
    check_scenes,
    find_scenes,
    read_futures,
    read_futures_of,
    score_modes,
)
from deltacache.evaluate.clips.sequences import CachedSequences, SequenceList, choose_sequences, read_batches
from deltacache.evaluate.evaluation import Evaluation, run_evaluation
from deltacache.evaluate.examples import Example, ExampleWorld, save_example, spread
from deltacache.evaluate.inputs import Models, World, load_models
from deltacache.evaluate.output import TABLES_VERSION, ModelRecord, RunStamp
from deltacache.evaluate.predictions import (
    AboutSequence,
    RolloutProtocol,
    about_sequences,
    reconstructions,
    reference_predictions,
    score_predictions,
)
from deltacache.evaluate.settings import ClipEvaluation
from deltacache.evaluate.statistics import Statistic
from deltacache.models.devices import allow_tf32, choose_device
from deltacache.pipeline.datasets.choice import rows_where, split_rows
from deltacache.pipeline.datasets.dataset import Dataset, open_dataset
from deltacache.pipeline.work.encoders import resolve_precision
from deltacache.schemas.datasets import fingerprint_of, sides
from deltacache.schemas.errors import MismatchError
from deltacache.schemas.progress import Reporter
from deltacache.schemas.texts import bytes_text, counted

# ----------------------------------------------------------------------------------------------------
# An evaluation's inputs, opened and checked before anything is computed or written.
# ----------------------------------------------------------------------------------------------------


_NOT_NUMBERS = {
    "out",
    "features",
    "tokenizer",
    "more_tokenizers",
    "worlds",
    "architectures",
    "futures",
    "device",
    "precision",  # see models_precision
    "where",  # these in so far as they choose anything
    "split",
    "split_seed",
}


@dataclass(frozen=True)
class ClipRun:
    """An evaluation whose inputs have been opened and checked.

    ``example_rows``: sequences to keep for the report; scenes, if there are any.
    """

    settings: ClipEvaluation
    dataset: Dataset
    models: Models
    protocol: RolloutProtocol
    sequences: SequenceList
    scenes: dict[int, CheckedScene]
    notes: tuple[str, ...]
    stamp: RunStamp
    example_rows: frozenset[int]
    device: torch.device

    @property
    def record(self) -> ModelRecord:
        """What ``models.json`` says."""
        backbone = self.dataset.card.backbone
        return ModelRecord(
            backbone=backbone.weights_sha256,
            pca=backbone.pca_fingerprint,
            **self.models.fingerprints,
            sources={"backbone": backbone.source} if backbone.source else {},
        )


def open_run(settings: ClipEvaluation) -> ClipRun:
    """Open what ``settings`` names; see ``evaluate_clips`` for what is refused."""
    dataset = open_dataset(settings.features, "features")
    device = choose_device(settings.device)
    settings = settings.model_copy(update={"precision": resolve_precision(device, settings.precision)})
    allow_tf32(device, settings.precision != "float32")
    models = load_models(settings, dataset.card, settings.features, device)
    protocol = RolloutProtocol(
        context=settings.context,
        horizons=settings.horizons,
        seed=settings.seed,
        grid=dataset.card.patch_grid,
        black=torch.from_numpy(dataset.black_patch_tokens.astype(np.float32)).to(device),
    )
    sequences = choose_sequences(
        dataset.index, settings.frames, settings.features, _chosen_rows(dataset, settings)
    )
    scenes, notes = _open_scenes(settings, dataset, sequences, protocol)
    return ClipRun(
        settings=settings,
        dataset=dataset,
        models=models,
        protocol=protocol,
        sequences=sequences,
        scenes=scenes,
        notes=(*sequences.notes, *models.notes, *notes, *_without_energy(models, protocol)),
        stamp=_stamp(settings, dataset, models),
        example_rows=frozenset(spread(tuple(scenes) or sequences.rows, settings.examples)),
        device=device,
    )


def _chosen_rows(dataset: Dataset, settings: ClipEvaluation) -> list[int] | None:
    """The clips that the settings choose; ``None``: all."""
    if not settings.choice:
        return None
    chosen = np.arange(len(dataset)) if settings.where is None else rows_where(dataset, settings.where)
    if settings.split is not None:
        chosen = np.intersect1d(chosen, split_rows(dataset, settings.split, settings.split_seed)[1])
    if len(chosen) == 0:
        raise MismatchError(
            f"--split {settings.split:g} holds out none of the clips of {settings.features}: give a smaller share, "
            "another --split-seed or more videos"
        )
    return chosen.tolist()


def _without_energy(models: Models, protocol: RolloutProtocol) -> Iterator[str]:
    """World models whose samples of a sequence are too many to be held together."""
    frame, count = protocol.black.numel(), len(protocol.horizons)
    for world in models.worlds:
        numbers = world.samples * count * frame
        if numbers > sample_sums.ENERGY_NUMBERS:
            yield (
                f"{world.method.name} ({world.method.world}) has no energy score: "
                f"{counted(world.samples, 'sample')} of {count} "
                f"frames of {frame} numbers are {bytes_text(4 * numbers)} per sequence, and at most "
                f"{bytes_text(4 * sample_sums.ENERGY_NUMBERS)} are held; give fewer samples or horizons"
            )


def _open_scenes(
    settings: ClipEvaluation, dataset: Dataset, sequences: SequenceList, protocol: RolloutProtocol
) -> tuple[dict[int, CheckedScene], tuple[str, ...]]:
    if settings.futures is None:
        return {}, ()
    found = find_scenes(read_futures(settings.futures), sequences.first_of_video, settings.futures)
    checked, notes = check_scenes(dataset, found.scenes, protocol)
    return checked, (*found.notes, *notes)


def _stamp(settings: ClipEvaluation, dataset: Dataset, models: Models) -> RunStamp:
    """``run_id`` follows from the numbers that went in: not from paths, the device or the clock."""
    card = dataset.card
    numbers = settings.model_dump(mode="json", exclude=_NOT_NUMBERS) | settings.choice
    made_from = {
        "settings": numbers,
        "features": card.fingerprint,
        "clips": dataset.index.select(["clip_id", "crc32c"]).to_pylist(),
        "tokenizer": models.tokenizer.fingerprint if models.tokenizer else None,
        **models.further,
        "worlds": models.world_ids,
        **settings.models_precision,
        "futures": read_futures(settings.futures) if settings.futures else None,
        "code_version": __version__,
        "tables": TABLES_VERSION,
    }
    return RunStamp(
        run_id=fingerprint_of(made_from),
        dataset=settings.dataset,
        context=settings.context,
        image_size=sides(card.image_size),
        seed=settings.seed,
        backbone=card.backbone.name,
        code_version=__version__,
        created_at=datetime.now(UTC),
        trained_sizes=models.trained_sizes,
    )


# ----------------------------------------------------------------------------------------------------
# From one batch of sequences to sums, and to examples for the report.
#
# Shapes: S samples, H longest horizon, D hidden.
# ----------------------------------------------------------------------------------------------------


_EXAMPLE_SAMPLES = 8
_EXAMPLE_BYTES = 32 << 20
"""An example keeps this many bytes of each world model's samples, and at least ``_EXAMPLE_SAMPLES``."""


@torch.inference_mode()
def score_batch(run: ClipRun, batch: CachedSequences, examples: Path) -> Iterator[Statistic]:
    """Every method's sums on the sequences of ``batch``; some are kept in the folder ``examples``.

    Raises:
        NotFiniteError: a prediction is not finite.
    """
    protocol, about = run.protocol, about_sequences(batch, run.protocol, run.settings.dataset)
    for method, predictions in reference_predictions(batch, protocol):
        yield from score_predictions(method, predictions, batch, about, protocol)
    deltas: dict[str, Tensor] = {}
    for tokenizer in run.models.tokenizers:
        encoded = torch.stack([delta_tokens(tokenizer, clip, protocol) for clip in batch.tokens])
        deltas[tokenizer.fingerprint] = encoded
        for method, predictions in reconstructions(tokenizer, batch, encoded, protocol):
            yield from score_predictions(method, predictions, batch, about, protocol)
    seen, frames = slice(protocol.context), slice(protocol.frames)
    for position, each in enumerate(about):
        context, seconds = batch.own[position, seen], batch.seconds[position, frames]
        futures: list[tuple[World, Futures]] = []
        for world in run.models.worlds:
            own = None if world.tokenizer is None else deltas[world.tokenizer.fingerprint][position, seen]
            futures.append((world, roll_out(world, context, seconds, own, each.sequence_id, protocol)))
        yield from _score_futures(run, batch, position, each, futures, examples)


def _score_futures(
    run: ClipRun,
    batch: CachedSequences,
    position: int,
    about: AboutSequence,
    rollouts: list[tuple[World, Futures]],
    examples: Path,
) -> Iterator[Statistic]:
    """Score the sampled futures of one sequence, and keep them if it is an example."""
    row, clip = batch.rows[position], batch.own[position]
    checked = run.scenes.get(row)
    wanted = row in run.example_rows
    futures = None
    if checked is not None:
        futures = read_futures_of(run.dataset, checked.scene, run.protocol, run.device)
    scored_worlds: list[tuple[World, ScoredSamples]] = []
    for world, sampled in rollouts:
        keep = max(_EXAMPLE_SAMPLES, _EXAMPLE_BYTES // (2 * clip[run.protocol.context :].numel()))
        scored = score_samples(world, sampled, clip, about, run.protocol, futures, keep if wanted else 0)
        scored_worlds.append((world, scored))
        yield from sample_statistics(world, scored, about)
        if checked is not None and scored.distances is not None:
            yield from score_modes(world, checked, scored.distances, about.dataset, run.protocol)
    if wanted:
        save_example(_example(run, batch, position, scored_worlds), examples)


def _example(
    run: ClipRun, batch: CachedSequences, position: int, scored_worlds: list[tuple[World, ScoredSamples]]
) -> Example:
    row, protocol = batch.rows[position], run.protocol
    clip = batch.own[position]
    checked = run.scenes.get(row)
    rows = checked.scene.rows if checked else (row,)
    futures = [run.dataset.read_frames(each, protocol.context, protocol.frames) for each in rows]
    longest = protocol.horizons[-1]
    reconstruction = clip[:0]
    if run.models.tokenizer is not None:
        model = run.models.tokenizer.model
        reconstruction = model.reconstruct_closed_loop(clip[None], protocol.black, protocol.grid, longest)[0]
    return Example(
        title=checked.scene.name if checked else batch.clip_ids[position],
        clip_ids=tuple(run.dataset.clip_ids[each] for each in rows),
        outcomes=checked.scene.outcomes if checked else ("",),
        context=protocol.context,
        grid=protocol.grid,
        seconds=batch.seconds[position].cpu().numpy(),
        patch_tokens=clip.half().cpu().numpy(),
        futures=np.stack(futures),
        reconstruction=reconstruction.half().cpu().numpy(),
        worlds=tuple(_example_world(world, scored, checked) for world, scored in scored_worlds),
    )


def _example_world(world: World, scored: ScoredSamples, checked: CheckedScene | None) -> ExampleWorld:
    samples = len(scored.metrics)
    nearest = reached = np.full(samples, NOTHING_REACHED)
    if checked is not None and scored.distances is not None:
        nearest = scored.distances[:, -1].argmin(1)
        reached = checked.reached(scored.distances, -1)
    return ExampleWorld(
        method=world.method.name,
        fingerprint=world.method.world or "",
        samples=scored.kept,
        mean=scored.mean[-1],
        best=int(scored.metrics[:, -1, 0].argmin()),
        nearest=nearest,
        reached=reached,
    )


def evaluate_clips(settings: ClipEvaluation, reporter: Reporter) -> Path:
    """Write ``metrics.parquet``, ``sequences.parquet`` and what the report needs; see ``run_evaluation``.

    Raises:
        DatasetError: the features or the futures file are missing or damaged, or ``out`` holds other things.
        CheckpointError: a model is missing or damaged.
        MismatchError: models, features, settings or futures that do not belong together.
        NotFiniteError: features or a prediction are not finite.
    """

    def open_source() -> Evaluation:
        run = open_run(settings)
        return Evaluation(
            settings=run.settings,
            run_id=run.stamp.run_id,
            notes=run.notes,
            record=run.record,
            stamp=lambda _: run.stamp,
            samples_of=lambda _: run.settings.samples,
            score=lambda examples, reporter: score_clips(run, examples, reporter),
        )

    return run_evaluation(settings.out, open_source, reporter)


def score_clips(run: ClipRun, examples: Path, reporter: Reporter) -> Iterator[Iterator[Statistic]]:
    """Sums of all sequences, a few sequences at a time; some are kept in the folder ``examples``."""
    count = len(run.sequences.rows)
    started = time.perf_counter()
    reading_s = 0.0
    with reporter.stage("evaluate", count) as stage:
        batches = read_batches(run.dataset, run.sequences, run.protocol.frames, run.device)
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            reading_s += time.perf_counter() - asked
            if batch is None:
                break
            yield score_batch(run, batch, examples)
            stage.advance(len(batch.rows))
    elapsed_s = time.perf_counter() - started
    share = reading_s / elapsed_s
    reporter.line(
        f"evaluate: {counted(count, 'sequence')}, {count / elapsed_s:.2f} sequences/s over {elapsed_s:.1f} s, "
        f"{100 * share:.0f} % of it reading; limit: {'reading' if share > 0.5 else 'the models'}"
    )
