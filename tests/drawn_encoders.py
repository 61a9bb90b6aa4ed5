"""Encoders of every family with random weights, saved as a user has them on disk, and their tokens by hand."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from deltacache.models.backbone import IMAGENET

_LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4}
TEXT_TOWER = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "vocab_size": 50,
}


@dataclass(frozen=True)
class Family:
    """How transformers builds an encoder.

    Attributes:
        patch: its patch size here.
        settings: of the config, beside width and layers.
        trained: how the config writes the image size that positions are learned for: its field, and whether in pixels
            or patches (NaFlex: all patches of a square).
    """

    model: str
    config: str
    patch: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    trained: str = "image_size"

    def build(self, hidden_size: int, image_size: int, **settings: Any) -> torch.nn.Module:
        """A model for square images of ``image_size`` pixels; the same weights for the same arguments."""
        size = (image_size // self.patch) ** 2 if self.trained == "num_patches" else image_size
        width = {"mlp_ratio": 1.0} if self.trained == "crop_size" else {"intermediate_size": hidden_size}
        if self.config.startswith("Dinov2"):
            width = {"mlp_ratio": 1}
        chosen = {
            **_LAYERS,
            **width,
            "hidden_size": hidden_size,
            "patch_size": self.patch,
            self.trained: size,
        }
        torch.manual_seed(hidden_size)
        config = getattr(transformers, self.config)(**{**chosen, **self.settings, **settings})
        model = getattr(transformers, self.model)(config)
        for (
            parameter
        ) in model.parameters():  # as they come, patches hardly hear of each other or of their place
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3 / max(1, parameter.shape[-1] / 64) ** 0.5)
        return model.eval()

    def save(self, folder: Path, hidden_size: int, image_size: int, **settings: Any) -> torch.nn.Module:
        """Build it and write it as ``save_pretrained`` does."""
        model = self.build(hidden_size, image_size, **settings)
        model.save_pretrained(folder)
        return model


_REGISTERS = {"num_register_tokens": 4}
_VJEPA = {
    "frames_per_clip": 4,
    "pred_hidden_size": 24,
    "pred_num_hidden_layers": 1,
    "pred_num_attention_heads": 2,
}
FAMILIES: Mapping[str, Family] = {
    "dinov2": Family("Dinov2Model", "Dinov2Config", 14),
    "dinov2_registers": Family("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", 14, _REGISTERS),
    "dinov2_giant": Family("Dinov2Model", "Dinov2Config", 14, {"use_swiglu_ffn": True}),
    "dinov3": Family("DINOv3ViTModel", "DINOv3ViTConfig", 16, _REGISTERS),
    "dinov3_hplus": Family("DINOv3ViTModel", "DINOv3ViTConfig", 16, {**_REGISTERS, "use_gated_mlp": True}),
    "siglip2_fixed14": Family("SiglipVisionModel", "SiglipVisionConfig", 14),
    "siglip2_fixed16": Family("SiglipVisionModel", "SiglipVisionConfig", 16),
    "siglip2_naflex": Family("Siglip2VisionModel", "Siglip2VisionConfig", 16, trained="num_patches"),
    "vjepa2": Family("VJEPA2Model", "VJEPA2Config", 16, _VJEPA, trained="crop_size"),
}

HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
PREFIX = {"dinov2": 1, "dinov2_registers": 5, "dinov2_giant": 1, "dinov3": 5, "dinov3_hplus": 5}
"""Tokens before the patches."""


def frames(count: int, height: int, width: int, seed: int = 1) -> torch.Tensor:
    """(count, 3, height, width) uint8 of noise."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def normalised(frame: torch.Tensor, family: str) -> torch.Tensor:
    """(3, H, W) uint8 as the family expects it."""
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in (HALF if "siglip" in family else IMAGENET))
    return (frame.float() / 255 - mean) / std


def of_image(model: Any, image: torch.Tensor, patch: int) -> torch.Tensor:
    """(1, P + N, D) of encoders that take images."""
    stretched = {"interpolate_pos_encoding": True} if "Siglip" in type(model).__name__ else {}
    return model(image[None], **stretched).last_hidden_state


def of_flat_patches(model: Any, image: torch.Tensor, patch: int) -> torch.Tensor:
    """(1, N, D) of SigLIP 2, padded and masked as its own processor does it."""
    rows, columns = image.shape[1] // patch, image.shape[2] // patch
    padded, mask = torch.zeros(1, rows * columns + 5, 3 * patch * patch), torch.zeros(1, rows * columns + 5)
    for row in range(rows):
        for column in range(columns):
            part = image[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            padded[0, row * columns + column] = part.permute(1, 2, 0).flatten()
            mask[0, row * columns + column] = 1
    hidden = model(padded, mask.long(), torch.tensor([[rows, columns]])).last_hidden_state
    return hidden[:, : rows * columns]


def of_tubelet(model: Any, image: torch.Tensor, patch: int) -> torch.Tensor:
    """(1, N, D) of V-JEPA 2 as for a model whose trained grid holds the image."""
    rows, columns = image.shape[1] // patch, image.shape[2] // patch
    side = max(rows, columns)
    settings = {**model.config.to_dict(), "crop_size": side * patch}
    larger = transformers.VJEPA2Model(transformers.VJEPA2Config(**settings)).eval()
    larger.load_state_dict(model.state_dict())
    video = torch.stack([image, image])[None]
    if rows == columns:
        return larger(pixel_values_videos=video, skip_predictor=True).last_hidden_state
    hidden = larger.encoder.embeddings(video)
    places = torch.tensor([[row * side + column for row in range(rows) for column in range(columns)]])
    for layer in larger.encoder.layer:
        hidden = layer(hidden, places)[0]
    return larger.encoder.layernorm(hidden)


BY_HAND: dict[str, Callable[[Any, torch.Tensor, int], torch.Tensor]] = {
    "siglip2_naflex": of_flat_patches,
    "vjepa2": of_tubelet,
}


@torch.no_grad()
def by_hand(family: str, model: Any, images: torch.Tensor) -> torch.Tensor:
    """(B, N, D) patch tokens, one image after the other."""
    encode = BY_HAND.get(family, of_image)
    each = [encode(model, normalised(image, family), FAMILIES[family].patch) for image in images]
    return torch.cat(each)[:, PREFIX.get(family, 0) :]
