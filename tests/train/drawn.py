"""Small datasets whose tokens are drawn, not extracted, and configs that train on them in seconds."""

# C clips, T frames, N patches, D hidden

from pathlib import Path
from typing import Any, Literal

import numpy as np

from deltacache import DatasetWriter
from deltacache.pipeline.storage.files import crc32c_of_npy
from deltacache.schemas.configs import (
    DataChoice,
    TokenizerConfig,
    TokenizerModelConfig,
    TrainingConfig,
    WorldConfig,
    WorldModelConfig,
)
from deltacache.schemas.datasets import BackboneCard, DatasetCard, SamplingSettings

HIDDEN, GRID = 16, (2, 2)
PATCHES = GRID[0] * GRID[1]


def black_tokens() -> np.ndarray:
    """(N, D) float16."""
    return np.full((PATCHES, HIDDEN), -0.5, dtype=np.float16)


def drawn_features(clips: int, frames: int, seed: int = 0) -> np.ndarray:
    """(C, T, N, D) float16: at each step all patches move along one of four directions, by chance.

    The frame before says nothing about the move, so only a token of the pair can.
    """
    rng = np.random.default_rng(seed)
    start = rng.normal(size=(clips, 1, PATCHES, HIDDEN))
    directions = rng.normal(size=(4, HIDDEN))
    moves = directions[rng.integers(0, 4, (clips, frames))][:, :, None]
    moves[:, 0] = 0
    return (start + np.cumsum(moves, axis=1)).astype(np.float16)


def drawn_deltas(clips: int, frames: int, seed: int = 0) -> np.ndarray:
    """(C, T, D) float16: each token is one of two opposite vectors by chance, with a little noise."""
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=HIDDEN)
    signs = rng.choice([-1.0, 1.0], size=(clips, frames, 1))
    return (signs * direction + 0.05 * rng.normal(size=(clips, frames, HIDDEN))).astype(np.float16)


def drawn_card(kind: Literal["features", "deltas"], frames: int) -> DatasetCard:
    """A card for tokens of nothing real."""
    backbone = BackboneCard(
        id="drawn",
        weights_sha256="0" * 64,
        patch_size=16,
        hidden_size=HIDDEN,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.25, 0.25, 0.25),
    )
    return DatasetCard(
        kind=kind,
        store="webdataset",
        backbone=backbone,
        tokenizer_fingerprint="f" * 16 if kind == "deltas" else None,
        image_size=16 * GRID[0],
        patch_grid=GRID,
        hidden_size=HIDDEN,
        sampling=SamplingSettings(frames=frames),
        black_crc32c=crc32c_of_npy(black_tokens()),
        code_version="0",
    )


def write_dataset(
    root: Path, kind: Literal["features", "deltas"], tokens: np.ndarray, seed: int = 0, first: int = 0
) -> Path:
    """Write (C, T, ...) tokens as a finished dataset of several shards, a clip a video, numbered from ``first``."""
    frames = tokens.shape[1]
    rng = np.random.default_rng(seed)
    with DatasetWriter(root, drawn_card(kind, frames), black_tokens(), videos_per_shard=5) as out:
        for number, clip in enumerate(tokens, first):
            times = 3.0 + np.cumsum(rng.uniform(0.04, 0.33, frames)).astype(np.float32)
            out.write(f"video{number:03d}.mp4", [(clip, times)], video_id=f"video{number:03d}")
    return root


def tokenizer_config(
    black_first_fraction: float = 0.25, data: dict[str, Any] | None = None, **training: object
) -> TokenizerConfig:
    """A small tokenizer; keywords change the training."""
    model = TokenizerModelConfig(num_heads=2, encoder_layers=1, decoder_layers=1, layer_scale_init=0.1)
    return TokenizerConfig(
        model=model,
        training=_training(training),
        data=DataChoice(**(data or {})),
        black_first_fraction=black_first_fraction,
    )


def world_config(
    query: Literal["noise", "learned"] = "noise", data: dict[str, Any] | None = None, **training: object
) -> WorldConfig:
    """A small world model; keywords change the training."""
    model = WorldModelConfig(num_heads=2, num_layers=2, query=query, layer_scale_init=0.1)
    candidates = 8 if query == "noise" else 1
    chosen = DataChoice(**(data or {}))
    return WorldConfig(model=model, training=_training(training), data=chosen, candidates=candidates)


def _training(changes: dict[str, object]) -> TrainingConfig:
    default = {"steps": 8, "batch_size": 5, "learning_rate": 3e-3, "warmup_steps": 3, "weight_decay": 0.01}
    default |= {"gradient_clip": 0.1, "seed": 7, "save_every": 4, "log_every": 2}
    return TrainingConfig.model_validate(default | changes)
