"""Fetching: a local path wherever a video lies, what identifies its content, and what is tried again."""

import errno
import hashlib
import os
import resource
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
from archive_maker import tar_bytes, zip_bytes
from fsspec.implementations.memory import MemoryFileSystem
from test_decode_folder import write_frames
from video_maker import read_number, write_video

from deltacache.pipeline.decoding.decode import VideoJob, decode_video
from deltacache.pipeline.inputs.fetching import content_sha256, fetched
from deltacache.pipeline.inputs.locations import (
    FrameObjects,
    Location,
    PlainFile,
    Refused,
    TarVideo,
    ZipFrames,
    ZipVideo,
    location_text,
    parse_location,
)
from deltacache.pipeline.inputs.sources import find_videos
from deltacache.pipeline.storage.storage import filesystem_of, may_pass, set_patience
from deltacache.schemas.datasets import SamplingSettings
from deltacache.schemas.errors import DeltacacheError, FailureReason, VideoRefusedError
from object_stores import s3_bucket


def refusal(location: str, spool: Path) -> VideoRefusedError:
    with pytest.raises(VideoRefusedError) as refused, fetched(location, spool):
        pass
    with pytest.raises(VideoRefusedError) as again:
        content_sha256(location)
    assert str(again.value) == str(refused.value)
    return refused.value


@pytest.mark.parametrize(
    "location",
    [
        PlainFile("/a/b c.mp4"),
        PlainFile("s3://bucket/ä.mp4"),
        PlainFile('{"not":"ours"}.mp4'),
        FrameObjects("s3://bucket/run 1"),
        ZipVideo("/a.zip.001", 3, 'in "side"/ü.mp4'),
        ZipFrames("gs://b/a.zip", 1, ""),
        TarVideo("/a.tar", 512, 10, ".mp4"),
        Refused("unreadable", "a.zip.002 is missing"),
    ],
)
def test_a_location_is_one_string(location: Location) -> None:
    assert parse_location(location_text(location)) == location


def test_a_path_that_looks_like_a_location_stays_a_path(tmp_path: Path) -> None:
    text = location_text(PlainFile('{"kind":"tar"}.mp4'))
    assert parse_location(text) == PlainFile('./{"kind":"tar"}.mp4')


def test_a_local_file_is_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(os.urandom(3 << 20))
    [video] = find_videos(str(path), None)
    with fetched(video.path, tmp_path / "no-spool-needed") as here:
        assert here.path == str(path)
        assert here.size_bytes == video.size_bytes == 3 << 20
        assert here.version == video.version == str(path.stat().st_mtime_ns)
        assert here.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() == content_sha256(str(path))


def test_a_local_folder_of_frames_is_itself(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "v")
    os.utime(folder / "frame_3_10.300.png", ns=(5 << 60, 5 << 60))
    [video] = find_videos(str(folder), None)
    with fetched(video.path, tmp_path / "no-spool-needed") as here:
        assert here.path == str(folder)
        assert here.size_bytes == video.size_bytes
        assert here.version == video.version == str(5 << 60)
    assert here.sha256 == content_sha256(str(folder))
    (folder / "frame_3_10.300.png").rename(folder / "frame_3_10.301.png")
    assert content_sha256(str(folder)) != here.sha256


def test_what_cannot_be_read_is_refused_without_naming_paths(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "endless.mp4").symlink_to("/dev/zero")
    (tmp_path / "broken.mp4").symlink_to(tmp_path / "nowhere")
    (tmp_path / "frames").mkdir()
    os.mkfifo(tmp_path / "frames/f_1.jpg")
    messages = {
        "pipe.mp4": "not a regular file",
        "endless.mp4": "not a regular file",
        "broken.mp4": "No such file or directory",
        "gone.mp4": "No such file or directory",
        "frames": "not a regular file",
    }
    for name, message in messages.items():
        error = refusal(str(tmp_path / name), tmp_path)
        assert (error.reason, error.message) == (FailureReason.UNREADABLE, message)
    assert "not known" in refusal("nosuchstore://bucket/a.mp4", tmp_path).message


@pytest.mark.slow
def test_a_large_object_comes_in_pieces_and_a_missing_one_is_refused(tmp_path: Path) -> None:
    with s3_bucket() as url:
        data = os.urandom((17 << 20) + 3)
        fs, _ = filesystem_of(url)
        fs.pipe_file(f"{url}/a.mp4", data)
        with fetched(f"{url}/a.mp4", tmp_path) as here:
            assert Path(here.path).read_bytes() == data
            assert here.sha256 == hashlib.sha256(data).hexdigest()
            assert here.version == find_videos(url, None)[0].version
        assert list(tmp_path.iterdir()) == []
        assert refusal(f"{url}/gone.mp4", tmp_path).message == "No such file or directory"


class Flaky(MemoryFileSystem):
    """A store that fails a few times first."""

    protocol = "flaky"
    cachable = False
    errors: ClassVar[list[Exception]] = []
    asked: ClassVar[list[str]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("flaky://"))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        self.asked.append(path)
        if self.errors:
            raise self.errors.pop(0)
        return super().cat_file(path, start, end, **kwargs)


fsspec.register_implementation("flaky", Flaky, clobber=True)


@pytest.fixture
def flaky() -> Iterator[type[Flaky]]:
    Flaky().pipe_file("/a.mp4", b"content")
    Flaky.asked.clear()
    yield Flaky
    Flaky.errors.clear()
    Flaky.store.clear()


def test_errors_that_may_pass_are_tried_again(flaky: type[Flaky], tmp_path: Path) -> None:
    flaky.errors[:] = [OSError(errno.EIO, "I/O"), ConnectionResetError(), OSError(errno.ESTALE, "stale")]
    with fetched("flaky:///a.mp4", tmp_path) as here:
        assert Path(here.path).read_bytes() == b"content"
    assert len(flaky.asked) == 4


def test_they_are_tried_for_a_while_with_growing_pauses(flaky: type[Flaky], tmp_path: Path) -> None:
    set_patience(2)
    flaky.errors[:] = [OSError(errno.EIO, f"request {n}") for n in range(1000)]
    started = time.monotonic()
    with pytest.raises(VideoRefusedError) as refused, fetched("flaky:///a.mp4", tmp_path):
        pass
    assert refused.value.reason is FailureReason.UNAVAILABLE
    assert refused.value.message == "Input/output error, also when tried again for 2 s"
    assert 1.5 < time.monotonic() - started < 10
    assert 5 < len(flaky.asked) < 60
    assert list(tmp_path.iterdir()) == []
    flaky.asked.clear()
    with pytest.raises(VideoRefusedError), fetched("flaky:///a.mp4", tmp_path):
        pass
    assert len(flaky.asked) == 1  # other videos of a store that is away do not wait for it
    flaky.errors.clear()
    with fetched("flaky:///a.mp4", tmp_path):
        pass
    flaky.errors[:] = [OSError(errno.EIO, "once")]
    with fetched("flaky:///a.mp4", tmp_path):
        pass  # it had answered


@pytest.mark.parametrize(
    "error", [FileNotFoundError(), PermissionError("no"), OSError(errno.ENAMETOOLONG, "")]
)
def test_errors_that_stay_are_not(flaky: type[Flaky], tmp_path: Path, error: Exception) -> None:
    flaky.errors[:] = [error]
    with pytest.raises(VideoRefusedError), fetched("flaky:///a.mp4", tmp_path):
        pass
    assert len(flaky.asked) == 1


class _Handler(BaseHTTPRequestHandler):
    statuses: ClassVar[list[int]] = []
    asked: ClassVar[int] = 0

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_GET(self) -> None:
        type(self).asked += 1
        self._answer(b"content")

    def _answer(self, body: bytes) -> None:
        status = self.statuses.pop(0) if self.statuses else 200
        self.send_response(status)
        self.send_header("Content-Length", "7")
        self.send_header("ETag", '"tag"')
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.parametrize(
    ("statuses", "is_read"),
    [
        ([503, 503, 429, 502, 200, 500, 200], True),  # a HEAD that fails is tried as a GET, by fsspec
        ([404, 404], False),
        ([403, 403], False),
        ([503] * 1000, False),
    ],
)
def test_http_statuses(tmp_path: Path, statuses: list[int], is_read: bool) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    _Handler.statuses, _Handler.asked = list(statuses), 0
    try:
        if is_read:
            with fetched(f"http://127.0.0.1:{server.server_port}/a.mp4", tmp_path) as here:
                assert (Path(here.path).read_bytes(), here.version) == (b"content", "tag")
        else:
            with (
                pytest.raises(VideoRefusedError) as refused,
                fetched(f"http://127.0.0.1:{server.server_port}/a.mp4", tmp_path),
            ):
                pass
            lasting = len(statuses) > 2
            assert refused.value.reason is (
                FailureReason.UNAVAILABLE if lasting else FailureReason.UNREADABLE
            )
            assert (_Handler.asked > 2) == lasting, "only what may pass is tried again"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_which_errors_may_pass() -> None:
    from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError

    def of_status(status: int) -> ClientError:
        return ClientError({"ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")  # pyright: ignore

    throttled = OSError(errno.EBUSY, "SlowDown")
    throttled.__cause__ = of_status(503)
    refused = OSError(errno.EIO, "an answer that s3fs does not know")
    refused.__cause__ = of_status(400)
    assert may_pass(throttled)
    assert not may_pass(refused)
    assert may_pass(EndpointConnectionError(endpoint_url="http://x"))
    assert may_pass(of_status(500))
    assert may_pass(of_status(429))
    assert may_pass(TimeoutError())
    for error in (of_status(404), of_status(403), NoCredentialsError(), ValueError(), OSError("no number")):
        assert not may_pass(error)


def test_a_full_spool_is_not_the_videos_fault(tmp_path: Path) -> None:
    (tmp_path / "z.zip").write_bytes(zip_bytes({"a.mp4": bytes(1 << 20)}))
    [video] = find_videos(str(tmp_path / "z.zip"), None)
    (tmp_path / "spool").mkdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with (
            pytest.raises(DeltacacheError, match="cannot be written to the spool folder") as error,
            fetched(video.path, tmp_path / "spool"),
        ):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not isinstance(error.value, VideoRefusedError)
    assert list((tmp_path / "spool").iterdir()) == []


def test_archived_videos_are_decoded_as_those_outside(tmp_path: Path) -> None:
    video = write_video(tmp_path / "v.mp4", size=64).read_bytes()
    frames = {f"f/{file.name}": file.read_bytes() for file in write_frames(tmp_path / "f").iterdir()}
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.zip").write_bytes(zip_bytes({"v.mp4": video, **frames}))
    (tmp_path / "in/b.tar").write_bytes(tar_bytes({"v.mp4": video}))
    outside = {"v.mp4": tmp_path / "v.mp4", "f": tmp_path / "f"}
    for source in find_videos(str(tmp_path / "in"), None):
        with fetched(source.path, tmp_path) as here:
            clip = decode_video(_job(here.path))[0]
        expected = decode_video(_job(str(outside[source.video_uri.split("/")[1]])))[0]
        np.testing.assert_array_equal(clip.pixels, expected.pixels)
        assert clip.frame_indices == expected.frame_indices
        assert [read_number(pixels) for pixels in clip.pixels] == list(clip.frame_indices)


def _job(path: str) -> VideoJob:
    sampling = SamplingSettings(frames=4, augment=False, spacing_min_s=0.3, spacing_max_s=0.3)
    return VideoJob(path, "uri", "video", 0, 1, 64, sampling)
