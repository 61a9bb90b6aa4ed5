"""Decoders that misbehave on purpose, for a decode server: ``decode_stubs:<function>``."""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

from deltacache.pipeline.decoding.decode import Allow, VideoJob, decode_video
from deltacache.schemas.clips import CropBox, PixelClip, clip_id_of
from deltacache.schemas.errors import FailureReason, VideoRefusedError


def behave(job: VideoJob, allow: Allow) -> list[PixelClip]:
    """Do what the file name says; anything else is decoded for real."""
    if Path(job.path).name == "long":
        allow(4.0)
        time.sleep(float(job.video_uri))
        return [clip_of(job)]
    deeds = {
        "crash": _crash,
        "abort": _abort,
        "hang": _hang,
        "hang_in_c": _hang_in_c,
        "eat_memory": _eat_memory,
        "bad_alloc": _bad_alloc,
        "call_it_corrupt": _call_it_corrupt,
        "refuse": _refuse,
        "bug": _bug,
        "exit": _exit,
        "killed_once": _killed_once,
        "killed_always": _killed_always,
        "chatter": _chatter,
        "pid": _pid,
        "modules": _modules,
    }
    deed = deeds.get(Path(job.path).name)
    return decode_video(job, allow) if deed is None else deed(job)


def clip_of(job: VideoJob, value: int = 0, uri: str | None = None) -> PixelClip:
    """A clip of one grey, with ``uri`` as a place to say something."""
    frames, size = job.sampling.frames, job.image_size
    return PixelClip(
        clip_id=clip_id_of(job.video_id, job.first_view),
        video_uri=uri or job.video_uri,
        view=job.first_view,
        pixels=np.full((frames, size, size, 3), value, np.uint8),
        timestamps_s=np.linspace(0, 1 / 3, frames, dtype=np.float32),
        frame_indices=tuple(range(frames)),
        crop=CropBox(1, 2, 3, 4),
        flip=True,
        decoder="stub",
        duplicate_frames=0,
    )


def _crash(job: VideoJob) -> list[PixelClip]:
    os.write(2, b"about to read address 0\n")
    return [clip_of(job, ctypes.string_at(0)[0])]


def _abort(job: VideoJob) -> list[PixelClip]:
    os.abort()


def _hang(job: VideoJob) -> list[PixelClip]:
    os.write(2, b"still waiting\n")
    while True:
        time.sleep(1)


def _hang_in_c(job: VideoJob) -> list[PixelClip]:
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))
    ctypes.PyDLL(None).pause()  # holds the interpreter's lock
    return []


def _eat_memory(job: VideoJob) -> list[PixelClip]:
    blocks = []
    while True:
        blocks.append(np.ones(1 << 24, np.uint8))


def _call_it_corrupt(job: VideoJob) -> list[PixelClip]:
    try:
        return _eat_memory(job)
    except MemoryError:
        raise VideoRefusedError(FailureReason.CORRUPT_STREAM, "invalid data") from None


def _bad_alloc(job: VideoJob) -> list[PixelClip]:
    os.write(2, b"terminate called after throwing an instance of 'std::bad_alloc'\n")
    os.abort()


def _refuse(job: VideoJob) -> list[PixelClip]:
    raise VideoRefusedError(FailureReason.UNSUPPORTED_CODEC, "ünknown codec")


def _bug(job: VideoJob) -> list[PixelClip]:
    raise KeyError("a bug of ours")


def _exit(job: VideoJob) -> list[PixelClip]:
    sys.exit(0)


def _killed_once(job: VideoJob) -> list[PixelClip]:
    mark = Path(job.video_uri)
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return [clip_of(job)]


def _killed_always(job: VideoJob) -> list[PixelClip]:
    os.kill(os.getpid(), signal.SIGKILL)
    return []


def _chatter(job: VideoJob) -> list[PixelClip]:
    for descriptor in (1, 2):
        os.write(descriptor, b"noise from a library\n" * 1000)
    print("noise from Python", flush=True)
    return [clip_of(job, 7)]


def _pid(job: VideoJob) -> list[PixelClip]:
    """Say who we are and hang: the uri is a file to write to."""
    Path(job.video_uri).write_text(f"{os.getpid()} {os.getppid()}")
    return _hang(job)


def _modules(job: VideoJob) -> list[PixelClip]:
    heavy = [name for name in ("av", "decord", "torch", "ray") if name in sys.modules]
    threads = len(list(Path("/proc/self/task").iterdir()))
    return [clip_of(job, uri=",".join([*heavy, f"threads={threads}"]))]
