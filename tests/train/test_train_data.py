from pathlib import Path

import numpy as np
import pytest
import torch
from drawn import PATCHES, black_tokens, drawn_deltas, drawn_features, write_dataset

from deltacache.pipeline.datasets.dataset import open_dataset
from deltacache.schemas.datasets import fingerprint_of, fingerprint_of_list
from deltacache.schemas.errors import DatasetError
from deltacache.train import data
from deltacache.train.data import (
    MappedClips,
    PairSettings,
    ResidentClips,
    ResidentFeatures,
    StreamedFeatures,
    choose_pairs,
    clip_batches,
    fits_in_memory,
    open_clips,
    open_pairs,
    pair_batches,
)
from deltacache.train.order import MicroBatch, Split, batch_items

CPU = torch.device("cpu")
WHOLE = Split(5)
SETTINGS = PairSettings(clips=12, frames=6, effective_batch=5, seed=1, black_first_fraction=0.3)


def test_a_pair_is_a_frame_and_the_next_one_of_the_drawn_clip(features: Path) -> None:
    tokens = drawn_features(12, 6)
    dataset = open_dataset(features)
    parts = list(WHOLE.parts_of(range(3, 6)))
    batches = pair_batches(open_pairs(dataset), dataset.black_patch_tokens, SETTINGS, parts, CPU)
    for part, batch in zip(parts, batches, strict=True):
        choice = choose_pairs(SETTINGS, part)
        for row, (clip, start, black) in enumerate(
            zip(choice.clips, choice.starts, choice.black, strict=True)
        ):
            previous = black_tokens() if black else tokens[clip, start]
            assert (batch.previous[row].numpy() == previous.astype(np.float32)).all()
            assert (batch.current[row].numpy() == tokens[clip, start + 1].astype(np.float32)).all()


def test_resident_and_streamed_features_give_the_same_batches(
    features: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_dataset(features)
    sources = [open_pairs(dataset)]
    monkeypatch.setattr(data, "memory_bytes", lambda: 4 * 12 * 6 * PATCHES * 16 * 2 - 4)
    sources.append(open_pairs(dataset))
    assert [type(source) for source in sources] == [ResidentFeatures, StreamedFeatures]
    runs = [
        pair_batches(source, dataset.black_patch_tokens, SETTINGS, WHOLE.parts_of(range(20)), CPU)
        for source in sources
    ]
    for resident, streamed in zip(*runs, strict=True):
        assert torch.equal(resident.previous, streamed.previous)
        assert torch.equal(resident.current, streamed.current)


def test_memory_budget_is_a_quarter(features: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "memory_bytes", lambda: 4 * 12 * 6 * PATCHES * 16 * 2)
    assert fits_in_memory(open_dataset(features))


def test_real_memory_is_measured() -> None:
    assert 2**28 < data.memory_bytes() < 2**50


def test_pairs_cover_all_places_and_the_asked_share_is_black() -> None:
    choices = [choose_pairs(SETTINGS, part) for part in WHOLE.parts_of(range(400))]
    starts = np.concatenate([choice.starts for choice in choices])
    black = np.concatenate([choice.black for choice in choices])
    assert set(starts.tolist()) == {0, 1, 2, 3, 4}
    assert abs(black.mean() - 0.3) < 0.04


@pytest.mark.parametrize(("fraction", "share"), [(0.0, 0.0), (1.0, 1.0)])
def test_no_or_only_black_pairs(fraction: float, share: float) -> None:
    settings = PairSettings(clips=3, frames=2, effective_batch=64, seed=0, black_first_fraction=fraction)
    assert choose_pairs(settings, MicroBatch(0, 0, 64)).black.mean() == share


def test_a_damaged_shard_stops_streaming_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_dataset(tmp_path / "features", "features", drawn_features(3, 2))
    shard = next((root / "shards").glob("*.tar"))
    body = bytearray(shard.read_bytes())
    at = body.find(drawn_features(3, 2)[1].tobytes())
    body[at + 10] ^= 0xFF
    shard.write_bytes(bytes(body))
    monkeypatch.setattr(data, "memory_bytes", lambda: 0)
    dataset = open_dataset(root)
    settings = PairSettings(clips=3, frames=2, effective_batch=3, seed=0, black_first_fraction=0.0)
    batches = pair_batches(
        open_pairs(dataset), dataset.black_patch_tokens, settings, [MicroBatch(0, 0, 3)], CPU
    )
    with pytest.raises(DatasetError, match="video001"):
        next(batches)


def test_delta_batches_hold_whole_clips_and_seconds_from_the_first_frame(deltas: Path) -> None:
    arrays = open_clips(open_dataset(deltas, "deltas"))
    assert arrays.timestamps_s.min() > 3
    parts = list(Split(2, accumulation=2).parts_of(range(4, 6)))
    for part, batch in zip(parts, clip_batches(arrays, 4, 1, parts, CPU), strict=True):
        items = batch_items(1, part.step, 4, 12)[part.start : part.stop]
        assert (batch.tokens.numpy() == drawn_deltas(12, 6)[items].astype(np.float32)).all()
        expected = arrays.timestamps_s[items] - arrays.timestamps_s[items][:, :1]
        assert (batch.timestamps_s.numpy() == expected).all()
        assert (batch.timestamps_s[:, 0] == 0).all()


def test_delta_batches_are_the_same_from_memory_and_from_mapped_shards(
    deltas: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_dataset(deltas)
    bytes_of_all = 12 * 6 * 16 * 2
    found = []
    for memory in (2 * bytes_of_all, 2 * bytes_of_all - 2):
        monkeypatch.setattr(data, "memory_bytes", lambda memory=memory: memory)
        found.append(open_clips(dataset))
    assert [type(one) for one in found] == [ResidentClips, MappedClips]
    parts = list(Split(5).parts_of(range(3, 9)))
    runs = [clip_batches(one, 5, 1, parts, CPU) for one in found]
    for resident, mapped in zip(*runs, strict=True):
        assert torch.equal(resident.tokens, mapped.tokens)
        assert torch.equal(resident.timestamps_s, mapped.timestamps_s)
        assert resident.tokens.dtype == torch.float32


def test_a_list_has_the_same_fingerprint_whether_or_not_it_fits_in_memory(deltas: Path) -> None:
    for ids in ([], ["a"], open_dataset(deltas).clip_ids, ['a"b', "\u00e9,"]):
        assert fingerprint_of_list("clip_ids", iter(ids)) == fingerprint_of({"clip_ids": ids})
