"""Which clips a training takes: of one or several datasets, filtered and split, drawn with given shares."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from functools import cached_property
from math import gcd, lcm
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa

from deltacache.pipeline.datasets.choice import rows_where, split_rows
from deltacache.pipeline.datasets.dataset import Dataset, open_dataset
from deltacache.pipeline.datasets.stores import token_shape
from deltacache.pipeline.storage.storage import AnyPath, in_threads, is_local
from deltacache.schemas.configs import DataChoice
from deltacache.schemas.datasets import DatasetCard, fingerprint_of_list
from deltacache.schemas.errors import DatasetError, MismatchError
from deltacache.schemas.jobs import DataPart
from deltacache.schemas.texts import counted
from deltacache.train.order import Mixture

Item = TypeVar("Item")
Result = TypeVar("Result")
_REMOTE_READS, _IDS_AT_ONCE = 16, 65536
_FINEST = 10_000
"""Shares are whole numbers of so many at most."""

_MEANING: dict[str, Callable[[Any], Any]] = {
    "kinds": lambda dataset: dataset.card.kind,
    "backbones": lambda dataset: dataset.card.backbone.weights_sha256[:16],
    "layers and PCA": lambda dataset: dataset.card.backbone.choice,
    "tokenizers": lambda dataset: dataset.card.tokenizer_fingerprint,
    "shapes of a clip": lambda dataset: token_shape(dataset.card),
}


def require_alike(datasets: "Sequence[Clips]", *, grids: bool = False) -> None:
    """Refuse datasets whose clips have not the same shape and meaning.

    Args:
        grids: whether the patch grids behind delta tokens must agree too.

    Raises:
        MismatchError: names both, and what differs.
    """
    meaning = _MEANING | ({"patch grids": lambda dataset: dataset.card.patch_grid} if grids else {})
    first = datasets[0]
    for other in datasets[1:]:
        for what, of in meaning.items():
            ours, theirs = of(first), of(other)
            if ours != theirs:
                raise MismatchError(
                    f"{first.root} and {other.root} cannot be read together, their {what} differ: {ours} and {theirs}. "
                    "Give datasets that were made in the same way"
                )


class ChosenClips:
    """Clips of one or several datasets behind each other, read like those of one ``Dataset``.

    Attributes:
        datasets: alike, see ``require_alike``.
        rows: of each, int64 in the order of its index.
        wheres: by which filter they were chosen, if any.
        weights: of each where they are given; without them every clip comes up as often as any other.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        rows: Sequence[np.ndarray],
        wheres: Sequence[str | None],
        weights: Sequence[float] | None = None,
    ) -> None:
        self.datasets, self.rows, self.wheres = tuple(datasets), tuple(rows), tuple(wheres)
        self.weights = weights
        self._starts = np.cumsum([0, *map(len, rows)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __repr__(self) -> str:
        return f"ChosenClips({self.root}, clips={len(self)})"

    @property
    def root(self) -> str:
        """The datasets' roots, for messages."""
        return ", ".join(str(each.root) for each in self.datasets)

    @property
    def card(self) -> DatasetCard:
        """Of the first dataset: what a model must know of all of them is the same."""
        return self.datasets[0].card

    @property
    def black_patch_tokens(self) -> np.ndarray:
        """(N, D) float16, of the first dataset."""
        return self.datasets[0].black_patch_tokens

    @cached_property
    def mixture(self) -> Mixture | None:
        """The shares in which the datasets are drawn, if weights are given."""
        if self.weights is None:
            return None
        exact = [Fraction(str(weight)) for weight in self.weights]
        parts = [(each / sum(exact)).limit_denominator(_FINEST) for each in exact]
        whole = min(lcm(*(part.denominator for part in parts)), _FINEST)
        shares = [round(part * whole) for part in parts]
        for dataset, share, weight in zip(self.datasets, shares, self.weights, strict=True):
            if share == 0:
                raise DatasetError(
                    f"{dataset.root} has the weight {weight:g} of {float(sum(exact)):g}: at least one in {_FINEST:,} "
                    "is needed; give it a larger weight or leave it out"
                )
        common = gcd(*shares)
        return Mixture(tuple(map(len, self.rows)), tuple(share // common for share in shares))

    @cached_property
    def timestamps_s(self) -> np.ndarray:
        """(C, T) float32, seconds from the first frame of each video."""
        return np.concatenate(
            [each.timestamps_s[rows] for each, rows in zip(self.datasets, self.rows, strict=True)]
        )

    @property
    def clip_ids(self) -> list[str]:
        """Ids in the order of the clips."""
        return list(ids_of(self))

    def read_frames(self, clip: int, start: int, stop: int) -> np.ndarray:
        """As ``Dataset.read_frames``."""
        dataset, row = self._place(range(len(self))[clip])
        return dataset.read_frames(row, start, stop)

    def read_all(self) -> np.ndarray:
        """The tokens of all clips, verified: (C, T, ...) float16."""
        frames = self.card.sampling.frames
        tokens = np.empty((len(self), *token_shape(self.card)), dtype=np.float16)

        def read(clip: int) -> None:
            tokens[clip] = self.read_frames(clip, 0, frames)

        deque(self.at_once(read, range(len(self))), maxlen=0)
        return tokens

    def at_once(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """As ``Dataset.at_once``."""
        local = all(is_local(each.root) for each in self.datasets)
        return map(work, items) if local else in_threads(work, items, threads=_REMOTE_READS)

    def _place(self, clip: int) -> tuple[Dataset, int]:
        member = int(np.searchsorted(self._starts, clip, side="right")) - 1
        return self.datasets[member], int(self.rows[member][clip - self._starts[member]])


Clips = Dataset | ChosenClips
"""What trainers read: all of a dataset, or what was chosen of several."""


def mixture_of(clips: Clips) -> Mixture | None:
    """The shares in which the datasets behind ``clips`` are drawn, if weights are given."""
    return clips.mixture if isinstance(clips, ChosenClips) else None


def choose_clips(
    parts: Sequence[DataPart],
    kind: Literal["features", "deltas"],
    choice: DataChoice,
    *,
    held_out: bool = False,
) -> Clips:
    """Open the datasets of a training, or the videos of them that its split holds out.

    Args:
        parts: paths with weights and filters; ``choice.where`` holds for those without a filter of their own.

    Raises:
        DatasetError: one is not a dataset of this kind, or nothing is left of it.
        MismatchError: they cannot be read together.
    """
    datasets = [open_training_data(part.path, kind) for part in parts]
    require_alike(datasets, grids=True)
    wheres = [part.where if part.where is not None else choice.where for part in parts]
    weighted = parts[0].weight is not None
    if len(datasets) == 1 and wheres[0] is None and choice.split is None:
        return datasets[0]
    rows: list[np.ndarray] = []
    for dataset, where in zip(datasets, wheres, strict=True):
        chosen = np.arange(len(dataset)) if where is None else rows_where(dataset, where)
        if choice.split is not None:
            chosen = np.intersect1d(chosen, split_rows(dataset, choice.split, choice.split_seed)[held_out])
            if len(chosen) == 0 and not held_out:
                raise DatasetError(
                    f"{dataset.root} has no clip left to train on with --split {choice.split:g}: all its videos are "
                    "held out; give a larger share, another --split-seed or more videos"
                )
        rows.append(chosen.astype(np.int64))
    if held_out and not sum(map(len, rows)):
        roots = ", ".join(str(each.root) for each in datasets)
        raise DatasetError(
            f"--split {choice.split:g} holds out none of the videos of {roots}: give a smaller share, another "
            "--split-seed or more videos"
        )
    weights = [float(part.weight or 0) for part in parts] if weighted and len(parts) > 1 else None
    return ChosenClips(datasets, rows, wheres, None if held_out else weights)


def open_training_data(root: AnyPath | str, kind: Literal["features", "deltas"]) -> Dataset:
    """Open a dataset that can be trained on.

    Raises:
        DatasetError: it is not a dataset of this kind, or holds no clips.
    """
    dataset = open_dataset(root, kind)
    if len(dataset) == 0:
        raise DatasetError(
            f"{root} holds no clips: training needs at least one; {dataset.root / 'failures.parquet'} says what was "
            "rejected and why, so run the command that made this dataset again with readable videos"
        )
    return dataset


def describe_clips(clips: Clips) -> Iterator[str]:
    """A line for each dataset of a mixture, or of what was chosen of one."""
    if isinstance(clips, Dataset):
        return
    mixture = clips.mixture
    for number, (dataset, rows) in enumerate(zip(clips.datasets, clips.rows, strict=True)):
        share = "" if mixture is None else f", share {mixture.shares[number] / sum(mixture.shares):.4g}"
        yield f"{dataset.root}: {len(rows):,} of {counted(len(dataset), 'clip', form=',')}{share}"


def ids_of(clips: Clips) -> Iterator[str]:
    """Clip ids in their order, without a list of all of them."""
    whole = isinstance(clips, Dataset)
    parts = [(clips, None)] if whole else list(zip(clips.datasets, clips.rows, strict=True))
    for dataset, rows in parts:
        column = dataset.column("clip_id")
        chosen = column if rows is None else column.take(pa.array(rows))
        for at in range(0, len(chosen), _IDS_AT_ONCE):
            yield from chosen.slice(at, _IDS_AT_ONCE).to_pylist()


def clips_record(clips: Clips) -> dict[str, Any]:
    """What a checkpoint says of the data: which, how many clips, and of several datasets or a choice what of each."""
    record = {
        "data_fingerprint": clips.card.fingerprint,
        "features_fingerprint": clips.card.features_fingerprint,
        "clips": {"count": len(clips), "fingerprint": fingerprint_of_list("clip_ids", ids_of(clips))},
    }
    if isinstance(clips, Dataset):
        return record
    mixture = clips.mixture
    members = [
        {
            "data_fingerprint": dataset.card.fingerprint,
            "features_fingerprint": dataset.card.features_fingerprint,
            "clips": len(rows),
            "of_clips": len(dataset),
            **({} if where is None else {"where": where}),
            **({} if mixture is None else {"share": mixture.shares[number] / sum(mixture.shares)}),
        }
        for number, (dataset, rows, where) in enumerate(
            zip(clips.datasets, clips.rows, clips.wheres, strict=True)
        )
    ]
    for name in ("data_fingerprint", "features_fingerprint"):
        prints = [each[name] for each in members]
        if len({*prints}) > 1:
            record[name] = fingerprint_of_list(name, prints)
    return {**record, "datasets": members}
