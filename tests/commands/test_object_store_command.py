"""Videos and datasets on an S3 server, by command, as a user without a shared disk works."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
import pytest
from command_runs import Command

from shared_ray import SharedRay
from warm_process import start_command

SERVER = """
import sys, time
from pathlib import Path
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

hold, held, asked = (Path(sys.argv[1]) / name for name in ("hold", "held", "asked"))
moto = DomainDispatcherApplication(create_backend_app)

def app(environ, start_response):
    with asked.open("a") as file:
        file.write(f'{environ["REQUEST_METHOD"]} {environ["PATH_INFO"]}?{environ["QUERY_STRING"]}\\n')
    if environ["REQUEST_METHOD"] == "PUT" and "/shards/" in environ["PATH_INFO"] and hold.exists():
        held.touch()
        time.sleep(60)  # by then whoever is uploading is dead
        start_response("503 Slow Down", [])
        return []
    return moto(environ, start_response)

server = make_server("127.0.0.1", 0, app, threaded=True)
print(server.server_port, flush=True)
server.serve_forever()
"""
FLAGS = ("--backbone", "tiny", "--image-size", "32", "--videos-per-shard", "2")


@pytest.fixture(scope="module")
def server_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """While there is a file ``hold``, uploads of shards do not end; ``held`` tells that one began."""
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def bucket(shared_ray: SharedRay, real_videos: Path, server_folder: Path) -> Iterator[str]:
    """A bucket with three real videos, on a server of its own; found through the usual variables.

    Ray's workers have them too: it starts after they are set, and ends with them.
    """
    shared_ray.stop()
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(server_folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with server, pytest.MonkeyPatch.context() as patch:
        assert server.stdout is not None
        port = next(line.strip() for line in server.stdout if line.strip().isdigit())
        environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        for name, value in environment.items():
            patch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="films")
        for video in sorted((real_videos / "fixture").glob("*.mp4"))[:3]:
            client.upload_file(str(video), "films", f"videos/{video.name}")
        yield "s3://films"
        server.terminate()
        shared_ray.stop()


def shards_of(bucket: str, dataset: str) -> dict[str, bytes]:
    client = boto3.client("s3")
    listed = client.list_objects_v2(Bucket=bucket.removeprefix("s3://"), Prefix=f"{dataset}/shards/")
    keys = [entry["Key"] for entry in listed.get("Contents", []) if entry["Size"]]
    return {
        Path(key).name: client.get_object(Bucket=bucket.removeprefix("s3://"), Key=key)["Body"].read()
        for key in keys
    }


@pytest.fixture(scope="module")
def local_shards(
    deltacache: Command, bucket: str, real_videos: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """The shards that the same videos give on a disk."""
    folder = tmp_path_factory.mktemp("local")
    videos = folder / "videos"
    videos.mkdir()
    for video in sorted((real_videos / "fixture").glob("*.mp4"))[:3]:
        (videos / video.name).symlink_to(video)
    deltacache("extract-features", videos, folder / "features", *FLAGS).done()
    return {path.name: path.read_bytes() for path in (folder / "features" / "shards").glob("*.tar")}


@contextmanager
def few_requests(folder: Path, most: int) -> Iterator[None]:
    """The server is asked for something, at most so often, and for no receipt.

    The videos' own place does not count, nor does the lock, which takes four and two every five seconds.
    """
    (folder / "asked").unlink(missing_ok=True)
    yield
    asked = (folder / "asked").read_text().splitlines()
    ours = [line for line in asked if not any(part in line for part in ("videos", ".lock"))]
    assert 3 <= len(ours) <= most, ours
    assert not [line for line in ours if "receipts" in line]


@pytest.mark.timeout(800)
def test_the_chain_reads_and_writes_an_object_store(
    deltacache: Command,
    deltacache_on_ray: Command,
    bucket: str,
    server_folder: Path,
    local_shards: dict[str, bytes],
    tmp_path: Path,
) -> None:
    features, tokenizer, deltas = f"{bucket}/features", tmp_path / "tokenizer", f"{bucket}/deltas"
    made = deltacache_on_ray("extract-features", f"{bucket}/videos", features, *FLAGS).done()
    assert "3 clips of 3 videos" in made.stdout
    with few_requests(server_folder, 14):
        again = deltacache("extract-features", f"{bucket}/videos", features, *FLAGS).done()
    assert "nothing to do" in again.stdout
    with few_requests(server_folder, 14):
        assert "3 clips of 3 videos in 2 of 2 shards" in deltacache("inspect", features).done().stdout
    assert "no damage" in deltacache("verify", features).done().stdout
    deltacache("train-tokenizer", features, tokenizer, "--preset", "tiny", "--steps", 2).done()
    deltacache("tokenize", features, deltas, "--tokenizer", tokenizer).done()
    with few_requests(server_folder, 16):  # of two datasets; with four for the lock, 20
        again = deltacache("tokenize", features, deltas, "--tokenizer", tokenizer).done()
    assert "nothing to do" in again.stdout
    deltacache("train-world", deltas, tmp_path / "world", "--preset", "tiny", "--steps", 2).done()
    assert shards_of(bucket, "features") == local_shards


@pytest.mark.timeout(800)
def test_a_command_killed_while_it_uploads_leaves_nothing_that_counts_and_is_made_good(
    deltacache: Command, bucket: str, server_folder: Path, local_shards: dict[str, bytes]
) -> None:
    out = f"{bucket}/killed"
    command = ["extract-features", f"{bucket}/videos", out, *FLAGS]
    (server_folder / "hold").touch()
    with start_command(*command) as process:  # at the end it is killed, with all processes below it
        deadline = time.monotonic() + 240
        while not (server_folder / "held").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    (server_folder / "hold").unlink()
    assert shards_of(bucket, "killed") == {}
    assert "0 of 2 shards" in deltacache("inspect", out).done().stdout
    deltacache(*command).done()
    assert "no damage" in deltacache("verify", out).done().stdout
    assert shards_of(bucket, "killed") == local_shards


def test_a_store_that_refuses_says_so(deltacache: Command, bucket: str) -> None:
    gone = deltacache("extract-features", "s3://no-such-bucket/videos", f"{bucket}/out", *FLAGS)
    gone.refused("no-such-bucket")
    deltacache("extract-features", f"{bucket}/videos", "s3://no-such-bucket/out", *FLAGS).refused(
        "Create the bucket"
    )
    assert "AWS_ENDPOINT_URL" in os.environ
