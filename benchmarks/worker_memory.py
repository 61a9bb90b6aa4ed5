"""Peak memory of each kind of process of an extraction, for N and for 10 N videos.

    python benchmarks/worker_memory.py VIDEOS --videos 100

Resident memory less what is shared (RSS - SHR), sampled five times a second; the largest process of a kind.
"""

import argparse
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

import psutil

from deltacache.pipeline.jobs.offline import extract_features
from deltacache.schemas.jobs import ExtractionSettings
from deltacache.schemas.progress import SilentReporter
from extraction import link

KINDS = {
    "ray::_Encoder": "encoder",
    "ray::decode_group": "decoder",
    "decode_server": "decode server and child",
}


def main() -> None:
    """Two runs and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("videos_folder", type=Path)
    parser.add_argument("--videos", type=int, default=100)
    arguments = parser.parse_args()
    peaks = []
    for count in (arguments.videos, 10 * arguments.videos):
        with tempfile.TemporaryDirectory(prefix="deltacache-memory-") as folder:
            peaks.append(peak_memory(arguments.videos_folder, Path(folder), count))
    print(f"{'MiB':26}{arguments.videos:>10} videos{10 * arguments.videos:>10} videos")
    for kind in peaks[0]:
        print(f"{kind:26}{peaks[0][kind] / 2**20:17.0f}{peaks[1][kind] / 2**20:17.0f}")


def peak_memory(videos: Path, folder: Path, count: int) -> dict[str, int]:
    """Bytes of the largest process of each kind while ``count`` videos are extracted."""
    many = link(videos, folder / "videos", count)
    settings = ExtractionSettings(
        source=str(many), backbone="tiny", image_size=64, videos_per_shard=32, max_failed_fraction=1.0
    )
    peaks: dict[str, int] = defaultdict(int)
    stop = threading.Event()
    watcher = threading.Thread(target=watch, args=(peaks, stop))
    watcher.start()
    extract_features(settings, folder / "features", SilentReporter())
    stop.set()
    watcher.join()
    return peaks


def watch(peaks: dict[str, int], stop: threading.Event) -> None:
    """Sample all processes below this one."""
    this = psutil.Process()
    while not stop.is_set():
        for process in [this, *this.children(recursive=True)]:
            try:
                kind = kind_of(process, this)
                memory = process.memory_info()
            except psutil.Error:
                continue
            if kind is not None:
                peaks[kind] = max(peaks[kind], memory.rss - memory.shared)
        time.sleep(0.2)


def kind_of(process: psutil.Process, this: psutil.Process) -> str | None:
    """The kind of a process, or None for Ray's own."""
    if process == this:
        return "driver"
    command = " ".join(process.cmdline())
    return next((kind for mark, kind in KINDS.items() if mark in command), None)


if __name__ == "__main__":
    main()
