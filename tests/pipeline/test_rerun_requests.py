"""A run over a finished dataset: what it asks of its object store, and what it notices all the same.

The jobs are the real ones up to the work itself, which is drawn; Ray is not started.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from small_datasets import BLACK, all_bytes, shard_of, small_card, sources_of
from upath import UPath

from deltacache.models.checkpoints import save_model
from deltacache.models.deltatok import DeltaTok
from deltacache.pipeline.datasets.changes import describe
from deltacache.pipeline.datasets.dataset import finish_dataset, finished_shards, open_dataset, write_shard
from deltacache.pipeline.datasets.plan import open_plan
from deltacache.pipeline.datasets.writing import drop_shards, is_dataset, read_card
from deltacache.pipeline.jobs import offline
from deltacache.pipeline.storage.locking import dataset_lock
from deltacache.pipeline.work.attempts import Attempts
from deltacache.schemas.errors import DatasetError
from deltacache.schemas.jobs import ClusterSettings, ExtractionSettings, TokenizeSettings
from deltacache.schemas.progress import SilentReporter
from object_stores import requests_at_the_server

CARD = small_card("features", "webdataset")
MOST = 16
"""With four to take the lock and to give it back, 20; while a command runs, the lock is renewed every five seconds."""


@contextmanager
def few_requests() -> Iterator[list[str]]:
    """No more than ``MOST`` requests but those of the lock, and none for receipts or parts."""
    asked: list[str] = []
    with requests_at_the_server() as all_asked:
        yield asked
    asked += [line for line in all_asked if ".lock" not in line]
    assert 3 <= len(asked) <= MOST, asked
    assert not [line for line in asked if "receipts" in line or "parts" in line]


@dataclass
class DrawnJob(offline._Job):
    """Does the work of encoders by drawing clips."""

    made: list[str] = field(default_factory=list)

    def run(self, attempts: Attempts, *_: Any) -> None:
        while (work := attempts.next()) is not None:
            self.made.append(work.task.shard_id)
            card = read_card(self.out)
            drawn = shard_of(card.kind, work.task)
            sources = sources_of(work.task)
            if self.out.name == "others":
                sources = [replace(source, sha256="0" * 64) for source in sources]
            write_shard(self.out, card, work.task.shard_id, *drawn, sources)
            attempts.done(work)


def videos_in(folder: Path, *names: str) -> None:
    """Files that are as ``sources_of`` says they were."""
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / f"{name}.mp4").write_bytes(b"video")
        os.utime(folder / f"{name}.mp4", ns=(1_700_000_000 * 10**9,) * 2)


def extract(root: UPath, videos: Path, **changes: Any) -> list[str]:
    """Run the job; the shards that it made."""
    settings = ExtractionSettings(source=str(videos), views=2, videos_per_shard=1, **changes)
    with dataset_lock(root, "extract-features") as lock, ExitStack() as resources:
        job = DrawnJob("extract-features", root, ClusterSettings(), lock, SilentReporter(), resources)
        offline._encode_videos(job, offline._VideoJob(settings, settings, CARD, BLACK, None))
    return job.made


@pytest.mark.slow
def test_requests_do_not_grow_with_the_shards(s3_root: UPath, tmp_path: Path) -> None:
    counted = []
    for shards in (2, 30):
        root, videos = s3_root / str(shards), tmp_path / str(shards)
        videos_in(videos, *(f"v{number:02d}" for number in range(shards)))
        assert len(extract(root, videos)) == shards
        now = []
        for look in (partial(extract, root, videos), partial(open_dataset, root), partial(describe, root)):
            with few_requests() as asked:
                look()
            now.append(len(asked))
        counted.append(now)
    assert counted[0] == counted[1]


def test_deltas_of_finished_features_are_known_in_as_few_requests(
    s3_root: UPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offline, "_Job", DrawnJob)
    save_model(tmp_path / "tokenizer", DeltaTok(CARD.hidden_size, 1, 1, 1), "tokenizer", {})
    videos_in(tmp_path / "videos", "a", "b", "c")
    extract(s3_root / "features", tmp_path / "videos")
    settings = TokenizeSettings(features=str(s3_root / "features"), tokenizer=tmp_path / "tokenizer")

    def tokenize() -> None:
        assert is_dataset(settings.features)  # as the command asks
        assert offline.tokenize_features(settings, s3_root / "deltas", SilentReporter()).clips == 6

    tokenize()
    with few_requests():
        tokenize()


def test_the_command_refuses_other_features_and_names_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offline, "_Job", DrawnJob)
    save_model(tmp_path / "tokenizer", DeltaTok(CARD.hidden_size, 1, 1, 1), "tokenizer", {})
    videos_in(tmp_path / "videos", "a", "b")
    for name in ("features", "others"):  # of other contents under the same names
        extract(UPath(tmp_path / name), tmp_path / "videos")
    settings = TokenizeSettings(features=str(tmp_path / "features"), tokenizer=tmp_path / "tokenizer")
    offline.tokenize_features(settings, tmp_path / "deltas", SilentReporter())
    before = all_bytes(tmp_path / "deltas")
    command = [sys.executable, "-m", "deltacache", "tokenize", tmp_path / "others", tmp_path / "deltas"]
    command += ["--tokenizer", tmp_path / "tokenizer"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"{tmp_path}/others is not the feature dataset that these deltas were made from" in done.stderr
    assert f"{tmp_path}/deltas was made from {tmp_path}/features" in done.stderr
    assert all_bytes(tmp_path / "deltas") == before


def test_a_second_run_is_noticed_in_as_few_requests(s3_root: UPath, tmp_path: Path) -> None:
    videos_in(tmp_path / "videos", "b", "d")
    extract(s3_root, tmp_path / "videos")
    videos_in(tmp_path / "videos", "a", "c")
    assert len(extract(s3_root, tmp_path / "videos")) == 2  # what lies there is not in the order of names now
    with few_requests():
        assert extract(s3_root, tmp_path / "videos") == []
    (tmp_path / "videos/a.mp4").unlink()
    with few_requests():
        assert extract(s3_root, tmp_path / "videos") == []


@pytest.mark.parametrize("place", ["local", "s3"])
def test_what_is_new_changed_or_unfinished_is_noticed(
    place: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    root = UPath(tmp_path / "features") if place == "local" else request.getfixturevalue("s3_root")
    videos = tmp_path / "videos"
    videos_in(videos, "a", "b", "c")
    first = extract(root, videos)
    assert extract(root, videos) == []

    drop_shards(root, first[:1])  # unfinished
    assert extract(root, videos) == first[:1]
    (root / "tables.json").unlink()  # an interrupted finish
    assert extract(root, videos) == []
    (root / "index.parquet").unlink()
    assert extract(root, videos) == []
    assert len(open_dataset(root)) == 6

    videos_in(videos, "new")
    assert len(extract(root, videos)) == 1
    assert len(open_dataset(root)) == 8
    (videos / "b.mp4").unlink()  # vanished: what it gave stays
    assert extract(root, videos) == []
    assert len(open_dataset(root)) == 8

    (videos / "c.mp4").write_bytes(b"other")  # of the same size
    with pytest.raises(DatasetError, match=r"1 video has changed since .*: c\.mp4"):
        extract(root, videos)
    (made,) = extract(root, videos, changed_videos="recompute")
    assert made in first
    assert finished_shards(root) == {*open_plan(root).shard_ids}
    finish_dataset(root)
    assert describe(root).finished
