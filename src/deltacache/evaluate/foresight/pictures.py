"""Sequences kept for the report: small frames and maps, and features along a few axes.

A whole frame has 2,048 patches of 1,152 numbers. What the report shows of them are three colours and distances, so an
example holds coordinates along the axes in which true features of the examples vary most.

Shapes: T frames, H longest horizon, N patches, D hidden, K axes, h x w pixels that are kept.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

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
from deltacache.evaluate.foresight.predictions import ForesightInputs, WholeSequence, depth_place
from deltacache.evaluate.output import Method
from deltacache.models.pca import Moments
from deltacache.pipeline.benchmarks.frames import is_relative
from deltacache.schemas.clips import clip_id_of
from deltacache.schemas.foresight import DATASET, ForesightEvaluation

_AXES = 32


@dataclass(frozen=True)
class Album:
    """Where examples go. ``wanted``: ids of their sequences; ``axes`` (D, K)."""

    wanted: frozenset[str]
    axes: Tensor
    folder: Path


def principal_axes(frames: Iterable[Tensor]) -> Tensor:
    """(D, K) orthonormal, along which features vary most, on the CPU; ``frames`` (T, N, D) of an example each."""
    moments = reduce(Moments.merge, (Moments.of(each.flatten(0, 1).cpu()) for each in frames))
    return torch.linalg.eigh(moments.scatter)[1].flip(1)[:, :_AXES].float()


@torch.inference_mode()
def save_picture(
    seen: WholeSequence, settings: ForesightEvaluation, inputs: ForesightInputs, album: Album
) -> None:
    """Keep ``seen`` in the album with every world model's future of it."""
    systems, context, clip = inputs.systems, settings.context, seen.tokens
    horizon, axes = len(clip) - context, album.axes.to(clip.device)
    futures = dict(systems.futures(clip, horizon))
    reconstruction = systems.reconstruction(clip, horizon)
    samples = {method.world or "": future[None] for method, future in futures.items()}
    clip_id = clip_id_of(seen.sequence.sequence_id, 0)
    example = Example(
        title=f"{DATASET} {seen.sequence.sequence_id}",
        clip_ids=(clip_id,),
        outcomes=("",),
        context=context,
        grid=systems.grid,
        seconds=(np.arange(len(clip)) * seen.sequence.spacing_s).astype(np.float32),
        patch_tokens=stored(clip @ axes),
        futures=stored(clip[None, context:] @ axes),
        reconstruction=stored(reconstruction @ axes),
        worlds=tuple(_world(method, future @ axes) for method, future in futures.items()),
        maps=tuple(example_maps(_map_makers(seen, settings, inputs), clip, reconstruction, samples)),
    )
    save_example(example, album.folder)
    height, width = kept_size(*seen.pictures[0].shape[:2])
    smaller = [Image.fromarray(each).resize((width, height), Image.Resampling.BOX) for each in seen.pictures]
    save_frames(album.folder, clip_id, np.stack([np.asarray(each) for each in smaller]))


def kept_size(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of a map of a label: every so many of its pixels."""
    step = max(1, -(-max(height, width) // MAP_SIDE))
    return -(-height // step), -(-width // step)


def _world(method: Method, future: Tensor) -> ExampleWorld:
    """Its one future (H, N, K)."""
    none = np.full(1, NOTHING_REACHED)
    return ExampleWorld(
        method=method.name,
        fingerprint=method.world or "",
        samples=stored(future[None]),
        mean=stored(future[-1]),
        best=0,
        nearest=none,
        reached=none,
    )


def _map_makers(
    seen: WholeSequence, settings: ForesightEvaluation, inputs: ForesightInputs
) -> Iterator[MapMaker]:
    heads, labels = inputs.heads, seen.labels
    segmentation, depth = heads.segmentation, heads.depth
    if segmentation is not None and labels.classes is not None:
        size = kept_size(*labels.classes.shape)
        yield MapMaker(
            "segmentation",
            labels.classes.cpu().numpy(),
            lambda tokens: heads.read(segmentation, tokens, size).argmax(1).byte(),
        )
    place = depth_place(seen.sequence, settings)
    if depth is not None and labels.depth is not None and place is not None:
        rows_columns = kept_size(*labels.depth.shape)
        yield MapMaker(
            "relative_depth" if is_relative(place) else "depth",
            stored(labels.depth),
            lambda tokens: heads.read(depth, tokens, rows_columns)[:, 0].half(),
        )
