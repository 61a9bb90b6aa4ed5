"""Tokens that are NaN or infinite: a model that gives them is refused, a clip that has some is a row."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_datasets import BLACK, GRID, HIDDEN, all_bytes, drawn_clip, small_card
from test_encoders import CPU, SIZE, delta_encoder, numbers, pixel_clip, random_vit
from test_shard_work import TASK, VIDEOS, DrawnEncoder, decoded, made
from upath import UPath

from deltacache.models.deltatok import DeltaTok
from deltacache.pipeline.datasets.dataset import prepare_dataset
from deltacache.pipeline.datasets.receipts import read_receipt
from deltacache.pipeline.jobs.offline import extract_features
from deltacache.pipeline.work.attempts import Kind, Work
from deltacache.pipeline.work.encoders import DeltaEncoder, FeatureEncoder, black_patch_tokens_of
from deltacache.pipeline.work.shard_work import ShardEncoding, commit_shard, measure_forward, retry_failures
from deltacache.pipeline.work.workers import measure_tokenizing, tokenize_shard
from deltacache.schemas.clips import FeatureClip, PixelClip
from deltacache.schemas.errors import DeltacacheError
from deltacache.schemas.jobs import ClusterSettings, ExtractionSettings
from deltacache.terminal import PlainReporter

BAD = {("b.mp4", 1), ("d.mp4", 0)}


def overflowing() -> Any:
    """A backbone whose tokens of bright frames are beyond what float16 holds."""
    backbone = random_vit()
    tokens_of = backbone.patch_tokens

    def tokens(frames: torch.Tensor) -> torch.Tensor:
        bright = frames.float().mean((1, 2, 3)) > 250
        return tokens_of(frames) * torch.where(bright, 1e9, 1.0)[:, None, None]

    backbone.patch_tokens = tokens  # pyright: ignore[reportAttributeAccessIssue]
    return backbone


@pytest.mark.parametrize("kind", ["float16", "int8", "deltas", "features to deltas"])
def test_a_clip_without_finite_tokens_is_none_and_its_neighbours_are_as_ever(kind: str) -> None:
    backbone = overflowing()
    white = replace(pixel_clip(1), pixels=np.full_like(pixel_clip(1).pixels, 255))
    clips: list[Any] = [pixel_clip(0), white, pixel_clip(2)]
    deltas = delta_encoder(backbone, 3)
    encode: Any = FeatureEncoder(backbone, CPU, 3, "int8" if kind == "int8" else "float16").encode
    if kind == "deltas":
        encode = deltas.encode
    elif kind == "features to deltas":
        one, _, other = encode(clips)
        tokens = one.patch_tokens.copy()
        tokens[1, 2, 3] = np.inf
        clips, encode = [one, replace(one, patch_tokens=tokens), other], deltas.encode_features
    first, bad, last = encode(clips)
    assert bad is None
    for clip, got in ((clips[0], first), (clips[2], last)):
        for array, alone in zip(numbers(got), numbers(encode([clip])[0]), strict=True):
            np.testing.assert_array_equal(array, alone)


class SometimesNone(DrawnEncoder):
    """Gives no tokens for the clips in ``BAD``."""

    def __init__(self, batch_clips: int) -> None:
        super().__init__()
        self.batch_clips = batch_clips

    def encode(self, clips: Sequence[PixelClip]) -> list[Any]:
        encoded = zip(clips, super().encode(clips), strict=True)
        return [None if (clip.video_uri, clip.view) in BAD else tokens for clip, tokens in encoded]


def test_they_are_rows_and_never_committed(tmp_path: Path) -> None:
    card = small_card("features", "webdataset")
    roots = [made(tmp_path / f"batches-of-{size}") for size in (1, 3)]
    for root, size in zip(roots, (1, 3), strict=True):
        encoding = ShardEncoding(SometimesNone(size), decoded(VIDEOS, "c"), lambda clips: None)
        result = commit_shard(root, card, TASK.shard_id, encoding)
        assert (result.clips, result.failed) == (6, ("b.mp4", "c.mp4", "d.mp4"))
    receipt = read_receipt(roots[0], TASK.shard_id)
    rows = [(row.video_uri, row.view, row.stage, row.reason) for row in receipt.failures]
    assert rows == [
        ("b.mp4", 1, "encode", "encode_failed"),
        ("c.mp4", None, "decode", "truncated"),
        ("d.mp4", 0, "encode", "encode_failed"),
    ]
    assert "not finite" in receipt.failures[0].message
    assert not {(row["video_uri"], row["view"]) for row in receipt.clips} & BAD
    assert all_bytes(Path(roots[0])) == all_bytes(Path(roots[1]))
    # What is tried again in vain leaves everything as it was.
    before = all_bytes(Path(roots[0]))
    again = ShardEncoding(
        SometimesNone(3), decoded([v for v in VIDEOS if v.video_id in "bcd"], "c"), lambda n: None
    )
    assert retry_failures(roots[0], card, TASK.shard_id, again).clips == 0
    assert all_bytes(Path(roots[0])) == before


class NoDeltas:
    """An encoder of features that gives nothing for the clips in ``without``."""

    batch_clips = 4

    def __init__(self, without: set[tuple[str, int]]) -> None:
        self.without = without

    def encode_features(self, clips: Sequence[FeatureClip]) -> list[Any]:
        bad = {f"{uri[0]}-v{view:03d}" for uri, view in self.without}
        named = {f"{video.video_id}-v{view:03d}": (video, view) for video in VIDEOS for view in range(2)}
        return [
            None if clip.clip_id in bad else drawn_clip("deltas", *named[clip.clip_id]).clip for clip in clips
        ]


def tokenized(features: UPath, deltas: UPath, kind: Kind, without: set[tuple[str, int]], *blamed: str) -> int:
    """The work on the shard, with an encoder that gives nothing for some clips; how many are new."""
    cards = small_card("features", "webdataset"), small_card("deltas", "webdataset")
    encoder: Any = NoDeltas(without)
    work = Work(kind, TASK, tuple((uri, "the encoder died") for uri in blamed))
    return tokenize_shard((features, cards[0]), (deltas, cards[1]), work, encoder, lambda clips: None).clips


@pytest.fixture
def features_and_deltas(tmp_path: Path) -> tuple[UPath, UPath]:
    features, card = made(tmp_path / "features"), small_card("features", "webdataset")
    commit_shard(
        features, card, TASK.shard_id, ShardEncoding(DrawnEncoder(), decoded(VIDEOS, "c"), lambda clips: None)
    )
    prepare_dataset(tmp_path / "deltas", small_card("deltas", "webdataset"), BLACK)
    return features, UPath(tmp_path / "deltas")


def test_deltas_of_features_likewise(features_and_deltas: tuple[UPath, UPath]) -> None:
    assert tokenized(*features_and_deltas, Kind.COMMIT, BAD) == 6
    receipt = read_receipt(features_and_deltas[1], TASK.shard_id)
    assert len(receipt.clips) == 6
    assert {(row.video_uri, row.view) for row in receipt.failures} == {*BAD, ("c.mp4", None)}


@pytest.mark.parametrize("blamed", [(), ("a.mp4", "d.mp4")])
def test_a_shard_that_grows_keeps_its_clips_though_they_would_fail_now(
    features_and_deltas: tuple[UPath, UPath], blamed: tuple[str, ...]
) -> None:
    deltas, other = features_and_deltas[1], ("d.mp4", 0)
    tokenized(*features_and_deltas, Kind.COMMIT, BAD)
    before = read_receipt(deltas, TASK.shard_id)
    # One of the two succeeds now, and clips that were good before do not, or their video kills its worker.
    assert tokenized(*features_and_deltas, Kind.RETRY, {other, ("a.mp4", 0), ("e.mp4", 1)}, *blamed) == 1
    after = read_receipt(deltas, TASK.shard_id)
    assert len(after.clips) == 7
    assert all(after.arrays[clip_id] == crcs for clip_id, crcs in before.arrays.items())
    assert {(row.video_uri, row.view) for row in after.failures} == {other, ("c.mp4", None)}
    assert tokenized(*features_and_deltas, Kind.RETRY, set()) == 1
    whole = UPath(deltas.parent / "whole")
    prepare_dataset(whole, small_card("deltas", "webdataset"), BLACK)
    assert tokenized(features_and_deltas[0], whole, Kind.COMMIT, set()) == 8
    assert all_bytes(Path(whole)) == all_bytes(Path(deltas))


def broken_vit() -> Any:
    backbone = random_vit()
    with torch.no_grad():
        next(parameter for parameter in backbone.parameters() if parameter.dim() > 1).fill_(torch.nan)
    return backbone


def test_a_backbone_or_tokenizer_is_refused_when_it_is_first_measured() -> None:
    with pytest.raises(
        DeltacacheError, match=r"backbone random gives tokens that are not finite for a black frame"
    ):
        black_patch_tokens_of(broken_vit(), SIZE)
    for encoder in (FeatureEncoder(broken_vit(), CPU), FeatureEncoder(broken_vit(), CPU, dtype="int8")):
        with pytest.raises(DeltacacheError, match=r"gives tokens for noise that are not finite"):
            measure_forward(encoder, 2, SIZE, 0)
    tokenizer = DeltaTok(HIDDEN, 1, 1, 1)
    with torch.no_grad():
        for parameter in tokenizer.parameters():
            parameter.fill_(torch.nan)
    deltas = DeltaEncoder(tokenizer, BLACK, GRID, CPU)
    with pytest.raises(DeltacacheError, match=r"gives tokens for noise that are not finite"):
        measure_tokenizing(deltas, small_card("features", "webdataset"), 0)


def test_a_damaged_backbone_ends_the_command_before_anything_is_written(tmp_path: Path) -> None:
    broken_vit().model.save_pretrained(tmp_path / "backbone")
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/a.mp4").write_bytes(b"x")
    settings = ExtractionSettings(
        source=str(tmp_path / "videos"),
        backbone=str(tmp_path / "backbone"),
        image_size=SIZE,
        cluster=ClusterSettings(encoders=0),
    )
    with pytest.raises(DeltacacheError, match="not finite"):
        extract_features(settings, tmp_path / "out", PlainReporter())
    assert not (tmp_path / "out").exists()
