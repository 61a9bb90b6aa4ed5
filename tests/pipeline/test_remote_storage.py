"""Datasets in object stores: byte for byte the local ones, and nothing half-written counts."""

import errno
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import fsspec
import numpy as np
import pytest
import torch
from botocore.exceptions import ClientError
from fsspec.implementations.memory import MemoryFileSystem
from small_datasets import BLACK, all_bytes, make_dataset, shard_of, small_card, sources_of, videos_named
from upath import UPath

from deltacache.pipeline.datasets.dataset import (
    finish_dataset,
    finished_shards,
    load_deltas,
    open_dataset,
    prepare_dataset,
    read_plan,
    write_plan,
    write_shard,
)
from deltacache.pipeline.datasets.plan import ShardTask, extend_plan, shard_tasks
from deltacache.pipeline.datasets.receipts import StoredClip, read_receipts
from deltacache.pipeline.storage import files as sealing
from deltacache.pipeline.storage.files import (
    is_temporary,
    move,
    readable_errors,
    remove,
    replacing,
    replacing_folder,
    temporary_path,
    write_bytes,
    write_if_changed,
    write_new,
)
from deltacache.pipeline.storage.mapped import MappedFiles
from deltacache.pipeline.storage.storage import dataset_root, names_in, objects_below, read_many, set_patience
from deltacache.schemas.errors import DatasetError, StorageError
from deltacache.train.data import PairSettings, ResidentFeatures, StreamedFeatures, pair_batches
from deltacache.train.mixture import open_training_data
from deltacache.train.order import Split

NAMES = ("a", "b", "broken", "c")
both_stores = pytest.mark.parametrize("store", ["webdataset", "zarr"])
every_kind = pytest.mark.parametrize("kind", ["features", "deltas"])


@pytest.fixture(params=["s3", "memory"])
def root(request: pytest.FixtureRequest) -> UPath:
    return request.getfixturevalue(f"{request.param}_root")


@pytest.fixture(autouse=True)
def spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where shards wait to be uploaded."""
    folder = tmp_path.with_name(tmp_path.name + "-spool")
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def client() -> Any:
    """Another client than the product's."""
    return boto3.client("s3")


def bucket_and_key(path: UPath) -> tuple[str, str]:
    bucket, _, key = path.path.partition("/")
    return bucket, key


def uploads_of(path: UPath) -> list[list[object]]:
    """The parts that have arrived, of each upload to ``path`` that was begun and did not end."""
    bucket, key = bucket_and_key(path)
    uploads = client().list_multipart_uploads(Bucket=bucket, Prefix=key).get("Uploads", [])
    return [
        client().list_parts(Bucket=bucket, Key=key, UploadId=upload["UploadId"]).get("Parts", [])
        for upload in uploads
    ]


@contextmanager
def every_request_denied() -> Iterator[None]:
    """The server checks rights, and nobody has any."""
    try:
        _rights_are_checked_after("0")
        yield
    finally:
        _rights_are_checked_after("inf")


def _rights_are_checked_after(requests: str) -> None:
    url = f"{os.environ['AWS_ENDPOINT_URL']}/moto-api/reset-auth"
    headers = {"Content-Type": "text/plain"}
    urllib.request.urlopen(urllib.request.Request(url, requests.encode(), headers)).close()


def bytes_below(root: UPath) -> dict[str, bytes]:
    """Every object below ``root``, by relative path."""
    start = len(root.path.rstrip("/")) + 1
    return {path.path[start:]: path.read_bytes() for path in objects_below(root)}


def planned(root: UPath, store: str) -> ShardTask:
    prepare_dataset(root, small_card("features", store), BLACK)
    plan = extend_plan(None, videos_named("a", "b"), 2, 2)
    write_plan(root, plan)
    return shard_tasks(plan)[0]


@pytest.mark.slow
@both_stores
@every_kind
def test_dataset_is_the_local_one_byte_for_byte(root: UPath, tmp_path: Path, store: str, kind: str) -> None:
    make_dataset(tmp_path / "local", kind, store, *NAMES)
    make_dataset(root, kind, store, *NAMES)
    assert bytes_below(root) == all_bytes(tmp_path / "local")
    local, remote = open_dataset(tmp_path / "local"), open_dataset(str(root))
    assert remote.clip_ids == local.clip_ids
    assert remote.failures.equals(local.failures)
    for clip in range(len(local)):
        np.testing.assert_array_equal(remote.read_frames(clip, 1, 3), local.read_frames(clip, 1, 3))
        assert not remote.read_frames(clip, 1, 3).flags.writeable
    if kind == "deltas":
        np.testing.assert_array_equal(
            load_deltas(root).delta_tokens, load_deltas(tmp_path / "local").delta_tokens
        )


@pytest.mark.slow
@both_stores
def test_open_dataset_can_be_sent_to_another_process(s3_root: UPath, store: str) -> None:
    make_dataset(s3_root, "features", store, "a")
    dataset = open_dataset(s3_root)
    again = pickle.loads(pickle.dumps(dataset))  # noqa: S301
    np.testing.assert_array_equal(again.read(0).patch_tokens, dataset.read(0).patch_tokens)


@pytest.mark.slow
@both_stores
def test_second_run_writes_nothing(s3_root: UPath, store: str) -> None:
    make_dataset(s3_root, "features", store, *NAMES)
    written = _times(s3_root)
    time.sleep(1.1)  # times of objects are whole seconds
    make_dataset(s3_root, "features", store, *NAMES)
    assert _times(s3_root) == written


def _times(root: UPath) -> dict[str, object]:
    bucket, prefix = bucket_and_key(root)
    objects = client().list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]
    return {held["Key"]: held["LastModified"] for held in objects}


@pytest.mark.slow
@both_stores
def test_interrupted_shard_leaves_nothing_that_counts(
    root: UPath, tmp_path: Path, spool: Path, store: str
) -> None:
    task = planned(root, store)
    clips, _ = shard_of("features", task)

    def interrupted() -> Iterator[StoredClip]:
        yield from clips[:2]
        raise KeyboardInterrupt

    card = small_card("features", store)
    with pytest.raises(KeyboardInterrupt):
        write_shard(root, card, task.shard_id, interrupted(), [], sources_of(task))
    assert finished_shards(root) == set()
    assert [name for name in names_in(root / "shards") if name != "zarr.json"] == []
    assert list(spool.iterdir()) == []
    write_shard(root, card, task.shard_id, clips, [], sources_of(task))
    finish_dataset(root)
    make_dataset(tmp_path / "whole", "features", store, "a", "b")
    assert bytes_below(root) == all_bytes(tmp_path / "whole")


_KILLED = """
import sys, time
from small_datasets import shard_of, small_card, sources_of
from upath import UPath
from deltacache.pipeline.datasets.dataset import write_shard
from test_remote_storage import planned
root, store = UPath(sys.argv[1]), sys.argv[2]
task = planned(root, store)
def clips():
    yield from shard_of("features", task)[0][:2]
    print("half", flush=True)
    time.sleep(60)
write_shard(root, small_card("features", store), task.shard_id, clips(), [], sources_of(task))
"""


def started(program: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path})


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


@both_stores
def test_killed_writer_leaves_nothing_that_counts(
    s3_root: UPath, tmp_path: Path, spool: Path, store: str
) -> None:
    process = started(_KILLED, s3_root, store)
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    kill(process)
    assert finished_shards(s3_root) == set()
    assert [name for name in names_in(s3_root / "shards") if name != "zarr.json"] == []
    assert len(list(spool.iterdir())) == 1  # what it had so far
    make_dataset(s3_root, "features", store, "a", "b")
    assert list(spool.iterdir()) == []
    make_dataset(tmp_path / "whole", "features", store, "a", "b")
    assert bytes_below(s3_root) == all_bytes(tmp_path / "whole")


_UPLOADING = """
import sys
from upath import UPath
from deltacache.pipeline.storage.files import replacing
with replacing(UPath(sys.argv[1])) as path, path.open("wb") as file:
    for _ in range(20):
        file.write(bytes(1 << 24))
"""


def test_writer_killed_within_an_upload_leaves_no_object(s3_root: UPath) -> None:
    target = s3_root / "big.bin"
    process = started(_UPLOADING, target)
    deadline = time.monotonic() + 60
    while not any(uploads_of(target)):
        assert time.monotonic() < deadline
        assert process.poll() is None
    kill(process)
    assert not target.exists()
    assert names_in(s3_root) == []


def test_upload_that_fails_is_taken_back(s3_root: UPath, monkeypatch: pytest.MonkeyPatch) -> None:
    target = s3_root / "big.bin"
    monkeypatch.setitem(
        sys.modules["deltacache.pipeline.storage.storage"].__dict__, "_S3_UPLOAD", {"chunksize": 1 << 20}
    )
    # Parts of 1 MiB are smaller than S3 allows: the server refuses when they are to be joined.
    with (
        pytest.raises(StorageError, match="cannot be written"),
        readable_errors(target),
        replacing(target) as path,
    ):
        path.write_bytes(bytes(6 << 20))
    assert not target.exists()
    assert uploads_of(target) == []


def test_folder_replaces_what_was_there(root: UPath) -> None:
    for names in (("a", "b/c"), ("a", "d")):
        with replacing_folder(root / "group") as folder:
            for name in names:
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text(name)
        assert bytes_below(root / "group") == {name: name.encode() for name in names}
    remove(root / "group")
    assert bytes_below(root) == {}


def test_files_of_one_prefix_are_told_apart(root: UPath) -> None:
    write_bytes(root / "shards/shard-1.tar", b"1")
    write_bytes(root / "shards/shard-1.tar.old", b"2")
    assert names_in(root / "shards") == ["shard-1.tar", "shard-1.tar.old"]
    remove(root / "shards/shard-1.tar")
    assert names_in(root / "shards") == ["shard-1.tar.old"]
    assert names_in(root / "elsewhere") == []


def test_listings_show_what_others_wrote(s3_root: UPath) -> None:
    assert names_in(s3_root) == []
    bucket, key = bucket_and_key(s3_root / "x.json")
    client().put_object(Bucket=bucket, Key=key, Body=b"x")
    assert names_in(s3_root) == ["x.json"]
    assert (s3_root / "x.json").exists()
    client().delete_object(Bucket=bucket, Key=key)
    assert not (s3_root / "x.json").exists()
    assert list(read_many([])) == []


@pytest.mark.slow
def test_many_files_are_read_in_order(root: UPath) -> None:
    paths = [root / f"[{number}].json" for number in range(150)]
    for number, path in enumerate(paths):
        path.fs.pipe_file(path.path, b"%d" % number)
    assert list(read_many(reversed(paths))) == [b"%d" % number for number in reversed(range(150))]
    with pytest.raises(FileNotFoundError):
        list(read_many([paths[0], root / "none.json"]))


@pytest.mark.slow
def test_missing_receipt_among_many_is_named(root: UPath) -> None:
    tasks = make_dataset(root, "features", "webdataset", *"abcdef", videos_per_shard=1)
    remove(root / "receipts" / f"{tasks[3].shard_id}.json")
    with pytest.raises(DatasetError, match=f"{tasks[3].shard_id}.json is missing"):
        list(read_receipts(root, [task.shard_id for task in tasks]))


def test_unchanged_content_is_not_written_again(root: UPath) -> None:
    write_if_changed(root / "x", b"1")
    write_if_changed(root / "x", b"2")
    assert (root / "x").read_bytes() == b"2"


def test_ranges_are_exact_and_short_ones_an_error(root: UPath) -> None:
    values = np.arange(60, dtype=np.int8)
    write_bytes(root / "x", values.tobytes())
    files = MappedFiles()
    array = files.array(root / "x", np.int8, 4, (3, 2, 5), 16)
    np.testing.assert_array_equal(array[1], values[20:30].reshape(2, 5))
    np.testing.assert_array_equal(files.array(root / "x", np.int8, 50, (1, 10), 10), values[None, 50:])
    assert files.array(root / "x", np.float16, 0, (0, 5), 10).shape == (0, 5)
    for offset in (51, 60, 1000):
        with pytest.raises(ValueError, match="must have 10"):
            files.array(root / "x", np.int8, offset, (1, 10), 10)
    with pytest.raises(FileNotFoundError):
        files.array(root / "none", np.int8, 0, (1, 10), 10)


@pytest.mark.slow
@both_stores
def test_damaged_shard_is_an_error_and_not_zeros(root: UPath, store: str) -> None:
    make_dataset(root, "features", store, "a", "b")
    receipt = next(read_receipts(root, finished_shards(root)))
    path = root / receipt.token_file
    content = path.read_bytes()
    dataset = open_dataset(root)
    write_bytes(path, content[: len(content) // 2])
    with pytest.raises(DatasetError, match=r"is damaged: .* has \d+ bytes, but its receipt says"):
        dataset.read(0)
    flipped = bytearray(content)
    flipped[receipt.token_offsets[0]] ^= 1
    write_bytes(path, bytes(flipped))
    with pytest.raises(DatasetError, match="its tokens have crc32c"):
        dataset.read(0)
    dataset.read(1)
    remove(path)
    with pytest.raises(DatasetError, match="is missing"):
        open_dataset(root).read(1)


def test_bucket_that_does_not_exist_is_one_readable_error(s3: str) -> None:
    root = UPath("s3://no-such-bucket/features")
    with pytest.raises(
        StorageError, match=r"s3://no-such-bucket/features.*Create the bucket, or correct its name"
    ):
        prepare_dataset(root, small_card("features", "zarr"), BLACK)
    with pytest.raises(StorageError, match=r"cannot be read .*bucket does not exist.*Create the bucket"):
        open_dataset(root)
    assert "no-such-bucket" not in [bucket["Name"] for bucket in client().list_buckets()["Buckets"]]


@pytest.mark.slow
def test_denied_access_is_one_readable_error(s3_root: UPath) -> None:
    make_dataset(s3_root, "features", "webdataset", "a")
    dataset = open_dataset(s3_root)
    with every_request_denied():
        for attempt in (
            lambda: open_dataset(s3_root),
            lambda: prepare_dataset(s3_root, small_card("features", "webdataset"), BLACK),
            lambda: finish_dataset(s3_root),
            lambda: read_plan(s3_root),
            lambda: dataset.read(0),
        ):
            with pytest.raises(
                StorageError, match=r"Let these credentials list, read, write and delete there"
            ):
                attempt()
    assert len(dataset.read(0).patch_tokens) == 3


def test_store_that_is_down_is_one_readable_error(s3: str) -> None:
    options = {"endpoint_url": "http://127.0.0.1:1", "config_kwargs": {"retries": {"max_attempts": 1}}}
    root = UPath("s3://any/features", **options)
    with pytest.raises(
        StorageError, match=r"Could not connect.*The store does not answer: check the network"
    ):
        open_dataset(root)
    with pytest.raises(StorageError, match=r"what was finished is kept. The store does not answer"):
        prepare_dataset(root, small_card("features", "zarr"), BLACK)


def test_missing_credentials_are_one_readable_error(monkeypatch: pytest.MonkeyPatch, s3: str) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    root = UPath(f"{s3}/x", skip_instance_cache=True)
    with pytest.raises(StorageError, match="Set the credentials of the store, for S3 AWS_ACCESS_KEY_ID"):
        open_dataset(root)


def test_store_whose_package_is_missing_is_one_readable_error() -> None:
    with pytest.raises(
        StorageError, match=r"gs://bucket/x/dataset.json cannot be read .*gcsfs.*: Install that package"
    ):
        open_dataset("gs://bucket/x")


class Unreliable(MemoryFileSystem):
    """A store that breaks off every connection but each third."""

    protocol = "unreliable"
    store: dict = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    cachable = False
    calls = 0

    def _falter(self) -> None:
        Unreliable.calls += 1
        if Unreliable.calls % 3:
            raise ConnectionResetError(104, "Connection reset by peer")

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: object) -> None:
        self._falter()
        super().pipe_file(path, value, mode, **kwargs)

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **kwargs: object
    ) -> bytes:
        self._falter()
        return super().cat_file(path, start, end, **kwargs)

    def put_file(self, lpath: str, rpath: str, *args: object, **kwargs: object) -> None:
        self._falter()
        super().put_file(lpath, rpath, *args, **kwargs)


def test_broken_connections_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("unreliable", Unreliable, clobber=True)
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _: None)
    with pytest.warns(UserWarning, match="not explicitly implemented"):
        root = UPath("unreliable://x/y")
    with replacing(root / "a") as path:
        path.write_bytes(b"12345")
    write_bytes(root / "b", b"6")
    assert list(read_many([root / "a", root / "b"])) == [b"12345", b"6"]
    Unreliable._falter = lambda self: (_ for _ in ()).throw(ConnectionResetError(104, "Connection reset"))
    with pytest.raises(StorageError, match="The store does not answer"), readable_errors(root / "c"):
        write_bytes(root / "c", b"7")


class AnswerError(Exception):
    """As clients of web servers raise it."""

    def __init__(self, status: int) -> None:
        super().__init__(f"HTTP status {status}")
        self.status = status


def _botocore_error(status: int) -> ClientError:
    return ClientError(
        {"Error": {"Code": "SlowDown"}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject"
    )


def test_outputs_are_tried_for_as_long_as_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """For seconds here; it was a second at most, whatever ``--retry-for`` said, and none for S3's own errors."""
    fsspec.register_implementation("unreliable", Unreliable, clobber=True)
    with warnings.catch_warnings(action="ignore"):  # that UPath does not know it
        root = UPath("unreliable://x/z")
    set_patience(30)
    passing = [
        AnswerError(503),
        AnswerError(429),
        TimeoutError(),
        _botocore_error(503),
        OSError(errno.ESTALE, "stale"),
    ]
    started, tried = time.monotonic(), []

    def falter(self: Unreliable) -> None:
        if time.monotonic() - started < 2:
            tried.append(passing[len(tried) % len(passing)])
            raise tried[-1]

    monkeypatch.setattr(Unreliable, "_falter", falter)
    write_bytes(root / "a", b"1")
    assert (root / "a").read_bytes() == b"1"
    assert len(tried) >= 4
    for final in (
        AnswerError(501),
        AnswerError(403),
        PermissionError(errno.EACCES, "denied"),
        OSError(errno.ENOSPC, "full"),
    ):
        passing[:], tried[:], started = [final], [], time.monotonic()
        with pytest.raises(type(final)):
            write_bytes(root / "b", b"2")
        assert len(tried) == 1


def test_a_disk_is_tried_again_where_that_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_patience(30)
    plain, errors = os.fsync, [errno.EIO, errno.ESTALE, errno.ETIMEDOUT]

    def fsync(descriptor: int) -> None:
        if errors:
            raise OSError(errors.pop(0), "from fsync")
        plain(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_bytes(tmp_path / "a", b"1")
    errors[:] = [errno.EIO]
    assert write_new(tmp_path / "b", b"2")
    assert not write_new(tmp_path / "b", b"3")
    errors[:] = [errno.EIO]
    move(tmp_path / "a", tmp_path / "c")
    assert all_bytes(tmp_path) == {"b": b"2", "c": b"1"}
    for final in (errno.ENOSPC, errno.EACCES, errno.EROFS):
        errors[:] = [final, final]
        with pytest.raises(StorageError, match="cannot be written"), readable_errors(tmp_path):
            write_bytes(tmp_path / "d", b"4")
        assert len(errors) == 1
    assert all_bytes(tmp_path) == {"b": b"2", "c": b"1"}


def test_a_table_that_is_fetched_lies_where_leftovers_are_removed(
    memory_root: UPath, spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(memory_root, "features", "webdataset", "a")
    plain, places = sealing.fetch_file, list[str]()

    def fetch_file(path: UPath, local: Path) -> None:
        places.append(str(local.relative_to(spool)))
        plain(path, local)

    monkeypatch.setattr(sealing, "fetch_file", fetch_file)
    assert len(open_dataset(memory_root)) == 2
    assert places
    assert all(is_temporary(place.partition("/")[0]) for place in places)
    assert list(spool.iterdir()) == []


def test_local_paths_in_every_form_are_local(tmp_path: Path) -> None:
    make_dataset(tmp_path, "features", "webdataset", "a")
    for form in (tmp_path, str(tmp_path), UPath(tmp_path), f"file://{tmp_path}", UPath(f"file://{tmp_path}")):
        assert isinstance(dataset_root(form), Path)
        assert len(open_dataset(form)) == 2


@pytest.mark.parametrize(
    ("out", "said"),
    [
        (
            "nosuch://b/out",
            "nosuch://b/out cannot be opened: .*Give a folder, or a url of a store such as s3://",
        ),
        ("s3:/b/out", "s3:/b/out has one slash behind its scheme: give s3://b/out"),
        ("simplecache::s3://b/out", "simplecache::s3 chains protocols, which is not supported"),
    ],
)
def test_outputs_that_are_no_store_are_refused_by_name(out: str, said: str) -> None:
    with pytest.raises(DatasetError, match=said):
        dataset_root(out)


def test_leftovers_of_others_stay_in_the_spool(root: UPath, spool: Path) -> None:
    living = temporary_path(spool / "deltacache")
    living.mkdir()
    dead = living.with_name(living.name.replace(f"-{os.getpid()}-", "-4194304-"))
    dead.mkdir()
    with replacing(root / "x") as path:
        path.write_bytes(b"1")
    assert list(spool.iterdir()) == [living]


_ON_A_SMALL_DISK = """
import sys, subprocess
from pathlib import Path
from small_datasets import make_dataset
from deltacache.schemas.errors import StorageError
disk = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk], check=True)
try:
    make_dataset(disk / "out", "features", sys.argv[2], *(f"v{n}" for n in range(400)), videos_per_shard=8)
except StorageError as error:
    print(error)
subprocess.run(["mount", "-o", "remount,size=50m", disk], check=True)
make_dataset(disk / "out", "features", sys.argv[2], *(f"v{n}" for n in range(400)), videos_per_shard=8)
print([p.name for p in (disk / "out").rglob(".tmp*")], flush=True)
subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
try:
    make_dataset(disk / "out2", "features", sys.argv[2], "a")
except StorageError as error:
    print(error)
"""


@both_stores
def test_full_and_read_only_disks_are_readable_errors(tmp_path: Path, store: str) -> None:
    (tmp_path / "disk").mkdir()
    inside = ["unshare", "--mount", *([] if os.getuid() == 0 else ["--user", "--map-root-user"])]
    if subprocess.run([*inside, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a small disk in a namespace of its own")
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [*inside, sys.executable, "-c", _ON_A_SMALL_DISK, tmp_path / "disk", store],
        env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    full, leftovers, read_only = done.stdout.splitlines()
    assert "cannot be written (No space left on device): what was finished is kept. Make room" in full, done
    assert leftovers == "[]"
    assert "Read-only file system" in read_only
    assert "mounted read-only: mount it for writing, or give another" in read_only


def test_spool_that_is_full_is_named(root: UPath) -> None:
    target = root / "x"
    with (
        pytest.raises(StorageError, match="set TMPDIR to a larger folder"),
        readable_errors(target),
        replacing(target),
        Path("/dev/full").open("wb", buffering=0) as full,
    ):
        full.write(b"1")
    assert not target.exists()


@pytest.mark.slow
def test_batches_of_a_remote_dataset_are_those_of_the_local_one(root: UPath, tmp_path: Path) -> None:
    places = (tmp_path / "local", root)
    batches = []
    for place in places:
        make_dataset(place, "features", "webdataset", *"abcdef")
        dataset = open_training_data(place, "features")
        settings = PairSettings(len(dataset), 3, effective_batch=8, seed=0, black_first_fraction=0.1)
        for source in (ResidentFeatures(dataset), StreamedFeatures(dataset)):
            parts = Split(8).parts_of(range(4))
            pairs = pair_batches(source, BLACK, settings, parts, torch.device("cpu"))
            # A batch holds until the next one is asked for
            batches.append([(pair.previous.numpy().copy(), pair.current.numpy().copy()) for pair in pairs])
    for other in batches[1:]:
        np.testing.assert_array_equal(other, batches[0])
