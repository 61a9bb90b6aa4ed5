"""Videos and datasets on an S3 server, by command, as a user without a shared disk works."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from conftest import Command

SERVER = (
    "import sys, time\n"
    "from moto.server import ThreadedMotoServer\n"
    "server = ThreadedMotoServer(ip_address='127.0.0.1', port=0, verbose=False)\n"
    "server.start()\n"
    "print(server.get_host_and_port()[1], flush=True)\n"
    "sys.stdin.read()"
)
FLAGS = ("--backbone", "tiny", "--image-size", "32", "--videos-per-shard", "2")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, real_videos: Path) -> Iterator[str]:
    """A bucket with three real videos, on a server of its own; found through the usual variables."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with server:
        assert server.stdout is not None
        port = next(line.strip() for line in server.stdout if line.strip().isdigit())
        environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="films")
        for video in sorted((real_videos / "fixture").glob("*.mp4"))[:3]:
            client.upload_file(str(video), "films", f"videos/{video.name}")
        yield "s3://films"
        server.terminate()


def test_the_chain_reads_and_writes_an_object_store(
    deltacache: Command, bucket: str, real_videos: Path, tmp_path: Path
) -> None:
    features, tokenizer, deltas = f"{bucket}/features", tmp_path / "tokenizer", f"{bucket}/deltas"
    made = deltacache("extract-features", f"{bucket}/videos", features, *FLAGS).done()
    assert "3 clips of 3 videos" in made.stdout
    assert (
        "nothing to do" in deltacache("extract-features", f"{bucket}/videos", features, *FLAGS).done().stdout
    )
    assert "3 clips of 3 videos in 2 of 2 shards" in deltacache("inspect", features).done().stdout
    assert "no damage" in deltacache("verify", features).done().stdout
    deltacache("train-tokenizer", features, tokenizer, "--preset", "tiny", "--steps", 2).done()
    deltacache("tokenize", features, deltas, "--tokenizer", tokenizer).done()
    deltacache("train-world", deltas, tmp_path / "world", "--preset", "tiny", "--steps", 2).done()
    local = tmp_path / "videos"
    local.mkdir()
    for video in sorted((real_videos / "fixture").glob("*.mp4"))[:3]:
        (local / video.name).symlink_to(video)
    deltacache("extract-features", local, tmp_path / "features", *FLAGS).done()
    client = boto3.client("s3")
    for shard in sorted((tmp_path / "features" / "shards").glob("*.tar")):
        stored = client.get_object(Bucket="films", Key=f"features/shards/{shard.name}")["Body"].read()
        assert stored == shard.read_bytes()


def test_a_store_that_refuses_says_so(deltacache: Command, bucket: str) -> None:
    gone = deltacache("extract-features", "s3://no-such-bucket/videos", f"{bucket}/out", *FLAGS)
    gone.refused("no-such-bucket")
    deltacache("extract-features", f"{bucket}/videos", "s3://no-such-bucket/out", *FLAGS).refused(
        "Create the bucket"
    )
    assert "AWS_ENDPOINT_URL" in os.environ
