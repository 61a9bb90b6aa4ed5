"""From one batch of sequences to scores, and to examples for the report.

Shapes: S samples, H longest horizon, D hidden.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deltacache.evaluate.benchmarks.statistics import Statistic
from deltacache.evaluate.clips.modes import NOTHING_REACHED
from deltacache.evaluate.clips.opening import Run
from deltacache.evaluate.clips.rollouts import (
    Futures,
    JudgedSamples,
    ensemble_statistics,
    judge_samples,
    roll_out,
    score_first_samples,
    score_samples,
)
from deltacache.evaluate.clips.scenes import CheckedScene, read_futures_of, score_modes
from deltacache.evaluate.clips.sequences import ClipBatch
from deltacache.evaluate.examples import Example, ExampleWorld, save_example
from deltacache.evaluate.inputs import Tokenizer, World
from deltacache.evaluate.predictions import Protocol, bounds, reconstructions, score_predictions
from deltacache.evaluate.rows import Score

_EXAMPLE_SAMPLES = 8
_EXAMPLE_BYTES = 32 << 20
"""An example keeps this many bytes of each world model's samples, and at least ``_EXAMPLE_SAMPLES``."""
_CHUNK_NUMBERS = 2**25  # of patch tokens encoded at a time: 128 MiB in float32


@dataclass(slots=True)
class ClipScores:
    """What is known of the sequences of a feature dataset.

    Attributes:
        scores: of single sequences, with all samples.
        by_count: best and mean of the first 1, 2, 5, ... samples.
        statistics: what each sequence's samples are together.
    """

    scores: list[Score] = field(default_factory=list)
    by_count: list[Score] = field(default_factory=list)
    statistics: list[Statistic] = field(default_factory=list)


@torch.inference_mode()
def score_batch(run: Run, batch: ClipBatch, examples: Path, found: ClipScores) -> None:
    """Add every method's scores on the sequences of ``batch``; some are kept in the folder ``examples``."""
    protocol, scores = run.protocol, found.scores
    for method, predictions in bounds(batch, protocol):
        scores.extend(score_predictions(method, predictions, batch, protocol))
    deltas: dict[str, Tensor] = {}
    for tokenizer in run.models.tokenizers:
        encoded = deltas[tokenizer.fingerprint] = _encoded(tokenizer, batch.tokens, protocol)
        for method, predictions in reconstructions(tokenizer, batch, encoded, protocol):
            scores.extend(score_predictions(method, predictions, batch, protocol))
    rollouts = [(world, roll_out(world, batch, deltas, protocol)) for world in run.models.worlds]
    for position in range(len(batch.rows)):
        futures = [(world, each[position]) for world, each in rollouts]
        _score_futures(run, batch, position, futures, examples, found)


def _encoded(tokenizer: Tokenizer, tokens: Tensor, protocol: Protocol) -> Tensor:
    """Delta tokens (U, T, ...) of clips (U, T, N, D), a few clips at a time: all may be long."""
    most = max(1, _CHUNK_NUMBERS // tokens[0].numel())
    encode = tokenizer.model.encode_clip
    return torch.cat([encode(clips, protocol.black, protocol.grid) for clips in tokens.split(most)])


def _score_futures(
    run: Run,
    batch: ClipBatch,
    position: int,
    rollouts: list[tuple[World, Futures]],
    examples: Path,
    found: ClipScores,
) -> None:
    """Score the sampled futures of one sequence, and keep them if it is an example."""
    row, clip = batch.rows[position], batch.own[position]
    checked = run.scenes.get(row)
    wanted = row in run.example_rows
    futures = None
    if checked is not None:
        futures = read_futures_of(run.dataset, checked.scene, run.protocol, run.device)
    judgements: list[tuple[World, JudgedSamples]] = []
    for world, sampled in rollouts:
        keep = max(_EXAMPLE_SAMPLES, _EXAMPLE_BYTES // (2 * clip[run.protocol.context :].numel()))
        judged = judge_samples(sampled, clip, run.protocol, futures, keep if wanted else 0)
        judgements.append((world, judged))
        about = (world, judged, batch.clip_ids[position], batch.seconds[position], run.protocol)
        found.scores.extend(score_samples(*about))
        found.by_count.extend(score_first_samples(*about))
        found.statistics.extend(ensemble_statistics(*about, run.settings.dataset))
        if checked is not None and judged.distances is not None:
            found.scores.extend(score_modes(world, checked, judged.distances, run.protocol))
    if wanted:
        save_example(_example(run, batch, position, judgements), examples)


def _example(
    run: Run, batch: ClipBatch, position: int, judgements: list[tuple[World, JudgedSamples]]
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
        worlds=tuple(_example_world(world, judged, checked) for world, judged in judgements),
    )


def _example_world(world: World, judged: JudgedSamples, checked: CheckedScene | None) -> ExampleWorld:
    samples = len(judged.metrics)
    nearest = reached = np.full(samples, NOTHING_REACHED)
    if checked is not None and judged.distances is not None:
        nearest = judged.distances[:, -1].argmin(1)
        reached = checked.reached(judged.distances, -1)
    return ExampleWorld(
        method=world.method.name,
        fingerprint=world.method.world or "",
        samples=judged.kept,
        mean=judged.mean[-1],
        best=int(judged.metrics[:, -1, 0].argmin()),
        nearest=nearest,
        reached=reached,
    )
