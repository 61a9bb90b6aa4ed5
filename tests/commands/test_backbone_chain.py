"""Every input convention through the whole chain, command by command, from lossless frames to the table."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from command_runs import Command
from PIL import Image

from deltacache.models.backbone import load_backbone
from deltacache.pipeline.datasets.dataset import load_deltas, open_dataset
from drawn_encoders import FAMILIES, by_hand

VIDEOS, FRAMES, SPACING_S, PATCHES = 4, 6, 0.1, 4
WIDTHS = {
    "dinov2_registers": (384, 6),
    "dinov3_hplus": (80, 5),
    "siglip2_naflex": (48, 4),
    "vjepa2": (96, 12),
}
"""Hidden sizes, and heads of tokenizer and world model that these split into; 384 is that of ViT-S."""
TRAIN = ("--preset", "tiny", "--steps", 3, "--batch-size", 4)
Run = Callable[..., None]


@pytest.fixture(scope="module")
def run(deltacache: Command) -> Run:
    """Runs a command that is done."""

    def command(name: str, *arguments: object) -> None:
        where = ("--gpus-per-encoder", 0) if name in ("extract-features", "tokenize") else ()
        deltacache(name, *arguments, *where).done()

    return command


def draw_video(folder: Path, seed: int, size: int) -> torch.Tensor:
    """A square that moves over a shaded ground, as PNG files; returns (T, 3, S, S) uint8."""
    rng = np.random.default_rng(seed)
    ground, colour, (x, y) = (
        rng.integers(0, 200, (size, 1, 3)),
        rng.integers(0, 256, 3),
        rng.integers(2, 20, 2),
    )
    folder.mkdir(parents=True)
    pictures = []
    for time in range(FRAMES):
        picture = np.broadcast_to(ground, (size, size, 3)).astype(np.uint8)
        picture[y : y + 12, x + 3 * time : x + 3 * time + 12] = colour
        Image.fromarray(picture).save(folder / f"frame_{time * SPACING_S:.1f}.png")
        pictures.append(torch.from_numpy(picture).permute(2, 0, 1))
    return torch.stack(pictures)


@dataclass(frozen=True)
class Drawn:
    """A family's encoder on disk, its videos, and what each frame of them is by hand."""

    encoder: Path
    videos: Path
    tokens: dict[str, torch.Tensor]  # by video: (T, N, D)


def draw(root: Path, family: str) -> Drawn:
    """Random weights, four videos, and their tokens from the model itself."""
    size = PATCHES * FAMILIES[family].patch
    model = FAMILIES[family].save(root / "encoder", WIDTHS[family][0], size)
    names = [f"video-{number}" for number in range(VIDEOS)]
    pictures = {name: draw_video(root / "videos" / name, seed, size) for seed, name in enumerate(names)}
    tokens = {name: by_hand(family, model, frames) for name, frames in pictures.items()}
    return Drawn(root / "encoder", root / "videos", tokens)


@pytest.mark.parametrize("family", WIDTHS)
def test_the_whole_chain(family: str, run: Run, tmp_path: Path) -> None:
    drawn, (width, heads), size = draw(tmp_path, family), WIDTHS[family], PATCHES * FAMILIES[family].patch
    features, tokenizer, deltas, world, results = (tmp_path / name for name in "ftdwr")
    spacing = ("--frames", FRAMES, "--spacing", SPACING_S, SPACING_S, "--no-augment", "--image-size", size)
    encode = ("--backbone", drawn.encoder, "--precision", "float32", *spacing)
    run("extract-features", drawn.videos, features, *encode)
    run("train-tokenizer", features, tokenizer, *TRAIN, "--heads", heads)
    run("tokenize", features, deltas, "--tokenizer", tokenizer)
    run("train-world", deltas, world, *TRAIN, "--heads", heads)
    chain = ("--tokenizer", tokenizer, "--world", world, "--horizons", "1", "--samples", 2)
    run("evaluate", results, "--data", f"clips={features}", *chain)

    stored, backbone = open_dataset(features), load_backbone(str(drawn.encoder))
    assert (stored.card.hidden_size, stored.card.patch_grid) == (width, (PATCHES, PATCHES))
    assert stored.card.backbone.image_mean == backbone.image_mean
    assert len(stored) == VIDEOS
    for place, clip_id in enumerate(stored.clip_ids):
        (name,) = (name for name in drawn.tokens if name in clip_id)
        tokens = torch.tensor(stored.read(place).patch_tokens).float()
        torch.testing.assert_close(tokens, drawn.tokens[name].half().float(), atol=4e-3, rtol=2e-3)

    assert load_deltas(deltas).delta_tokens.shape == (VIDEOS, FRAMES, width)
    rows = pq.read_table(results / "metrics.parquet").to_pylist()
    values = {
        (row["method"], row["aggregation"]): row["value"] for row in rows if row["metric"] == "smooth_l1"
    }
    assert values["present", "single"] == 0
    assert 0 < values["copy_last", "single"] < 1
    assert 0 < values["deltaworld", "best"] <= values["deltaworld", "mean"] < 1
    assert {row["n_sequences"] for row in rows} == {VIDEOS}
