"""Principal components of a feature dataset, streamed: shard by shard, a few MiB of tokens at a time.

Shapes: T frames, N patches, D hidden size.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from upath import UPath

import deltacache
from deltacache.models.devices import choose_device
from deltacache.models.pca import CONFIG_FILE, Moments, Pca, load_pca, principal_components, save_pca
from deltacache.pipeline.datasets.changes import describe
from deltacache.pipeline.datasets.dataset import dequantise, stored_clips
from deltacache.pipeline.datasets.plan import open_plan
from deltacache.pipeline.datasets.receipts import read_receipt, receipts_sha256
from deltacache.pipeline.storage.files import readable_errors, replacing_folder
from deltacache.pipeline.storage.storage import AnyPath, dataset_root
from deltacache.schemas.clips import FeatureClip
from deltacache.schemas.datasets import DatasetCard
from deltacache.schemas.errors import DatasetError, DeltacacheError
from deltacache.schemas.progress import Reporter
from deltacache.schemas.texts import counted

_BATCH_BYTES = 64 << 20
"""Of a batch's vectors in float64."""


@dataclass(slots=True)
class _Stream:
    """Moments of the frames of a dataset, and what reading and computing them took, in seconds."""

    root: UPath
    card: DatasetCard
    moments: Moments
    read_s: float = 0.0
    compute_s: float = 0.0
    taken: int = field(default=0, init=False)  # frames

    def add_shard(self, shard_id: str, chosen: "_Chosen") -> int:
        """Take the chosen frames of a shard in; returns how many clips were passed."""
        receipt, start, clips = read_receipt(self.root, shard_id), time.perf_counter(), 0
        for stored in stored_clips(self.root, self.card, receipt):
            assert isinstance(stored.clip, FeatureClip)  # the dataset holds features
            clips += 1
            frames = chosen.of_next_clip()
            tokens = _float16(stored.clip, frames)
            self.read_s += time.perf_counter() - start
            start = time.perf_counter()
            self._add(stored.clip.clip_id, tokens)
            self.taken += len(frames)
            self.compute_s += time.perf_counter() - start
            start = time.perf_counter()
        return clips

    def _add(self, clip_id: str, tokens: np.ndarray) -> None:
        """Take (frames, N, D) float16 in, a bounded part at a time."""
        vectors = tokens.reshape(-1, tokens.shape[-1])
        rows = max(1, _BATCH_BYTES // (8 * vectors.shape[1]))
        try:
            for first in range(0, len(vectors), rows):
                part = torch.from_numpy(vectors[first : first + rows].copy())
                self.moments.merge(Moments.of(part.to(self.moments.mean.device)))
        except DeltacacheError as error:
            raise DatasetError(
                f"{self.root}: clip {clip_id}: {error}: extract its video again, or leave it out"
            ) from error


class _Chosen:
    """``wanted`` of all frames of a dataset, spread evenly; asked clip by clip in the order of the plan."""

    def __init__(self, clips: int, frames: int, wanted: int) -> None:
        self._frames, self._total, self._wanted = frames, clips * frames, wanted
        self._clip = 0

    def of_next_clip(self) -> Sequence[int]:
        """Frames of the next clip, in order.

        The i-th of n wanted frames out of V is number floor((i + 1/2) V / n).
        """
        first = self._clip * self._frames
        self._clip += 1
        low, high = (self._first_from(number) for number in (first, first + self._frames))
        numbers = ((2 * i + 1) * self._total // (2 * self._wanted) for i in range(low, high))
        return [number - first for number in numbers]

    def _first_from(self, number: int) -> int:
        """The smallest i whose frame is ``number`` or later."""
        return max(0, -(-(2 * number * self._wanted - self._total) // (2 * self._total)))


def fit_pca(
    features: AnyPath | str,
    out: Path,
    components: int,
    reporter: Reporter,
    *,
    frames: int | None = None,
    device: str = "auto",
) -> Pca:
    """Fit a PCA on the patch tokens of ``features`` and write it to the folder ``out``.

    Args:
        frames: how many frames to take, spread evenly over the dataset; ``None``: all. The black frame is left out.

    Raises:
        DeltacacheError: deltas, an unfinished or reduced dataset, damage, numbers that are not finite, too few
            vectors, constant channels, or an ``out`` that holds something else.
    """
    root = dataset_root(features)
    card, clips, shards = _opened(root)
    total = clips * card.sampling.frames
    if frames is not None and not 1 <= frames <= total:
        raise DeltacacheError(
            f"{counted(frames, 'frame')} of {root}, which has {total}: give 1 to {total}, or leave --frames out"
        )
    wanted = total if frames is None else frames
    metadata = _metadata(root, card, shards, clips, wanted)
    if (found := _found(out, components, metadata)) is not None:
        reporter.line(f"{out}: fitted on this already, nothing to do; {_line(found)}")
        return found
    stream = _Stream(root, card, Moments.empty(card.hidden_size, choose_device(device)))
    chosen = _Chosen(clips, card.sampling.frames, wanted)
    with reporter.stage("fit-pca", clips) as stage:
        for shard_id in shards:
            stage.advance(stream.add_shard(shard_id, chosen))
    start = time.perf_counter()
    pca = principal_components(stream.moments, components, {**metadata, "vectors": stream.moments.count})
    solve_s = time.perf_counter() - start
    with readable_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir():
            out.rmdir()  # empty, as _found made sure
        with replacing_folder(out) as folder:
            save_pca(folder, pca)
    reporter.line(
        f"{out}: {_line(pca)}; {stream.moments.count} vectors of {counted(stream.taken, 'frame')}; reading "
        f"{stream.read_s:.1f} s, covariance {stream.compute_s:.1f} s, components {solve_s:.1f} s"
    )
    return pca


def _opened(root: UPath) -> tuple[DatasetCard, int, list[str]]:
    """Card, number of clips, and shards in the order of the plan."""
    described = describe(root)
    card = described.card
    if card.kind != "features":
        raise DatasetError(
            f"{root} holds {card.kind}, but a PCA is of features: give a dataset of extract-features"
        )
    if card.backbone.pca_fingerprint is not None:
        raise DatasetError(
            f"{root} was reduced by PCA {card.backbone.pca_fingerprint} already: give features made without --pca"
        )
    if not described.finished:
        raise DatasetError(f"{root} is not finished: run extract-features on it again, then fit-pca")
    return card, described.clips, open_plan(root).shard_ids


def _metadata(root: UPath, card: DatasetCard, shards: list[str], clips: int, frames: int) -> dict[str, Any]:
    """What the PCA is made from."""
    return {
        "features_fingerprint": card.fingerprint,
        "receipts_sha256": receipts_sha256(root, shards),
        "clips": clips,
        "frames": frames,
        "backbone": card.backbone.model_dump(mode="json"),
        "image_size": card.model_dump(mode="json", include={"image_size"})["image_size"],
        "code_version": deltacache.__version__,
    }


def _found(out: Path, components: int, metadata: dict[str, Any]) -> Pca | None:
    """The same PCA if ``out`` holds it; None if it is free."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / CONFIG_FILE).is_file():
        raise DeltacacheError(f"{out} holds something else: give a new or empty folder")
    found = load_pca(out)
    changed = [f"components was {found.size}, now {components}"] if found.size != components else []
    for name, value in metadata.items():
        if name != "code_version" and found.metadata.get(name) != value:
            changed.append(f"{name} was {found.metadata.get(name)}, now {value}")
    if changed:
        raise DeltacacheError(
            f"{out} holds another PCA ({'; '.join(changed)}): give another folder, or remove it"
        )
    return found


def _line(pca: Pca) -> str:
    return f"{pca.size} components of {pca.channels} channels explain {pca.explained:.2%} of the variance"


def _float16(clip: FeatureClip, frames: Sequence[int]) -> np.ndarray:
    tokens = clip.patch_tokens[frames]
    return tokens if clip.scales is None else dequantise(tokens, clip.scales[frames])
