"""One sequence kept for the report: frames, features, what the head sees in them, and sampled futures.

Only the first crop is kept. Shapes: T frames, H longest horizon of the sequence, S samples, s of them that are
kept, N patches, D hidden.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from deltacache.evaluate.benchmarks.benchmark_inputs import BenchmarkInputs
from deltacache.evaluate.benchmarks.sampling import CropFutures, Sampler, SequenceBatch, ensemble_of
from deltacache.evaluate.clips.scenes import NOTHING_REACHED
from deltacache.evaluate.examples import (
    MAP_SIDE,
    Example,
    ExampleWorld,
    MapMaker,
    example_maps,
    save_example,
    save_frames,
    stored,
)
from deltacache.evaluate.inputs import World
from deltacache.models.deltatok import Grid
from deltacache.models.rgb_decoder import RgbDecoder
from deltacache.schemas.clips import clip_id_of

_EXAMPLE_SAMPLES = 8
_PICTURES_AT_ONCE = 16


@torch.inference_mode()
def save_picture(
    batch: SequenceBatch, frames: np.ndarray | None, inputs: BenchmarkInputs, sampler: Sampler, folder: Path
) -> None:
    """Keep the first crop of the one sequence of ``batch``; ``frames`` (C, T, S, S, 3) are its pixels."""
    sequence, clip = batch.sequences[0].sequence, batch.tokens[0]
    context = inputs.protocol.context
    horizon = len(clip) - context
    tokenizer = inputs.models.tokenizer
    reconstruction, samples = clip[:0], {}
    worlds: list[ExampleWorld] = []
    if tokenizer is not None:
        reconstruction = tokenizer.model.reconstruct_closed_loop(
            clip[None], inputs.protocol.black, inputs.protocol.grid, horizon
        )[0]
    deltas = sampler.true_deltas(batch, [horizon])
    for world in inputs.models.worlds:
        kept, entry = _world(world, clip, sampler.roll_out(world, batch, deltas, horizon))
        samples[entry.fingerprint] = kept
        worlds.append(entry)
    clip_id = clip_id_of(sequence.sequence_id, 0)
    example = Example(
        title=f"{batch.dataset} {sequence.sequence_id}",
        clip_ids=(clip_id,),
        outcomes=("",),
        context=context,
        grid=inputs.protocol.grid,
        seconds=(np.arange(len(clip)) * sequence.spacing_s).astype(np.float32),
        patch_tokens=stored(clip),
        futures=stored(clip[None, context:]),
        reconstruction=stored(reconstruction),
        worlds=tuple(worlds),
        maps=tuple(example_maps(_map_makers(batch, inputs), clip, reconstruction, samples)),
    )
    save_example(example, folder)
    if frames is not None:
        save_frames(folder, clip_id, frames[0])


def _world(world: World, clip: Tensor, futures: CropFutures) -> tuple[Tensor, ExampleWorld]:
    """The first samples (s, H, N, D), and what is kept of a world model's futures of the first crop."""
    ensemble = ensemble_of(futures.last(0), clip[-1])
    kept = futures.first_samples(0, _EXAMPLE_SAMPLES)
    none = np.full(world.samples, NOTHING_REACHED)
    entry = ExampleWorld(
        method=world.method.name,
        fingerprint=world.method.world or "",
        samples=stored(kept),
        mean=stored(ensemble.mean),
        best=ensemble.best,
        nearest=none,
        reached=none,
    )
    return kept, entry


def _map_makers(batch: SequenceBatch, inputs: BenchmarkInputs) -> Iterator[MapMaker]:
    """The head, and the decoder of pictures."""
    loaded, scorer = batch.sequences[0], inputs.scorers[batch.dataset]
    side = min(MAP_SIDE, loaded.split.size)
    if scorer is not None:
        label = None if loaded.label is None else loaded.label[0]
        yield MapMaker(scorer.task, label, lambda tokens: scorer.maps(tokens, side))
    if inputs.rgb is not None:
        decoder, grid = inputs.rgb, inputs.protocol.grid
        yield MapMaker("rgb", None, lambda tokens: pictures(decoder, tokens, grid, side))


def pictures(decoder: RgbDecoder, tokens: Tensor, grid: Grid, side: int) -> Tensor:
    """(B, side, side, 3) uint8 of tokens (B, N, D)."""
    pictures = []
    for chunk in tokens.split(_PICTURES_AT_ONCE):
        picture = decoder(chunk.transpose(1, 2).unflatten(2, grid))
        small = functional.interpolate(picture, size=(side, side), mode="area")
        pictures.append((255 * small).round().byte().permute(0, 2, 3, 1))
    return torch.cat(pictures)
