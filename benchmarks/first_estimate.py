"""How long a user waits for a trainer's first estimate of its time: from the command to the line that says it.

    python benchmarks/first_estimate.py /tmp/estimates --hidden 768 --clips 200

Tokens of the given width at 256 px are drawn, pictures too; each command is stopped when the line has come.
"""

import argparse
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from benchmark_evaluation import draw_vspw

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "train"))
import drawn

ESTIMATE = re.compile(r"(\d|about .*) for [\d,]+ steps| on this machine")
PATCHES = 256


def main() -> None:
    """A row for each trainer, without and with ``--dry-run``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--clips", type=int, default=200)
    options = parser.parse_args()
    folder: Path = options.folder
    features, deltas, vspw = (folder / name for name in ("features", "deltas", "vspw"))
    if not vspw.exists():
        draw(folder, options.hidden, options.clips)
    head = ("--backbone", "tiny", "--split", "val", "--image-size", "512")
    for name, arguments in {
        "tokenizer tiny": ("train-tokenizer", features, "OUT", "--preset", "tiny"),
        "tokenizer released": ("train-tokenizer", features, "OUT"),
        "world tiny": ("train-world", deltas, "OUT", "--preset", "tiny"),
        "world released": ("train-world", deltas, "OUT"),
        "world dino-world": ("train-world", features, "OUT", "--preset", "dino-world"),
        "head vspw": ("train-head", "vspw", vspw, "OUT", *head),
        "head rgb": ("train-head", "rgb", vspw / "data", "OUT", "--backbone", "tiny", "--preset", "tiny"),
    }.items():
        for more in ((), ("--dry-run",)):
            seconds, line = waited([*arguments, *more], folder / "out")
            print(f"| {name}{' --dry-run' if more else ''} | {seconds:.1f} | {line} |", flush=True)


def waited(arguments: list[object], out: Path) -> tuple[float, str]:
    """Seconds until the estimate, and the line."""
    shutil.rmtree(out, ignore_errors=True)
    command = [str(out) if each == "OUT" else str(each) for each in arguments]
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "deltacache", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line.strip())
        if ESTIMATE.search(line) and "warm-up" not in line:
            seconds = time.perf_counter() - began
            process.kill()
            process.wait()
            return seconds, lines[-1].partition(": ")[2]
    raise SystemExit("\n".join(lines))


def draw(folder: Path, hidden: int, clips: int) -> None:
    """Datasets of 8 frames."""
    drawn.HIDDEN, drawn.GRID, drawn.PATCHES = hidden, (16, 16), PATCHES
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    tokens = rng.standard_normal((clips, 8, PATCHES, hidden), dtype=np.float32).astype(np.float16)
    drawn.write_dataset(folder / "features", "features", tokens)
    drawn.write_dataset(folder / "deltas", "deltas", tokens[:, :, 0])
    draw_vspw(folder / "vspw", 4, 24, 480)  # the last frame that is scored is the twentieth


if __name__ == "__main__":
    main()
