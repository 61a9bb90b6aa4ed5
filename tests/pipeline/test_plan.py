"""The plan: which videos form which shard, appended to and never changed."""

import itertools
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_datasets import videos_named

from deltacache.pipeline.datasets import plan as plan_module
from deltacache.pipeline.datasets.plan import (
    copy_plan,
    extend_plan,
    grow_plan,
    open_plan,
    ordinal_of,
    read_plan,
    resize_plan,
    resized,
    runs_of,
    shard_tasks,
    write_plan,
)
from deltacache.pipeline.inputs.sources import VideoSource
from deltacache.pipeline.storage import files as sealing
from deltacache.schemas.errors import DatasetError
from deltacache.schemas.tables import PLAN_SCHEMA


def contents(plan: pa.Table) -> list[list[tuple[str, int, int]]]:
    return [[(v.video_uri, v.first_view, v.views) for v in task.videos] for task in shard_tasks(plan)]


def test_videos_are_planned_in_order_whatever_the_order_given() -> None:
    plan = extend_plan(None, videos_named("c", "a", "b"), 2, 2)
    assert plan.schema.equals(PLAN_SCHEMA)
    assert contents(plan) == [[("a", 0, 2), ("b", 0, 2)], [("c", 0, 2)]]
    assert plan.equals(extend_plan(None, videos_named("b", "c", "a"), 2, 2))


def test_the_same_again_changes_nothing() -> None:
    plan = extend_plan(None, videos_named("a", "b"), 2, 2)
    assert extend_plan(plan, videos_named("b", "a"), 2, 2).equals(plan)
    assert extend_plan(plan, videos_named("a", "b"), 1, 7).equals(plan)


def test_new_videos_and_more_views_form_new_shards() -> None:
    plan = extend_plan(None, videos_named("b", "d"), 1, 2)
    longer = extend_plan(plan, videos_named("a", "b", "c", "d"), 3, 2)
    assert longer.slice(0, plan.num_rows).equals(plan)
    assert contents(longer)[1:] == [[("a", 0, 3), ("c", 0, 3)], [("b", 1, 2), ("d", 1, 2)]]
    assert extend_plan(longer, videos_named("a", "b", "c", "d"), 3, 2).equals(longer)


def test_videos_that_are_gone_stay_planned() -> None:
    plan = extend_plan(None, videos_named("a", "b"), 1, 2)
    assert extend_plan(plan, videos_named("b"), 1, 2).equals(plan)
    assert extend_plan(plan, [], 1, 2).equals(plan)


def test_shard_ids_name_place_and_content() -> None:
    ids = [task.shard_id for task in shard_tasks(extend_plan(None, videos_named("a", "b"), 1, 1))]
    other = [task.shard_id for task in shard_tasks(extend_plan(None, videos_named("a", "c"), 1, 1))]
    views = [task.shard_id for task in shard_tasks(extend_plan(None, videos_named("a", "b"), 2, 1))]
    assert ids[0] == other[0]
    assert len({*ids, *other, *views}) == 5
    assert [shard_id[:6] for shard_id in ids] == ["00000-", "00001-"]
    # Fixed for ever: a change would orphan the shards of every dataset there is.
    assert ids == ["00000-4b408f75", "00001-35a3fe25"]


def test_resized_videos_give_their_shards_other_ids_and_leave_the_others() -> None:
    plan = extend_plan(None, videos_named("a", "b", "c"), 2, 2)
    changed = shard_tasks(resized(plan, {"c": 7}))
    before = shard_tasks(plan)
    assert changed[0] == before[0]
    assert changed[1].shard_id != before[1].shard_id
    assert changed[1].videos[0].size_bytes == 7
    bigger = [replace(v, size_bytes=7) if v.video_uri == "c" else v for v in videos_named("a", "b", "c")]
    assert changed == shard_tasks(extend_plan(None, bigger, 2, 2))


def test_two_videos_of_one_id_are_refused() -> None:
    twice = [VideoSource("same-id", uri, uri, 1) for uri in ("a", "b")]
    with pytest.raises(DatasetError, match=r"two videos have the id same-id"):
        extend_plan(None, twice, 1, 2)


def test_written_plan_is_read_back_and_only_appended_to(tmp_path: Path) -> None:
    root = tmp_path / "a=b"  # a name that Parquet readers like to take for a column
    root.mkdir()
    assert read_plan(root).num_rows == 0
    plan = extend_plan(None, videos_named("a", "b"), 1, 1)
    write_plan(root, plan)
    assert read_plan(root).equals(plan)
    before = (root / "plan.parquet").stat()
    write_plan(root, plan)
    after = (root / "plan.parquet").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    with pytest.raises(DatasetError, match="a plan is only appended to"):
        write_plan(root, extend_plan(None, videos_named("b", "c"), 1, 1))
    with pytest.raises(DatasetError, match="a plan is only appended to"):
        write_plan(root, plan.slice(0, 1))
    assert read_plan(root).equals(plan)
    longer = extend_plan(plan, videos_named("c"), 1, 1)
    write_plan(root, longer)
    assert read_plan(root).equals(longer)
    assert [path.name for path in root.iterdir()] == ["plan.parquet"]


def test_damaged_plan_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DatasetError, match=r"plan\.parquet is damaged.*--repair` removes it"):
        read_plan(tmp_path)
    plan = extend_plan(None, videos_named("a", "b", "c"), 1, 1)
    with pytest.raises(DatasetError, match="a shard in two places"):
        shard_tasks(pa.concat_tables([plan, plan.slice(0, 1)]))
    evil = plan.set_column(0, "shard", pa.array(["../../x"] * 3))
    with pytest.raises(DatasetError, match=r"'../../x' is not a shard id"):
        shard_tasks(evil)


@pytest.mark.slow
def test_a_large_plan_takes_seconds() -> None:
    videos = [VideoSource(f"video-{n}", f"v/{n:07d}.mp4", "", n) for n in range(50_000)]
    plan = extend_plan(None, videos, 2, 32)
    assert len(shard_tasks(extend_plan(plan, videos, 2, 32))) == -(-50_000 // 32)


def missing_one_by_one(plan: pa.Table, videos: list[VideoSource], views: int) -> set[tuple[str, int]]:
    """Uris with the views that are not planned: the oracle."""
    planned = {
        (v.video_id, view)
        for task in shard_tasks(plan)
        for v in task.videos
        for view in range(v.first_view, v.first_view + v.views)
    }
    return {(v.video_uri, view) for v in videos for view in range(views) if (v.video_id, view) not in planned}


@pytest.mark.parametrize("seed", range(10))
def test_plans_grow_by_exactly_what_is_missing(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    plan = None
    for _ in range(4):  # runs over other videos, with more or fewer views; some shards are lost with the plan
        videos = videos_named(*rng.sample("abcdefghij", rng.randint(1, 10)))
        views, size = rng.randint(1, 6), rng.randint(1, 3)
        before = PLAN_SCHEMA.empty_table() if plan is None else plan
        missing = missing_one_by_one(before, videos, views)
        plan = extend_plan(plan, videos, views, size)
        new = {task.shard_id for task in shard_tasks(plan)} - {task.shard_id for task in shard_tasks(before)}
        added = [
            (v.video_uri, view)
            for task in shard_tasks(plan)
            if task.shard_id in new
            for v in task.videos
            for view in range(v.first_view, v.first_view + v.views)
        ]
        assert sorted(added) == sorted(missing)
        ordinals = [ordinal_of(task.shard_id) for task in shard_tasks(plan)]
        assert ordinals == sorted(set(ordinals))
        root = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        root.mkdir()
        if before.num_rows:
            write_plan(root, before)
        grown = grow_plan(root, open_plan(root), videos, views, size)
        assert grown.table().equals(plan)
        wanted = set(rng.sample(grown.shard_ids, rng.randint(0, len(grown.shard_ids))))
        assert list(grown.only(wanted)) == [task for task in shard_tasks(plan) if task.shard_id in wanted]
        assert grown.only(wanted).clips() == {
            task.shard_id: sum(v.views for v in task.videos)
            for task in shard_tasks(plan)
            if task.shard_id in wanted
        }
        lost = rng.choice(grown.shard_ids)
        plan = plan.filter(pa.array([shard != lost for shard in plan["shard"].to_pylist()], pa.bool_()))


def test_a_plan_is_the_same_file_however_it_grew_and_is_read_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "_ROWS_AT_ONCE", 3)
    monkeypatch.setattr(plan_module, "_TASKS_AT_ONCE", 2)
    monkeypatch.setattr(sealing, "_ROWS_A_GROUP", 4)
    videos = videos_named(*"abcdefghijk")
    at_once, bit_by_bit = tmp_path / "at once", tmp_path / "bit by bit"
    for root, steps in ((at_once, (11,)), (bit_by_bit, (4, 8, 11))):
        root.mkdir()
        for stop in steps:
            grow_plan(root, open_plan(root), videos[:stop], 1, 2)
    assert (at_once / "plan.parquet").read_bytes() == (bit_by_bit / "plan.parquet").read_bytes()
    plan = open_plan(at_once)
    assert plan.shard_ids == [task.shard_id for task in shard_tasks(plan.table())]
    assert pq.ParquetFile(at_once / "plan.parquet").num_row_groups == 3
    copied = tmp_path / "copied"
    copied.mkdir()
    copy_plan(plan, copied)
    assert (copied / "plan.parquet").read_bytes() == (at_once / "plan.parquet").read_bytes()
    resize_plan(copied, {"c": 7})
    assert open_plan(copied).table().equals(resized(plan.table(), {"c": 7}))


def test_runs_are_found_across_parts() -> None:
    for text in ("", "a", "aab", "abbbc", "aabbccdda"):
        for size in (1, 2, 3, 9):
            parts = [
                pa.array(list(text[start : start + size]), pa.string()) for start in range(0, len(text), size)
            ]
            runs = [(key, len(list(group))) for key, group in itertools.groupby(text)]
            values, starts = runs_of(parts)
            assert values == [key for key, _ in runs]
            assert np.diff(starts).tolist() == [count for _, count in runs]
