"""CPU time of decoding one video: one view against eight that fall into the same stretch, and what it goes into.

    python benchmarks/decode.py ../shared/videos/fixture --sizes 128 256 512

The stretch is the first ``--seconds`` of each clip, cut out without encoding it again, so that any view's frames lie
within the same few groups of pictures. Best of ``--repeats``, one thread.

probe    reading all packets
decode   getting the frames as RGB, without the probe
resize   cutting and resizing them
all      ``decode_video``, all of these; the ratio is that of eight views to one
child    CPU time of the same one view in its disposable process, the server's included
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import av
import psutil

from deltacache.pipeline.decoding.child import ChildDecoder
from deltacache.pipeline.decoding.decode import VideoJob, decode_video, frame_sources
from deltacache.pipeline.decoding.native_log import native_log
from deltacache.pipeline.decoding.probe import probe_video
from deltacache.pipeline.decoding.sampling import draw_view
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
    """CPU milliseconds of the server and its children for one job, the mean of several."""
    decoder.decode(job)
    before = _server_seconds(decoder)
    for _ in range(5 * repeats):
        decoder.decode(job)
    time.sleep(0.02)  # the last child is reaped after its answer
    return (_server_seconds(decoder) - before) / (5 * repeats) * 1e3


def _server_seconds(decoder: ChildDecoder) -> float:
    times = psutil.Process(decoder.server_pid).cpu_times()
    return times.user + times.system + times.children_user + times.children_system


def main() -> None:
    """Measure and print one row a clip and size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("videos", type=Path)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
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
