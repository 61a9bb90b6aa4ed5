"""Damaged files: each ends as frames that decoding in sequence gives too, or as a refusal. Never otherwise."""

import random
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
from video_maker import write_video

from crops import crop_and_resize
from deltacache.pipeline.decoding.child import ChildDecoder
from deltacache.pipeline.decoding.decode import VideoJob
from deltacache.schemas.clips import PixelClip
from deltacache.schemas.datasets import SamplingSettings
from deltacache.schemas.errors import VideoRefusedError

_MUTATIONS = 110  # of each file
_X264 = "keyint=10:bframes=2:threads=1"
_FILES = {
    "a.mp4": {"options": {"x264-params": _X264}},
    "a.mkv": {"options": {"x264-params": _X264}},
    "a.avi": {"codec": "mpeg4", "options": {"g": "10"}},
}


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Flip, blank, shuffle, drop or insert a few bytes, or cut the file off."""
    changed, at = bytearray(data), rng.randrange(len(data))
    length = rng.choice([1, 8, 64, 500])
    match rng.randrange(6):
        case 0:
            for _ in range(rng.choice([1, 5, 50])):
                changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case 1:
            changed[at : at + length] = bytes(len(changed[at : at + length]))
        case 2:
            changed[at : at + length] = rng.randbytes(len(changed[at : at + length]))
        case 3:
            del changed[at : at + length]
        case 4:
            changed[at:at] = rng.randbytes(length)
        case _:
            del changed[at:]
    return bytes(changed)


@pytest.mark.slow
@pytest.mark.parametrize("name", _FILES)
def test_damaged_files_end_well(tmp_path: Path, name: str) -> None:
    whole = write_video(tmp_path / name, size=128, frames=30, **_FILES[name]).read_bytes()
    ends: Counter[str] = Counter()
    with ChildDecoder(timeout_s=20, memory_bytes=2 << 30) as decoder:
        for seed in range(_MUTATIONS):
            path = tmp_path / f"{seed}_{name}"
            path.write_bytes(mutate(whole, random.Random(f"{name} {seed}")))
            job = VideoJob(str(path), name, "video", 0, 1, 32, SamplingSettings(frames=4, seed=seed))
            try:
                clip = decoder.decode(job)[0]
            except VideoRefusedError as error:
                ends[error.reason.value] += 1
            else:
                ends["frames"] += 1
                np.testing.assert_array_equal(clip.pixels, in_sequence(path, clip))
    assert ends.total() == _MUTATIONS
    assert ends["frames"] > 0
    assert len(ends) > 1, ends


def in_sequence(path: Path, clip: PixelClip) -> np.ndarray:
    """The clip's frames as the slowest reader gets them.

    Damage between the stretches that a clip needs is not looked for (see docs/decoding.md): a reader that goes on
    behind it counts fewer frames, but finds the same at the same times.
    """
    counted, timed, is_whole = decode_all(path)
    wanted = clip.frame_indices
    if is_whole:
        frames = [counted[index] for index in wanted]
    else:
        frames = [timed[packet_times(path)[index]] for index in wanted]
    return np.stack([crop_and_resize(frame, clip.crop, 32, flip=clip.flip) for frame in frames])


def decode_all(path: Path) -> tuple[list[np.ndarray], dict[int | None, np.ndarray], bool]:
    """Every frame that comes out from the first packet on: in order, by time, and whether no packet failed."""
    counted: list[np.ndarray] = []
    timed: dict[int | None, np.ndarray] = {}
    is_whole = True
    with av.open(str(path), metadata_errors="ignore") as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        for packet in container.demux(stream):
            try:
                for frame in packet.decode():
                    counted.append(frame.to_ndarray(format="rgb24"))
                    timed[frame.pts] = counted[-1]
            except av.error.FFmpegError:
                is_whole = False
    return counted, timed, is_whole


def packet_times(path: Path) -> list[int]:
    with av.open(str(path), metadata_errors="ignore") as container:
        packets = container.demux(container.streams.video[0])
        return sorted(packet.pts for packet in packets if packet.pts is not None)
