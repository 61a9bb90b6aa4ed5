"""The long form of tests/commands/test_chaos.py: many kills, extraction and tokenizing, one table.

    python benchmarks/chaos.py VIDEOS --kills 40 --videos 120

A Ray of three nodes on this machine, the commands as a user runs them. Rounds of extract-features and tokenize
into new folders go on until there were enough kills; after each the dataset must be byte-identical to that of an
undisturbed run, ``verify`` must find nothing, and no receipt may have been written twice.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from itertools import cycle
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "commands"))
from chaos import KINDS, contents, nodes, run_through

FLAGS = ["--backbone", "tiny", "--image-size", "64", "--views", "2", "--videos-per-shard", "4"]


def main() -> None:
    """Kill, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("videos_folder", type=Path)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument(
        "--videos", type=int, default=120, help="the folder's videos are linked to so many names"
    )
    parser.add_argument("--pause", type=float, nargs=2, default=(2.0, 10.0), help="seconds between kills")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="deltacache-chaos-") as folder:
        run(arguments, Path(folder))


def run(arguments: argparse.Namespace, folder: Path) -> None:
    """Rounds in ``folder`` until there were enough kills."""
    videos = folder / "videos"
    videos.mkdir()
    files = [file.resolve() for file in sorted(arguments.videos_folder.iterdir()) if file.is_file()]
    for number, file in zip(range(arguments.videos), cycle(files), strict=False):
        (videos / f"{number:04d}-{file.name}").symlink_to(file)
    features, tokenizer, deltas = folder / "features", folder / "tokenizer", folder / "deltas"
    plain("extract-features", videos, features, *FLAGS)
    plain("train-tokenizer", features, tokenizer, "--preset", "tiny", "--steps", 2)
    plain("tokenize", features, deltas, "--tokenizer", tokenizer)
    kills, starts, exits = Counter[str](), 0, Counter[int]()
    began, rng, rounds = time.monotonic(), random.Random(arguments.seed), 0
    with nodes(3) as cluster:
        while kills.total() < arguments.kills:
            shaken = folder / f"shaken-{rounds}"
            if rounds % 3 < 2:
                command, whole, kinds = ["extract-features", videos, shaken, *FLAGS], features, KINDS
            else:
                command = ["tokenize", features, shaken, "--tokenizer", tokenizer]
                whole, kinds = deltas, {"encoder": 2, "raylet": 1, "driver": 1}
            left = arguments.kills - kills.total()
            report = run_through(
                command, shaken, cluster, kinds, rng, most_kills=left, pause_s=tuple(arguments.pause), say=say
            )
            assert contents(shaken) == contents(whole), f"{command[0]}: {shaken} differs from {whole}"
            assert report.redone == 0, report
            plain("verify", shaken)
            kills, starts, exits, rounds = (
                kills + report.kills,
                starts + report.starts,
                exits + report.exits,
                rounds + 1,
            )
            say(
                f"round {rounds} ({command[0]}): identical after {dict(report.kills)}, {report.starts} starts"
            )
    print(f"\n{kills.total()} kills in {rounds} rounds and {time.monotonic() - began:.0f} s, {starts} starts")
    for kind in KINDS:
        print(f"{kind:14} {kills[kind]:4}")
    print("every dataset byte-identical, no receipt written twice, verify found nothing")


def plain(*arguments: object) -> None:
    """Run a command undisturbed."""
    subprocess.run(
        [sys.executable, "-m", "deltacache", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL
    )


def say(text: str) -> None:
    """A line with the time."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


if __name__ == "__main__":
    main()
