"""Draw a long video of 1080p as MPEG-TS, AVI and FLV, for the time limit of decoding.

A piece is encoded once, H.264 without B-frames; its packets are written several times, with later times each time.
Decoders take that for one stream.

    python benchmarks/long_video.py FOLDER --minutes 25
    deltacache extract-features FOLDER/long.ts OUT --backbone tiny --image-size 64 --views 8
"""

import argparse
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

RATE, PIECE_MINUTES, HEIGHT, WIDTH, BOX = 24, 5, 1080, 1920, 256


def encoded_piece() -> list[tuple[bytes, int | None, bool]]:
    """Packets of five minutes: a box of noise moves over noise of blocks; bytes, time in frames, keyframe."""
    draw = np.random.default_rng(0)
    ground = draw.integers(60, 190, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    box = draw.integers(0, 255, (BOX, BOX, 3), dtype=np.uint8)
    codec = av.CodecContext.create("libx264", "w")
    codec.width, codec.height, codec.pix_fmt = WIDTH, HEIGHT, "yuv420p"
    codec.time_base, codec.framerate = Fraction(1, RATE), Fraction(RATE)
    codec.options = {"preset": "ultrafast", "crf": "28", "threads": "1", "g": str(2 * RATE)}
    packets = list[tuple[bytes, int | None, bool]]()
    for number in range(RATE * 60 * PIECE_MINUTES):
        picture = ground.copy()
        x, y = number * 7 % (WIDTH - BOX), number * 3 % (HEIGHT - BOX)
        picture[y : y + BOX, x : x + BOX] = box
        frame = av.VideoFrame.from_ndarray(picture, "rgb24")
        frame.pts, frame.time_base = number, codec.time_base
        packets += [(bytes(packet), packet.pts, packet.is_keyframe) for packet in codec.encode(frame)]
    return packets + [(bytes(packet), packet.pts, packet.is_keyframe) for packet in codec.encode(None)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=int, default=25, help="a multiple of five")
    flags = parser.parse_args()
    flags.folder.mkdir(parents=True, exist_ok=True)
    packets = encoded_piece()
    for suffix, kind in {"ts": "mpegts", "avi": "avi", "flv": "flv"}.items():
        path = flags.folder / f"long.{suffix}"
        with av.open(str(path), "w", format=kind) as container:
            stream = container.add_stream("libx264", rate=RATE)
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            for start in range(0, RATE * 60 * flags.minutes, RATE * 60 * PIECE_MINUTES):
                for content, time, is_key in packets:
                    assert time is not None
                    packet = av.Packet(content)
                    packet.pts = packet.dts = start + time
                    packet.time_base, packet.is_keyframe, packet.stream = Fraction(1, RATE), is_key, stream
                    container.mux(packet)
        print(f"{path}: {path.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
