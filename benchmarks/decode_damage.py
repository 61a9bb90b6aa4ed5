"""How often damage passes for sound frames: flipped bits and lost packets, over codecs and containers.

Each damaged file is decoded as extraction does. It ends *refused*, or with frames that are all *right* (those of the
undamaged file at the same times), or with some *wrong* ones.

    python benchmarks/decode_damage.py --files 15
"""

import argparse
import random
import tempfile
from collections import Counter
from pathlib import Path

import av
import numpy as np
from av.packet import Packet

from deltacache.pipeline.decoding.decode import frame_sources
from deltacache.pipeline.decoding.frame_source import SourceFailedError
from deltacache.pipeline.decoding.native_log import native_log
from deltacache.schemas.errors import FailureReason, VideoRefusedError

_SIZE, _FRAMES = 160, 50
_STREAMS = {  # file name: encoder, pixel format, options
    "h264.mp4": ("libx264", "yuv420p", {"x264-params": "keyint=12:bframes=2:threads=1"}),
    "h264.mkv": ("libx264", "yuv420p", {"x264-params": "keyint=12:bframes=2:threads=1"}),
    "h264.ts": ("libx264", "yuv420p", {"x264-params": "keyint=12:bframes=2:threads=1"}),
    "hevc.mp4": ("libx265", "yuv420p", {"x265-params": "keyint=12:pools=1:log-level=none"}),
    "mpeg4.mp4": ("mpeg4", "yuv420p", {"g": "12"}),
    "mpeg4.avi": ("mpeg4", "yuv420p", {"g": "12"}),
    "mpeg2.ts": ("mpeg2video", "yuv420p", {"g": "12", "bf": "2"}),
    "vp8.webm": ("libvpx", "yuv420p", {"g": "12", "cpu-used": "8"}),
    "vp9.webm": ("libvpx-vp9", "yuv420p", {"g": "12", "cpu-used": "8"}),
    "flv1.flv": ("flv", "yuv420p", {"g": "12"}),
    "wmv2.wmv": ("wmv2", "yuv420p", {"g": "12"}),
    "mjpeg.avi": ("mjpeg", "yuvj420p", {}),
    "ffv1.mkv": ("ffv1", "yuv420p", {"level": "3", "slicecrc": "1", "slices": "4"}),
}


def _write(path: Path, codec: str, pixel_format: str, options: dict[str, str]) -> None:
    """A picture of smooth noise that moves."""
    rng = np.random.default_rng(0)
    noise = np.kron(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.width = stream.height = _SIZE
        stream.pix_fmt = pixel_format
        for number in range(_FRAMES):
            picture = np.ascontiguousarray(noise[number : number + _SIZE, 2 * number : 2 * number + _SIZE])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def _flipped(whole: Path, damaged: Path, rng: random.Random) -> None:
    """Five bits in the packets of the video, wherever they lie in the file."""
    data = bytearray(whole.read_bytes())
    with av.open(str(whole)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    for packet in rng.choices(packets[1:], k=5):
        place = data.find(packet[:64])
        if place >= 0:  # MPEG-TS cuts packets up: then anywhere behind its tables
            data[place + rng.randrange(min(64, len(packet)))] ^= 1 << rng.randrange(8)
        else:
            data[rng.randrange(len(data) // 10, len(data))] ^= 1 << rng.randrange(8)
    damaged.write_bytes(data)


def _lossy(whole: Path, damaged: Path, rng: random.Random) -> None:
    """One packet less, neither the first nor the last."""
    lost = rng.randrange(1, _FRAMES - 1)
    with av.open(str(whole)) as source, av.open(str(damaged), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        packets: list[Packet] = [packet for packet in source.demux(video=0) if packet.size]
        for place, packet in enumerate(packets):
            if place != lost:
                packet.stream = stream
                target.mux(packet)


def _decoded(path: Path, times: np.ndarray | None = None) -> tuple[np.ndarray, list[np.ndarray]]:
    """Times and frames: all of the file, or those nearest to ``times``, by the first way that gives them."""
    failed: Exception | None = None
    with native_log() as log:
        for source in frame_sources(str(path), log):
            there = source.timestamps_s
            wanted = (
                range(len(there))
                if times is None
                else sorted({int(np.abs(there - t).argmin()) for t in times})
            )
            try:
                return there[list(wanted)], [frame.rgb for frame in source.frames(wanted)]
            except SourceFailedError as error:
                failed = error
    raise VideoRefusedError(FailureReason.CORRUPT_STREAM, f"{failed}")


def _end(damaged: Path, times: np.ndarray, frames: list[np.ndarray]) -> str:
    """How a damaged file ends, of which sixteen frames are wanted."""
    try:
        seen, pictures = _decoded(damaged, times[3 :: len(times) // 16])
    except VideoRefusedError:
        return "refused"
    truth = [frames[int(np.abs(times - time).argmin())] for time in seen]
    return "right" if all(map(np.array_equal, pictures, truth)) else "wrong"


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=15, help="damaged files of each kind and stream")
    files = parser.parse_args().files
    total: dict[str, Counter[str]] = {"flipped": Counter(), "lost": Counter()}
    print(f"{'stream':10s}  flipped: refused right wrong   lost: refused right wrong")
    with tempfile.TemporaryDirectory() as folder:
        for name, (codec, pixel_format, options) in _STREAMS.items():
            whole = Path(folder, name)
            _write(whole, codec, pixel_format, options)
            times, frames = _decoded(whole)
            cells = []
            for kind, damage in {"flipped": _flipped, "lost": _lossy}.items():
                ends: Counter[str] = Counter()
                for seed in range(files):
                    damaged = Path(folder, f"damaged_{name}")
                    damage(whole, damaged, random.Random(f"{name} {kind} {seed}"))
                    ends[_end(damaged, times, frames)] += 1
                total[kind] += ends
                cells.append(f"{ends['refused']:7d} {ends['right']:5d} {ends['wrong']:5d}")
            print(f"{name:10s}         {'         '.join(cells)}", flush=True)
    cells = [f"{ends['refused']:7d} {ends['right']:5d} {ends['wrong']:5d}" for ends in total.values()]
    print(f"{'all':10s}         {'         '.join(cells)}")


if __name__ == "__main__":
    main()
