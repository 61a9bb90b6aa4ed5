"""Decode each video in a disposable process: a crash, a hang or a flood of memory costs that video only."""

import json
import os
import select
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from deltacache.pipeline.decoding.decode import VideoJob
from deltacache.pipeline.decoding.sampling import Window
from deltacache.schemas.clips import CropBox, PixelClip
from deltacache.schemas.datasets import SamplingSettings, parse_size
from deltacache.schemas.errors import FailureReason, VideoRefusedError

# ----------------------------------------------------------------------------------------------------
# Messages between the decoder's processes, and pixels in a memory file that they share. Nothing is pickled.
#
# On the wire: the length of a message (8 bytes, big-endian), then the message as JSON. Pixels are written
# once, by the child, into a file that only memory holds, and read once, by the owner.
# ----------------------------------------------------------------------------------------------------


_LENGTH = struct.Struct(">Q")
_KEPT_BYTES = 64 << 20  # of the file in memory: taking pages again costs more than writing them


@dataclass(frozen=True, slots=True)
class Message:
    """Plain JSON values."""

    header: dict[str, Any]

    def to_bytes(self) -> bytes:
        """As it travels."""
        header = json.dumps(self.header).encode()
        return _LENGTH.pack(len(header)) + header


def parse_message(data: bytearray) -> Message | None:
    """The message that ``data`` is, or None when it is not one whole message."""
    if len(data) < _LENGTH.size or len(data) != _LENGTH.size + _LENGTH.unpack_from(data)[0]:
        return None
    return Message(json.loads(data[_LENGTH.size :]))


def read_message(descriptor: int) -> Message:
    """Read one message.

    Raises:
        EOFError: the other side has gone.
    """
    (length,) = _LENGTH.unpack(_read_exactly(descriptor, _LENGTH.size))
    return Message(json.loads(_read_exactly(descriptor, length)))


def _read_exactly(descriptor: int, length: int) -> bytearray:
    data = bytearray(length)
    view, done = memoryview(data), 0
    while done < length:
        count = os.readv(descriptor, [view[done:]])
        if not count:
            raise EOFError(f"the other side ended after {done} of {length} bytes")
        done += count
    return data


def write_bytes(descriptor: int, data: bytes) -> None:
    """Write all of ``data``.

    Raises:
        BrokenPipeError: the other side has gone.
    """
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def job_to_json(job: VideoJob) -> dict[str, Any]:
    """A job as plain values."""
    return {
        "path": job.path,
        "video_uri": job.video_uri,
        "video_id": job.video_id,
        "first_view": job.first_view,
        "views": job.views,
        "image_size": job.image_size,
        "sampling": job.sampling.model_dump(mode="json"),
        "window": None if job.window is None else asdict(job.window),
        "span": job.span,
        "pieces": job.pieces,
    }


def job_from_json(values: dict[str, Any]) -> VideoJob:
    """The inverse of ``job_to_json``."""
    sampling = SamplingSettings.model_validate(values["sampling"])
    window = None if values["window"] is None else Window(**values["window"])
    size, span = parse_size(values["image_size"]), values["span"] and tuple(values["span"])
    return VideoJob(**{**values, "image_size": size, "sampling": sampling, "window": window, "span": span})


def pixel_file() -> int:
    """A descriptor of an empty file in memory."""
    if sys.platform == "linux":
        return os.memfd_create("deltacache-pixels")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def clips_message(clips: Sequence[PixelClip], pixels: int) -> Message:
    """Decoded clips: their pixels go into the file ``pixels``, one after the other, the rest into the message."""
    about: list[dict[str, Any]] = []
    offset = 0
    for clip in clips:
        view = np.ascontiguousarray(clip.pixels).reshape(-1).data
        while view:
            count = os.pwrite(pixels, view, offset)
            view, offset = view[count:], offset + count
        about.append(
            {
                "clip_id": clip.clip_id,
                "video_uri": clip.video_uri,
                "view": clip.view,
                "shape": clip.pixels.shape,
                "timestamps_s": clip.timestamps_s.tolist(),
                "frame_indices": clip.frame_indices,
                "crop": [clip.crop.top, clip.crop.left, clip.crop.height, clip.crop.width],
                "flip": clip.flip,
                "decoder": clip.decoder,
                "duplicate_frames": clip.duplicate_frames,
                "windows": clip.windows,
            }
        )
    return Message({"status": "decoded", "clips": about})


def clips_of(message: Message, pixels: int) -> list[PixelClip]:
    """The inverse of ``clips_message``."""
    clips, offset = [], 0
    for about in message.header["clips"]:
        array = np.empty(about.pop("shape"), np.uint8)
        view = array.reshape(-1).data
        while view:
            count = os.preadv(pixels, [view], offset)
            if not count:
                raise EOFError("the decoder wrote fewer pixels than it says")
            view, offset = view[count:], offset + count
        values = {
            "pixels": array,
            "timestamps_s": np.array(about.pop("timestamps_s"), np.float32),
            "frame_indices": tuple(about.pop("frame_indices")),
            "crop": CropBox(*about.pop("crop")),
            "windows": tuple(about.pop("windows")),
        }
        clips.append(PixelClip(**about, **values))
    if offset > _KEPT_BYTES:
        os.ftruncate(pixels, 0)
    return clips


def refusal_message(error: VideoRefusedError) -> Message:
    """A video that cannot be used."""
    return Message({"status": "refused", "reason": error.reason.value, "message": error.message})


def refusal_of(message: Message) -> VideoRefusedError:
    """The inverse of ``refusal_message``."""
    return VideoRefusedError(FailureReason(message.header["reason"]), message.header["message"])


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
