"""Receipts and the protocol around them: what is not committed does not exist."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from crc32c import crc32c
from small_datasets import BLACK, all_bytes, make_dataset, shard_of, small_card, sources_of, videos_named

from deltacache.pipeline.datasets.dataset import (
    finish_dataset,
    finished_shards,
    open_dataset,
    prepare_dataset,
    write_shard,
)
from deltacache.pipeline.datasets.plan import ShardTask, extend_plan, shard_tasks, write_plan
from deltacache.pipeline.datasets.receipts import FileRecord, StoredClip, read_receipt, receipt_bytes
from deltacache.pipeline.storage.files import remove_leftovers, seal_json, temporary_path
from deltacache.schemas.datasets import SamplingSettings, canonical_json
from deltacache.schemas.errors import DatasetError, MismatchError

pytestmark = pytest.mark.parametrize("store", ["webdataset", "zarr"])


def prepared(root: Path, store: str) -> ShardTask:
    prepare_dataset(root, small_card("features", store), BLACK)
    plan = extend_plan(None, videos_named("a", "b"), 2, 2)
    write_plan(root, plan)
    return shard_tasks(plan)[0]


def hidden(root: Path) -> list[str]:
    return [path.name for path in root.rglob("*") if path.name.startswith(".")]


def test_receipt_says_what_the_shard_holds(tmp_path: Path, store: str) -> None:
    task = prepared(tmp_path, store)
    card = small_card("features", store)
    clips, failures = shard_of("features", task)
    receipt = write_shard(tmp_path, card, task.shard_id, iter(clips), failures, sources_of(task))
    assert read_receipt(tmp_path, task.shard_id) == receipt
    assert receipt.fingerprint == card.fingerprint
    assert list(receipt.arrays) == [stored.clip.clip_id for stored in clips]
    sizes = {name: (tmp_path / name).stat().st_size for name in receipt.files}
    assert sizes == {name: record.bytes for name, record in receipt.files.items()}
    assert receipt.total_bytes == sum(sizes.values())
    on_disk = {f"shards/{name}" for name in all_bytes(tmp_path / "shards")} - {"shards/zarr.json"}
    assert on_disk == set(receipt.files)


def test_a_shard_whose_videos_all_failed_has_a_receipt_and_no_files(tmp_path: Path, store: str) -> None:
    make_dataset(tmp_path, "features", store, "broken-a", "broken-b")
    (shard_id,) = finished_shards(tmp_path)
    receipt = read_receipt(tmp_path, shard_id)
    assert (receipt.files, receipt.clips, len(receipt.failures)) == ({}, (), 2)
    dataset = open_dataset(tmp_path)
    assert len(dataset) == 0
    assert dataset.failures["video_uri"].to_pylist() == ["broken-a", "broken-b"]
    assert all_bytes(tmp_path / "shards") == {}


def test_interrupted_shard_leaves_nothing_that_counts(tmp_path: Path, store: str) -> None:
    root, whole = tmp_path / "interrupted", tmp_path / "whole"
    task = prepared(root, store)
    clips, _ = shard_of("features", task)

    def interrupted() -> Iterator[StoredClip]:
        yield from clips[:2]
        raise KeyboardInterrupt

    card = small_card("features", store)
    with pytest.raises(KeyboardInterrupt):
        write_shard(root, card, task.shard_id, interrupted(), [], sources_of(task))
    assert finished_shards(root) == set()
    assert hidden(root) == []
    write_shard(root, card, task.shard_id, clips, [], sources_of(task))
    finish_dataset(root)
    make_dataset(whole, "features", store, "a", "b")
    assert all_bytes(root) == all_bytes(whole)


def test_renamed_shard_without_receipt_is_made_again(tmp_path: Path, store: str) -> None:
    make_dataset(tmp_path, "features", store, "a", "b")
    before = all_bytes(tmp_path)
    (shard_id,) = finished_shards(tmp_path)
    (tmp_path / "receipts" / f"{shard_id}.json").unlink()
    assert finished_shards(tmp_path) == set()
    victim = max(
        (tmp_path / "shards").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0
    )
    victim.chmod(0o644)
    victim.write_bytes(b"from another attempt")
    make_dataset(tmp_path, "features", store, "a", "b")
    assert all_bytes(tmp_path) == before


def test_second_writer_of_a_finished_shard_changes_nothing(tmp_path: Path, store: str) -> None:
    (task,) = make_dataset(tmp_path, "features", store, "a", "b")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    receipt = write_shard(tmp_path, small_card("features", store), task.shard_id, [], [], sources_of(task))
    assert len(receipt.clips) == 4
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_two_writers_of_one_shard_at_once_agree(tmp_path: Path, store: str) -> None:
    task = prepared(tmp_path, store)
    card = small_card("features", store)
    clips, _ = shard_of("features", task)

    def overtaken() -> Iterator[StoredClip]:
        yield clips[0]
        write_shard(tmp_path, card, task.shard_id, clips, [], sources_of(task))
        yield from clips[1:]

    write_shard(tmp_path, card, task.shard_id, overtaken(), [], sources_of(task))
    assert hidden(tmp_path) == []
    finish_dataset(tmp_path)
    assert [open_dataset(tmp_path).read(row).clip_id for row in range(4)] == [s.clip.clip_id for s in clips]


def test_leftovers_of_dead_attempts_go_and_those_of_living_ones_stay(tmp_path: Path, store: str) -> None:
    make_dataset(tmp_path, "features", store, "a")
    living = temporary_path(tmp_path / "shards" / "x.tar")
    dead = living.with_name(living.name.replace(f"-{os.getpid()}-", "-4194304-"))
    host = living.name.split("-")[1]
    elsewhere, long_ago = (living.with_name(living.name.replace(host, h)) for h in ("00000000", "11111111"))
    for path in (living, elsewhere, long_ago):
        path.write_bytes(b"half")
    os.utime(long_ago, (0, 0))
    dead.mkdir()
    (dead / "zarr.json").write_bytes(b"half")
    finish_dataset(tmp_path)
    assert set(hidden(tmp_path)) == {living.name, elsewhere.name}
    assert not dead.exists()
    remove_leftovers(tmp_path / "shards")
    assert living.exists()


def test_receipt_of_another_dataset_is_refused(tmp_path: Path, store: str) -> None:
    (task,) = make_dataset(tmp_path, "features", store, "a")
    path = tmp_path / "receipts" / f"{task.shard_id}.json"
    path.write_bytes(receipt_bytes(replace(read_receipt(tmp_path, task.shard_id), fingerprint="f" * 16)))
    (tmp_path / "tables.json").unlink()  # as whatever replaces a shard does: without it, receipts are read
    with pytest.raises(MismatchError, match=r"fingerprint ffffffffffffffff, but this one has [0-9a-f]{16}"):
        finish_dataset(tmp_path)


def test_receipt_that_the_plan_does_not_have_is_refused(tmp_path: Path, store: str) -> None:
    (task,) = make_dataset(tmp_path, "features", store, "a")
    path = tmp_path / "receipts" / f"{task.shard_id}.json"
    path.rename(path.with_name("00001-00000000.json"))
    with pytest.raises(
        DatasetError, match=r"00001-00000000\.json is of a shard that plan\.parquet does not have"
    ):
        finish_dataset(tmp_path)


def test_damaged_receipts_are_refused(tmp_path: Path, store: str) -> None:
    (task,) = make_dataset(tmp_path, "features", store, "a")
    path = tmp_path / "receipts" / f"{task.shard_id}.json"
    whole = path.read_bytes()
    body = json.loads(whole)
    changed = json.dumps(body | {"shard_id": "00007-01234567"}).encode()
    for content in (b"", whole[:-30], whole.replace(b"pyav", b"pyaw"), changed, b"[]", b"{}", b"\xff"):
        path.write_bytes(content)
        with pytest.raises(DatasetError, match=r"is damaged .*verify .* --repair` drops that shard"):
            read_receipt(tmp_path, task.shard_id)
    path.unlink()
    with pytest.raises(DatasetError, match="is missing, and without its receipt shard"):
        read_receipt(tmp_path, task.shard_id)


@pytest.mark.parametrize(
    "name", ["../outside.tar", "shards/../../outside.tar", "/etc/passwd", "index.parquet", ""]
)
def test_files_outside_the_shards_folder_are_refused(tmp_path: Path, store: str, name: str) -> None:
    (task,) = make_dataset(tmp_path, "features", store, "a")
    receipt = read_receipt(tmp_path, task.shard_id)
    with pytest.raises(ValueError, match="is not below shards/"):
        replace(receipt, files={**receipt.files, name: FileRecord(1, 1)})
    body = json.loads(receipt_bytes(receipt))
    del body["receipt_crc32c"]
    body["files"][name] = {"bytes": 1, "crc32c": 1}
    text = canonical_json(body)
    forged = f'{text[:-1]},"receipt_crc32c":{crc32c(text.encode())}}}\n'
    (tmp_path / "receipts" / f"{task.shard_id}.json").write_text(forged)
    with pytest.raises(DatasetError, match="is not below shards/"):
        open_dataset(tmp_path).read(0)


def test_clips_of_another_shape_kind_or_twice_are_bugs(tmp_path: Path, store: str) -> None:
    task = prepared(tmp_path, store)
    card = small_card("features", store)
    clips, _ = shard_of("features", task)
    deltas, _ = shard_of("deltas", task)
    for bad in ([clips[0], clips[0]], deltas):
        with pytest.raises(ValueError, match=task.shard_id):
            write_shard(tmp_path, card, task.shard_id, bad, [], sources_of(task))
    narrow = small_card("features", store, hidden_size=2, patch_grid=(3, 4))
    with pytest.raises(ValueError, match=r"must have the shape \(3, 12, 2\)"):
        write_shard(tmp_path, narrow, task.shard_id, clips, [], sources_of(task))
    assert hidden(tmp_path) == []
    assert finished_shards(tmp_path) == set()


def test_output_that_cannot_be_written_is_one_readable_error(tmp_path: Path, store: str) -> None:
    task = prepared(tmp_path, store)
    clips, _ = shard_of("features", task)
    (tmp_path / "shards").rmdir()
    (tmp_path / "shards").write_bytes(b"a file where the folder should be")
    with pytest.raises(DatasetError, match=r"cannot be written .*what was finished is kept"):
        write_shard(tmp_path, small_card("features", store), task.shard_id, clips, [], sources_of(task))


def test_receipt_gives_back_the_rows_of_the_plan(tmp_path: Path, store: str) -> None:
    for task in make_dataset(tmp_path, "features", store, "a", "broken-b", "c"):
        sources = read_receipt(tmp_path, task.shard_id).sources
        assert tuple(source.planned() for source in sources) == task.videos
        assert all(source.version and (source.sha256 or "broken" in source.video_uri) for source in sources)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video_id": "../x"}, "video id '../x' must be"),
        ({"size_bytes": -1}, "size_bytes >= 0"),
        ({"first_view": -1}, "first_view >= 0"),
        ({"views": 0}, "views >= 1"),
        ({"views": 1.5}, "must be whole numbers"),
        ({"size_bytes": True}, "must be whole numbers"),
        ({"version": 7}, "version is 7, must be text"),
        ({"sha256": "abc"}, "sha256 is 'abc', must be 64 hex digits or empty"),
    ],
)
def test_sources_that_cannot_be_are_refused(
    tmp_path: Path, store: str, change: dict[str, object], message: str
) -> None:
    (task,) = make_dataset(tmp_path, "features", store, "a")
    body = json.loads(receipt_bytes(read_receipt(tmp_path, task.shard_id)))
    del body["receipt_crc32c"]
    body["sources"][0] |= change
    forged = seal_json(canonical_json(body).encode(), "receipt_crc32c")
    (tmp_path / "receipts" / f"{task.shard_id}.json").write_bytes(forged)
    with pytest.raises(DatasetError, match=f"is damaged .*{re.escape(message)}"):
        read_receipt(tmp_path, task.shard_id)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"precision": "bfloat16"}, 'precision is "float32", asked for "bfloat16"'),
        ({"dtype": "int8"}, 'dtype is "float16", asked for "int8"'),
        ({"sampling": SamplingSettings(frames=3, seed=7)}, "sampling.seed is 0, asked for 7"),
        ({"image_size": 64}, "image_size is 48, asked for 64"),
    ],
)
def test_other_settings_are_named(tmp_path: Path, store: str, changes: dict[str, object], named: str) -> None:
    make_dataset(tmp_path, "features", store, "a")
    before = all_bytes(tmp_path)
    with pytest.raises(MismatchError, match=f"made with other settings .*{re.escape(named)}"):
        prepare_dataset(tmp_path, small_card("features", store, **changes), BLACK)
    assert all_bytes(tmp_path) == before


def test_other_weights_are_named(tmp_path: Path, store: str) -> None:
    make_dataset(tmp_path, "features", store, "a")
    card = small_card("features", store)
    other = card.model_copy(
        update={"backbone": card.backbone.model_copy(update={"weights_sha256": "77" * 32})}
    )
    with pytest.raises(
        MismatchError, match=f'backbone.weights_sha256 is "{"5e" * 32}", asked for "{"77" * 32}"'
    ):
        prepare_dataset(tmp_path, other, BLACK)
