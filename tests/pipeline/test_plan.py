"""The plan: which videos form which shard, appended to and never changed."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from small_datasets import videos_named

from deltacache.pipeline.datasets.plan import extend_plan, read_plan, resized, shard_tasks, write_plan
from deltacache.pipeline.inputs.sources import VideoSource
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


def test_a_large_plan_takes_seconds() -> None:
    videos = [VideoSource(f"video-{n}", f"v/{n:07d}.mp4", "", n) for n in range(50_000)]
    plan = extend_plan(None, videos, 2, 32)
    assert len(shard_tasks(extend_plan(plan, videos, 2, 32))) == -(-50_000 // 32)
