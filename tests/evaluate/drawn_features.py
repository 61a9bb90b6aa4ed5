"""A small world for the evaluation: scenes with two futures each, and random models that fit them."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from deltacache.evaluate.settings import ClipEvaluation
from deltacache.models.checkpoints import load_tokenizer, save_model
from deltacache.models.deltatok import DeltaTok
from deltacache.models.worlds.deltaworld import DeltaWorld
from deltacache.pipeline.datasets.dataset import finish_dataset, prepare_dataset, write_plan, write_shard
from deltacache.pipeline.datasets.plan import extend_plan, shard_tasks
from deltacache.pipeline.datasets.receipts import StoredClip
from deltacache.pipeline.inputs.sources import VideoSource
from deltacache.pipeline.storage.files import crc32c_of_npy
from deltacache.schemas.clips import CropBox, FeatureClip, clip_id_of
from deltacache.schemas.datasets import BackboneCard, DatasetCard, SamplingSettings

ModelT = TypeVar("ModelT", bound=nn.Module)

FRAMES, GRID, HIDDEN, CONTEXT = 7, (2, 3), 32, 4
PATCHES = GRID[0] * GRID[1]
SCENES, OUTCOMES = 5, ("left", "right")
BACKBONE = "b" * 64


@dataclass(frozen=True)
class DrawnClip:
    """One clip of a dataset to write. ``tokens`` (T, N, D)."""

    name: str
    tokens: np.ndarray
    view: int = 0


def draw_clips(seed: int = 0) -> list[DrawnClip]:
    """Two clips per scene, equal for ``CONTEXT`` frames; afterwards each drifts its own way."""
    rng = np.random.default_rng(seed)
    clips = []
    for scene in range(SCENES):
        context = rng.normal(size=(PATCHES, HIDDEN)) + 0.1 * rng.normal(
            size=(CONTEXT, PATCHES, HIDDEN)
        ).cumsum(0)
        for outcome in OUTCOMES:
            steps = 0.2 * rng.normal(size=(FRAMES - CONTEXT, PATCHES, HIDDEN)).cumsum(0)
            clips.append(DrawnClip(f"scene{scene}-{outcome}", np.concatenate([context, context[-1] + steps])))
    return clips


def timestamps(frames: int = FRAMES) -> np.ndarray:
    """Not evenly spaced, and not from 0."""
    return (3.0 + np.cumsum(0.1 + 0.02 * np.arange(frames))).astype(np.float32)


def drawn_card(frames: int = FRAMES, hidden: int = HIDDEN, backbone: str = BACKBONE) -> DatasetCard:
    """The card of a dataset whose black frame is a ramp."""
    return DatasetCard(
        kind="features",
        store="webdataset",
        backbone=BackboneCard(
            id="drawn",
            weights_sha256=backbone,
            patch_size=16,
            hidden_size=hidden,
            image_mean=(0.5, 0.5, 0.5),
            image_std=(0.5, 0.5, 0.5),
        ),
        image_size=32,
        patch_grid=GRID,
        hidden_size=hidden,
        sampling=SamplingSettings(frames=frames),
        black_crc32c=crc32c_of_npy(black_tokens(hidden)),
        code_version="0",
    )


def black_tokens(hidden: int = HIDDEN) -> np.ndarray:
    """(N, D) float16."""
    return np.linspace(-1, 1, PATCHES * hidden).reshape(PATCHES, hidden).astype(np.float16)


def write_features(root: Path, clips: Iterable[DrawnClip], card: DatasetCard | None = None) -> Path:
    """Write a feature dataset of one shard, in the order of the clips."""
    card = card or drawn_card()
    clips = list(clips)
    names = list(dict.fromkeys(clip.name for clip in clips)) or ["refused"]
    videos = [VideoSource(name, f"{name}.mp4", f"/videos/{name}.mp4", 1) for name in names]
    prepare_dataset(root, card, black_tokens(card.hidden_size))
    plan = extend_plan(None, videos, max((clip.view for clip in clips), default=0) + 1, len(videos))
    write_plan(root, plan)
    (task,) = shard_tasks(plan)
    write_shard(root, card, task.shard_id, [_stored(clip, card) for clip in clips], [], [])
    finish_dataset(root)
    return root


def _stored(clip: DrawnClip, card: DatasetCard) -> StoredClip:
    frames = card.sampling.frames
    feature_clip = FeatureClip(
        clip_id_of(clip.name, clip.view), clip.tokens.astype(np.float16), timestamps(frames)
    )
    return StoredClip(
        clip=feature_clip,
        video_uri=f"{clip.name}.mp4",
        view=clip.view,
        frame_indices=tuple(range(frames)),
        crop=CropBox(0, 0, 32, 32),
        flip=False,
        decoder="drawn",
        duplicate_frames=0,
    )


def save_tokenizer(folder: Path, *, seed: int = 0, hidden: int = HIDDEN, **metadata: object) -> Path:
    """A random tokenizer that listens to its token; ``metadata`` replaces what says where it comes from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _lively(DeltaTok(hidden, 2, 1, 1, layer_scale_init=0.5))
    made_from = {"backbone_sha256": BACKBONE, "patch_grid": list(GRID), "hidden_size": hidden}
    save_model(folder, model, "tokenizer", {**made_from, **metadata})
    return folder


def save_world(folder: Path, tokenizer: Path | str, *, query: str = "noise", hidden: int = HIDDEN) -> Path:
    """A random world model of ``tokenizer`` (a path, or a fingerprint) with noise that matters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = _lively(
            DeltaWorld(
                hidden,
                2,
                2,
                query="learned" if query == "learned" else "noise",
                noise_std=1.0,
                layer_scale_init=0.5,
            )
        )
    fingerprint = tokenizer if isinstance(tokenizer, str) else load_tokenizer(tokenizer).fingerprint
    save_model(folder, model, "world", {"tokenizer_fingerprint": fingerprint})
    return folder


def _lively(model: ModelT) -> ModelT:
    """Random weights large enough for every input to matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return model


def write_futures(path: Path, clips: Iterable[DrawnClip]) -> Path:
    """The table that says which clips share a scene."""
    rows = [f"{clip.name}.mp4,{clip.name.split('-')[0]},{clip.name.split('-')[1]}" for clip in clips]
    path.write_text("\n".join(["video_uri,scene,outcome", *rows]) + "\n")
    return path


@dataclass(frozen=True)
class DrawnWorld:
    """Paths of everything an evaluation can be given."""

    root: Path
    features: Path
    tokenizer: Path
    noise: Path
    learned: Path
    futures: Path

    def settings(self, out: str = "out", **changes: object) -> ClipEvaluation:
        """All models on the features, with few samples."""
        fields = {
            "out": self.root / out,
            "features": self.features,
            "tokenizer": self.tokenizer,
            "worlds": (self.noise, self.learned),
            "futures": self.futures,
            "samples": 6,
            "seed": 3,
            "device": "cpu",
            "examples": 2,
        }
        return ClipEvaluation.model_validate(fields | changes)


def draw_world(root: Path) -> DrawnWorld:
    """Write the dataset and the models below ``root``."""
    clips = draw_clips()
    tokenizer = save_tokenizer(root / "tokenizer")
    return DrawnWorld(
        root=root,
        features=write_features(root / "features", clips),
        tokenizer=tokenizer,
        noise=save_world(root / "noise", tokenizer),
        learned=save_world(root / "learned", tokenizer, query="learned"),
        futures=write_futures(root / "futures.csv", clips),
    )
