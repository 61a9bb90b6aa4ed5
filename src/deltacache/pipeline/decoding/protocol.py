"""Messages between the decoder's processes, and pixels in a memory file that they share. Nothing is pickled.

On the wire: the length of a message (8 bytes, big-endian), then the message as JSON. Pixels are written once, by
the child, into a file that only memory holds, and read once, by the owner.
"""

import json
import os
import struct
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltacache.pipeline.decoding.decode import VideoJob
from deltacache.schemas.clips import CropBox, PixelClip
from deltacache.schemas.datasets import SamplingSettings
from deltacache.schemas.errors import FailureReason, VideoRefusedError
from deltacache.schemas.images import parse_size

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
    }


def job_from_json(values: dict[str, Any]) -> VideoJob:
    """The inverse of ``job_to_json``."""
    sampling = SamplingSettings.model_validate(values["sampling"])
    return VideoJob(**{**values, "image_size": parse_size(values["image_size"]), "sampling": sampling})


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
