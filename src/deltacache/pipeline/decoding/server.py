"""A small process that forks a disposable child for each video: ``python -m deltacache.pipeline.decoding.server``.

It imports the decoders once, decodes nothing itself, and has one thread, so forking is cheap and safe. It ends
when its standard input does, that is, when its owner has gone; the child dies with it.

Standard input brings one message a video, standard output takes one answer each (see ``decode_protocol``).
"""

import ctypes
import gc
import importlib
import mmap
import os
import re
import resource
import select
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

# Imported before forking, so that no child pays for it: the first three are what decoding imports by the way.
import av.subtitles.stream  # noqa: F401
import numpy.ma  # noqa: F401
import PIL.ImageFile  # noqa: F401

import deltacache.pipeline.decoding.decord_frames
import deltacache.pipeline.decoding.resampling  # noqa: F401
from deltacache.pipeline.decoding.child import (
    Message,
    clips_message,
    job_from_json,
    parse_message,
    read_message,
    refusal_message,
    write_bytes,
)
from deltacache.pipeline.decoding.decode import Allow, VideoJob
from deltacache.pipeline.decoding.native_log import NativeLog, native_log
from deltacache.schemas.clips import PixelClip
from deltacache.schemas.errors import FailureReason, VideoRefusedError
from deltacache.schemas.texts import bytes_text

Decode = Callable[[VideoJob, Allow], list[PixelClip]]

_LONGEST_ANSWER = 1 << 28
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)
_FACTOR = struct.Struct("d")
_NO_MEMORY = ("bad_alloc", "Cannot allocate memory", "MemoryError")


class _Channel(NamedTuple):
    """File descriptors, and memory that the child shares. Pixels go into a file in memory.

    Requests become readable during decoding only when the owner has gone.

    Attributes:
        factor: how many times the time limit the child is allowed.
    """

    requests: int
    replies: int
    pixels: int
    factor: mmap.mmap


def main() -> None:
    """Serve until standard input ends.

    The arguments name the decoding function, ``module:function``, and the descriptor of the file for pixels.
    """
    module, function = sys.argv[1].split(":")
    decode: Decode = getattr(importlib.import_module(module), function)
    factor = mmap.mmap(-1, _FACTOR.size)
    channel = _Channel(requests=os.dup(0), replies=os.dup(1), pixels=int(sys.argv[2]), factor=factor)
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)  # a decoder that prints must not write into the answers
    gc.freeze()  # a collection in a child would copy every page that it looks at
    try:
        write_bytes(channel.replies, Message({"status": "ready"}).to_bytes())
        while True:
            request = read_message(channel.requests).header
            if request["job"]["sampling"].get("shots"):
                import deltacache.pipeline.decoding.shots  # noqa: F401 - once, not in every child
            _decode_in_child(decode, request, channel)
    except (EOFError, BrokenPipeError):
        return


def _decode_in_child(decode: Decode, request: dict[str, Any], channel: _Channel) -> None:
    _FACTOR.pack_into(channel.factor, 0, 1.0)
    with native_log() as log:
        read_end, write_end = os.pipe()
        server = os.getpid()
        child = os.fork()
        if not child:
            _die_with(server)
            os.close(channel.requests)
            os.close(channel.replies)  # or the owner would not see the server's end while this child lives
            _run_child(decode, request, write_end, channel)
        os.close(write_end)
        exit_code: int | None = None
        try:
            data, limit_s = _collect(read_end, request["timeout_s"], channel)
            if data is None:
                times = limit_s / request["timeout_s"]
                by = f", {times:.3g} times --decode-timeout for its bytes and frames" if times > 1 else ""
                message = f"not decoded within {limit_s:.4g} s{by}"
                os.kill(child, signal.SIGKILL)
                exit_code = _reap(child)  # or it might write into the next video's pixels
                answer = _refused(FailureReason.DECODE_TIMEOUT, f"{message}{_said(log)}")
            else:
                answer = parse_message(data)
            if answer is None:
                exit_code = _reap(child)
                answer = _explain(exit_code, log)
            write_bytes(channel.replies, answer.to_bytes())
        finally:
            os.close(read_end)
            if exit_code is None:  # while the owner is at work on the answer
                _reap(child)


def _die_with(server: int) -> None:
    """Have the kernel kill this child when the server dies, where it can."""
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != server:
        os._exit(1)


def _run_child(decode: Decode, request: dict[str, Any], write_end: int, channel: _Channel) -> NoReturn:
    """Decode, write the answer, end. What is not even an error (``SystemExit``) is printed, and the exit code is 1."""
    exit_code = 1
    try:
        answer = _answer(decode, request, channel)
        write_bytes(write_end, answer.to_bytes())
        exit_code = 0
    finally:
        if exit_code:
            traceback.print_exc()
        os._exit(exit_code)  # no cleaning up: the exit handlers belong to the server


def _answer(decode: Decode, request: dict[str, Any], channel: _Channel) -> Message:
    job = job_from_json(request["job"])
    hard = _limit_memory(request["memory_bytes"])
    try:
        clips = decode(job, lambda factor: _FACTOR.pack_into(channel.factor, 0, factor))
        return clips_message(clips, channel.pixels)
    except VideoRefusedError as error:
        if error.reason is FailureReason.CORRUPT_STREAM and _was_near(request["memory_bytes"]):
            return _out_of_memory(request["memory_bytes"])
        return refusal_message(error)
    except MemoryError:
        return _out_of_memory(request["memory_bytes"])
    except Exception as error:  # noqa: BLE001 - libraries raise all kinds; a video costs no more than itself
        where = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{type(error).__name__}: {error}".replace(job.path, Path(job.path).name)
        return _refused(
            FailureReason.DECODER_CRASHED,
            f"decoding raised {said} (in {where.name}, {Path(where.filename).name})",
        )
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))  # the answer needs memory as well


def _limit_memory(memory_bytes: int) -> int:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    soft = memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    return hard


def _was_near(memory_bytes: int) -> bool:
    """Whether the address space came close to its limit: FFmpeg calls many a failed allocation bad data."""
    if sys.platform != "linux":
        return False
    peak = re.search(r"VmPeak:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return peak is not None and int(peak[1]) * 1024 > 0.9 * memory_bytes


def _out_of_memory(memory_bytes: int) -> Message:
    return _refused(
        FailureReason.OUT_OF_MEMORY,
        f"decoding needs more than the limit of {bytes_text(memory_bytes)}",
    )


def _collect(read_end: int, timeout_s: float, channel: _Channel) -> tuple[bytearray | None, float]:
    """What the child writes until it ends, None when it does not end in time; and how long it had.

    The owner hears of every limit that is raised.

    Raises:
        EOFError: the owner has gone.
    """
    data, started, limit_s = bytearray(), time.monotonic(), timeout_s
    while True:
        left = started + limit_s - time.monotonic()
        if left <= 0:
            allowed_s = timeout_s * _FACTOR.unpack_from(channel.factor)[0]
            if not allowed_s > limit_s:
                return None, limit_s
            limit_s = allowed_s
            write_bytes(channel.replies, Message({"status": "allowed", "limit_s": limit_s}).to_bytes())
            continue
        ready, _, _ = select.select([read_end, channel.requests], [], [], left)
        if channel.requests in ready:
            raise EOFError("the owner has gone")
        if ready:
            chunk = os.read(read_end, 1 << 20)
            if not chunk or len(data) > _LONGEST_ANSWER:
                return data, limit_s
            data += chunk


def _reap(child: int) -> int:
    """The child's exit code, negative for a signal. Its pipe is closed or it is not wanted any more."""
    wait_s = 0.0002
    while wait_s < 0.1:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(wait_s)
        wait_s *= 1.5
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _explain(exit_code: int, log: NativeLog) -> Message:
    """Why a child ended without a whole answer."""
    if exit_code >= 0:
        return _refused(FailureReason.DECODER_CRASHED, f"the decoder ended by itself{_said(log)}")
    name = signal.Signals(-exit_code).name
    if any(word in log.text(limit=2000) for word in _NO_MEMORY):
        return _refused(FailureReason.OUT_OF_MEMORY, f"the decoder ran out of memory{_said(log)}")
    if -exit_code in (signal.SIGKILL, signal.SIGTERM):
        return Message({"status": "killed", "signal": name})
    return _refused(FailureReason.DECODER_CRASHED, f"the decoder died of {name}{_said(log)}")


def _said(log: NativeLog) -> str:
    lines = log.last_lines()
    return f"; it said: {lines}" if lines else ""


def _refused(reason: FailureReason, message: str) -> Message:
    return refusal_message(VideoRefusedError(reason, message))


if __name__ == "__main__":
    main()
