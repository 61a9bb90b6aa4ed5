"""Which clips of a feature dataset are scored, and how they are read in batches.

Shapes: B clips of a batch, U >= B clips held for it, T frames, N patches, D hidden.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from deltacache.evaluate.metrics import check_finite_frames
from deltacache.pipeline.datasets.dataset import Dataset
from deltacache.schemas.clips import FeatureClip
from deltacache.schemas.errors import DatasetError, MismatchError
from deltacache.schemas.texts import counted

BATCH_CLIPS = 8


@dataclass(frozen=True, slots=True)
class SequenceList:
    """Dataset rows to score, each with the row whose delta tokens it is swapped with.

    Attributes:
        videos: that the rows are from, by their addresses.
        partners: as long as ``rows``, or empty if there is a single sequence.
        first_of_video: the row of each video's first view, by the video's address.
        notes: what was left out, in words.
    """

    rows: tuple[int, ...]
    videos: tuple[str, ...]
    partners: tuple[int, ...]
    first_of_video: dict[str, int]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CachedSequences:
    """Clips on the device.

    Attributes:
        rows: dataset rows of the B clips to score.
        clip_ids: of the same clips.
        videos: that they are from.
        tokens: (U, T, N, D) float32; the B clips come first, then partners that are not among them.
        partners: (B,) positions in ``tokens``, or ``None``.
        seconds: (B, T) float32 since each clip's first frame.
    """

    rows: tuple[int, ...]
    clip_ids: tuple[str, ...]
    videos: tuple[str, ...]
    tokens: Tensor
    partners: Tensor | None
    seconds: Tensor

    @property
    def own(self) -> Tensor:
        """(B, T, N, D): the clips to score."""
        return self.tokens[: len(self.rows)]


def choose_sequences(
    index: pa.Table, frames: int, name: str, chosen: Sequence[int] | None = None
) -> SequenceList:
    """Take the clips of at least ``frames`` frames, of those that are ``chosen`` if any are, in the dataset's order.

    A clip's partner is the next clip of another video (of any video, if there is only one), the first
    clips following the last.

    Raises:
        DatasetError: there are no clips.
        MismatchError: all clips are too short.
    """
    lengths = index["timestamps_s"].combine_chunks().value_lengths().to_pylist()
    uris = index["video_uri"].to_pylist()
    asked = range(len(lengths)) if chosen is None else chosen
    rows = tuple(row for row in asked if lengths[row] >= frames)
    if not lengths:
        raise DatasetError(f"{name} holds no clips: its failures.parquet says what was rejected and why")
    if not rows:
        raise MismatchError(
            f"{name} has {counted(len(lengths), 'clip')} of at most {counted(max(lengths), 'frame')}, but context and "
            f"longest horizon need {frames}: give a shorter context or horizon, or extract longer clips"
        )
    first: dict[str, int] = {}
    views = index["view"].to_pylist()
    for row in sorted(rows, key=lambda row: views[row]):
        first.setdefault(uris[row], row)
    partners = _partners(rows, uris)
    duplicates = index["duplicate_frames"].to_pylist()
    left_out = [
        (len(lengths) - len(asked), "clips are left out by --where or --split"),
        (len(asked) - len(rows), f"clips are shorter than {counted(frames, 'frame')}: not scored"),
        (sum(duplicates[row] > 0 for row in rows), "sequences contain repeated frames: scored as they are"),
        (int(not partners), "sequence alone: there is no other whose delta token could be swapped in"),
    ]
    videos = tuple(uris[row] for row in rows)
    return SequenceList(
        rows, videos, partners, first, tuple(f"{count} {text}" for count, text in left_out if count)
    )


def _partners(rows: Sequence[int], uris: Sequence[str]) -> tuple[int, ...]:
    count = len(rows)
    if count < 2:
        return ()
    videos = [uris[row] for row in rows]
    if len(set(videos)) == 1:
        return (*rows[1:], rows[0])
    others = [0] * count
    for at in reversed(range(2 * count)):  # twice around: the last ones look at the first
        here, after = at % count, (at + 1) % count
        others[here] = after if videos[after] != videos[here] else others[after]
    return tuple(rows[at] for at in others)


def read_batches(
    dataset: Dataset, sequences: SequenceList, frames: int, device: torch.device
) -> Iterator[CachedSequences]:
    """Read the sequences' first ``frames`` frames, a few clips at a time.

    Raises:
        DatasetError: a clip is damaged.
    """
    held: dict[int, FeatureClip] = {}
    for start in range(0, len(sequences.rows), BATCH_CLIPS):
        rows = sequences.rows[start : start + BATCH_CLIPS]
        partners = sequences.partners[start : start + BATCH_CLIPS]
        needed = list(dict.fromkeys([*rows, *partners]))
        held = {row: held.get(row) or read_features(dataset, row) for row in needed}
        tokens = np.stack([held[row].patch_tokens[:frames] for row in needed])
        seconds = np.stack([held[row].timestamps_s[:frames] for row in rows]).astype(np.float64)
        positions = [needed.index(row) for row in partners]
        dataset.release()
        yield CachedSequences(
            rows=rows,
            clip_ids=tuple(held[row].clip_id for row in rows),
            videos=sequences.videos[start : start + BATCH_CLIPS],
            tokens=torch.from_numpy(tokens).to(device).float(),
            partners=torch.tensor(positions, device=device) if positions else None,
            seconds=torch.from_numpy((seconds - seconds[:, :1]).astype(np.float32)).to(device),
        )


def read_features(dataset: Dataset, row: int) -> FeatureClip:
    """One clip of a feature dataset.

    Raises:
        DatasetError: it is damaged.
        NotFiniteError: it holds NaN or infinity.
    """
    clip = dataset.read(row)
    if not isinstance(clip, FeatureClip):
        raise TypeError(f"row {row} of {dataset.root} is not a FeatureClip")
    check_finite_frames(torch.tensor(clip.patch_tokens), f"{dataset.root}, sequence {clip.clip_id}")
    return clip
