"""Image encoders on the meta device: their sizes without their weights."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from deltacache.models.backbones.convention import InputConvention
from deltacache.models.backbones.inputs import convention_of
from deltacache.models.backbones.reading import quiet_transformers, readable_folder
from deltacache.models.backbones.tiny import tiny_encoder
from deltacache.schemas.errors import CheckpointError, DeltacacheError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# hidden size, blocks, heads, width of the MLP, whether it is gated: DINOv3 on 16-px patches, 4 registers
_DINOV3 = {
    "vits16": (384, 12, 6, 1536, False),
    "vits16plus": (384, 12, 6, 1536, True),
    "vitb16": (768, 12, 12, 3072, False),
    "vitl16": (1024, 24, 16, 4096, False),
    "vith16plus": (1280, 32, 20, 5120, True),
    "vit7b16": (4096, 40, 32, 8192, True),
}
# hidden size, blocks, heads: DINOv2 on 14-px patches, 4 registers
_DINOV2 = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
NAMES = ("tiny", *_DINOV3, *(f"dinov2-with-registers-{size}" for size in _DINOV2))


def encoder_on(device: str | torch.device, source: str) -> InputConvention:
    """An encoder of random or, on meta, no weights: one of ``NAMES``, its hub id, or a folder with config.json.

    Raises:
        DeltacacheError: none of these.
    """
    from transformers import AutoModel

    try:
        config = _config(source)
        with torch.device(device), quiet_transformers():
            return convention_of(AutoModel.from_config(config).eval(), source)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"backbone {source!r} cannot be built from its config: {error}. Give a folder whose config.json is that "
            "of a vision transformer that transformers knows"
        ) from error


def short_name(source: str) -> str:
    """``vitb16`` of ``facebook/dinov3-vitb16-pretrain-lvd1689m``."""
    return re.sub(r"^(?:facebook/)?(?:dinov3-)?(.+?)(?:-pretrain-\w+)?$", r"\1", source)


def _config(source: str) -> "PretrainedConfig":
    from transformers import AutoConfig, Dinov2WithRegistersConfig, DINOv3ViTConfig

    if source == "tiny":
        return tiny_encoder().config
    if (Path(source).expanduser() / "config.json").is_file():
        with readable_folder(Path(source).expanduser(), source) as folder:
            return AutoConfig.from_pretrained(folder, local_files_only=True)
    name = short_name(source)
    if name in _DINOV3:
        hidden_size, blocks, heads, width, gated = _DINOV3[name]
        return DINOv3ViTConfig(
            hidden_size=hidden_size,
            num_hidden_layers=blocks,
            num_attention_heads=heads,
            intermediate_size=width,
            use_gated_mlp=gated,
            num_register_tokens=4,
        )
    size = name.removeprefix("dinov2-with-registers-")
    if name != size and size in _DINOV2:
        hidden_size, blocks, heads = _DINOV2[size]
        return Dinov2WithRegistersConfig(
            hidden_size=hidden_size,
            num_hidden_layers=blocks,
            num_attention_heads=heads,
            patch_size=14,
            image_size=518,
        )
    raise DeltacacheError(
        f"backbone {source!r} is not known here: give one of {', '.join(NAMES)}, or a folder with a config.json"
    )
