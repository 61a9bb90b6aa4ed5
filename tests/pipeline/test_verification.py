"""Verification finds every injected fault and names the file and, where it is one's, the clip."""

import gc
import json
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_datasets import (
    BLACK,
    all_bytes,
    make_dataset,
    shard_of,
    small_card,
    sources_of,
    videos_named,
    write_sealed,
)

from deltacache.pipeline.datasets import plan as plan_module
from deltacache.pipeline.datasets import verification as table_checks
from deltacache.pipeline.datasets.changes import describe, recorded_sources
from deltacache.pipeline.datasets.dataset import finish_dataset, prepare_dataset, write_plan, write_shard
from deltacache.pipeline.datasets.plan import (
    ShardTask,
    extend_plan,
    open_plan,
    plan_of,
    read_plan,
    shard_id_of,
)
from deltacache.pipeline.datasets.receipts import Failure, Receipt, read_receipt, receipt_bytes
from deltacache.pipeline.datasets.verification import Problem, verify_dataset
from deltacache.pipeline.datasets.writing import drop_shards, finished_summary, read_table
from deltacache.pipeline.storage import files as checksums
from deltacache.pipeline.storage.files import temporary_path
from deltacache.schemas.errors import DatasetError
from deltacache.schemas.tables import INDEX_SCHEMA

KINDS = ["features", "deltas"]
STORES = ["webdataset", "zarr"]
NAMES = ("a", "b", "broken-c", "d", "e", "f")

both_stores = pytest.mark.parametrize("store", STORES)


def made(root: Path, store: str, kind: str = "features") -> list[ShardTask]:
    tasks = make_dataset(root, kind, store, *NAMES)
    assert verify_dataset(root) == []
    return tasks


def found(root: Path) -> set[tuple[str, str | None]]:
    return {(problem.file, problem.clip_id) for problem in verify_dataset(root)}


def flip(path: Path, offset: int) -> None:
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


def forge(root: Path, receipt: Receipt) -> None:
    (root / "receipts" / f"{receipt.shard_id}.json").write_bytes(receipt_bytes(receipt))


@pytest.mark.parametrize("kind", KINDS)
@both_stores
def test_whole_and_new_datasets_have_no_problems(tmp_path: Path, store: str, kind: str) -> None:
    made(tmp_path, store, kind)
    assert [str(problem) for problem in verify_dataset(tmp_path)] == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@both_stores
def test_every_flipped_bit_of_a_shard_is_found(tmp_path: Path, store: str, kind: str) -> None:
    tasks = made(tmp_path, store, kind)
    receipt = read_receipt(tmp_path, tasks[1].shard_id)
    for name, record in receipt.files.items():
        for offset in range(0, record.bytes, max(1, record.bytes // 9)):
            flip(tmp_path / name, offset)
            assert (name, None) in found(tmp_path), (name, offset)
            flip(tmp_path / name, offset)
    assert verify_dataset(tmp_path) == []


@pytest.mark.parametrize("kind", KINDS)
@both_stores
def test_flipped_bit_of_a_clip_is_found_with_its_clip(tmp_path: Path, store: str, kind: str) -> None:
    tasks = made(tmp_path, store, kind)
    receipt = read_receipt(tmp_path, tasks[0].shard_id)
    clip_id = receipt.clips[2]["clip_id"]
    frames_bytes = len(receipt.clips[2]["timestamps_s"]) * receipt.frame_stride
    for offset in (0, frames_bytes - 6):
        flip(tmp_path / receipt.token_file, receipt.token_offsets[2] + offset)
        assert found(tmp_path) == {(receipt.token_file, None), (receipt.token_file, clip_id)}
        flip(tmp_path / receipt.token_file, receipt.token_offsets[2] + offset)


def test_flipped_bit_around_the_tokens_is_found_with_its_clip(tmp_path: Path) -> None:
    tasks = made(tmp_path, "webdataset")
    receipt = read_receipt(tmp_path, tasks[0].shard_id)
    tar = (tmp_path / receipt.token_file).read_bytes()
    clip_id = receipt.clips[1]["clip_id"]
    start = tar.index(f"{clip_id}.json".encode())
    times = tar.index(f"{clip_id}.timestamps_s.npy".encode()) + 512 + 128
    for offset in (start + 3, start + 512 + 7, receipt.token_offsets[1] - 9, times, times + 11):
        flip(tmp_path / receipt.token_file, offset)
        assert found(tmp_path) == {(receipt.token_file, None), (receipt.token_file, clip_id)}
        flip(tmp_path / receipt.token_file, offset)


def test_flipped_times_and_chunk_checksums_in_zarr_are_found_with_their_clip(tmp_path: Path) -> None:
    tasks = made(tmp_path, "zarr")
    receipt = read_receipt(tmp_path, tasks[0].shard_id)
    clip_id = receipt.clips[1]["clip_id"]
    times = next(name for name in receipt.files if name.endswith("timestamps_s/c/0/0"))
    flip(tmp_path / times, 3 * 4 + 4 + 2)
    assert found(tmp_path) == {(times, None), (times, clip_id)}
    flip(tmp_path / times, 3 * 4 + 4 + 2)
    flip(tmp_path / receipt.token_file, receipt.token_offsets[1] + 2 * receipt.frame_stride - 1)
    assert found(tmp_path) == {(receipt.token_file, None), (receipt.token_file, clip_id)}


@both_stores
def test_truncated_and_missing_files_are_found(tmp_path: Path, store: str) -> None:
    tasks = made(tmp_path, store)
    receipt = read_receipt(tmp_path, tasks[2].shard_id)
    path = tmp_path / receipt.token_file
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[: receipt.token_offsets[2] + 3])
    lost = {row["clip_id"] for row in receipt.clips[2:]}
    assert found(tmp_path) == {(receipt.token_file, clip) for clip in {None, *lost}}
    path.write_bytes(b"")
    assert (receipt.token_file, None) in found(tmp_path)
    path.unlink()
    assert (receipt.token_file, None) in found(tmp_path)


@both_stores
def test_shard_without_receipt_and_receipt_without_shard_are_found(tmp_path: Path, store: str) -> None:
    tasks = made(tmp_path, store)
    receipt = read_receipt(tmp_path, tasks[0].shard_id)
    top = "/".join(receipt.token_file.split("/")[:2])
    path = tmp_path / "receipts" / f"{receipt.shard_id}.json"
    content = path.read_bytes()
    path.unlink()
    assert {(top, None), ("plan.parquet", None)} <= found(tmp_path)
    path.write_bytes(content)
    (tmp_path / top).rename(tmp_path / "elsewhere")
    assert found(tmp_path) == {(name, None) for name in receipt.files}
    (tmp_path / "elsewhere").rename(tmp_path / top)
    stranger = tmp_path / "receipts" / "00009-0123abcd.json"
    stranger.write_bytes(content)
    assert ("receipts/00009-0123abcd.json", None) in found(tmp_path)


@both_stores
def test_files_that_nobody_wrote_are_found(tmp_path: Path, store: str) -> None:
    tasks = made(tmp_path, store)
    receipt = read_receipt(tmp_path, tasks[0].shard_id)
    stray = tmp_path / "shards" / "notes.txt"
    stray.write_text("?")
    assert found(tmp_path) == {("shards/notes.txt", None)}
    stray.unlink()
    if store == "zarr":
        inside = "/".join(receipt.token_file.split("/")[:2]) + "/patch_tokens/c/9"
        (tmp_path / inside).write_text("?")
        assert found(tmp_path) == {(inside, None)}
        (tmp_path / inside).unlink()
        (tmp_path / "shards/zarr.json").write_text("{}")
        assert found(tmp_path) == {("shards/zarr.json", None)}


@pytest.mark.slow
def test_every_flipped_bit_of_receipt_and_tables_is_found(tmp_path: Path) -> None:
    tasks = made(tmp_path, "webdataset")
    for name in (f"receipts/{tasks[0].shard_id}.json", "index.parquet", "failures.parquet", "tables.json"):
        size = (tmp_path / name).stat().st_size
        for offset in range(0, size - 1, max(1, size // 23)):
            flip(tmp_path / name, offset)
            assert verify_dataset(tmp_path), (name, offset)
            flip(tmp_path / name, offset)
    assert verify_dataset(tmp_path) == []


def test_flipped_bit_of_black_tokens_is_found(tmp_path: Path) -> None:
    made(tmp_path, "webdataset")
    flip(tmp_path / "black_patch_tokens.npy", 140)
    assert found(tmp_path) == {("black_patch_tokens.npy", None)}


def test_swapped_clip_ids_in_a_receipt_are_found(tmp_path: Path) -> None:
    tasks = made(tmp_path, "webdataset")
    receipt = read_receipt(tmp_path, tasks[0].shard_id)
    first, second = (row["clip_id"] for row in receipt.clips[:2])
    rows = (
        {**receipt.clips[0], "clip_id": second},
        {**receipt.clips[1], "clip_id": first},
        *receipt.clips[2:],
    )
    arrays = {row["clip_id"]: receipt.arrays[row["clip_id"]] for row in rows}
    forge(tmp_path, replace(receipt, clips=rows, arrays=arrays))
    assert {(f"receipts/{receipt.shard_id}.json", clip) for clip in (first, second)} <= found(tmp_path)


def changed_index(root: Path, change: Callable[[list[dict]], list[dict]]) -> set[tuple[str, str | None]]:
    index = pq.ParquetFile(root / "index.parquet").read()
    content = (root / "index.parquet").read_bytes()
    changed = pa.Table.from_pylist(change(index.to_pylist()), schema=index.schema)
    write_sealed(root / "index.parquet", changed)
    problems = {key for key in found(root) if key != ("index.parquet", None)}
    (root / "index.parquet").write_bytes(content)
    return problems


def test_index_that_differs_from_the_receipts_is_found_row_by_row(tmp_path: Path) -> None:
    made(tmp_path, "webdataset")
    rows = pq.ParquetFile(tmp_path / "index.parquet").read().to_pylist()
    ids = [row["clip_id"] for row in rows]
    named = {("index.parquet", ids[1])}
    assert changed_index(tmp_path, lambda rows: rows[:1] + rows[2:]) == named
    assert changed_index(tmp_path, lambda rows: [*rows, rows[1]]) == named
    assert changed_index(tmp_path, lambda rows: [rows[0], rows[1] | {"crc32c": 1}, *rows[2:]]) == named
    new = changed_index(tmp_path, lambda rows: [*rows, rows[0] | {"clip_id": "new"}])
    assert new == {("index.parquet", "new")}
    swapped = [rows[0] | {"clip_id": ids[1]}, rows[1] | {"clip_id": ids[0]}, *rows[2:]]
    assert changed_index(tmp_path, lambda _: swapped) == {
        ("index.parquet", ids[0]),
        ("index.parquet", ids[1]),
    }
    (tmp_path / "index.parquet").unlink()
    assert ("index.parquet", None) in found(tmp_path)


def test_receipt_that_leaves_out_a_planned_clip_is_found(tmp_path: Path) -> None:
    tasks = made(tmp_path, "webdataset")
    receipt = read_receipt(tmp_path, tasks[1].shard_id)
    (refused,) = receipt.failures
    forge(tmp_path, replace(receipt, failures=()))
    lost = {clip for file, clip in found(tmp_path) if file.startswith("receipts/")}
    video_id = next(video.video_id for video in tasks[1].videos if video.video_uri == refused.video_uri)
    assert lost == {f"{video_id}-v000", f"{video_id}-v001"}
    forge(tmp_path, replace(receipt, failures=(Failure(refused.video_uri, 0, "decode", "truncated", ""),)))
    lost = {clip for file, clip in found(tmp_path) if file.startswith("receipts/")}
    assert lost == {f"{video_id}-v001"}


def test_changed_plan_is_found(tmp_path: Path) -> None:
    made(tmp_path, "webdataset")
    plan = read_plan(tmp_path)
    changed = plan.set_column(3, "size_bytes", pa.array([7] * plan.num_rows))
    pq.write_table(changed, tmp_path / "plan.parquet")  # without a checksum
    assert found(tmp_path) == {("plan.parquet", None)}
    write_sealed(tmp_path / "plan.parquet", changed)
    assert ("plan.parquet", None) in found(tmp_path)
    (tmp_path / "plan.parquet").write_bytes(b"nothing")
    assert ("plan.parquet", None) in found(tmp_path)


def test_unfinished_dataset_says_so(tmp_path: Path) -> None:
    prepare_dataset(tmp_path, small_card("features", "webdataset"), BLACK)
    write_plan(tmp_path, extend_plan(None, videos_named(*NAMES), 1, 2))
    finish_dataset(tmp_path)
    (problem,) = verify_dataset(tmp_path)
    assert "3 of 3 shards have no receipt" in str(problem)


def test_what_is_no_dataset_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="is not a dataset"):
        verify_dataset(tmp_path)


def test_problems_read_as_one_line() -> None:
    assert str(Problem("shards/x.tar", "a-v000", "is altered")) == "shards/x.tar (clip a-v000): is altered"
    assert str(Problem("plan.parquet", None, "is missing")) == "plan.parquet: is missing"


@both_stores
def test_description_counts_what_is_there(tmp_path: Path, store: str) -> None:
    tasks = made(tmp_path, store)
    what = describe(tmp_path)
    assert (what.clips, what.videos, what.planned_videos, dict(what.failures)) == (10, 5, 6, {"truncated": 1})
    assert (what.shards, what.planned_shards, what.finished) == (3, 3, True)
    receipts = [read_receipt(tmp_path, task.shard_id) for task in tasks]
    assert what.bytes == sum(receipt.total_bytes for receipt in receipts)
    text = str(what)
    for part in (
        "10 clips of 5 videos in 3 of 3 shards",
        "truncated 1",
        what.card.fingerprint,
        "finished",
        store,
    ):
        assert part in text
    (tmp_path / "receipts" / f"{tasks[0].shard_id}.json").unlink()
    assert (describe(tmp_path).clips, describe(tmp_path).finished) == (6, False)
    body = json.loads((tmp_path / "dataset.json").read_text())
    assert body["fingerprint"] in str(describe(tmp_path))


@both_stores
def test_description_is_the_same_whatever_was_merged(tmp_path: Path, store: str) -> None:
    tasks = made(tmp_path, store)
    odd = make_dataset(tmp_path, "features", store, *NAMES, 'with "quotes"', "back\\slash", 'ünï,"views":[')
    whole = describe(tmp_path)
    assert (whole.clips, whole.videos, whole.shards) == (16, 8, 5)
    for merged in ("all", "none", "first"):
        if merged == "none":
            (tmp_path / "tables.json").unlink()
        if merged == "first":  # as while a command adds to a finished dataset
            drop_shards(tmp_path, [task.shard_id for task in odd[len(tasks) :]])
            finish_dataset(tmp_path)
            make_shards(tmp_path, store, odd)
            assert len(read_table(tmp_path / "index.parquet", INDEX_SCHEMA)) == 10
        assert replace(describe(tmp_path), root=whole.root) == whole, merged
        sources = sources_now(tmp_path).to_pylist()
        assert sorted(row["video_uri"] for row in sources) == sorted(
            video.video_uri for task in odd for video in task.videos
        )
    (tmp_path / f"receipts/{odd[-1].shard_id}.json").write_bytes(b"{}")
    with pytest.raises(DatasetError, match=r"is damaged .*verify .* --repair"):
        describe(tmp_path)


def sources_now(root: Path) -> pa.Table:
    plan = open_plan(root)
    return pa.concat_tables(recorded_sources(root, plan, finished_summary(root, plan)))


def make_shards(root: Path, store: str, tasks: list[ShardTask]) -> None:
    for task in tasks:
        write_shard(
            root, small_card("features", store), task.shard_id, *shard_of("features", task), sources_of(task)
        )


def test_sources_of_a_shard_made_anew_are_not_those_of_the_tables(tmp_path: Path) -> None:
    tasks = made(tmp_path, "webdataset")
    drop_shards(tmp_path, [tasks[1].shard_id])
    assert len(sources_now(tmp_path)) == 4
    new = [replace(source, version="2") for source in sources_of(tasks[1])]
    card = small_card("features", "webdataset")
    write_shard(tmp_path, card, tasks[1].shard_id, *shard_of("features", tasks[1]), new)
    now = {"2": 2, "1700000000000000000": 4}
    assert Counter(sources_now(tmp_path)["version"].to_pylist()) == now
    finish_dataset(tmp_path)
    made(tmp_path / "other", "webdataset")  # as if the tables were replaced halfway
    (tmp_path / "sources.parquet").write_bytes((tmp_path / "other/sources.parquet").read_bytes())
    assert Counter(sources_now(tmp_path)["version"].to_pylist()) == now


@both_stores
def test_appended_bytes_are_found(tmp_path: Path, store: str) -> None:
    made(tmp_path, store)
    for name, content in all_bytes(tmp_path).items():
        (tmp_path / name).write_bytes(content + b"\0")
        assert (name, None) in found(tmp_path), name
        (tmp_path / name).write_bytes(content)
    assert found(tmp_path) == set()


@pytest.mark.parametrize("kind", KINDS)
@both_stores
def test_clips_exchanged_in_a_shard_and_between_shards_are_both_named(
    tmp_path: Path, store: str, kind: str
) -> None:
    tasks = made(tmp_path, store, kind)
    one, other = (read_receipt(tmp_path, task.shard_id) for task in tasks[:2])
    for first, second in (((one, 0), (one, 2)), ((one, 0), (other, 0))):
        whole = {
            receipt.token_file: (tmp_path / receipt.token_file).read_bytes() for receipt, _ in (first, second)
        }
        spans = [(receipt.token_file, *span(receipt, row)) for receipt, row in (first, second)]
        parts = [whole[file][start:stop] for file, start, stop in spans]
        for (file, start, stop), part in zip(spans, reversed(parts), strict=True):
            content = bytearray((tmp_path / file).read_bytes())
            content[start:stop] = part
            (tmp_path / file).write_bytes(content)
        named = {(receipt.token_file, receipt.clips[row]["clip_id"]) for receipt, row in (first, second)}
        assert found(tmp_path) == named | {(file, None) for file in whole}
        for file, content in whole.items():
            (tmp_path / file).write_bytes(content)
    assert found(tmp_path) == set()


def span(receipt: Receipt, row: int) -> tuple[int, int]:
    """The tokens of a clip."""
    start = receipt.token_offsets[row]
    return start, start + (len(receipt.clips[row]["timestamps_s"]) - 1) * receipt.frame_stride + 8


@both_stores
def test_clips_exchanged_in_receipt_and_files_alike_are_found(tmp_path: Path, store: str) -> None:
    """Receipts that fit their checksums, whose clips stand for each other's values."""
    tasks = made(tmp_path, store)
    receipt = read_receipt(tmp_path, tasks[0].shard_id)
    file, (first, second) = f"receipts/{receipt.shard_id}.json", [row["clip_id"] for row in receipt.clips[:2]]
    offsets = (receipt.token_offsets[1], receipt.token_offsets[0], *receipt.token_offsets[2:])
    forge(tmp_path, replace(receipt, token_offsets=offsets))
    assert {(receipt.token_file, clip) for clip in (first, second)} <= found(tmp_path)
    rows = ({**receipt.clips[1], "row": 0}, {**receipt.clips[0], "row": 1}, *receipt.clips[2:])
    arrays = {row["clip_id"]: receipt.arrays[row["clip_id"]] for row in rows}
    forge(tmp_path, replace(receipt, clips=rows, arrays=arrays, token_offsets=offsets))
    assert (file, first) in found(tmp_path)  # the same values, but not in the plan's order
    sources = tuple(replace(source, size_bytes=source.size_bytes + 1) for source in receipt.sources)
    forge(tmp_path, replace(receipt, sources=sources))
    assert found(tmp_path) == {(file, None)}


def test_shard_and_video_planned_twice_are_found(tmp_path: Path) -> None:
    tasks = made(tmp_path, "webdataset")
    plan = read_plan(tmp_path)
    write_sealed(tmp_path / "plan.parquet", pa.concat_tables([plan, plan.slice(0, 2)]))
    assert any("twice" in str(problem) for problem in verify_dataset(tmp_path))
    videos = (tasks[0].videos[0],)
    again = ShardTask(shard_id_of(3, videos), videos)
    write_sealed(tmp_path / "plan.parquet", plan_of([*tasks, again]))
    assert ("plan.parquet", f"{videos[0].video_id}-v000") in found(tmp_path)


@both_stores
def test_leftovers_are_found(tmp_path: Path, store: str) -> None:
    made(tmp_path, store)
    left = [
        temporary_path(tmp_path / name) for name in ("index.parquet", "receipts/x.json", "shards/shard-x.tar")
    ]
    for path in left:
        path.write_bytes(b"half")
    assert found(tmp_path) == {(path.relative_to(tmp_path).as_posix(), None) for path in left}


def test_progress_counts_shards(tmp_path: Path) -> None:
    tasks = made(tmp_path, "webdataset")
    flip(tmp_path / read_receipt(tmp_path, tasks[0].shard_id).token_file, 9)
    seen: list[tuple[str, object]] = []

    class Stage:
        def advance(self, items: int = 1, **status: float | str) -> None:
            seen.append(("shard", status["problems"]))

    class Telling:
        @contextmanager
        def stage(self, name: str, total: int | None, *, done: int = 0) -> Iterator[Stage]:
            seen.append((name, total))
            yield Stage()

        def line(self, text: str) -> None:
            seen.append(("line", text))

    verify_dataset(tmp_path, Telling())
    assert seen == [("verify", 3), ("shard", 2), ("shard", 2), ("shard", 2)]


@pytest.mark.slow
def test_verifying_holds_ids_of_shards_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peak of Python's memory, arrays included, grows by less than a clip's row for each shard of eight."""
    monkeypatch.setattr(checksums, "_CHUNK_BYTES", 1 << 12)  # reads at once, which would hide the rest
    monkeypatch.setattr(table_checks, "_ROWS_AT_ONCE", 16)
    monkeypatch.setattr(plan_module, "_ROWS_AT_ONCE", 16)
    peaks = []
    for videos in (20, 200):
        root = tmp_path / str(videos)
        make_dataset(root, "features", "webdataset", *(f"video-{n:04d}" for n in range(videos)), views=4)
        verify_dataset(root)
        gc.collect()
        tracemalloc.start()
        assert verify_dataset(root) == []
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    shards = (200 - 20) // 2
    assert peaks[1] - peaks[0] < 2000 * shards, peaks
