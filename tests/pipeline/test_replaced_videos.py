"""Videos that were replaced: found by hashes over tables in parts as by a loop over receipts."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
from small_datasets import BLACK, shard_of, small_card, sources_of, videos_named
from upath import UPath

from deltacache.pipeline.datasets import changes
from deltacache.pipeline.datasets.changes import changed_videos, same_videos
from deltacache.pipeline.datasets.dataset import finish_dataset, prepare_dataset, write_shard
from deltacache.pipeline.datasets.plan import grow_plan, open_plan
from deltacache.pipeline.datasets.receipts import finished_shards, read_receipt
from deltacache.pipeline.datasets.writing import finished_summary
from deltacache.pipeline.inputs.sources import VideoSource

CARD = small_card("deltas", "webdataset")


def changed_one_by_one(root: UPath, sources: list[VideoSource], now: dict[str, str]) -> list[VideoSource]:
    """The oracle: a record whose size or version differs makes a suspect, of which all contents are compared."""
    records: dict[str, list[tuple[int, str, str]]] = {}
    for shard in finished_shards(root):
        for source in read_receipt(root, shard).sources:
            about = (source.size_bytes, source.version, source.sha256)
            records.setdefault(source.video_uri, []).append(about)
    return [
        video
        for video in sources
        if any(
            sha256 and (size, version) != (video.size_bytes, video.version)
            for size, version, sha256 in records.get(video.video_uri, [])
        )
        and {sha256 for _, _, sha256 in records[video.video_uri]} - {"", now[video.video_uri]}
    ]


@pytest.mark.parametrize("seed", range(6))
def test_changed_videos_are_those_that_a_loop_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    rng = random.Random(seed)
    root = UPath(tmp_path / "deltas")
    contents = [f"{number:064x}" for number in range(3)]
    prepare_dataset(root, CARD, BLACK)
    for names, views in (("abcdef", 1), ("cdefgh", 2)):  # the second run adds videos and views
        videos = [replace(video, version="1") for video in videos_named(*names)]
        plan = grow_plan(root, open_plan(root), videos, views, 2)
        for task in plan.only({*plan.shard_ids} - finished_shards(root)):
            sources = [
                replace(source, version=rng.choice("12"), sha256=rng.choice(["", *contents[:2]]))
                for source in sources_of(task)
            ]
            write_shard(root, CARD, task.shard_id, *shard_of("deltas", task), sources)
    now = {name: rng.choice(contents) for name in "abcdefghij"}
    monkeypatch.setattr(changes, "_sha256", lambda video: now[video.video_uri])
    found = [
        replace(video, version=rng.choice("12"), size_bytes=video.size_bytes + rng.choice([0, 0, 1]))
        for video in videos_named(*sorted(rng.sample("abcdefghij", rng.randint(1, 10))))
    ]
    said: list[str] = []
    for finished in (False, True):
        if finished:
            finish_dataset(root)
        plan = open_plan(root)
        held = finished_summary(root, plan)
        assert (held is not None) == finished
        changed = changed_videos(found, root, plan, held, said.append)
        assert changed == changed_one_by_one(root, found, now)


def test_the_same_videos_are_known_at_once(tmp_path: Path) -> None:
    root = UPath(tmp_path / "deltas")
    prepare_dataset(root, CARD, BLACK)
    videos = [replace(video, version="1") for video in videos_named(*"abcde")]
    plan = grow_plan(root, open_plan(root), videos, 2, 2)
    for task in plan.only(plan.shard_ids):
        sources = [replace(source, version="1") for source in sources_of(task)]
        write_shard(root, CARD, task.shard_id, *shard_of("deltas", task), sources)
    held = finish_dataset(root)
    assert same_videos(root, plan, held, videos, 2)
    assert same_videos(root, plan, held, videos, 1)  # fewer views are there too
    others = [
        (videos, 3),
        (videos[:-1], 2),
        ([*videos, *videos_named("f")], 2),
        ([*videos[:-1], *videos_named("f")], 2),
        ([replace(videos[0], size_bytes=1), *videos[1:]], 2),
        ([*videos[:-1], replace(videos[-1], version="2")], 2),
    ]
    for found, views in others:
        assert not same_videos(root, plan, held, found, views)
    (root / "sources.parquet").write_bytes(b"damaged")
    assert not same_videos(root, plan, held, videos, 2)
    assert changed_videos(videos, root, plan, held, print) == []
