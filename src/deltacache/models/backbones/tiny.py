"""The built-in encoder: small, random, the same everywhere."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from deltacache.models.backbones.reading import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SEED = 2604_04913


def tiny_encoder() -> "PreTrainedModel":
    """A two-layer DINOv3 ViT of width 64 on 16-px patches, with the same random weights everywhere."""
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    config = DINOv3ViTConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        patch_size=16,
        num_register_tokens=4,
        image_size=64,
    )
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        model = DINOv3ViTModel(config)
    generator = torch.Generator().manual_seed(_SEED)
    for name, parameter in sorted(model.named_parameters()):
        parameter.data = _weights(name, parameter.shape, generator)
    return model


def _weights(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Uniform weights that keep the size of what passes through; norms 1, biases 0, LayerScale 0.3.

    Tokens then say above all what their own patch shows and a little what surrounds them and where they
    are, as trained features do. With the usual std of 0.02, a model this narrow passes on almost nothing
    but the patch itself. Uniform, because that comes from integers exactly: a normal draw may differ in the
    last bit between processors, and so would the hash.
    """
    if "patch_embeddings.weight" in name:
        return _smooth_filters(shape, generator)
    if name.endswith("bias") or "mask_token" in name:
        return torch.zeros(shape)
    if "norm" in name or "layer_scale" in name:
        return torch.full(shape, 0.3 if "layer_scale" in name else 1.0)
    inputs = math.prod(shape[1:]) if name.endswith("weight") else 1  # CLS and registers: std 1
    return (torch.rand(shape, generator=generator) * 2.0 - 1.0) * math.sqrt(3.0 / inputs)


def _smooth_filters(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Patch filters (D, 3, P, P) that see shapes and colours but no single pixels, as trained ones do.

    With independent weights a shape that moves by a pixel gives unrelated tokens, and nothing small can
    learn its motion. Every step is exact in float32: 4 x 4 multiples of 1/128, stretched by weights that
    are multiples of 1/64, times a power of two.
    """
    coarse = torch.randint(-127, 128, (*shape[:2], 4, 4), generator=generator) / 128.0
    return nn.functional.interpolate(coarse, size=tuple(shape[2:]), mode="bilinear") / 64.0
