"""From one batch of sequences to sums, and to examples for the report.

Shapes: S samples, H longest horizon, D hidden.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deltacache.evaluate.clips.modes import NOTHING_REACHED
from deltacache.evaluate.clips.opening import Run
from deltacache.evaluate.clips.rollouts import (
    Futures,
    JudgedSamples,
    judge_samples,
    roll_out,
    sample_statistics,
)
from deltacache.evaluate.clips.scenes import CheckedScene, read_futures_of, score_modes
from deltacache.evaluate.clips.sequences import ClipBatch
from deltacache.evaluate.examples import Example, ExampleWorld, save_example
from deltacache.evaluate.inputs import Tokenizer, World
from deltacache.evaluate.predictions import (
    AboutSequence,
    Protocol,
    about_sequences,
    bounds,
    reconstructions,
    score_predictions,
)
from deltacache.evaluate.statistics import Statistic

_EXAMPLE_SAMPLES = 8
_EXAMPLE_BYTES = 32 << 20
"""An example keeps this many bytes of each world model's samples, and at least ``_EXAMPLE_SAMPLES``."""
_CHUNK_NUMBERS = 2**25  # of patch tokens encoded at a time: 128 MiB in float32


@torch.inference_mode()
def score_batch(run: Run, batch: ClipBatch, examples: Path) -> Iterator[Statistic]:
    """Every method's sums on the sequences of ``batch``; some are kept in the folder ``examples``.

    Raises:
        NotFiniteError: a prediction is not finite.
    """
    protocol, about = run.protocol, about_sequences(batch, run.protocol, run.settings.dataset)
    for method, predictions in bounds(batch, protocol):
        yield from score_predictions(method, predictions, batch, about, protocol)
    deltas: dict[str, Tensor] = {}
    for tokenizer in run.models.tokenizers:
        encoded = deltas[tokenizer.fingerprint] = _encoded(tokenizer, batch.tokens, protocol)
        for method, predictions in reconstructions(tokenizer, batch, encoded, protocol):
            yield from score_predictions(method, predictions, batch, about, protocol)
    rollouts = [(world, roll_out(world, batch, deltas, protocol)) for world in run.models.worlds]
    for position, each in enumerate(about):
        futures = [(world, found[position]) for world, found in rollouts]
        yield from _score_futures(run, batch, position, each, futures, examples)


def _encoded(tokenizer: Tokenizer, tokens: Tensor, protocol: Protocol) -> Tensor:
    """Delta tokens (U, T, ...) of clips (U, T, N, D), a few clips at a time: all may be long."""
    most = max(1, _CHUNK_NUMBERS // tokens[0].numel())
    encode = tokenizer.model.encode_clip
    return torch.cat([encode(clips, protocol.black, protocol.grid) for clips in tokens.split(most)])


def _score_futures(
    run: Run,
    batch: ClipBatch,
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
    judgements: list[tuple[World, JudgedSamples]] = []
    for world, sampled in rollouts:
        keep = max(_EXAMPLE_SAMPLES, _EXAMPLE_BYTES // (2 * clip[run.protocol.context :].numel()))
        judged = judge_samples(world, sampled, clip, about, run.protocol, futures, keep if wanted else 0)
        judgements.append((world, judged))
        yield from sample_statistics(world, judged, about)
        if checked is not None and judged.distances is not None:
            yield from score_modes(world, checked, judged.distances, about.dataset, run.protocol)
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
