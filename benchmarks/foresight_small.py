"""Table D in small: draw a street of moving shapes, then run every command of docs/foresight.md on it.

    python benchmarks/foresight_small.py OUT [--snippets 150] [--steps 1]

``--steps`` multiplies the trainers' steps. Prints the table that evaluate-foresight prints; minutes on two cores.
"""

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

HEIGHT, WIDTH, FRAMES, FPS = 64, 128, 30, 16
SKY, BUILDING, ROAD, PERSON, CAR = 23, 11, 7, 24, 26  # Cityscapes' label ids
COLOURS = {
    SKY: (150, 190, 230),
    BUILDING: (130, 110, 90),
    ROAD: (90, 90, 95),
    PERSON: (220, 60, 60),
    CAR: (40, 70, 200),
}


@dataclass(frozen=True)
class Street:
    """Where a car and a person are at frame 0, and how far they go in one frame (pixels)."""

    car: float
    car_step: float
    person: float
    person_step: float
    skyline: int

    @classmethod
    def drawn(cls, rng: np.random.Generator) -> "Street":
        """At random, always moving."""
        car_step = rng.choice([-1, 1]) * rng.uniform(1.5, 4)
        person_step = rng.choice([-1, 1]) * rng.uniform(0.5, 1.5)
        middle = rng.uniform(30, WIDTH - 30, 2)  # where they are at frame 16, so that both are seen
        return cls(
            middle[0] - 16 * car_step,
            car_step,
            middle[1] - 16 * person_step,
            person_step,
            rng.integers(14, 26),
        )

    def labels(self, frame: int) -> np.ndarray:
        """(HEIGHT, WIDTH) uint8 label ids."""
        ids = np.full((HEIGHT, WIDTH), SKY, np.uint8)
        ids[self.skyline : 40], ids[40:] = BUILDING, ROAD
        person, car = self.person + frame * self.person_step, self.car + frame * self.car_step
        cv2.ellipse(ids, (round(person), 36), (6, 13), 0, 0, 360, PERSON, -1)
        cv2.rectangle(ids, (round(car) - 16, 36), (round(car) + 16, 55), CAR, -1)
        return ids


def picture(ids: np.ndarray) -> np.ndarray:
    """(HEIGHT, WIDTH, 3) BGR, a little shaded from top to bottom."""
    table = np.zeros((256, 3), np.float32)
    for label, colour in COLOURS.items():
        table[label] = colour[::-1]
    return (table[ids] * np.linspace(0.85, 1.15, HEIGHT)[:, None, None]).clip(0, 255).astype(np.uint8)


def nearness(ids: np.ndarray) -> np.ndarray:
    """(HEIGHT, WIDTH) uint8, relative as Depth Anything's: more is nearer, 0 for the sky."""
    ground = np.tile(np.linspace(20, 240, HEIGHT)[:, None], (1, WIDTH))
    values = np.select([ids == SKY, ids == BUILDING, ids == PERSON, ids == CAR], [0, 60, 150, 200], ground)
    return values.astype(np.uint8)


def draw(out: Path, snippets: int) -> None:
    """``frames/`` to train on, and ``cityscapes/`` and ``depth/`` with the labelled frames of both splits."""
    rng = np.random.default_rng(0)
    for number in range(snippets + snippets // 3):
        split = "train" if number < snippets else "val"
        street, city = Street.drawn(rng), f"{split}{number % 5}"
        snippet = f"{city}_{number:06d}"
        for frame in range(FRAMES):
            shown = picture(street.labels(frame))
            if split == "train":
                write(out / "frames" / snippet / f"frame_{frame / FPS:.4f}.png", shown)
            if split == "val" or frame == 19:
                place = out / "cityscapes" / "leftImg8bit_sequence" / split / city
                write(place / f"{snippet}_{frame:06d}_leftImg8bit.png", shown)
        ids, name = street.labels(19), f"{snippet}_000019"
        write(out / "cityscapes" / "gtFine" / split / city / f"{name}_gtFine_labelIds.png", ids)
        write(out / "depth" / split / city / f"{name}_leftImg8bit_depth.png", nearness(ids))


def write(path: Path, values: np.ndarray) -> None:
    """A PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), values)


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--snippets", type=int, default=150)
    parser.add_argument("--steps", type=float, default=1.0)
    asked = parser.parse_args()
    out: Path = asked.out

    def run(*words: object) -> None:
        print("deltacache", *words, flush=True)
        subprocess.run([sys.executable, "-m", "deltacache", *map(str, words)], check=True)

    def steps(count: int) -> int:
        return max(10, int(count * asked.steps))

    if not (out / "frames").is_dir():
        draw(out, asked.snippets)
    seen = ["--backbone", "tiny", "--layers", "0,1", "--image-size", f"{HEIGHT}x{WIDTH}"]
    clips = ["--frames", 7, "--spacing", 0.1875, 0.1875, "--views", 6]
    run("extract-features", out / "frames", out / "layers", *seen, *clips)
    run("fit-pca", out / "layers", out / "pca", "--components", 48)
    seen += ["--pca", out / "pca"]
    run("extract-features", out / "frames", out / "features", *seen, *clips)
    run(
        "train-tokenizer",
        out / "features",
        out / "tokenizer",
        "--preset",
        "tiny",
        "--steps",
        steps(1500),
        "--resume",
    )
    run("tokenize", out / "features", out / "deltas", "--tokenizer", out / "tokenizer")
    for source, name, count in (("features", "foresight", 1200), ("deltas", "foresight-delta", 1500)):
        run(
            "train-world",
            out / source,
            out / name,
            "--preset",
            f"{name}-tiny",
            "--steps",
            steps(count),
            "--resume",
        )
    heads = ["--preset", "tiny", "--steps", steps(300), "--resume"]
    depth = ["--depth", out / "depth"]
    run("train-foresight-head", "segmentation", out / "cityscapes", out / "head", *seen, *heads)
    run("train-foresight-head", "depth", out / "cityscapes", out / "depth-head", *seen, *heads, *depth)
    models = [
        "--tokenizer",
        out / "tokenizer",
        "--world",
        out / "foresight",
        "--world",
        out / "foresight-delta",
    ]
    scored = ["--head", out / "head", "--depth-head", out / "depth-head", *depth]
    run("evaluate-foresight", out / "cityscapes", out / "results", *seen, *models, *scored)


if __name__ == "__main__":
    main()
