"""Cached clips for one's own training loop: a map-style dataset, and an iterable one that streams shards.

Both read through ``Dataset``: every clip is verified, on disks and in object stores alike.

Shapes: C clips, B clips of a batch, T frames; tokens of a frame are (D,), (M, D) or (N, D).
"""

import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils import data as torch_data

from deltacache.pipeline.datasets.dataset import Dataset, open_dataset
from deltacache.pipeline.datasets.stores import token_shape
from deltacache.pipeline.storage.storage import AnyPath, is_local, names_in
from deltacache.schemas.datasets import fingerprint_of
from deltacache.schemas.errors import DatasetError, MismatchError, SettingsError
from deltacache.schemas.hub import dataset_place, streamed_place
from deltacache.schemas.tables import INDEX_SCHEMA
from deltacache.train.data import MappedClips, ResidentClips, open_clips
from deltacache.train.mixture import require_alike
from deltacache.train.order import seed_of

AnyDataset = str | Path | AnyPath | Dataset
Item = dict[str, Any]
_OWN = {"tokens", "timestamps_s", "crop", "index"}


class ClipRows(Sequence[Item]):
    """Clips that were read together: ``batch`` has all of them, and one by one they are views of it."""

    def __init__(self, batch: Item) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch["index"])

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[at] for at in range(*row.indices(len(self)))]
        return {name: values[range(len(self))[row]] for name, values in self.batch.items()}


class ClipDataset(torch_data.Dataset[Item]):
    """The clips of one or several datasets of features or deltas, as writable tensors.

    ``clips[i]`` is a dict: ``tokens`` (T, ...), ``timestamps_s`` (T,) seconds from the first frame of the video,
    ``crop`` (4,) top, left, height and width in pixels of the frame, ``index`` i, and what ``columns`` name.
    ``DataLoader(clips, batch_size=1024, shuffle=True, collate_fn=clips.collate)`` reads a batch in one piece.

    Tokens are in memory where they take at most half of it, else they are read from the shards as they are asked for.

    Args:
        columns: of ``index.parquet``, such as ``clip_id``, ``video_uri`` or ``view``; and side arrays of the datasets,
            such as ``action``: float32 (T,) or (T, W), or a list of texts.
        dtype: of the tokens: float32, or float16 as they are stored.

    Raises:
        DatasetError: no finished dataset, a damaged one, or no such column.
        MismatchError: datasets of different backbones, tokenizers, or numbers of frames.

    Example:
        >>> clips = deltacache.ClipDataset("deltas/", columns=["video_uri"])
        >>> clips[0]["tokens"].shape, clips[0]["video_uri"]
        (torch.Size([8, 768]), 'a.mp4')
    """

    def __init__(
        self,
        paths: AnyDataset | Sequence[AnyDataset],
        *,
        columns: Sequence[str] = (),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._datasets = _open(paths)
        self._columns = _checked(columns, self._datasets)
        self._dtype = _checked_dtype(dtype)
        self._starts = np.cumsum([0, *map(len, self._datasets)])
        self._crops = [torch.from_numpy(_crops(each)) for each in self._datasets]
        self._values = [{name: _column(each, name) for name in self._columns} for each in self._datasets]
        self._clips: list[ResidentClips | MappedClips] = self._load()
        self._own = threading.local()  # a buffer for each thread that reads
        self._process = os.getpid()

    def _load(self) -> list[ResidentClips | MappedClips]:
        return [open_clips(each, sharers=len(self._datasets)) for each in self._datasets]

    def __getstate__(self) -> dict[str, Any]:
        """For a worker that is not a fork: it opens the datasets again instead of being sent their tokens."""
        return {name: each for name, each in vars(self).items() if name not in ("_clips", "_own")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._clips, self._own = self._load(), threading.local()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __repr__(self) -> str:
        names = ", ".join(str(each.root) for each in self._datasets)
        return f"ClipDataset({names}, clips={len(self)}, clip={token_shape(self._datasets[0].card)})"

    def __getitem__(self, index: int) -> Item:
        return self.__getitems__([range(len(self))[index]])[0]

    def __getitems__(self, indices: Sequence[int] | Tensor | np.ndarray) -> ClipRows:
        """Several clips at once, in this order; what ``DataLoader`` asks for."""
        asked = np.asarray(indices, np.int64)
        if len(asked) and not (-len(self) <= asked.min() and asked.max() < len(self)):
            raise IndexError(f"clips {asked.min()} to {asked.max()} of {len(self)}")
        asked = np.where(asked < 0, asked + len(self), asked)
        if os.getpid() != self._process:
            self._datasets, self._process = _here(self._datasets, self._process)
            self._clips = [
                clips if isinstance(clips, ResidentClips) else MappedClips.of(dataset)
                for clips, dataset in zip(self._clips, self._datasets, strict=True)
            ]
        if len(self._datasets) == 1:
            return ClipRows({**self._rows(0, asked), "index": torch.from_numpy(asked)})
        which = np.searchsorted(self._starts, asked, side="right") - 1
        places = {number: np.flatnonzero(which == number) for number in np.unique(which).tolist()}
        parts = [self._rows(number, asked[at] - self._starts[number]) for number, at in places.items()]
        back = np.argsort(np.concatenate([*places.values(), np.empty(0, np.int64)]), kind="stable")
        order = torch.from_numpy(back)
        batch: Item = {}
        for name in parts[0] if parts else ():
            joined = [part[name] for part in parts]
            if isinstance(joined[0], Tensor):
                batch[name] = torch.cat(joined)[order]
            else:
                flat = [value for part in joined for value in part]
                batch[name] = [flat[at] for at in back.tolist()]
        return ClipRows({**batch, "index": torch.from_numpy(asked)})

    def _rows(self, number: int, rows: np.ndarray) -> Item:
        """Of one dataset."""
        clips, at = self._clips[number], torch.from_numpy(rows)
        if isinstance(clips, ResidentClips):
            tokens = self._gathered(torch.from_numpy(clips.tokens), at)
        else:
            tokens = torch.from_numpy(clips.tokens[rows]).to(self._dtype)
        columns = {name: _of_clips(column, rows) for name, column in self._values[number].items()}
        times = torch.from_numpy(clips.timestamps_s[rows])
        return {"tokens": tokens, "timestamps_s": times, "crop": self._crops[number][at], **columns}

    def _gathered(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """Rows (B, T, ...) in the dtype that is asked for, in memory of their own.

        Float32 takes the way of a buffer that is used again: fresh memory costs several times what filling it does.
        """
        if self._dtype == tokens.dtype:
            return tokens.index_select(0, rows)
        buffer = getattr(self._own, "buffer", None)
        shape = (len(rows), *tokens.shape[1:])
        if buffer is None or buffer.shape != shape:
            buffer = self._own.buffer = torch.empty(shape, dtype=tokens.dtype)
        torch.index_select(tokens, 0, rows, out=buffer)
        return buffer.to(self._dtype)

    @staticmethod
    def collate(rows: Sequence[Item]) -> Item:
        """A batch for ``DataLoader``: tensors (B, ...), and lists of what is text."""
        return rows.batch if isinstance(rows, ClipRows) else torch_data.default_collate(list(rows))


class ClipStream(torch_data.IterableDataset[Item]):
    """The same clips one after the other, shard by shard, for tokens that memory does not hold.

    Shards come in an order that is drawn from (seed, epoch), and the clips of a shard too; workers and ranks divide the
    shards. From an object store or the hub (``org/name``) several clips are fetched at a time, and nothing is kept on
    the disk. ``set_epoch`` says which epoch it is, as that of ``DistributedSampler`` does: call it before each, without
    persistent workers.

    ``state_dict()`` and ``load_state_dict()`` keep the position: torchdata's ``StatefulDataLoader`` calls them in every
    worker, and continues with the next clip that was not yielded.

    Args:
        shuffle: else shards and clips come as they lie.
        rank, world_size: which part of the shards, for a loader in each of several processes.

    Example:
        >>> stream = deltacache.ClipStream("s3://bucket/features/", seed=1)
        >>> loader = StatefulDataLoader(stream, batch_size=16, num_workers=4)
        >>> position = loader.state_dict()  # later: loader.load_state_dict(position)
    """

    def __init__(
        self,
        paths: AnyDataset | Sequence[AnyDataset],
        *,
        shuffle: bool = True,
        seed: int = 0,
        columns: Sequence[str] = (),
        dtype: torch.dtype = torch.float32,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not 0 <= rank < world_size:
            raise SettingsError(f"Invalid rank {rank} of {world_size}: ranks count from 0")
        self._datasets, self._dtype = _open(paths, streamed=True), _checked_dtype(dtype)
        self._columns = _checked(columns, self._datasets)
        self._shuffle, self._seed, self._part = shuffle, seed, (rank, world_size)
        self._values: dict[int, dict[str, Any]] = {}
        self._epoch, self._done, self._resumed = 0, 0, False
        self._process = os.getpid()

    def __len__(self) -> int:
        """All clips, of all ranks and workers."""
        return sum(map(len, self._datasets))

    def set_epoch(self, epoch: int) -> None:
        """Take the order of that epoch when it is iterated next."""
        self._epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        """The position in this worker: which epoch, and how many of its clips were yielded."""
        return {"epoch": self._epoch, "done": self._done, "stream": self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind the position of ``state``, with the next iteration.

        Raises:
            MismatchError: the state of other datasets, another seed, or another number of workers or ranks.
        """
        if state["stream"] != self._identity():
            raise MismatchError(
                f"this position is that of another stream ({state['stream']}, not {self._identity()}): it belongs to "
                "the same datasets, seed, shuffle and numbers of workers and ranks; give those, or start a new stream"
            )
        self._epoch, self._done, self._resumed = state["epoch"], state["done"], True

    def __iter__(self) -> Iterator[Item]:
        if not self._resumed:
            self._done = 0
        self._resumed = False
        self._datasets, self._process = _here(self._datasets, self._process)
        order = self._order()
        skipped = self._done
        for number, shard in order:
            clips = self._clips_of(number, shard)
            if skipped >= len(clips):
                skipped -= len(clips)
                continue
            dataset = self._datasets[number]
            wanted = clips[skipped:].tolist()
            skipped = 0
            frames = dataset.card.sampling.frames
            found = dataset.at_once(
                lambda clip, read=dataset.read_frames, frames=frames: read(clip, 0, frames), wanted
            )
            for clip, tokens in zip(wanted, found, strict=True):
                self._done += 1
                yield self._item(number, clip, tokens)
            dataset.release()
        self._done = 0

    def _order(self) -> list[tuple[int, str]]:
        """Datasets and shards of this worker, in the order of the epoch."""
        shards = [
            (number, shard) for number, dataset in enumerate(self._datasets) for shard in dataset.shard_ids
        ]
        if self._shuffle:
            drawn = np.random.Generator(np.random.PCG64(seed_of("shards", self._seed, self._epoch)))
            shards = [shards[at] for at in np.argsort(drawn.random(len(shards)), kind="stable")]
        first, step = self._share()
        return shards[first::step]

    def _share(self) -> tuple[int, int]:
        rank, world_size = self._part
        worker = torch_data.get_worker_info()
        if worker is None:
            return rank, world_size
        return rank * worker.num_workers + worker.id, world_size * worker.num_workers

    def _clips_of(self, number: int, shard: str) -> np.ndarray:
        clips = np.asarray(self._datasets[number].clips_of(shard))
        if not self._shuffle:
            return clips
        drawn = np.random.Generator(np.random.PCG64(seed_of("clips", self._seed, self._epoch, number, shard)))
        return clips[np.argsort(drawn.random(len(clips)), kind="stable")]

    def _item(self, number: int, clip: int, tokens: np.ndarray) -> Item:
        dataset = self._datasets[number]
        held = self._values.get(number)
        if held is None:
            columns = {name: _column(dataset, name) for name in self._columns}
            held = self._values[number] = {"crop": _crops(dataset), "columns": columns}
        first = sum(map(len, self._datasets[:number]))
        return {
            "tokens": torch.from_numpy(np.array(tokens)).to(self._dtype),
            "timestamps_s": torch.from_numpy(dataset.timestamps_s[clip].copy()),
            "crop": torch.from_numpy(held["crop"][clip].copy()),
            "index": first + clip,
            **{name: _of_clips(column, np.array([clip]))[0] for name, column in held["columns"].items()},
        }

    def _identity(self) -> str:
        """What a position belongs to."""
        return fingerprint_of(
            {
                "datasets": [[each.card.fingerprint, len(each), *each.shard_ids] for each in self._datasets],
                "order": [self._shuffle, self._seed],
                "share": list(self._share()),
            }
        )


def _open(paths: AnyDataset | Sequence[AnyDataset], *, streamed: bool = False) -> list[Dataset]:
    """The datasets, of which each clip has the same shape and meaning.

    Raises:
        MismatchError: they differ in that.
    """
    several: Sequence[Any] = paths if isinstance(paths, list | tuple) else [paths]
    place = streamed_place if streamed else dataset_place
    datasets = [each if isinstance(each, Dataset) else _opened(place(each)) for each in several]
    if not datasets:
        raise DatasetError("no dataset is given: give the path of one or several")
    require_alike(datasets)
    return datasets


def _here(datasets: list[Dataset], process: int) -> tuple[list[Dataset], int]:
    """In a worker that was forked, clients of object stores are not those of the process before: opened again."""
    if os.getpid() == process:
        return datasets, process
    return [each if is_local(each.root) else _opened(str(each.root)) for each in datasets], os.getpid()


def _opened(place: str | Path | AnyPath) -> Dataset:
    dataset = open_dataset(place)
    if not is_local(dataset.root) and dataset.root.protocol == "hf":
        for folder in ("shards", "receipts"):  # once here, or every thread that reads lists them
            names_in(dataset.root / folder)
    return dataset


def _checked(columns: Sequence[str], datasets: Sequence[Dataset]) -> tuple[str, ...]:
    for dataset in datasets:
        known = [
            name for name in (*INDEX_SCHEMA.names, *sorted(dataset.card.side_arrays)) if name not in _OWN
        ]
        taken = [name for name in columns if name not in known]
        if taken:
            raise DatasetError(
                f"{taken[0]!r} is not a column of the index that can be added, and not a side array of {dataset.root}: "
                f"choose from {', '.join(known)}"
            )
    arrays = [{name: each.card.side_arrays.get(name) for name in columns} for each in datasets]
    for dataset, other in zip(datasets[1:], arrays[1:], strict=True):
        if other != arrays[0]:
            raise MismatchError(
                f"{datasets[0].root} and {dataset.root} have other side arrays ({arrays[0]} and {other}): they cannot "
                "be read together; leave those columns out"
            )
    return tuple(columns)


Column = pa.Array | Tensor | list[list[str]]
"""A value for each clip: of the index, of a side array of numbers, or of one of texts."""


def _column(dataset: Dataset, name: str) -> Column:
    if name not in dataset.card.side_arrays:
        return dataset.column(name)
    values = dataset.side_array(name)
    return torch.from_numpy(values) if isinstance(values, np.ndarray) else values


def _of_clips(column: Column, rows: np.ndarray) -> Any:
    if isinstance(column, Tensor):
        return column[torch.from_numpy(rows)]
    if isinstance(column, list):
        return [column[row] for row in rows.tolist()]
    return column.take(pa.array(rows)).to_pylist()


def _checked_dtype(dtype: torch.dtype) -> torch.dtype:
    if dtype not in (torch.float32, torch.float16):
        raise SettingsError(f"Invalid dtype {dtype}: must be torch.float32 or torch.float16")
    return dtype


def _crops(dataset: Dataset) -> np.ndarray:
    """(C, 4) int32: top, left, height, width."""
    column = dataset.column("crop")
    return column.flatten().to_numpy(zero_copy_only=False).astype(np.int32).reshape(len(dataset), 4)
