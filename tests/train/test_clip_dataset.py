"""``ClipDataset`` and ``ClipStream``: cached clips in one's own training loop."""

import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

import deltacache
from deltacache.pipeline.datasets.dataset import Dataset
from deltacache.pipeline.storage.files import crc32c_of_npy
from deltacache.schemas.datasets import BackboneCard, DatasetCard, SamplingSettings
from deltacache.schemas.errors import DeltacacheError
from object_stores import s3_bucket

FRAMES, HIDDEN, GRID = 3, 8, (2, 2)
of_torchdata = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # 0.11 calls it


def write(root: Path | str, kind: str, clips: int, *, seed: int = 0, tokenizer: str = "f" * 16) -> Dataset:
    """A dataset of drawn tokens in shards of three videos; each crop is another."""
    rng = np.random.default_rng(seed)
    black = np.zeros((4, HIDDEN), np.float16)
    card = DatasetCard(
        kind="features" if kind == "features" else "deltas",
        store="webdataset",
        backbone=BackboneCard(
            id="drawn", weights_sha256="0" * 64, patch_size=16, hidden_size=HIDDEN,
            image_mean=(0.5, 0.5, 0.5), image_std=(0.25, 0.25, 0.25),
        ),
        tokenizer_fingerprint=None if kind == "features" else tokenizer,
        image_size=32,
        patch_grid=GRID,
        hidden_size=HIDDEN,
        sampling=SamplingSettings(frames=FRAMES),
        black_crc32c=crc32c_of_npy(black),
        code_version="0",
    )  # fmt: skip
    shape = (FRAMES, 4, HIDDEN) if kind == "features" else (FRAMES, HIDDEN)
    with deltacache.DatasetWriter(root, card, black, videos_per_shard=3) as out:
        for number in range(clips):
            tokens = rng.standard_normal(shape).astype(np.float16)
            out.write(f"{seed}-{number}.mp4", [(tokens, np.arange(FRAMES, dtype=np.float32) + number)])
    return deltacache.open_dataset(root)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two delta datasets of 8 and 5 clips."""
    root = tmp_path_factory.mktemp("two")
    write(root / "a", "deltas", 8)
    write(root / "b", "deltas", 5, seed=1)
    return root / "a", root / "b"


def by_hand(root: Path, clip: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    dataset = deltacache.open_dataset(root)
    read: Any = dataset.read(clip)
    tokens = read.delta_tokens if dataset.card.kind == "deltas" else read.patch_tokens
    row = dataset.index.slice(clip, 1).to_pylist()[0]
    return torch.tensor(tokens.astype(np.float32)), torch.tensor(read.timestamps_s), row


def check(item: dict[str, Any], roots: tuple[Path, ...]) -> None:
    """A clip is what the dataset that it is from holds."""
    index, at = int(item["index"]), 0
    lengths = [len(deltacache.open_dataset(root)) for root in roots]
    while index >= lengths[at]:
        index, at = index - lengths[at], at + 1
    tokens, times, row = by_hand(roots[at], index)
    assert torch.equal(item["tokens"], tokens)
    assert torch.equal(item["timestamps_s"], times)
    assert item["crop"].tolist() == row["crop"]
    if "video_uri" in item:
        assert item["video_uri"] == row["video_uri"]


@pytest.mark.parametrize("in_memory", [True, False])
def test_clips_are_those_of_the_datasets(
    two: tuple[Path, Path], in_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not in_memory:
        monkeypatch.setattr("deltacache.train.data.DELTA_SHARE", 0.0)
    clips = deltacache.ClipDataset(two, columns=["video_uri", "view"])
    assert len(clips) == 13
    for index in range(13):
        check(clips[index], two)
    assert int(clips[-1]["index"]) == 12
    batch = clips.__getitems__([12, 0, 7, 8, 0])
    assert [int(item["index"]) for item in batch] == [12, 0, 7, 8, 0]
    for item in batch:
        check(item, two)
    whole = clips.collate(batch)
    assert whole["tokens"].shape == (5, FRAMES, HIDDEN)
    assert whole["video_uri"][0] == "1-4.mp4"
    with pytest.raises(IndexError):
        clips[13]
    clips[3]["tokens"].fill_(7)  # writable, and one's own
    check(clips[3], two)
    assert deltacache.ClipDataset(two, dtype=torch.float16)[0]["tokens"].dtype == torch.float16


def test_a_loader_gives_every_clip_once(two: tuple[Path, Path]) -> None:
    clips = deltacache.ClipDataset(two, columns=["video_uri"])
    for workers, collate in ((0, clips.collate), (2, clips.collate), (0, None)):
        loader = DataLoader(clips, batch_size=4, shuffle=True, num_workers=workers, collate_fn=collate)
        seen: list[int] = []
        for batch in loader:
            seen += batch["index"].tolist()
            first = {name: values[0] for name, values in batch.items()}
            check(first, two)
        assert sorted(seen) == list(range(13))


def test_a_worker_that_is_no_fork_opens_the_datasets_itself(two: tuple[Path, Path]) -> None:
    clips = deltacache.ClipDataset(two)
    sent = pickle.dumps(clips)
    assert len(sent) < 20_000
    check(pickle.loads(sent)[9], two)  # noqa: S301


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer": "e" * 16}, "their tokenizers differ: ffffffffffffffff and eeeeeeeeeeeeeeee"),
        ({"kind": "features"}, "their kinds differ: deltas and features"),
    ],
)
def test_what_does_not_go_together(
    two: tuple[Path, Path], tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    write(tmp_path / "other", **{"kind": "deltas", "clips": 1, **changes})
    with pytest.raises(DeltacacheError, match=words):
        deltacache.ClipDataset([two[0], tmp_path / "other"])
    with pytest.raises(DeltacacheError, match="'colour' is not a column of the index"):
        deltacache.ClipDataset(two[0], columns=["colour"])
    with pytest.raises(DeltacacheError, match=r"Invalid dtype torch.int8"):
        deltacache.ClipDataset(two[0], dtype=torch.int8)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The same features in an object store and in a folder."""
    with s3_bucket() as bucket:
        folder = tmp_path_factory.mktemp("features") / "features"
        write(folder, "features", 14)
        write(f"{bucket}/features", "features", 14)
        yield f"{bucket}/features", folder


def test_a_stream_gives_every_clip_once_an_epoch(store: tuple[str, Path]) -> None:
    remote, folder = store
    stream = deltacache.ClipStream(remote, seed=3, columns=["video_uri"])
    orders = []
    for epoch in (0, 0, 1):
        stream.set_epoch(epoch)
        items = list(stream)
        orders.append([item["index"] for item in items])
        assert sorted(orders[-1]) == list(range(14))
        for item in items:
            check(item, (folder,))
    assert orders[0] == orders[1] != orders[2]
    plain = deltacache.ClipStream(folder, shuffle=False)
    assert [item["index"] for item in plain] == list(range(14))
    ranks = [deltacache.ClipStream(folder, seed=3, rank=rank, world_size=2) for rank in range(2)]
    indices = [[item["index"] for item in each] for each in ranks]
    assert sorted(indices[0] + indices[1]) == list(range(14))


@of_torchdata
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 3])
def test_a_stream_goes_on_where_it_was(
    store: tuple[str, Path], workers: int, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loader() -> StatefulDataLoader[Any]:
        stream = deltacache.ClipStream(store[0], seed=1)
        return StatefulDataLoader(stream, batch_size=2, num_workers=workers)

    whole = [batch["index"].tolist() for batch in loader()]
    assert sorted(index for batch in whole for index in batch) == list(range(14))
    first, taken = loader(), []
    for batch in first:
        taken.append(batch["index"].tolist())
        if len(taken) == stop:
            break
    position = first.state_dict()
    again = loader()
    again.load_state_dict(position)
    made, original = [0], deltacache.ClipStream._item

    def counting(self: deltacache.ClipStream, *place: Any) -> dict[str, Any]:
        made[0] += 1
        return original(self, *place)

    monkeypatch.setattr(deltacache.ClipStream, "_item", counting)
    rest = [batch["index"].tolist() for batch in again]
    assert taken + rest == whole
    if not workers:  # nothing that was yielded already is read again
        assert made == [14 - 2 * stop]


def test_a_position_of_another_stream_is_refused(two: tuple[Path, Path]) -> None:
    position = deltacache.ClipStream(two[0], seed=1).state_dict()
    with pytest.raises(DeltacacheError, match="this position is that of another stream"):
        deltacache.ClipStream(two[0], seed=2).load_state_dict(position)
    with pytest.raises(DeltacacheError, match="Invalid rank 2 of 2"):
        deltacache.ClipStream(two[0], rank=2, world_size=2)


@of_torchdata
def test_the_examples_of_the_page_run(
    two: tuple[Path, Path], store: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs/python.md").read_text()
    examples = re.findall(
        r"```python\n(.*?)```", page.partition("## Clips in your own training loop")[2], re.DOTALL
    )
    assert len(examples) == 2
    for name, target in {"deltas-a": two[0], "deltas-b": two[1], "features": store[1]}.items():
        (tmp_path / name).symlink_to(target)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(examples[0], names)
    assert len(names["clips"]) == 13
    exec(examples[1], names)
    rest = list(names["loader"])
    assert sum(len(batch["index"]) for batch in rest) == 14 - len(names["batch"]["index"])
