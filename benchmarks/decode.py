"""CPU time of decoding one video: one view against a plain loop, and against eight that fall into the same stretch.

    python benchmarks/decode.py ../shared/videos/fixture --plain
    python benchmarks/decode.py ../shared/videos/fixture --sizes 128 256 512

``--plain`` decodes one view of each whole clip, at the first of ``--sizes``, the mean of three views. The plain loops
take the same frames and cut and resize them in the same way, in this process, and check nothing:

decord   ``VideoReader(path).get_batch(frames)``
PyAV     decoding in sequence from the first frame to the last one wanted
best     the faster of the two
here     ``decode_video``
child    the same in its disposable process, the server's and the caller's share included

Without it:

The stretch is the first ``--seconds`` of each clip, cut out without encoding it again, so that any view's frames lie
within the same few groups of pictures. Best of ``--repeats``, one thread.

probe    reading all packets
decode   getting the frames as RGB, without the probe
resize   cutting and resizing them
all      ``decode_video``, all of these; the ratio is that of eight views to one
child    CPU time of the same one view in its disposable process, the server's and the caller's included
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import av
import decord
import numpy as np
import psutil

from deltacache.pipeline.decoding.child import ChildDecoder
from deltacache.pipeline.decoding.decode import VideoJob, decode_video, frame_sources
from deltacache.pipeline.decoding.native_log import native_log
from deltacache.pipeline.decoding.probe import probe_video
from deltacache.pipeline.decoding.resampling import CroppedClip, Resizer
from deltacache.pipeline.decoding.sampling import draw_view
from deltacache.schemas.clips import PixelClip
from deltacache.schemas.datasets import SamplingSettings


def best_ms(call: Callable[[], object], repeats: int) -> float:
    """The shortest of several CPU times of this process, after one that does not count."""
    call()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times) * 1e3


def decode_only(job: VideoJob) -> None:
    """Get the frames of a job and drop them."""
    with native_log() as log:
        source = next(frame_sources(job.path, log))
        views = range(job.first_view, job.first_view + job.views)
        samples = [
            draw_view(job.video_id, v, source.timestamps_s, source.height, source.width, job.sampling)
            for v in views
        ]
        for _ in source.frames(sorted({index for sample in samples for index in sample.frame_indices})):
            pass


def cut_out(path: Path, folder: Path, seconds: float) -> Path:
    """The packets of the first seconds of a video, in a container of the same kind."""
    target = folder / path.name
    with av.open(str(path)) as source, av.open(str(target), "w") as sink:
        stream = source.streams.video[0]
        copy = sink.add_stream_from_template(stream)
        start: int | None = None
        for packet in source.demux(stream):
            at = packet.pts if packet.dts is None else packet.dts
            if at is None or stream.time_base is None:
                continue  # the empty packet at the end
            start = at if start is None else start
            if (at - start) * stream.time_base > seconds:
                break
            packet.stream = copy
            sink.mux(packet)
    return target


def child_ms(decoder: ChildDecoder, job: VideoJob, repeats: int) -> float:
    """CPU milliseconds of the server, its children and this process for one job, the mean of several."""
    decoder.decode(job)
    before = _server_seconds(decoder) + time.process_time()
    for _ in range(5 * repeats):
        decoder.decode(job)
    time.sleep(0.02)  # the last child is reaped after its answer
    return (_server_seconds(decoder) + time.process_time() - before) / (5 * repeats) * 1e3


def _server_seconds(decoder: ChildDecoder) -> float:
    times = psutil.Process(decoder.server_pid).cpu_times()
    return times.user + times.system + times.children_user + times.children_system


def against_plain_loops(videos: Path, size: int, repeats: int) -> None:
    """Print one row a clip, and the means."""
    print("| clip | decoder | decord | PyAV | here | child |\n|---|---|---|---|---|---|")
    rows: list[list[float]] = []
    with ChildDecoder(600, 8 << 30) as decoder, native_log():
        for path in sorted(videos.iterdir()):
            taken, way = list[list[float]](), ""
            for view in range(3):
                job = VideoJob(str(path), path.name, "video", view, 1, size, SamplingSettings())
                (clip,) = decode_video(job)
                way = clip.decoder
                calls = (
                    lambda clip=clip, path=path: _cut(clip, size, _with_decord(path, clip)),
                    lambda clip=clip, path=path: _cut(clip, size, _with_pyav(path, clip)),
                    lambda job=job: decode_video(job),
                )
                taken.append([*(best_ms(call, repeats) for call in calls), child_ms(decoder, job, 1)])
            rows.append([sum(column) / len(taken) for column in zip(*taken, strict=True)])
            cells = " | ".join(f"{value:.0f}" for value in rows[-1])
            print(f"| {path.name} | {way} | {cells} |", flush=True)
    means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    best = sum(min(row[:2]) for row in rows) / len(rows)
    print(f"| mean | | {' | '.join(f'{value:.0f}' for value in means)} |")
    print(
        f"best {best:.0f}; here / best {means[2] / best:.2f}, child / best {means[3] / best:.2f} (goal 1.25)"
    )


def _with_decord(path: Path, clip: PixelClip) -> list[np.ndarray]:
    return list(decord.VideoReader(str(path), num_threads=1).get_batch(clip.frame_indices).asnumpy())


def _with_pyav(path: Path, clip: PixelClip) -> list[np.ndarray]:
    frames: dict[int, np.ndarray] = {}
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        for index, frame in enumerate(container.decode(stream)):
            if index in clip.frame_indices:
                frames[index] = frame.to_ndarray(format="rgb24")
            if index == clip.frame_indices[-1]:
                break
    return [frames[index] for index in clip.frame_indices]


def _cut(clip: PixelClip, size: int, frames: list[np.ndarray]) -> np.ndarray:
    cropped, resizer = CroppedClip(len(frames), size, clip.crop, flip=clip.flip), Resizer(size)
    for t, frame in enumerate(frames):
        resizer.load(frame)
        resizer.cut(cropped, t)
    return cropped.finish()


def main() -> None:
    """Measure and print one row a clip and size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("videos", type=Path)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--plain", action="store_true", help="compare with plain loops")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.plain:
        against_plain_loops(arguments.videos, arguments.sizes[0], arguments.repeats)
        return
    print(
        "| clip | size | probe | decode 1 | resize 1 | decode 8 | resize 8 | all 1 | all 8 | ratio | child 1 |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    with ChildDecoder(600, 8 << 30) as decoder, tempfile.TemporaryDirectory() as folder:
        for whole in sorted(arguments.videos.iterdir()):
            path = cut_out(whole, Path(folder), arguments.seconds)
            for size in arguments.sizes:
                print(row(path, size, arguments.repeats, decoder), flush=True)


def row(path: Path, size: int, repeats: int, decoder: ChildDecoder) -> str:
    """One row of the table, CPU milliseconds."""
    one = VideoJob(str(path), path.name, "video", 0, 1, size, SamplingSettings())
    probe = best_ms(lambda: probe_video(str(path)), repeats)
    cells = []
    for job in (one, replace(one, views=8)):
        whole = best_ms(lambda job=job: decode_video(job), repeats)
        frames = best_ms(lambda job=job: decode_only(job), repeats)
        cells.append((whole, frames - probe, whole - frames))
    (all_1, decode_1, resize_1), (all_8, decode_8, resize_8) = cells
    numbers = [probe, decode_1, resize_1, decode_8, resize_8, all_1, all_8]
    texts = [f"{number:.0f}" for number in numbers]
    child = child_ms(decoder, one, repeats)
    return f"| {path.name} | {size} | {' | '.join(texts)} | {all_8 / all_1:.2f} | {child:.0f} |"


if __name__ == "__main__":
    main()
