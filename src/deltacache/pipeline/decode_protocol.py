"""Messages between the decoder's processes: a JSON header and raw bytes. Nothing is pickled.

On the wire: the lengths of header and payload (8 bytes each, big-endian), the header, the payload.
"""

import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deltacache.pipeline.decode import VideoJob
from deltacache.schemas.clips import CropBox, PixelClip
from deltacache.schemas.datasets import SamplingSettings
from deltacache.schemas.errors import FailureReason, VideoRefusedError

_LENGTHS = struct.Struct(">QQ")


@dataclass(frozen=True, slots=True)
class Message:
    """A header of plain JSON values and bytes."""

    header: dict[str, Any]
    payload: bytearray = field(default_factory=bytearray)

    def to_bytes(self) -> bytes:
        """As it travels."""
        header = json.dumps(self.header).encode()
        return b"".join([_LENGTHS.pack(len(header), len(self.payload)), header, self.payload])


def parse_message(data: bytearray) -> Message | None:
    """The message that ``data`` is, or None when it is not one whole message."""
    if len(data) < _LENGTHS.size:
        return None
    header_length, payload_length = _LENGTHS.unpack_from(data)
    header_end = _LENGTHS.size + header_length
    if len(data) != header_end + payload_length:
        return None
    return Message(json.loads(data[_LENGTHS.size : header_end]), data[header_end:])


def read_message(descriptor: int) -> Message:
    """Read one message.

    Raises:
        EOFError: the other side has gone.
    """
    header_length, payload_length = _LENGTHS.unpack(_read_exactly(descriptor, _LENGTHS.size))
    header = json.loads(_read_exactly(descriptor, header_length))
    return Message(header, _read_exactly(descriptor, payload_length))


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
    return VideoJob(**{**values, "sampling": SamplingSettings.model_validate(values["sampling"])})


def clips_message(clips: Sequence[PixelClip]) -> Message:
    """Decoded clips: their pixels one after the other, everything else in the header."""
    about = [
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
        for clip in clips
    ]
    return Message({"status": "decoded", "clips": about}, bytearray().join(c.pixels.tobytes() for c in clips))


def clips_of(message: Message) -> list[PixelClip]:
    """The inverse of ``clips_message``; pixels share the message's memory."""
    clips, offset = [], 0
    for about in message.header["clips"]:
        shape = tuple(about.pop("shape"))
        size = int(np.prod(shape))
        pixels = np.frombuffer(message.payload, np.uint8, size, offset).reshape(shape)
        offset += size
        values = {
            "pixels": pixels,
            "timestamps_s": np.array(about.pop("timestamps_s"), np.float32),
            "frame_indices": tuple(about.pop("frame_indices")),
            "crop": CropBox(*about.pop("crop")),
        }
        clips.append(PixelClip(**about, **values))
    return clips


def refusal_message(error: VideoRefusedError) -> Message:
    """A video that cannot be used."""
    return Message({"status": "refused", "reason": error.reason.value, "message": error.message})


def refusal_of(message: Message) -> VideoRefusedError:
    """The inverse of ``refusal_message``."""
    return VideoRefusedError(FailureReason(message.header["reason"]), message.header["message"])
