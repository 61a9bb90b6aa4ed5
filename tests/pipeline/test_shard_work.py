"""Committing shards as their groups arrive, and merging retried videos into finished ones."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_datasets import BLACK, FRAMES, all_bytes, drawn_clip, small_card
from upath import UPath

from deltacache.pipeline.datasets.dataset import prepare_dataset
from deltacache.pipeline.datasets.plan import PlannedVideo, ShardTask, shard_id_of
from deltacache.pipeline.datasets.receipts import Failure, SourceRecord, read_receipt
from deltacache.pipeline.decoding.work import DecodedGroup
from deltacache.pipeline.work.shard_work import ShardEncoding, commit_shard, retry_failures, try_videos
from deltacache.schemas.clips import CropBox, DeltaClip, FeatureClip, PixelClip, clip_id_of

VIDEOS = tuple(PlannedVideo(name, f"{name}.mp4", 1, 0, 2) for name in "abcde")
TASK = ShardTask(shard_id_of(0, VIDEOS), VIDEOS)


class DrawnEncoder:
    """Tokens that depend on the clip's id alone; raises at the clip that is named."""

    batch_clips = 3

    def __init__(self, raises_at: str | None = None) -> None:
        self.raises_at = raises_at
        self.most = 0

    def encode(self, clips: Sequence[PixelClip]) -> list[FeatureClip | DeltaClip]:
        self.most = max(self.most, len(clips))
        if self.raises_at in [clip.clip_id for clip in clips]:
            raise KeyboardInterrupt
        videos = {video.video_uri: video for video in VIDEOS}
        return [drawn_clip("features", videos[clip.video_uri], clip.view).clip for clip in clips]


def decoded(videos: Sequence[PlannedVideo], broken: str) -> Iterator[DecodedGroup]:
    """Groups of two videos; those in ``broken`` are refused."""
    for start in range(0, len(videos), 2):
        group = videos[start : start + 2]
        whole = [video for video in group if video.video_id not in broken]
        yield DecodedGroup(
            tuple(pixels(video, view) for video in whole for view in range(video.views)),
            tuple(
                Failure(v.video_uri, None, "decode", "truncated", "cut")
                for v in group
                if v.video_id in broken
            ),
            tuple(SourceRecord(v.video_id, v.video_uri, 1, 0, 2, "7", "5e" * 32) for v in group),
            0.5,
        )


def pixels(video: PlannedVideo, view: int) -> PixelClip:
    stored = drawn_clip("features", video, view)
    return PixelClip(
        clip_id=clip_id_of(video.video_id, view),
        video_uri=video.video_uri,
        view=view,
        pixels=np.zeros((FRAMES, 4, 4, 3), np.uint8),
        timestamps_s=stored.clip.timestamps_s,
        frame_indices=stored.frame_indices,
        crop=CropBox(1, 2, 30, 40),
        flip=stored.flip,
        decoder="pyav",
        duplicate_frames=stored.duplicate_frames,
    )


@pytest.fixture
def out(tmp_path: Path) -> UPath:
    return made(tmp_path / "out")


def made(root: Path) -> UPath:
    prepare_dataset(root, small_card("features", "webdataset"), BLACK)
    return UPath(root)


def commit(root: UPath, broken: str, videos: Sequence[PlannedVideo] = VIDEOS) -> int:
    encoding = ShardEncoding(DrawnEncoder(), decoded(videos, broken), lambda clips: None)
    return commit_shard(root, small_card("features", "webdataset"), TASK.shard_id, encoding).clips


def retry(root: UPath, tried: str, broken: str, raises_at: str | None = None) -> int:
    videos = [video for video in VIDEOS if video.video_id in tried]
    encoding = ShardEncoding(DrawnEncoder(raises_at), decoded(videos, broken), lambda clips: None)
    return retry_failures(root, small_card("features", "webdataset"), TASK.shard_id, encoding).clips


def test_groups_become_full_batches_in_the_order_of_the_plan(out: UPath) -> None:
    counted: list[int] = []
    encoder = DrawnEncoder()
    encoding = ShardEncoding(encoder, decoded(VIDEOS, "b"), counted.append)
    result = commit_shard(out, small_card("features", "webdataset"), TASK.shard_id, encoding)
    assert counted == [3, 3, 2]
    assert (result.clips, len(result.failed), result.videos, result.decode_s) == (8, 1, 5, 1.5)


def test_trying_writes_nothing(out: UPath) -> None:
    before = all_bytes(Path(out))
    encoding = ShardEncoding(DrawnEncoder(), decoded(VIDEOS, ""), lambda clips: None)
    assert try_videos(TASK.shard_id, encoding).clips == 0
    assert all_bytes(Path(out)) == before


@pytest.mark.parametrize("broken", ["a", "e", "ac", "abcde"])
def test_retried_videos_join_their_shard_as_if_they_had_never_failed(
    out: UPath, tmp_path: Path, broken: str
) -> None:
    commit(out, broken)
    assert retry(out, broken, "") == 2 * len(broken)
    whole = made(tmp_path / "whole")
    commit(whole, "")
    assert all_bytes(Path(out)) == all_bytes(Path(whole))


def test_some_may_fail_again(out: UPath, tmp_path: Path) -> None:
    commit(out, "bde")
    assert retry(out, "bde", "d") == 4
    whole = made(tmp_path / "whole")
    commit(whole, "d")
    assert all_bytes(Path(out)) == all_bytes(Path(whole))


def test_when_all_fail_again_nothing_changes(out: UPath) -> None:
    commit(out, "bd")
    before = all_bytes(Path(out))
    assert retry(out, "bd", "bd") == 0
    assert all_bytes(Path(out)) == before


def test_a_crash_before_the_merge_leaves_the_shard_as_it_was(out: UPath) -> None:
    commit(out, "bd")
    before = all_bytes(Path(out))
    with pytest.raises(KeyboardInterrupt):
        retry(out, "bd", "", raises_at="d-v001")
    assert all_bytes(Path(out)) == before


def test_a_shard_that_cannot_be_written_stays_as_it_was(out: UPath, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(out, "bd")
    before = all_bytes(Path(out))

    def full(*arguments: object) -> Iterator[object]:
        raise OSError(28, "No space left on device")
        yield

    with monkeypatch.context() as patch:
        patch.setattr("deltacache.pipeline.work.shard_work.stored_clips", full)
        with pytest.raises(OSError, match="No space left"):
            retry(out, "bd", "")
    assert all_bytes(Path(out)) == before


def test_a_retry_that_is_repeated_changes_nothing(out: UPath) -> None:
    """Its worker died after the commit, before it could say so."""
    commit(out, "bd")
    retry(out, "bd", "")
    before = all_bytes(Path(out))
    assert retry(out, "bd", "") == 0
    assert all_bytes(Path(out)) == before


def test_a_replaced_video_that_is_refused_again_is_noted(out: UPath) -> None:
    commit(out, "b")
    videos = [VIDEOS[1]]
    groups = [
        DecodedGroup((), group.failures, (replace(group.sources[0], sha256="ab" * 32),), 0.1)
        for group in decoded(videos, "b")
    ]
    encoding = ShardEncoding(DrawnEncoder(), groups, lambda clips: None)
    card = small_card("features", "webdataset")
    assert retry_failures(out, card, TASK.shard_id, encoding).clips == 0
    receipt = read_receipt(out, TASK.shard_id)
    assert receipt.sources[1].sha256 == "ab" * 32
    assert len(receipt.clips) == 8
