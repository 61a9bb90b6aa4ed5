"""Frames a second of a LeRobot v3 dataset, whose episodes share an MP4, beside those of reading the MP4 in sequence.

    python benchmarks/lerobot.py --episodes 40 --frames 150 --size 240 320

in sequence   a plain loop of PyAV over the whole MP4, to RGB
episodes      every frame of every episode, episode by episode, as jobs read them
probe all     the same when the packets of the whole MP4 are read for each episode, not only those around it
clips         clips of eight frames, one an episode, with their disposable processes: clips a second, and how long an
              episode takes at that rate beside decoding the whole MP4 in sequence for its frames
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from deltacache.pipeline.datasets.plan import PlannedVideo
from deltacache.pipeline.decoding.decode import frame_sources
from deltacache.pipeline.decoding.native_log import native_log
from deltacache.pipeline.decoding.probe import probe_video
from deltacache.pipeline.decoding.work import DecodeSettings, decode_group
from deltacache.pipeline.inputs.fetching import fetched
from deltacache.pipeline.inputs.folders import VideoSource
from deltacache.pipeline.inputs.sources import find_videos
from deltacache.schemas.datasets import SamplingSettings
from deltacache.schemas.jobs import DecodeLimits

_FPS, _CAMERA = 30, "observation.images.top"


def draw(root: Path, episodes: int, frames: int, size: tuple[int, int], codec: str) -> Path:
    """A dataset in one MP4, with the keyframe distance of two that LeRobot writes; returns the MP4."""
    path = root / f"videos/{_CAMERA}/chunk-000/file-000.mp4"
    path.parent.mkdir(parents=True)
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (size[0] + 300, size[1] + 300, 3), dtype=np.uint8) // 4
    rows = np.linspace(0, 190, size[0] + 300)[:, None, None].astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=_FPS, options={"g": "2", "crf": "30"})
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for number in range(episodes * frames):
            shift = number % 300
            picture = (noise + rows)[shift : shift + size[0], shift : shift + size[1]]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    for folder in ("data/chunk-000", "meta/episodes/chunk-000"):
        (root / folder).mkdir(parents=True)
    known = [
        {
            "episode_index": number // frames,
            "timestamp": number % frames / _FPS,
            "action": [float(number)] * 7,
        }
        for number in range(episodes * frames)
    ]
    pq.write_table(pa.Table.from_pylist(known), root / "data/chunk-000/file-000.parquet")
    about = [
        {
            "episode_index": episode,
            "length": frames,
            "tasks": ["draw"],
            "data/chunk_index": 0,
            "data/file_index": 0,
            f"videos/{_CAMERA}/chunk_index": 0,
            f"videos/{_CAMERA}/file_index": 0,
            f"videos/{_CAMERA}/from_timestamp": episode * frames / _FPS,
            f"videos/{_CAMERA}/to_timestamp": (episode + 1) * frames / _FPS,
        }
        for episode in range(episodes)
    ]
    pq.write_table(pa.Table.from_pylist(about), root / "meta/episodes/chunk-000/file-000.parquet")
    info = {
        "codebase_version": "v3.0",
        "fps": _FPS,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        "features": {
            _CAMERA: {"dtype": "video", "shape": [*size, 3]},
            "action": {"dtype": "float32", "shape": [7]},
        },
    }
    (root / "meta/info.json").write_text(json.dumps(info))
    return path


def in_sequence(path: Path) -> int:
    """Decode all of it."""
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "NONE"
        return sum(frame.to_ndarray(format="rgb24").shape[0] > 0 for frame in container.decode(video=0))


def by_episodes(videos: list[VideoSource], spool: Path, *, probe_all: bool = False) -> int:
    """Decode every frame of every episode."""
    count = 0
    for video in videos:
        with fetched(video.path, spool) as file, native_log() as log:
            if probe_all:
                probe_video(file.path)
            source = next(frame_sources(file.path, log, span=file.span))
            count += sum(1 for _ in source.frames(range(len(source.timestamps_s))))
    return count


def clips(videos: list[VideoSource]) -> int:
    """Decode a clip of eight frames of every episode, in its disposable process."""
    settings = DecodeSettings(224, SamplingSettings(frames=8), DecodeLimits())
    planned = [PlannedVideo(video.video_id, video.video_uri, video.size_bytes, 0, 1) for video in videos]
    group = decode_group(planned, {video.video_uri: video.path for video in videos}, settings, {})
    assert not group.failures, group.failures
    return len(group.clips)


def rate(call: Callable[[], int], repeats: int = 3) -> float:
    """Items a second, the best of several."""
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        count = call()
        rates.append(count / (time.perf_counter() - start))
    return max(rates)


def main() -> None:
    """Draw, measure, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--episodes", type=int, default=40)
    parser.add_argument("--frames", type=int, default=150)
    parser.add_argument("--size", type=int, nargs=2, default=(240, 320))
    parser.add_argument("--codecs", nargs="+", default=["libx264", "libsvtav1"])
    asked = parser.parse_args()
    for codec in asked.codecs:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "robot"
            path = draw(root, asked.episodes, asked.frames, tuple(asked.size), codec)
            videos = find_videos(str(root), None)
            whole = rate(lambda path=path: in_sequence(path))
            print(
                f"{codec}, {path.stat().st_size / 1e6:.1f} MB, {asked.episodes} episodes of {asked.frames} frames"
            )
            print(f"  in sequence  {whole:8.0f} frames/s")
            for name, probe_all in (("episodes", False), ("probe all", True)):
                own = rate(lambda v=videos, p=probe_all: by_episodes(v, Path(folder), probe_all=p))
                print(f"  {name:11}  {own:8.0f} frames/s, {own / whole:.2f} of in sequence")
            own = rate(lambda v=videos: clips(v))
            took = asked.episodes * asked.frames / whole
            print(
                f"  clips        {own:8.1f} clips/s; all in {len(videos) / own:.2f} s, the MP4 in sequence {took:.2f} s"
            )


if __name__ == "__main__":
    main()
