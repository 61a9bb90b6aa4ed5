"""Sizes and encoded frames of all clips of some videos, sharing their frames (``--windows all``) and each by itself.

python benchmarks/windows_size.py ../shared/videos/fixture --frames 8 --spacing 0.2 --strides 1 4
"""

import argparse
import tempfile
import time
from pathlib import Path

import deltacache


def main() -> None:
    """Extract, tokenize, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("videos", type=Path)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--spacing", type=float, default=0.2)
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--strides", type=int, nargs="+", default=[1, 4])
    asked = parser.parse_args()
    settings = {
        "backbone": "tiny",
        "image_size": asked.image_size,
        "frames": asked.frames,
        "spacing": (asked.spacing, asked.spacing),
        "augment": False,
        "encoders": 0,
        "max_failed_fraction": 1,
    }
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        tokenizer = None
        for stride in asked.strides:
            begun = time.perf_counter()
            out = root / f"windows-{stride}"
            features = deltacache.extract_features(
                asked.videos, out, windows="all", stride=stride, **settings
            )
            took = time.perf_counter() - begun
            tokens = features.read(0).patch_tokens
            by_itself = len(features) * tokens.nbytes
            shared = sum(path.stat().st_size for path in (out / "shards").iterdir())
            if tokenizer is None:
                tokenizer = deltacache.train_tokenizer(out, root / "tokenizer", preset="tiny", steps=1)
            deltas = deltacache.tokenize(out, root / f"deltas-{stride}", tokenizer, encoders=0)
            of_deltas = len(deltas) * deltas.read(0).delta_tokens.nbytes
            print(
                f"stride {stride}: {len(features)} clips; features {shared / 1e6:.1f} MB, each clip by itself "
                f"{by_itself / 1e6:.1f} MB ({by_itself / shared:.2f} times); deltas {of_deltas / 1e6:.2f} MB "
                f"({of_deltas / shared:.2%} of them); bytes of {shared / tokens[0].nbytes:.0f} frames, in clips "
                f"{len(features) * asked.frames}; {took:.1f} s"
            )


if __name__ == "__main__":
    main()
