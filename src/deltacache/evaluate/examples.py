"""A few sequences with their sampled futures, kept beside the tables for the report's pictures.

``examples/<clip_id>.npz`` holds arrays, ``examples/<clip_id>.frames.npy`` a clip's pixels once someone has
given them. Neither is pickled.

Shapes: T frames (context and longest horizon H), F true futures, s samples kept, S all samples, N patches,
D hidden.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from zipfile import BadZipFile

import numpy as np
from torch import Tensor

from deltacache.schemas.benchmarks import LabelledSequence
from deltacache.schemas.errors import DatasetError

_SUFFIX = ".npz"
MAP_SIDE = 256
"""Pixels of the longer side of a kept map, at most."""
MapKind = Literal["segmentation", "depth", "relative_depth", "rgb"]


@dataclass(frozen=True)
class ExampleWorld:
    """What one world model predicted for the sequence.

    Attributes:
        samples: (s, H, N, D) float16.
        mean: (N, D) float16 at the longest horizon: features averaged over all S samples.
        best: index of the sample with the lowest smooth-L1 at the longest horizon; -1 where no truth is known.
        nearest: (S,) index of the true future that each sample is nearest to there; -1 where only one is known.
        reached: (S,) the same where the sample reaches it, else -1.
    """

    method: str
    fingerprint: str
    samples: np.ndarray
    mean: np.ndarray
    best: int
    nearest: np.ndarray
    reached: np.ndarray


@dataclass(frozen=True)
class ExampleMaps:
    """What a head or a decoder of pictures makes of the sequence: class ids (uint8, 255 is ignored), metres
    (float16), relative inverse depth (float16, up to ``MAX_DEPTH_M``, near is large) or colours (uint8, with a last
    dimension of 3).

    Attributes:
        truth: (T, h, w[, 3]) of the true features.
        label: (H', W') of the last frame, at its own resolution, or ``None``.
        reconstruction: (H, h, w[, 3]), or no frames.
        samples: (s, H, h, w[, 3]) by the fingerprint of the world model.
    """

    kind: MapKind
    truth: np.ndarray
    label: np.ndarray | None
    reconstruction: np.ndarray
    samples: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Example:
    """One sequence.

    Attributes:
        title: the clip, or the scene it stands for.
        clip_ids: of the F true futures; the first is the sequence itself.
        outcomes: names of the true futures, empty strings when there is only the recorded one.
        patch_tokens: (T, N, D) float16, true; of whole frames their coordinates along D axes.
        futures: (F, H, N, D) float16, true; of a video that ends earlier, fewer than H.
        reconstruction: (H, N, D) float16, closed loop, or no frames without a tokenizer.
        seconds: (T,) since the first frame.
        grid: rows and columns of patches.
    """

    title: str
    clip_ids: tuple[str, ...]
    outcomes: tuple[str, ...]
    context: int
    grid: tuple[int, int]
    seconds: np.ndarray
    patch_tokens: np.ndarray
    futures: np.ndarray
    reconstruction: np.ndarray
    worlds: tuple[ExampleWorld, ...]
    maps: tuple[ExampleMaps, ...] = ()


def save_example(example: Example, folder: Path) -> Path:
    """Write ``folder/<first clip_id>.npz``."""
    arrays: dict[str, np.ndarray] = {
        "title": np.array(example.title),
        "clip_ids": np.array(example.clip_ids),
        "outcomes": np.array(example.outcomes),
        "context": np.array(example.context),
        "grid": np.array(example.grid),
        "seconds": example.seconds,
        "patch_tokens": example.patch_tokens,
        "futures": example.futures,
        "reconstruction": example.reconstruction,
        "worlds": np.array([world.fingerprint for world in example.worlds], dtype=np.str_),
    }
    for world in example.worlds:
        arrays |= {
            f"{world.fingerprint}_method": np.array(world.method),
            f"{world.fingerprint}_samples": world.samples,
            f"{world.fingerprint}_mean": world.mean,
            f"{world.fingerprint}_best": np.array(world.best),
            f"{world.fingerprint}_nearest": world.nearest,
            f"{world.fingerprint}_reached": world.reached,
        }
    arrays["maps"] = np.array([each.kind for each in example.maps], dtype=np.str_)
    for each in example.maps:
        arrays |= _map_arrays(each)
    path = folder / f"{example.clip_ids[0]}{_SUFFIX}"
    np.savez_compressed(path, allow_pickle=False, **arrays)
    return path


def _map_arrays(maps: ExampleMaps) -> dict[str, np.ndarray]:
    arrays = {f"{maps.kind}_truth": maps.truth, f"{maps.kind}_reconstruction": maps.reconstruction}
    if maps.label is not None:
        arrays[f"{maps.kind}_label"] = maps.label
    return arrays | {f"{maps.kind}_samples_{name}": each for name, each in maps.samples.items()}


def load_examples(folder: Path) -> list[Example]:
    """Read all examples of a folder, sorted by title; none if it is not there.

    Raises:
        DatasetError: one is damaged.
    """
    examples = [_load(path) for path in sorted(folder.glob(f"*{_SUFFIX}"))]
    return sorted(examples, key=lambda example: example.title)


def _load(path: Path) -> Example:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return Example(
                title=str(arrays["title"]),
                clip_ids=tuple(arrays["clip_ids"].tolist()),
                outcomes=tuple(arrays["outcomes"].tolist()),
                context=int(arrays["context"]),
                grid=(int(arrays["grid"][0]), int(arrays["grid"][1])),
                seconds=arrays["seconds"],
                patch_tokens=arrays["patch_tokens"],
                futures=arrays["futures"],
                reconstruction=arrays["reconstruction"],
                worlds=tuple(_load_world(arrays, name) for name in arrays["worlds"].tolist()),
                maps=tuple(_load_maps(arrays, kind) for kind in arrays["maps"].tolist()),
            )
    except (BadZipFile, ValueError, KeyError, EOFError, OSError) as error:
        raise DatasetError(f"{path} is damaged ({error}): run evaluate again") from error


def _load_world(arrays: np.lib.npyio.NpzFile, name: str) -> ExampleWorld:
    return ExampleWorld(
        method=str(arrays[f"{name}_method"]),
        fingerprint=name,
        samples=arrays[f"{name}_samples"],
        mean=arrays[f"{name}_mean"],
        best=int(arrays[f"{name}_best"]),
        nearest=arrays[f"{name}_nearest"],
        reached=arrays[f"{name}_reached"],
    )


def _load_maps(arrays: np.lib.npyio.NpzFile, kind: MapKind) -> ExampleMaps:
    prefix = f"{kind}_samples_"
    return ExampleMaps(
        kind=kind,
        truth=arrays[f"{kind}_truth"],
        label=arrays.get(f"{kind}_label"),
        reconstruction=arrays[f"{kind}_reconstruction"],
        samples={name.removeprefix(prefix): arrays[name] for name in arrays if name.startswith(prefix)},
    )


def save_frames(folder: Path, clip_id: str, frames: np.ndarray) -> None:
    """Keep a clip's pixels (T, H, W, 3) uint8."""
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"{clip_id}: frames are {frames.dtype}{frames.shape}, must be uint8(T, H, W, 3)")
    np.save(folder / f"{clip_id}.frames.npy", frames, allow_pickle=False)


def load_frames(folder: Path, clip_id: str) -> np.ndarray | None:
    """Pixels (T, H, W, 3) that were kept, or ``None``.

    Raises:
        DatasetError: the file is damaged.
    """
    path = folder / f"{clip_id}.frames.npy"
    if not path.exists():
        return None
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DatasetError(f"{path} is damaged ({error}): delete it") from error


def examples_of(sequences: Sequence[LabelledSequence], count: int) -> frozenset[str]:
    """Ids of at most ``count`` sequences, evenly over those that go furthest."""
    longest = max(len(each.frames) for each in sequences)
    rows = [row for row, each in enumerate(sequences) if len(each.frames) == longest]
    return frozenset(sequences[row].sequence_id for row in spread(rows, count))


def spread(rows: Sequence[int], count: int) -> tuple[int, ...]:
    """At most ``count`` of ``rows``, evenly over the list."""
    if count >= len(rows):
        return tuple(rows)
    return tuple(rows[round(position)] for position in np.linspace(0, len(rows) - 1, count))


# ----------------------------------------------------------------------------------------------------
# From tensors to what is kept of an example: tokens, and what a head or a decoder of pictures makes of them.
#
# Shapes: T frames, H longest horizon, s samples, N patches, D hidden, h x w pixels of a map.
# ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MapMaker:
    """One way of looking at features.

    Attributes:
        label: (H', W') of the last frame, at its own resolution, or ``None``.
        make: from tokens (B, N, D) to maps (B, h, w[, 3]).
    """

    kind: MapKind
    label: np.ndarray | None
    make: Callable[[Tensor], Tensor]

    def maps(self, tokens: Tensor) -> np.ndarray:
        """Maps (..., h, w[, 3]) of tokens (..., N, D)."""
        return self.make(tokens.flatten(0, -3)).unflatten(0, tokens.shape[:-2]).cpu().numpy()


def example_maps(
    makers: Iterator[MapMaker], clip: Tensor, reconstruction: Tensor, samples: Mapping[str, Tensor]
) -> Iterator[ExampleMaps]:
    """Maps of true frames (T, N, D), of reconstructed ones (H or 0, N, D) and of each world's (s, H, N, D)."""
    for maker in makers:
        truth = maker.maps(clip)
        yield ExampleMaps(
            kind=maker.kind,
            truth=truth,
            label=maker.label,
            reconstruction=maker.maps(reconstruction) if len(reconstruction) else truth[:0],
            samples={name: maker.maps(each) for name, each in samples.items()},
        )


def stored(tokens: Tensor) -> np.ndarray:
    """As an example holds them."""
    return tokens.half().cpu().numpy()
