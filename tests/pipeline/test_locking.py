"""The lock of a dataset, between real processes: held, refused, released by death, taken over."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from small_datasets import BLACK, make_dataset, small_card
from upath import UPath

from deltacache.pipeline.datasets.dataset import prepare_dataset
from deltacache.pipeline.datasets.verification import verify_dataset
from deltacache.pipeline.storage import locking
from deltacache.pipeline.storage.files import write_bytes
from deltacache.pipeline.storage.locking import (
    LOCK_FILE,
    DatasetLock,
    LeaseTimes,
    LockRecord,
    dataset_lock,
    read_lock,
)
from deltacache.pipeline.storage.storage import names_in, put
from deltacache.schemas.errors import DatasetError, StorageError
from object_stores import s3_bucket

SHORT = LeaseTimes(renew_s=0.5, grace_s=3.0)
LONG = LeaseTimes(renew_s=0.5, grace_s=30.0)  # where nobody is given up: a machine under load renews late

_HOLDER = """
import sys, time
from upath import UPath
from deltacache.pipeline.storage import locking
from deltacache.pipeline.storage.locking import LeaseTimes
if "no-flock" in sys.argv:
    locking._locked = lambda path: (_ for _ in ()).throw(OSError(38, "Function not implemented"))
with locking.dataset_lock(sys.argv[1], "deltacache extract-features a b", LeaseTimes(0.5, 30.0)) as lock:
    lock.update({"shards": 3})
    print("held", flush=True)
    for line in sys.stdin:
        lock.update({"shards": int(line)})
        print("updated", flush=True)
"""


@contextmanager
def held_by_another(root: Path | UPath, *flags: str) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", _HOLDER, str(root), *flags]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    def locked(_: Path) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(locking, "_locked", locked)


@pytest.fixture(params=["flock", "no-flock", "s3"])
def place(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path | UPath, str]:
    """Where to write, and the flag that the other process needs for it."""
    if request.param == "s3":
        return request.getfixturevalue("s3_root"), ""
    if request.param == "no-flock":
        without_flock(monkeypatch)
    return tmp_path / "out", request.param


def test_second_command_is_refused_while_the_first_lives(place: tuple[Path | UPath, str]) -> None:
    root, flag = place
    with held_by_another(root, flag) as other:
        start = time.monotonic()
        with (
            pytest.raises(
                DatasetError,
                match=rf"(out|features) is being written by `deltacache extract-features a b` \(process {other.pid} "
                r"on \S+, since 20\S+\): .*Wait until it has ended, or stop it",
            ) as refusal,
            dataset_lock(root, "deltacache tokenize", LONG),
        ):
            pass
        assert str(other.pid) in str(refusal.value)
        assert time.monotonic() - start < 10
        info = read_lock(root)
        assert info is not None
        assert (info.pid, info.command, info.alive) == (other.pid, "deltacache extract-features a b", True)
        assert info.started_at <= info.updated_at
    assert other.returncode == 0
    assert read_lock(root) is None
    with dataset_lock(root, "deltacache tokenize", LONG):
        assert LOCK_FILE in names_in(UPath(root))
    assert LOCK_FILE not in names_in(UPath(root))


def test_lock_of_a_killed_command_is_free(place: tuple[Path | UPath, str]) -> None:
    root, flag = place
    said: list[str] = []
    with held_by_another(root, flag) as other:
        other.send_signal(signal.SIGKILL)
        other.wait()
        info = read_lock(root)
        assert info is not None
        assert not info.alive
        with dataset_lock(root, "deltacache tokenize", SHORT, said.append):
            now = read_lock(root)
            assert now is not None
            assert (now.pid, now.alive) == (os.getpid(), True)
    if flag != "flock":
        assert f"taking over from `deltacache extract-features a b` (process {other.pid}" in said[0]


def test_status_is_published(place: tuple[Path | UPath, str]) -> None:
    root, flag = place
    with held_by_another(root, flag) as other:
        assert other.stdin is not None
        deadline = time.monotonic() + 20
        for shards in range(4, 1000):
            other.stdin.write(f"{shards}\n")
            other.stdin.flush()
            assert other.stdout is not None
            other.stdout.readline()
            info = read_lock(root)
            assert info is not None
            if info.status.get("shards", 0) > 3:
                break
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_status_of_a_local_lock_is_written_once_a_second(tmp_path: Path) -> None:
    with dataset_lock(tmp_path, "x") as lock:
        for step in range(20_000):
            lock.update({"step": step, "text": "x" * (step % 100)})
        info = read_lock(tmp_path)
        assert info is not None
        assert info.status.get("step", 0) < 19_999
        time.sleep(1)
        lock.update({"step": "last"})
        info = read_lock(tmp_path)
        assert info is not None
        assert info.status == {"step": "last"}


def stranger(root: UPath, **changes: object) -> None:
    """A lease of a command on another machine, which nobody renews."""
    record = LockRecord(
        "deltacache far-away", "lease", SHORT.grace_s, host="elsewhere", pid=7, machine="00000000"
    )
    for name, value in changes.items():
        setattr(record, name, value)
    put(root / LOCK_FILE, record.to_bytes())


def test_abandoned_lease_of_another_machine_is_watched_and_taken_over(s3_root: UPath) -> None:
    stranger(s3_root)
    said: list[str] = []
    start = time.monotonic()
    with dataset_lock(s3_root, "deltacache tokenize", SHORT, said.append):
        assert time.monotonic() - start >= SHORT.grace_s
        assert "taking over from `deltacache far-away` (process 7 on elsewhere, since 20" in said[0]
    assert names_in(s3_root) == []


def test_lease_of_another_machine_that_is_renewed_is_respected(s3_root: UPath) -> None:
    stranger(s3_root)
    timer = threading.Timer(0.7, stranger, [s3_root])
    timer.start()
    with pytest.raises(DatasetError, match="process 7 on elsewhere"), dataset_lock(s3_root, "x", SHORT):
        pass
    timer.join()
    assert names_in(s3_root) == [LOCK_FILE]


def test_unreadable_lease_is_watched_too(s3_root: UPath) -> None:
    put(s3_root / LOCK_FILE, b"{half")
    assert read_lock(s3_root) is None
    with dataset_lock(s3_root, "x", SHORT, lambda _: None):
        assert read_lock(s3_root) is not None


def updating(lock: DatasetLock, loss: Callable[[], object]) -> None:
    """Work that goes on for a while, in which the lock is lost."""
    lock.update({})
    loss()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        lock.update({})
        time.sleep(0.05)


@pytest.mark.parametrize(
    "loss", [stranger, lambda root: (root / LOCK_FILE).unlink()], ids=["taken", "unlink"]
)
def test_owner_that_lost_its_lease_stops(s3_root: UPath, loss: Callable[[UPath], None]) -> None:
    def between_renewals() -> None:  # one that has read its lease would write over what comes then
        with lock._hold._writing:  # pyright: ignore[reportAttributeAccessIssue]
            loss(s3_root)

    said = r"\.lock was lost: it (belongs to `deltacache far-away`|was removed)"
    with pytest.raises(DatasetError, match=said), dataset_lock(s3_root, "x", LONG) as lock:
        updating(lock, between_renewals)
    assert names_in(s3_root) == ([LOCK_FILE] if loss is stranger else [])  # the other's stays


@pytest.mark.parametrize("end", ["answered", "failed"])
def test_a_renewal_that_is_carried_out_after_a_takeover_lets_nobody_go_on(
    s3_root: UPath, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """It has read its own lease, and writes when another command has watched it, taken over and begun."""
    at_the_write, taken_over, written = threading.Event(), threading.Event(), threading.Event()

    def late(path: UPath, content: bytes) -> None:
        is_late = b"deltacache late" in content and not at_the_write.is_set()
        if is_late:
            at_the_write.set()
            assert taken_over.wait(60)
        write_bytes(path, content)
        if is_late:
            written.set()
            if end == "failed":
                raise TimeoutError("no answer")

    def overtaken() -> None:
        assert at_the_write.wait(60)
        said = r"\.lock was lost: it (was removed|belongs to `deltacache late`)"
        times = LeaseTimes(renew_s=1.0, grace_s=4.0)
        with (
            pytest.raises(DatasetError, match=said),
            dataset_lock(s3_root, "deltacache next", times, lambda _: None) as other,
        ):
            updating(other, lambda: between_renewals(other))

    def between_renewals(other: DatasetLock) -> None:
        with other._hold._writing:  # pyright: ignore[reportAttributeAccessIssue]
            taken_over.set()
            assert written.wait(60)

    monkeypatch.setattr(locking, "write_bytes", late)
    said = r"\.lock was lost: it was not renewed for \d+ s, so another command may have taken it over"
    with pytest.raises(DatasetError, match=said), dataset_lock(s3_root, "deltacache late", SHORT) as lock:
        updating(lock, overtaken)
    assert names_in(s3_root) == []


@pytest.mark.slow
def test_two_that_take_over_at_once_do_not_both_win(s3_root: UPath) -> None:
    times = LeaseTimes(renew_s=1.0, grace_s=4.0)
    for _ in range(3):
        stranger(s3_root)
        won: list[str] = []
        refused: list[str] = []
        both = threading.Barrier(4)

        def compete(
            name: str, won: list = won, refused: list = refused, both: threading.Barrier = both
        ) -> None:
            both.wait()
            try:
                with dataset_lock(s3_root, name, times, lambda _: None) as lock:
                    won.append(name)
                    for _ in range(20):
                        lock.update({})
                        time.sleep(0.1)
            except DatasetError as error:
                refused.append(str(error))

        threads = [threading.Thread(target=compete, args=(f"deltacache {n}",)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(won), len(refused)) == (1, 3)


@pytest.mark.slow
def test_lock_is_no_part_of_the_dataset(tmp_path: Path) -> None:
    root = tmp_path / "out"
    with dataset_lock(root, "x"):
        make_dataset(root, "features", "webdataset", "a")
        assert verify_dataset(root) == []
    (root / LOCK_FILE).write_bytes(b"left by a killed command")
    prepare_dataset(root, small_card("features", "webdataset"), BLACK)
    assert verify_dataset(root) == []


def test_folder_that_was_only_locked_goes_again(tmp_path: Path) -> None:
    with dataset_lock(tmp_path / "a" / "b", "x"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not (tmp_path / "a" / "b").exists()


def test_error_of_the_work_is_passed_on(place: tuple[Path | UPath, str]) -> None:
    root, _ = place
    with pytest.raises(ZeroDivisionError), dataset_lock(root, "x", SHORT):
        raise ZeroDivisionError
    assert read_lock(root) is None


def test_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"")
    with pytest.raises(DatasetError, match="is a file: give a folder"), dataset_lock(tmp_path / "out", "x"):
        pass


def test_output_where_nothing_can_be_written_is_refused() -> None:
    with pytest.raises(StorageError, match="/proc/out cannot be written"), dataset_lock("/proc/out", "x"):
        pass


def test_bucket_that_does_not_exist_is_refused(s3: str) -> None:
    with (
        pytest.raises(StorageError, match=r"s3://no-such-bucket.*Create the bucket"),
        dataset_lock("s3://no-such-bucket/out", "x", SHORT),
    ):
        pass


def test_content_is_json_for_people(tmp_path: Path) -> None:
    with dataset_lock(tmp_path, "deltacache extract-features"):
        body = json.loads((tmp_path / LOCK_FILE).read_bytes())
    assert body["command"] == "deltacache extract-features"
    assert body["pid"] == os.getpid()


class _Deaf:
    """An S3 server that ignores ``If-None-Match``, or one that knows no such condition."""

    def __init__(self, application: Any, status: int | None) -> None:
        self._application, self._status = application, status

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        if environ.pop("HTTP_IF_NONE_MATCH", None) is not None and self._status is not None:
            start_response(f"{self._status} Not Implemented", [("Content-Type", "application/xml")])
            return [
                b"<Error><Code>NotImplemented</Code><Message>A header is not implemented</Message></Error>"
            ]
        return self._application(environ, start_response)


@pytest.fixture(params=[None, 501])
def deaf_root(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[UPath]:
    served = DomainDispatcherApplication(create_backend_app)
    monkeypatch.setattr(
        "moto.moto_server.threaded_moto_server.DomainDispatcherApplication",
        lambda *_: _Deaf(served, request.param),
    )
    with s3_bucket() as bucket:
        yield UPath(f"{bucket}/out")


def test_a_store_that_ignores_conditions_is_refused_and_nobody_holds_the_lock(deaf_root: UPath) -> None:
    said = r"cannot be locked: its store ignores the condition `If-None-Match"
    for _ in range(2):
        with pytest.raises(DatasetError, match=said), dataset_lock(deaf_root, "x", SHORT):
            raise AssertionError("it was held")
    assert names_in(deaf_root) == []
    stranger(deaf_root)  # who holds it is left alone
    timer = threading.Timer(0.7, stranger, [deaf_root])
    timer.start()
    with pytest.raises(DatasetError, match="process 7 on elsewhere"), dataset_lock(deaf_root, "x", SHORT):
        pass
    timer.join()
    assert names_in(deaf_root) == [LOCK_FILE]
