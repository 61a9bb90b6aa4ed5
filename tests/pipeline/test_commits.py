"""Attempts of one shard that overlap, stop or die anywhere: bytes and receipt are of one attempt, always.

An attempt is a thread that stops before each step of its commit until it is its turn. One that dies stays where it
is: none of its clean-up happens, as after SIGKILL.
"""

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dying import killed_before
from small_datasets import BLACK, all_bytes, shard_of, small_card, sources_of, videos_named
from upath import UPath

from deltacache.pipeline.datasets import writing as commits
from deltacache.pipeline.datasets.dataset import (
    finish_dataset,
    finished_shards,
    prepare_dataset,
    read_plan,
    write_plan,
)
from deltacache.pipeline.datasets.plan import ShardTask, extend_plan, open_plan, shard_tasks
from deltacache.pipeline.datasets.receipts import Receipt, StoredClip, read_receipt
from deltacache.pipeline.datasets.verification import repair_dataset, verify_dataset
from deltacache.pipeline.datasets.writing import (
    STAGING,
    finished_summary,
    receipt_digest,
    settle_commits,
    write_shard,
)
from deltacache.pipeline.storage import files as atomic
from deltacache.pipeline.storage.files import crc32c_of_file, write_bytes
from deltacache.pipeline.storage.locking import LOCK_FILE, LockRecord
from deltacache.pipeline.storage.storage import AnyPath, objects_below
from deltacache.schemas.clips import FeatureClip
from deltacache.schemas.errors import DeltacacheError

both_stores = pytest.mark.parametrize("store", ["webdataset", "zarr"])
STEPS = ("move", "write_new", "remove", "read_file", "write_bytes", "held_by")  # in commits.py
REMOTE_STEPS = ("copy_object", "remove_object")  # in atomic.py: of which a move consists in an object store


class Died(BaseException):
    """An attempt ends here, without any clean-up."""


class Attempts:
    """Threads that take turns, one step at a time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._local = threading.local()
        self._turns: dict[str, tuple[threading.Semaphore, threading.Semaphore]] = {}
        self._dead: set[str] = set()
        self.living: list[str] = []
        self.results: dict[str, Receipt] = {}
        self.errors: dict[str, Exception] = {}
        for module, names in ((commits, STEPS), (atomic, REMOTE_STEPS)):
            for name in names:
                monkeypatch.setattr(module, name, self._stopping(getattr(module, name)))

    def _stopping(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def stopping(*arguments: Any, **options: Any) -> Any:
            name = getattr(self._local, "name", None)
            if name is not None:
                if name not in self._dead:
                    go, stopped = self._turns[name]
                    stopped.release()
                    go.acquire()
                if name in self._dead:
                    raise Died
            return call(*arguments, **options)

        return stopping

    def start(self, name: str, work: Callable[[], Receipt]) -> None:
        """Begin an attempt; it stops before its first step."""
        self._turns[name] = threading.Semaphore(0), threading.Semaphore(0)

        def run() -> None:
            self._local.name = name
            try:
                self.results[name] = work()
            except Died:
                pass
            except (DeltacacheError, OSError, ValueError) as error:
                self.errors[name] = error
            self.living.remove(name)
            self._turns[name][1].release()

        self.living.append(name)
        threading.Thread(target=run, daemon=True).start()
        self._turns[name][1].acquire()

    def step(self, name: str) -> None:
        """Let an attempt do one step."""
        go, stopped = self._turns[name]
        go.release()
        stopped.acquire()

    def kill(self, name: str) -> None:
        """End an attempt where it is."""
        self._dead.add(name)
        self.step(name)


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> Attempts:
    return Attempts(monkeypatch)


def planned(root: AnyPath, store: str) -> ShardTask:
    prepare_dataset(root, small_card("features", store), BLACK)
    plan = extend_plan(read_plan(root), videos_named("a", "b"), 2, 2)
    write_plan(root, plan)
    return shard_tasks(plan)[0]


def clips_of(task: ShardTask, mark: int) -> list[StoredClip]:
    """As another kind of processor would compute them: every number is ``mark``, so that it shows who wrote them."""
    clips, _ = shard_of("features", task)
    kept = clips[: len(clips) - mark % 2]  # and now and then a clip fails
    return [replace(stored, clip=_marked(stored.clip, mark)) for stored in kept]


def _marked(clip: Any, mark: int) -> FeatureClip:
    return FeatureClip(clip.clip_id, np.full_like(clip.patch_tokens, mark), clip.timestamps_s)


def attempt(
    root: AnyPath, store: str, task: ShardTask, mark: int, replaces: str = "", lock: str = ""
) -> Callable[[], Receipt]:
    card, clips = small_card("features", store), clips_of(task, mark)
    return lambda: write_shard(
        root, card, task.shard_id, clips, [], sources_of(task), replaces=replaces, lock=lock
    )


def taken(root: AnyPath, token: str) -> None:
    """A command takes the lock."""
    write_bytes(root / LOCK_FILE, LockRecord("extract-features", "lease", token=token).to_bytes())


def marks_of(root: AnyPath, receipt: Receipt) -> set[int]:
    """By whom the shard and its receipt were written; fails if its files are not those that its receipt lists."""
    for name, record in receipt.files.items():
        assert ((root / name).stat().st_size, crc32c_of_file(root / name)) == (record.bytes, record.crc32c), (
            name
        )
    held = {path.path if isinstance(path, UPath) else str(path) for path in _files(root / "shards")}
    listed = {
        str((root / name).path if isinstance(root / name, UPath) else root / name) for name in receipt.files
    }
    assert {name for name in held if not name.endswith("shards/zarr.json")} == listed
    content = (root / receipt.token_file).read_bytes()
    start = receipt.token_offsets[0]
    return {int(np.frombuffer(content[start : start + 2], np.float16)[0])}


def _files(folder: AnyPath) -> Sequence[Any]:
    if isinstance(folder, Path):
        return [path for path in folder.rglob("*") if path.is_file()]
    return objects_below(folder)


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[int], UPath]]:
    if request.param == "local":
        yield lambda number: UPath(tmp_path / str(number))
        return
    folder = UPath(f"memory://{tmp_path.name}")
    yield lambda number: folder / str(number)
    folder.fs.rm(folder.path, recursive=True)


@pytest.mark.slow
@both_stores
def test_whatever_order_attempts_end_in_the_shard_is_of_one_of_them(
    place: Callable[[int], UPath], store: str, attempts: Attempts
) -> None:
    for seed in range(25):
        root, rng = place(seed), random.Random(seed)
        task = planned(root, store)
        names = [f"{seed}-{mark}" for mark in range(1, 4)]
        waiting = {name: attempt(root, store, task, mark) for mark, name in enumerate(names, 1)}
        committed: set[int] = set()
        while waiting or attempts.living:
            if waiting and (not attempts.living or rng.random() < 0.05):
                name = rng.choice(list(waiting))
                attempts.start(name, waiting.pop(name))
            name = rng.choice(attempts.living) if attempts.living else None
            if name is not None and rng.random() < 0.02:
                attempts.kill(name)
            elif name is not None:
                attempts.step(name)
            if finished_shards(root):
                committed |= marks_of(root, read_receipt(root, task.shard_id))
                assert len(committed) == 1, f"seed {seed}: the bytes of a committed shard changed"
        assert not attempts.errors
        settle_commits(root, alone=True)
        if finished_shards(root):
            committed |= marks_of(root, read_receipt(root, task.shard_id))
        last = attempt(root, store, task, 4)()
        assert marks_of(root, last) == (committed or {4})
        for name in names:
            if name in attempts.results:
                assert attempts.results[name] == last, f"seed {seed}: {name} was given another receipt"
        finish_dataset(root)
        assert not _files(root / STAGING)
        assert not isinstance(root, Path) or not (root / STAGING).exists()


@pytest.mark.slow
@both_stores
def test_a_late_attempt_at_any_point_leaves_the_committed_bytes(
    place: Callable[[int], UPath], store: str, attempts: Attempts
) -> None:
    for steps in range(200):
        root = place(steps)
        task = planned(root, store)
        attempts.start(f"late {steps}", attempt(root, store, task, 1))
        for _ in range(steps):
            if attempts.living:
                attempts.step(f"late {steps}")
        ended = not attempts.living
        committed = attempt(root, store, task, 2)()
        before = receipt_digest(root, task.shard_id)
        while attempts.living:
            attempts.step(f"late {steps}")
        assert attempts.results[f"late {steps}"] == committed
        assert receipt_digest(root, task.shard_id) == before
        assert len(marks_of(root, committed)) == 1
        if ended:
            assert steps > 5
            return
    raise AssertionError("the late attempt never ended")


@pytest.mark.slow
@both_stores
@pytest.mark.parametrize("kind", ["commit", "replacement"])
def test_what_the_next_command_removes_of_a_late_attempt_is_not_committed_in_part(
    place: Callable[[int], UPath], store: str, kind: str, attempts: Attempts
) -> None:
    """The attempt of a driver that was killed, and the clean-up of the command that follows, step by step."""
    ends = set[int]()
    for seed in range(20):
        root, rng = place(seed), random.Random(seed)
        task, old = planned(root, store), ""
        if kind == "replacement":
            attempt(root, store, task, 9)()
            old = receipt_digest(root, task.shard_id)
        taken(root, "first")
        attempts.start(f"late {seed}", attempt(root, store, task, 2, old, "first"))
        for _ in range(rng.randrange(5)):
            if attempts.living:
                attempts.step(f"late {seed}")
        taken(root, "next")
        attempts.start(f"next {seed}", lambda root=root: settle_commits(root, alone=True))
        while attempts.living:
            attempts.step(rng.choice(attempts.living))
        settle_commits(root, alone=True)
        marks = marks_of(root, read_receipt(root, task.shard_id)) if finished_shards(root) else {0}
        assert marks <= ({2, 9} if old else {0, 2}), f"seed {seed}"
        assert not _files(root / STAGING)
        ends |= marks
    assert ends == ({2, 9} if old else {0, 2})


@pytest.mark.slow
@both_stores
def test_a_late_replacement_of_an_earlier_command_does_not_count(
    place: Callable[[int], UPath], store: str, attempts: Attempts
) -> None:
    """Its driver was killed; the next command settles, merges the tables and ends, whatever the attempt does then."""
    ends = Counter[int]()
    for steps in range(100):
        root, late = place(steps), f"late {steps}"
        task = planned(root, store)
        attempt(root, store, task, 8)()
        taken(root, "first")
        attempts.start(late, attempt(root, store, task, 2, receipt_digest(root, task.shard_id), "first"))
        for _ in range(steps):
            if attempts.living:
                attempts.step(late)
        in_time = not attempts.living
        taken(root, "next")
        settle_commits(root, alone=True)
        finish_dataset(root)
        before = receipt_digest(root, task.shard_id)
        while attempts.living:
            attempts.step(late)
        assert receipt_digest(root, task.shard_id) == before
        if (root / "tables.json").exists():  # removed by one that had begun to move its files in time
            assert finished_summary(root, open_plan(root)) is not None
        else:
            assert late in attempts.results
        settle_commits(root, alone=True, lock="next")
        finish_dataset(root)
        assert not _files(root / STAGING)
        assert [
            each for each in verify_dataset(root) if STAGING not in each.file
        ] == []  # empty folders of the store
        receipt = read_receipt(root, task.shard_id)
        assert late in attempts.errors or attempts.results[late] == receipt
        ends.update(marks_of(root, receipt))
        if in_time:
            assert ends[8] >= 3 <= ends[2]
            return
    raise AssertionError("the late attempt never ended")


@both_stores
@pytest.mark.parametrize("kind", ["commit", "replacement"])
def test_an_attempt_of_an_earlier_command_that_begins_late_is_refused(
    place: Callable[[int], UPath], store: str, kind: str, attempts: Attempts
) -> None:
    """Its worker outlived the driver, and takes up its next shard when another command is at work."""
    for steps in (
        0,
        100,
    ):  # the next command takes the lock before it begins, or before it has looked at the lock twice
        root = place(steps)
        task = planned(root, store)
        if kind == "replacement":
            attempt(root, store, task, 8)()
        finish_dataset(root)
        before = receipt_digest(root, task.shard_id)
        taken(root, "next" if steps == 0 else "first")
        late = f"late {steps}"
        attempts.start(late, attempt(root, store, task, 2, before, "first"))
        if steps:
            while not any("commit-" in path.name for path in _files(root / STAGING)):
                attempts.step(late)
            taken(root, "next")
        while attempts.living:
            attempts.step(late)
        assert "is being written by `extract-features`" in str(attempts.errors[late])
        assert receipt_digest(root, task.shard_id) == before
        assert kind == "commit" or (root / "tables.json").exists()
        settle_commits(root, alone=True, lock="next")
        assert receipt_digest(root, task.shard_id) == before
        assert not _files(root / STAGING)


@pytest.mark.slow
@both_stores
def test_of_two_replacements_of_one_receipt_one_takes_place(
    place: Callable[[int], UPath], store: str, attempts: Attempts
) -> None:
    """Such as of ``--retry-failed``: what the first has added must not be lost by the second."""
    for seed in range(15):
        root, rng = place(seed), random.Random(seed)
        task = planned(root, store)
        attempt(root, store, task, 9)()
        old = receipt_digest(root, task.shard_id)
        names = [f"{seed} {mark}" for mark in (2, 4)]
        for name in names:
            attempts.start(name, attempt(root, store, task, int(name[-1]), old))
        while attempts.living:
            name = rng.choice(attempts.living)
            if rng.random() < 0.03:
                attempts.kill(name)
            else:
                attempts.step(name)
        settle_commits(root, alone=True)
        receipt = read_receipt(root, task.shard_id)
        assert marks_of(root, receipt) <= {2, 4, 9}
        assert all(attempts.results[name] == receipt for name in names if name in attempts.results)


@pytest.mark.slow
@both_stores
@pytest.mark.parametrize("kind", ["commit", "replacement"])
def test_killed_at_each_step_nothing_committed_is_lost_and_the_rest_is_finished(
    tmp_path: Path, store: str, kind: str
) -> None:
    """SIGKILL of a real process before each step."""
    whole = UPath(tmp_path / "whole")
    task = planned(whole, store)
    first = 2 if kind == "commit" else 9
    if kind == "replacement":
        attempt(whole, store, task, first)()
    digest = receipt_digest(whole, task.shard_id)
    attempt(whole, store, task, 2, digest)()
    finish_dataset(whole)
    for step in range(100):
        root = UPath(tmp_path / str(step))
        planned(root, store)
        if kind == "replacement":
            attempt(root, store, task, first)()
            finish_dataset(root)
        if not killed_before(step, attempt(root, store, task, 2, digest), {commits: STEPS}):
            assert step > 5
            return
        if kind == "replacement":
            assert finished_shards(root) == {task.shard_id}, "committed clips are never gone"
            if step % 2:
                repair_dataset(root)
        settle_commits(root, alone=True)
        marks = marks_of(root, read_receipt(root, task.shard_id)) if finished_shards(root) else set()
        assert marks <= {2, 9}
        now = receipt_digest(root, task.shard_id)
        if marks != {2}:
            attempt(root, store, task, 2, now)()
        finish_dataset(root)
        assert all_bytes(Path(root)) == all_bytes(Path(whole))
        assert verify_dataset(root) == []
    raise AssertionError("it was never finished")
