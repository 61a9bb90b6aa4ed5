"""Parts: what is folded while a job runs gives the tables that the receipts alone give, whatever happens between."""

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_datasets import BLACK, all_bytes, shard_of, small_card, sources_of, videos_named

from deltacache.pipeline.datasets import writing as folding
from deltacache.pipeline.datasets.changes import describe, held_parts
from deltacache.pipeline.datasets.dataset import finish_dataset, open_dataset, prepare_dataset, write_shard
from deltacache.pipeline.datasets.plan import (
    ShardTask,
    extend_plan,
    grow_plan,
    open_plan,
    shard_tasks,
    write_plan,
)
from deltacache.pipeline.datasets.receipts import finished_shards, read_receipt
from deltacache.pipeline.datasets.verification import repair_dataset, verify_dataset
from deltacache.pipeline.datasets.writing import (
    PARTS,
    Folding,
    checked_receipts,
    drop_shards,
    failure_rows,
    finished_summary,
    receipt_digest,
    settle_commits,
    source_rows,
)
from deltacache.schemas.tables import INDEX_SCHEMA

CARD = small_card("deltas", "webdataset")
NAMES = ("a", "b", "broken-c", "d", "e", "f", "g")


@pytest.fixture(autouse=True)
def two_shards_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "SHARDS_A_PART", 2)


def planned(root: Path, *names: str) -> list[ShardTask]:
    prepare_dataset(root, CARD, BLACK)
    plan = extend_plan(None, videos_named(*(names or NAMES)), 2, 1)
    write_plan(root, plan)
    return shard_tasks(plan)


def commit(root: Path, task: ShardTask, version: str = "1700000000000000000") -> None:
    sources = [replace(source, version=version) for source in sources_of(task)]
    replaces = receipt_digest(root, task.shard_id)
    write_shard(root, CARD, task.shard_id, *shard_of("deltas", task), sources, replaces=replaces)


def run_job(root: Path, tasks: list[ShardTask]) -> None:
    """Commit what has no receipt, last shard first, folding as a driver does."""
    plan, done = open_plan(root), finished_shards(root)
    missing = {task.shard_id for task in tasks} - done
    receipts = partial(checked_receipts, root, card=CARD)
    with Folding(root, plan.shard_ids, missing, receipts) as fold:
        for task in reversed(tasks):
            if task.shard_id in missing:
                commit(root, task)
                fold.committed(task.shard_id)


def rows_of_receipts(root: Path) -> dict[str, list[dict[str, Any]]]:
    """The tables by a loop over the receipts: the oracle."""
    receipts = [
        read_receipt(root, shard) for shard in open_plan(root).shard_ids if shard in finished_shards(root)
    ]
    return {
        "index.parquet": [row for receipt in receipts for row in receipt.clips],
        "failures.parquet": [row for receipt in receipts for row in failure_rows(receipt)],
        "sources.parquet": [row for receipt in receipts for row in source_rows(receipt)],
    }


def rows_of_tables(root: Path) -> dict[str, list[dict[str, Any]]]:
    return {name: pq.read_table(root / name).to_pylist() for name in rows_of_receipts(root)}


def parts_of(root: Path) -> list[str]:
    return sorted(path.name for path in (root / PARTS).iterdir()) if (root / PARTS).exists() else []


def tables_of(root: Path) -> dict[str, bytes]:
    return {name: content for name, content in all_bytes(root).items() if "/" not in name}


def test_tables_from_parts_are_those_from_receipts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = planned(tmp_path)
    run_job(tmp_path, tasks)
    assert parts_of(tmp_path) == [f"part-000000{n}-000000{n + 1}.parquet" for n in (0, 2, 4)]
    before = describe(tmp_path)
    read = []
    monkeypatch.setattr(folding, "part_row", lambda receipt: read.append(receipt.shard_id) or plain(receipt))
    finish_dataset(tmp_path)
    assert read == [tasks[-1].shard_id]  # of the seventh shard alone the receipt is read
    assert rows_of_tables(tmp_path) == rows_of_receipts(tmp_path)
    assert describe(tmp_path) == before
    folded = tables_of(tmp_path)
    monkeypatch.setattr(folding, "SHARDS_A_PART", 100)
    planned(tmp_path / "other")
    run_job(tmp_path / "other", tasks)
    finish_dataset(tmp_path / "other")
    assert parts_of(tmp_path / "other") == []
    assert tables_of(tmp_path / "other") == folded


plain = folding.part_row


def test_finished_dataset_is_known_without_any_receipt(tmp_path: Path) -> None:
    tasks = planned(tmp_path)
    run_job(tmp_path, tasks)
    finish_dataset(tmp_path)
    held = all_bytes(tmp_path)
    for task in tasks:
        (tmp_path / f"receipts/{task.shard_id}.json").write_bytes(b"")  # reading one would be an error
    plan = open_plan(tmp_path)
    summary = finished_summary(tmp_path, plan)
    assert summary is not None
    assert (summary.clips, summary.failures, summary.planned_videos) == (12, {"truncated": 1}, 7)
    finish_dataset(tmp_path)
    assert describe(tmp_path).finished
    assert len(open_dataset(tmp_path)) == 12
    assert grow_plan(tmp_path, plan, videos_named(*NAMES), 2, 1) is plan
    now = all_bytes(tmp_path)
    assert {name: now[name] for name in tables_of(tmp_path)} == {
        name: held[name] for name in tables_of(tmp_path)
    }


def test_what_is_missing_after_all_is_noticed(tmp_path: Path) -> None:
    tasks = planned(tmp_path)
    run_job(tmp_path, tasks)
    finish_dataset(tmp_path)

    def complete() -> bool:
        return finished_summary(tmp_path, open_plan(tmp_path)) is not None

    assert complete()
    longer = extend_plan(open_plan(tmp_path).table(), videos_named(*NAMES, "new"), 2, 1)
    write_plan(tmp_path, longer)
    assert not complete()
    run_job(tmp_path, shard_tasks(longer))
    assert not complete()  # committed, not merged
    finish_dataset(tmp_path)
    assert complete()
    for lost in ("tables.json", "index.parquet", f"receipts/{tasks[3].shard_id}.json"):
        content = (tmp_path / lost).read_bytes()
        (tmp_path / lost).unlink()
        assert not complete(), lost
        (tmp_path / lost).write_bytes(content)
        assert complete()
    drop_shards(tmp_path, [tasks[3].shard_id])
    assert not complete()


@pytest.mark.parametrize("drop", [drop_shards, lambda *_: None])
def test_shard_that_is_replaced_is_not_taken_from_its_part(tmp_path: Path, drop: Any) -> None:
    tasks = planned(tmp_path)
    run_job(tmp_path, tasks)
    finish_dataset(tmp_path)
    drop(tmp_path, [tasks[2].shard_id])
    commit(tmp_path, tasks[2], version="2")
    assert parts_of(tmp_path) == [f"part-000000{n}-000000{n + 1}.parquet" for n in (0, 4)]
    assert sum(part.num_rows for part in held_parts(tmp_path, open_plan(tmp_path))) == 7
    finish_dataset(tmp_path)
    assert rows_of_tables(tmp_path) == rows_of_receipts(tmp_path)
    assert rows_of_tables(tmp_path)["sources.parquet"][2]["version"] == "2"
    assert len(parts_of(tmp_path)) == 3


def test_part_of_another_plan_is_not_believed(tmp_path: Path) -> None:
    run_job(tmp_path, planned(tmp_path))
    other = tmp_path / "other"
    tasks = planned(other, *(f"x{name}" for name in NAMES))
    run_job(other, tasks)
    for name in parts_of(other):
        (other / PARTS / name).write_bytes((tmp_path / PARTS / name).read_bytes())
    (other / PARTS / "part-0000100-0000101.parquet").write_bytes(b"of a plan that was longer")
    finish_dataset(other)
    assert rows_of_tables(other) == rows_of_receipts(other)
    assert len(parts_of(other)) == 3
    assert verify_dataset(other) == []


@pytest.mark.parametrize("damage", ["bit", "cut", "other"])
def test_damaged_part_is_named_and_made_again(tmp_path: Path, damage: str) -> None:
    run_job(tmp_path, planned(tmp_path))
    finish_dataset(tmp_path)
    whole = all_bytes(tmp_path)
    path = tmp_path / PARTS / parts_of(tmp_path)[1]
    content = bytearray(path.read_bytes())
    if damage == "bit":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[:-9])
    else:  # a receipt's content from another time, with a right checksum
        table = pq.read_table(path)
        changed = table.set_column(1, "bytes", pa.array([1] * table.num_rows, pa.int64()))
        with folding.sealed_table(path, folding.PART_SCHEMA) as written:
            written.add(changed)
    assert {problem.file for problem in verify_dataset(tmp_path)} == {f"parts/{path.name}"}
    (tmp_path / "tables.json").unlink()
    if damage != "other":
        assert sum(part.num_rows for part in held_parts(tmp_path, open_plan(tmp_path))) == 7
    repair_dataset(tmp_path)
    finish_dataset(tmp_path)
    assert all_bytes(tmp_path) == whole


def test_leftovers_and_strangers_among_the_parts(tmp_path: Path) -> None:
    run_job(tmp_path, planned(tmp_path))
    finish_dataset(tmp_path)
    (tmp_path / PARTS / "notes.txt").write_text("mine")
    (tmp_path / PARTS / "part-0000100-0000101.parquet").write_bytes(b"")
    files = {problem.file for problem in verify_dataset(tmp_path)}
    assert files == {"parts/notes.txt", "parts/part-0000100-0000101.parquet"}
    assert "parts/notes.txt" in repair_dataset(tmp_path).left
    assert "notes.txt" in parts_of(tmp_path)
    assert "part-0000100-0000101.parquet" not in parts_of(tmp_path)


def test_a_fold_that_fails_ends_the_job(tmp_path: Path) -> None:
    tasks = planned(tmp_path)

    def receipts(shards: Any) -> Iterator[Any]:
        raise RuntimeError("cannot be folded")
        yield

    def job() -> None:
        shards = [task.shard_id for task in tasks]
        with Folding(tmp_path, shards, shards, receipts) as fold:
            for shard in shards:
                fold.committed(shard)

    with pytest.raises(RuntimeError, match="cannot be folded"):
        job()


def job_that_is_killed(root: Path, operations: int) -> None:
    """In a process of its own: a job, a shard that is replaced, the finish; SIGKILL before so many renames and
    removals."""
    count = 0

    def dying(plain: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count > operations:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*arguments, **options)

        return call

    Path.replace, Path.unlink = dying(Path.replace), dying(Path.unlink)
    tasks = shard_tasks(open_plan(root).table())
    run_job(root, tasks)
    drop_shards(root, [tasks[1].shard_id])
    commit(root, tasks[1], version="2")
    finish_dataset(root)


@pytest.mark.slow
def test_killed_anywhere_the_tables_are_those_of_an_undisturbed_run(tmp_path: Path) -> None:
    def forked(root: Path, operations: int) -> int:
        child = os.fork()
        if child == 0:
            try:
                job_that_is_killed(root, operations)
                os._exit(0)
            finally:
                os._exit(7)  # an error of its own
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    names = NAMES[:4]
    whole = tmp_path / "whole"
    tasks = planned(whole, *names)
    run_job(whole, tasks)
    drop_shards(whole, [tasks[1].shard_id])
    commit(whole, tasks[1], version="2")
    finish_dataset(whole)
    killed = 0
    for operations in range(1000):
        root = tmp_path / f"killed-{operations}"
        planned(root, *names)
        ended = forked(root, operations)
        assert ended in (0, -signal.SIGKILL)
        # Whatever is there, parts and tables say what the receipts say.
        index = pa.concat_tables(
            [INDEX_SCHEMA.empty_table(), *map(folding.clips_in, held_parts(root, open_plan(root)))]
        )
        assert index.to_pylist() == rows_of_receipts(root)["index.parquet"], operations
        if finished_summary(root, open_plan(root)) is not None:
            assert rows_of_tables(root) == rows_of_receipts(root), operations
        settle_commits(root, alone=True)  # as every command does first
        if tasks[1].shard_id in finished_shards(root):
            if read_receipt(root, tasks[1].shard_id).sources[0].version != "2":
                drop_shards(root, [tasks[1].shard_id])
                commit(root, tasks[1], version="2")
        else:
            commit(root, tasks[1], version="2")
        run_job(root, tasks)
        finish_dataset(root)
        assert all_bytes(root) == all_bytes(whole), operations
        if ended == 0:
            break
        killed += 1
    assert killed > 20
