"""Videos that were replaced, and deltas whose features are others or have grown: nothing goes unasked."""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from dying import killed_before
from small_datasets import BLACK, all_bytes, make_dataset, shard_of, small_card, sources_of, videos_named
from upath import UPath

from deltacache.pipeline.datasets import changes, plan
from deltacache.pipeline.datasets import writing as commits
from deltacache.pipeline.datasets import writing as dropping
from deltacache.pipeline.datasets.changes import (
    Lineage,
    changed_videos,
    drop_changed,
    lineage,
)
from deltacache.pipeline.datasets.dataset import finish_dataset, finished_shards, prepare_dataset, read_plan
from deltacache.pipeline.datasets.plan import ShardTask, extend_plan, open_plan, shard_tasks, write_plan
from deltacache.pipeline.datasets.receipts import SourceRecord
from deltacache.pipeline.datasets.verification import repair_dataset, verify_dataset
from deltacache.pipeline.datasets.writing import drop_shards, finished_summary, settle, write_shard
from deltacache.pipeline.inputs.sources import VideoSource, video_id_of
from deltacache.schemas.errors import DatasetError, MismatchError

NAMES = ("a", "b", "c", "d", "e")
Sources = Callable[[ShardTask], list[SourceRecord]]


@pytest.fixture
def features(tmp_path: Path) -> UPath:
    make_dataset(tmp_path / "features", "features", "webdataset", *NAMES)
    return UPath(tmp_path / "features")


@pytest.fixture
def deltas(tmp_path: Path) -> UPath:
    make_dataset(tmp_path / "deltas", "deltas", "webdataset", *NAMES)
    return UPath(tmp_path / "deltas")


def made_again(
    root: UPath, kind: str, shard: int, sources: Sources = sources_of, clips: int | None = None
) -> None:
    """Make one shard again, of other videos or with fewer clips."""
    task = shard_tasks(read_plan(root))[shard]
    drop_shards(root, [task.shard_id])
    stored, failures = shard_of(kind, task)
    write_shard(root, small_card(kind, "webdataset"), task.shard_id, stored[:clips], failures, sources(task))
    finish_dataset(root)


def other_contents(task: ShardTask) -> list[SourceRecord]:
    return [replace(source, sha256=hashlib.sha256(b"another").hexdigest()) for source in sources_of(task)]


def without_contents(task: ShardTask) -> list[SourceRecord]:
    return [replace(source, sha256="") for source in sources_of(task)]


def to_drop(found: Lineage, features: UPath, deltas: UPath, *, recompute: bool = False) -> list[str]:
    return found.to_drop(features, deltas, "/data/features", recompute=recompute)


def test_features_of_other_videos_under_the_same_names_are_another_dataset(
    features: UPath, deltas: UPath
) -> None:
    for shard in range(3):
        made_again(features, "features", shard, other_contents)
    for recompute in (False, True):
        with pytest.raises(
            MismatchError,
            match=r"/features is not the feature dataset that these deltas were made from. \S+/deltas was made from "
            r"/data/features and holds a with content ca978112ca1bbdca, but \S+/features has it with content "
            r"ae448ac86c4e8e4d: 3 of its 3 shards .* Nothing was changed",
        ):
            to_drop(lineage(features, deltas), features, deltas, recompute=recompute)


def test_features_of_videos_of_other_names_are_another_dataset(tmp_path: Path, deltas: UPath) -> None:
    make_dataset(tmp_path / "others", "features", "webdataset", "x", "y", "z")
    others = UPath(tmp_path / "others")
    with pytest.raises(MismatchError, match=r"holds a with .* but \S+/others does not have it in this shard"):
        to_drop(lineage(others, deltas), others, deltas, recompute=True)


def test_a_copy_a_repaired_one_and_one_that_has_grown_are_the_same_features(
    tmp_path: Path, features: UPath, deltas: UPath
) -> None:
    copy = UPath(tmp_path / "copy")
    shutil.copytree(features, copy)
    (copy / "plan.parquet").unlink()
    (copy / "dataset.json").unlink()
    (copy / "shards" / f"shard-{shard_tasks(read_plan(features))[1].shard_id}.tar").write_bytes(b"")
    prepare_dataset(copy, small_card("features", "webdataset"), BLACK)
    repair_dataset(copy)
    make_dataset(Path(copy), "features", "webdataset", *NAMES, "f", "g")
    found = lineage(copy, deltas)
    assert (found.same, found.grown, found.changed, found.missing, found.unknown) == (3, [], [], [], None)
    assert to_drop(found, copy, deltas) == []
    found.check_known(copy, deltas, adds=True)


def test_features_with_more_clips_of_the_same_videos_have_grown(features: UPath, deltas: UPath) -> None:
    made_again(deltas, "deltas", 0, clips=3)
    found = lineage(features, deltas)
    assert found.grown == [shard_tasks(read_plan(deltas))[0].shard_id]
    assert to_drop(found, features, deltas) == []


@pytest.mark.parametrize("clips", [None, 3])
def test_shards_of_replaced_videos_or_fewer_clips_go_only_when_asked(
    features: UPath, deltas: UPath, clips: int | None
) -> None:
    made_again(features, "features", 1, other_contents if clips is None else sources_of, clips)
    found = lineage(features, deltas)
    with pytest.raises(
        DatasetError, match=r"1 of its 3 shards .*--changed-videos recompute, which removes these"
    ):
        to_drop(found, features, deltas)
    shard_id = shard_tasks(read_plan(deltas))[1].shard_id
    assert to_drop(found, features, deltas, recompute=True) == [shard_id]


def test_nothing_is_added_to_deltas_that_do_not_say_what_they_are_of(features: UPath, deltas: UPath) -> None:
    for root, kind in ((features, "features"), (deltas, "deltas")):
        made_again(root, kind, 2, without_contents)
    found = lineage(features, deltas)
    assert to_drop(found, features, deltas) == []
    make_dataset(Path(features), "features", "webdataset", *NAMES, "f")
    found = lineage(features, deltas)
    found.check_known(features, deltas, adds=False)
    with pytest.raises(
        DatasetError, match=r"deltas has no checksums of the videos in its shard 00002-.*into a new folder"
    ):
        found.check_known(features, deltas, adds=True)


# Replaced videos, with a kill at each step.

STEPS = {
    changes: ("drop_durably",),
    commits: ("remove", "drop_parts"),
    dropping: ("write_bytes", "forget_tables", "remove", "drop_shards", "resize_plan", "make_folder"),
    plan: ("_write",),
}


def videos(folder: Path, contents: dict[str, bytes]) -> list[VideoSource]:
    folder.mkdir(exist_ok=True)
    found = []
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        found.append(VideoSource(video_id_of(name), name, str(folder / name), len(content), str(content)))
    return found


def recompute(root: UPath, sources: list[VideoSource]) -> None:
    """``extract-features --changed-videos recompute``, without decoders and models."""
    settle(root)
    finish_dataset(root)
    by_uri = {source.video_uri: source for source in sources}
    changed = changed_videos(
        sources, root, open_plan(root), finished_summary(root, open_plan(root)), lambda _: None
    )
    if changed:
        drop_changed(root, changed)
    write_plan(root, extend_plan(read_plan(root), sources, 2, 2))
    for task in shard_tasks(read_plan(root)):
        if task.shard_id in finished_shards(root):
            continue
        assert all(video.size_bytes == by_uri[video.video_uri].size_bytes for video in task.videos)
        contents = {uri: Path(source.path).read_bytes() for uri, source in by_uri.items()}
        records = [
            replace(
                source,
                version=by_uri[source.video_uri].version,
                sha256=hashlib.sha256(contents[source.video_uri]).hexdigest(),
            )
            for source in sources_of(task)
        ]
        write_shard(
            root, small_card("features", "webdataset"), task.shard_id, *shard_of("features", task), records
        )
    settle(root)
    finish_dataset(root)


@pytest.mark.slow
def test_recomputing_replaced_videos_ends_the_same_wherever_it_was_killed(tmp_path: Path) -> None:
    before = {name: name.encode() * 9 for name in NAMES}
    after = before | {
        "a": b"a longer one",
        "b": b"?" * 9,
        "e": b"short",
    }  # two of other sizes, one of the same
    first, second = videos(tmp_path / "before", before), videos(tmp_path / "after", after)
    start = UPath(tmp_path / "start")
    prepare_dataset(start, small_card("features", "webdataset"), BLACK)
    recompute(start, first)
    undisturbed = UPath(tmp_path / "undisturbed")
    shutil.copytree(start, undisturbed)
    recompute(undisturbed, second)
    assert all_bytes(Path(undisturbed)) != all_bytes(Path(start))
    for step in range(200):
        root = UPath(tmp_path / str(step))
        shutil.copytree(start, root)
        killed = killed_before(step, lambda root=root: recompute(root, second), STEPS)
        if step % 2:
            repair_dataset(root)
        recompute(root, second)
        assert all_bytes(Path(root)) == all_bytes(Path(undisturbed)), f"killed before step {step}"
        assert verify_dataset(root) == []
        shutil.rmtree(root)
        if not killed:
            assert step > 15
            return
    raise AssertionError("it was never finished")


def test_nothing_is_dropped_before_it_is_written_down(tmp_path: Path) -> None:
    task = make_dataset(tmp_path / "out", "features", "webdataset", *NAMES)[0]
    root = UPath(tmp_path / "out")
    changed = [replace(source, size_bytes=7) for source in videos_named("a")]
    assert killed_before(0, lambda: drop_changed(root, changed), {dropping: ("write_bytes",)})
    assert task.shard_id in finished_shards(root)
    settle(root)
    assert len(finished_shards(root)) == 3
    assert not (root / ".staging").exists()
