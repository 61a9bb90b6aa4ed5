"""Decode each video in a disposable process: a crash, a hang or a flood of memory costs that video only."""

import os
import select
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from deltacache.pipeline.decoding.decode import VideoJob
from deltacache.pipeline.decoding.protocol import (
    Message,
    clips_of,
    job_to_json,
    pixel_file,
    read_message,
    refusal_of,
    write_bytes,
)
from deltacache.schemas.clips import PixelClip
from deltacache.schemas.errors import FailureReason, VideoRefusedError

_ATTEMPTS = 3  # for ends that say nothing about the video: someone killed the child or the server
_START_S = 120.0
_STOP_S = 5.0
_GRACE_S = 30.0  # the server keeps the time limit itself; this is for a server that does not answer


class ChildDecoder:
    """Owns a decode server and gives it one video after the other. Use it from one thread.

    Args:
        timeout_s: wall-clock limit of a short video; long ones are allowed more (see ``decode.allowed``).
        memory_bytes: limit of the address space of one video's process.
        decode: what to run there, ``module:function``; it takes a ``VideoJob`` and returns ``PixelClip`` s.
    """

    def __init__(
        self,
        timeout_s: float,
        memory_bytes: int,
        *,
        decode: str = "deltacache.pipeline.decoding.decode:decode_video",
    ) -> None:
        self._timeout_s, self._memory_bytes, self._decode = timeout_s, memory_bytes, decode
        self._server: _Server | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def server_pid(self) -> int | None:
        """The process id of the running server, for whoever watches or kills it."""
        return self._server.pid if self._server else None

    def start(self) -> None:
        """Start the server, unless it runs; ``decode`` does so too."""
        if self._server is None:
            self._server = _Server(self._decode)

    def close(self) -> None:
        """End the server and whatever it is decoding."""
        if self._server is not None:
            self._server.stop()
            self._server = None

    def decode(self, job: VideoJob) -> list[PixelClip]:
        """Decode one video.

        Raises:
            VideoRefusedError: by the decoder, or because its process crashed, hung, took too much memory or raised
                any other error.
        """
        for _ in range(_ATTEMPTS):
            answer = self._ask(job)
            status = answer.header["status"]
            if status == "decoded" and self._server is not None:
                return clips_of(answer, self._server.pixels)
            if status == "refused":
                raise refusal_of(answer)
        raise VideoRefusedError(FailureReason.DECODER_CRASHED, f"its process was killed {_ATTEMPTS} times")

    def _ask(self, job: VideoJob) -> Message:
        """Ask the server, starting one if need be; a dead server's answer is ``killed``."""
        self.start()
        assert self._server is not None
        request = Message(
            {"job": job_to_json(job), "timeout_s": self._timeout_s, "memory_bytes": self._memory_bytes}
        )
        try:
            return self._server.ask(request, self._timeout_s)
        except (EOFError, BrokenPipeError):
            self.close()
            return Message({"status": "killed"})
        except TimeoutError as error:
            self.close()
            raise VideoRefusedError(FailureReason.DECODE_TIMEOUT, f"{error}") from error
        except BaseException:  # interrupted halfway: the next answer would be that of this video
            self.close()
            raise


class _Server:
    """One running ``decode_server``.

    Attributes:
        pixels: descriptor of the file in memory that its children write pixels into.

    Raises:
        RuntimeError: it does not start, with what it said.
    """

    def __init__(self, decode: str) -> None:
        self.pixels = pixel_file()
        with tempfile.TemporaryFile() as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "deltacache.pipeline.decoding.server", decode, str(self.pixels)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=_environment(),
                pass_fds=[self.pixels],
                start_new_session=True,  # Ctrl-C is for the owner, who then closes standard input
            )
            if self._process.stdin is None or self._process.stdout is None:
                raise RuntimeError("subprocess gave no pipes")
            self._requests, self._replies = self._process.stdin, self._process.stdout
            try:
                self._receive(_START_S)
            except (EOFError, TimeoutError) as error:
                self.stop()
                log.seek(0)
                said = log.read()[-4000:].decode(errors="replace")
                raise RuntimeError(f"the decode server did not start: {said or error}") from error

    @property
    def pid(self) -> int:
        """The server's process id."""
        return self._process.pid

    def ask(self, request: Message, timeout_s: float) -> Message:
        """Send one request and wait for its answer.

        Raises:
            EOFError, BrokenPipeError: the server has died.
            TimeoutError: it does not answer.
        """
        write_bytes(self._requests.fileno(), request.to_bytes())
        answer = self._receive(timeout_s + _GRACE_S)
        while answer.header["status"] == "allowed":
            answer = self._receive(answer.header["limit_s"] + _GRACE_S)
        return answer

    def _receive(self, timeout_s: float) -> Message:
        poll = select.poll()  # select() fails on the high descriptors of busy processes
        poll.register(self._replies, select.POLLIN | select.POLLHUP)
        if not poll.poll(timeout_s * 1000):
            raise TimeoutError(f"no answer within {timeout_s:g} s")
        return read_message(self._replies.fileno())

    def stop(self) -> None:
        """End it: its child goes first. Waits for both."""
        self._requests.close()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._replies.close()
        os.close(self.pixels)


def _environment() -> dict[str, str]:
    """This process's environment, one thread a library, and the same modules within reach."""
    paths = [path or str(Path.cwd()) for path in sys.path]
    single = dict.fromkeys(["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"], "1")
    return {**os.environ, **single, "PYTHONPATH": os.pathsep.join(paths)}
