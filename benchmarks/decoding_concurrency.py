"""How many videos are decoded at once: many decoders, few encoders, a source that is slow.

    python benchmarks/decoding_concurrency.py VIDEO --decoders 16 --videos 256 --delay 1

The command runs on this machine with a list of urls; a server on loopback sleeps before every answer and counts how
many it is asked for at once. The source sleeps, so more decoders than cores can be busy.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "commands"))
from slow_source import slow_source


def main() -> None:
    """Run the job, print one row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("video", type=Path)
    parser.add_argument("--decoders", type=int, default=16)
    parser.add_argument("--encoders", type=int, default=1)
    parser.add_argument("--videos", type=int, default=256)
    parser.add_argument("--videos-per-shard", type=int, default=32)
    parser.add_argument("--delay", type=float, default=1.0, help="seconds of the source, a video")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="deltacache-") as folder,
        slow_source(arguments.video.read_bytes(), arguments.delay) as source,
    ):
        out = Path(folder) / "out"
        command = [
            *(sys.executable, "-m", "deltacache", "extract-features"),
            *(source.write_list(Path(folder) / "list.txt", arguments.videos), out),
            *("--backbone", "tiny", "--image-size", "32", "--decoders", arguments.decoders),
            *("--encoders", arguments.encoders, "--videos-per-shard", arguments.videos_per_shard),
        ]
        subprocess.run(list(map(str, command)), check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        figures = json.loads((out / "throughput.json").read_text())
    print(
        "| decoders | encoders | videos per shard | most at once | mean | clips/s | at most, by the delay |"
    )
    print(
        f"| {arguments.decoders} | {arguments.encoders} | {arguments.videos_per_shard} | {source.most} | "
        f"{source.mean:.1f} | {figures['clips_per_s']:.1f} | {arguments.decoders / arguments.delay:.1f} |"
    )


if __name__ == "__main__":
    main()
