"""Random models and depth maps for evaluations of whole frames of the miniature Cityscapes."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from deltacache.models.checkpoints import load_tokenizer, save_model
from deltacache.models.deltatok import DeltaTok
from deltacache.models.heads import DepthHead, SegmentationHead
from deltacache.models.worlds.foresight import Foresight
from deltacache.models.worlds.foresight_delta import ForesightDelta
from deltacache.schemas.foresight import ForesightEvaluation, FrameFeatureConfig

SIZE, GRID, WIDTH = (32, 64), (2, 4), 64
FEATURES = FrameFeatureConfig(backbone="tiny", image_size=SIZE)


def lively(model: nn.Module, seed: int) -> Any:
    """Random weights large enough that futures differ from copies."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@torch.random.fork_rng(devices=[])
def save_models(folder: Path, cityscapes: Path) -> Path:
    """Random models, the same every time, and depth maps that fall from top to bottom."""
    torch.manual_seed(0)
    tokenizer = lively(DeltaTok(WIDTH, 4, 1, 1, layer_scale_init=0.5), 0)
    save_model(folder / "tokenizer", tokenizer, "tokenizer", {})
    save_model(folder / "baseline", lively(Foresight(WIDTH, 4, 1, position_grid=GRID), 1), "world", {})
    fingerprint = load_tokenizer(folder / "tokenizer").fingerprint
    save_model(
        folder / "delta",
        lively(ForesightDelta(WIDTH, 4, 1), 2),
        "world",
        {"tokenizer_fingerprint": fingerprint},
    )
    save_model(folder / "segmentation", lively(SegmentationHead(WIDTH, 19), 3), "head", {})
    save_model(folder / "depth", lively(DepthHead(WIDTH), 4), "head", {})
    for label in cityscapes.glob("gtFine/val/*/*.png"):
        place = folder / "maps" / "val" / label.parent.name
        place.mkdir(parents=True, exist_ok=True)
        with Image.open(label) as picture:
            width, height = picture.size
        ramp = np.linspace(0, 255, height).astype(np.uint8)
        name = label.name.replace("_gtFine_labelIds", "_leftImg8bit_depth")
        Image.fromarray(np.tile(ramp[:, None], (1, width))).save(place / name)
    return folder


def whole_settings(made: Path, cityscapes: Path, out: Path, **changes: Any) -> ForesightEvaluation:
    fields: dict[str, Any] = {
        "out": out,
        "root": cityscapes,
        "features": FEATURES,
        "tokenizer": made / "tokenizer",
        "worlds": (made / "baseline", made / "delta"),
        "segmentation_head": made / "segmentation",
        "depth_head": made / "depth",
        "depth": made / "maps",
        "device": "cpu",
    }
    return ForesightEvaluation(**(fields | changes))
