"""A decoder that crashes, hangs or eats memory costs its video and nothing else."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from decode_stubs import clip_of
from video_maker import write_video

from deltacache.pipeline.decoding.child import ChildDecoder
from deltacache.pipeline.decoding.decode import VideoJob, allowed, decode_video
from deltacache.schemas.datasets import SamplingSettings
from deltacache.schemas.errors import FailureReason, VideoRefusedError

STUBS = "decode_stubs:behave"


def job_of(path: str | Path, uri: str = "video.mp4", size: int = 16) -> VideoJob:
    return VideoJob(str(path), uri, "video", 0, 1, size, SamplingSettings(frames=4))


@pytest.fixture(scope="module")
def decoder() -> Iterator[ChildDecoder]:
    with ChildDecoder(timeout_s=60, memory_bytes=2 << 30, decode=STUBS) as decoder:
        yield decoder


def refusal(decoder: ChildDecoder, job: VideoJob) -> VideoRefusedError:
    with pytest.raises(VideoRefusedError) as refused:
        decoder.decode(job)
    return refused.value


def is_alive(pid: int) -> bool:
    """Running, and not a zombie waiting to be reaped."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_dead(pid: int) -> None:
    deadline = time.monotonic() + 10
    while is_alive(pid):
        assert time.monotonic() < deadline, f"{pid} still lives"
        time.sleep(0.01)


def test_clips_arrive_as_they_were_decoded(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", size=128)
    job = VideoJob(str(path), "ä/b.mp4", "video", 1, 3, 32, SamplingSettings())
    with ChildDecoder(60, 4 << 30) as decoder:
        received = decoder.decode(job)
    for got, expected in zip(received, decode_video(job), strict=True):
        np.testing.assert_array_equal(got.pixels, expected.pixels)
        np.testing.assert_array_equal(got.timestamps_s, expected.timestamps_s)
        assert got.timestamps_s.dtype == np.float32
        assert got.pixels.flags.writeable
        for name in ("clip_id", "video_uri", "view", "frame_indices", "crop", "flip", "decoder"):
            assert getattr(got, name) == getattr(expected, name)
        assert got.duplicate_frames == expected.duplicate_frames


@pytest.mark.parametrize(
    ("deed", "reason", "words"),
    [
        ("crash", FailureReason.DECODER_CRASHED, "died of SIGSEGV; it said: about to read address 0"),
        ("abort", FailureReason.DECODER_CRASHED, "died of SIGABRT"),
        ("bad_alloc", FailureReason.OUT_OF_MEMORY, "std::bad_alloc"),
        ("killed_always", FailureReason.DECODER_CRASHED, "was killed 3 times"),
        ("refuse", FailureReason.UNSUPPORTED_CODEC, "ünknown codec"),
        ("bug", FailureReason.DECODER_CRASHED, "raised KeyError: 'a bug of ours' (in _bug, decode_stubs.py)"),
        ("exit", FailureReason.DECODER_CRASHED, "ended by itself"),
    ],
)
def test_a_bad_end_costs_one_video(
    decoder: ChildDecoder, deed: str, reason: FailureReason, words: str
) -> None:
    error = refusal(decoder, job_of(deed))
    assert error.reason is reason
    assert words in error.message
    assert decoder.decode(job_of("chatter"))[0].pixels[0, 0, 0, 0] == 7


@pytest.mark.slow
@pytest.mark.parametrize("deed", ["hang", "hang_in_c"])
def test_a_hanging_decoder_is_killed_in_time(deed: str) -> None:
    with ChildDecoder(timeout_s=0.5, memory_bytes=2 << 30, decode=STUBS) as decoder:
        decoder.decode(job_of("chatter"))
        start = time.monotonic()
        error = refusal(decoder, job_of(deed))
        assert error.reason is FailureReason.DECODE_TIMEOUT
        assert "not decoded within 0.5 s" in error.message
        assert time.monotonic() - start < 10
        assert decoder.decode(job_of("chatter"))


@pytest.mark.slow
def test_a_long_video_may_take_longer_and_not_for_ever() -> None:
    """Four times the limit, as its bytes and frames allow; the owner waits as long."""
    with ChildDecoder(timeout_s=0.5, memory_bytes=2 << 30, decode=STUBS) as decoder:
        assert decoder.decode(job_of("long", uri="1"))
        said = refusal(decoder, job_of("long", uri="60")).message
        assert "not decoded within 2 s, 4 times --decode-timeout for its bytes and frames" in said
        assert "not decoded within 0.5 s" in refusal(decoder, job_of("hang")).message


def test_the_limit_follows_bytes_and_frames(real_videos: Path) -> None:
    assert allowed(0, 0) == 1
    assert (
        allowed(25 * 60 * 10**6, 25 * 60 * 30 * 1920 * 1080) * 300 > 1500
    )  # 25 minutes of 1080p, at 30 frames/s
    assert allowed(1 << 60, 0) == 100
    seen: list[float] = []
    decode_video(job_of(real_videos / "fixture" / "dog_720p.mp4"), seen.append)
    assert seen == [pytest.approx(1, abs=1e-3), pytest.approx(1 + 289 * 1280 * 720 / 2e10, abs=1e-3)]


@pytest.mark.slow
def test_a_flood_of_memory_ends_at_the_limit() -> None:
    with ChildDecoder(timeout_s=60, memory_bytes=1 << 29, decode=STUBS) as decoder:
        error = refusal(decoder, job_of("eat_memory"))
        assert error.reason is FailureReason.OUT_OF_MEMORY
        assert "more than the limit of 512 MiB" in error.message
        error = refusal(decoder, job_of("call_it_corrupt"))  # as FFmpeg does when an allocation fails
        assert error.reason is FailureReason.OUT_OF_MEMORY
        assert decoder.decode(job_of("chatter"))


def test_a_real_video_above_the_memory_limit_is_refused(real_videos: Path) -> None:
    path = real_videos / "fixture" / "dog_720p.mp4"
    with ChildDecoder(timeout_s=60, memory_bytes=200 << 20) as decoder:
        assert refusal(decoder, job_of(path)).reason is FailureReason.OUT_OF_MEMORY


def test_a_child_killed_from_outside_is_tried_again(decoder: ChildDecoder, tmp_path: Path) -> None:
    job = job_of("killed_once", uri=str(tmp_path / "was_here"))
    assert decoder.decode(job)[0].clip_id == clip_of(job).clip_id


def test_a_killed_server_is_replaced(decoder: ChildDecoder) -> None:
    decoder.decode(job_of("chatter"))
    before = decoder.server_pid
    assert before is not None
    os.kill(before, signal.SIGKILL)
    assert decoder.decode(job_of("chatter"))
    assert decoder.server_pid != before


def test_nothing_reaches_the_terminal(decoder: ChildDecoder, capfd: pytest.CaptureFixture[str]) -> None:
    decoder.decode(job_of("chatter"))
    refusal(decoder, job_of("crash"))
    assert capfd.readouterr() == ("", "")


def test_the_decoding_process_is_light_and_single_threaded(decoder: ChildDecoder) -> None:
    assert decoder.decode(job_of("modules"))[0].video_uri == "av,decord,threads=1"


def _decoding_owner(note: Path) -> tuple[int, int, int]:
    """A forked process that decodes a video for a minute: its id, and those of its decoding child and server."""
    owner = os.fork()
    if not owner:
        with ChildDecoder(timeout_s=60, memory_bytes=2 << 30, decode=STUBS) as decoder:
            decoder.decode(job_of("pid", uri=str(note)))
        os._exit(0)
    return owner, *_pids(note)


@pytest.mark.slow
def test_the_child_dies_with_the_server_and_the_server_with_its_owner(tmp_path: Path) -> None:
    """The owner is a forked process that is killed while a video is being decoded."""
    owner, child, server = _decoding_owner(tmp_path / "pids")
    os.kill(owner, signal.SIGKILL)
    os.waitpid(owner, 0)
    wait_until_dead(child)
    wait_until_dead(server)


def test_the_child_dies_when_the_server_is_killed(tmp_path: Path) -> None:
    owner, child, server = _decoding_owner(tmp_path / "pids")
    os.kill(server, signal.SIGKILL)
    wait_until_dead(child)
    os.kill(owner, signal.SIGKILL)
    os.waitpid(owner, 0)


def _pids(note: Path) -> tuple[int, int]:
    deadline = time.monotonic() + 30
    while not (note.exists() and " " in note.read_text()):
        assert time.monotonic() < deadline, "no child came up"
        time.sleep(0.01)
    child, server = note.read_text().split()
    return int(child), int(server)


@pytest.mark.slow
def test_closing_leaves_no_process_behind() -> None:
    decoder = ChildDecoder(timeout_s=60, memory_bytes=2 << 30, decode=STUBS)
    decoder.decode(job_of("chatter"))
    server = decoder.server_pid
    assert server is not None
    decoder.close()
    assert not is_alive(server)
    assert decoder.server_pid is None


def test_a_server_that_does_not_start_says_why() -> None:
    with (
        ChildDecoder(1, 1 << 30, decode="no_such_module:decode") as decoder,
        pytest.raises(RuntimeError, match=r"(?s)did not start.*No module named 'no_such_module'"),
    ):
        decoder.decode(job_of("x"))
