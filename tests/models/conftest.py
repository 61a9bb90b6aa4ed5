"""The released code's small models and what they answered, with sizes read from the files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from deltacache.models.backbone import Backbone, load_backbone
from deltacache.models.deltatok import DeltaTok
from deltacache.models.worlds.deltaworld import DeltaWorld

VARIANTS: dict[str, dict[str, Any]] = {
    "released": {},
    "paper": {"qk_norm": False, "gated_attention": False, "mlp": "gelu"},
    "frame_compression": {"frame_compression": "learned"},
}
Read = Callable[[str], dict[str, Tensor]]


@pytest.fixture(scope="session")
def read(golden: Path) -> Read:
    """Tensors of one golden file of ``tiny/``."""
    return lambda name: load_file(golden / "tiny" / f"{name}.safetensors")


@pytest.fixture(scope="session")
def heads(golden: Path) -> int:
    return json.loads((golden / "tiny" / "meta.json").read_text())["heads"]


@pytest.fixture(scope="session")
def golden_backbone(golden: Path) -> Backbone:
    return load_backbone(str(golden / "tiny" / "backbone"))


@pytest.fixture(scope="session")
def grid(golden_backbone: Backbone, read: Read) -> tuple[int, int]:
    frames = read("deltatok_released_io")["frames"]
    return frames.shape[-2] // golden_backbone.patch_size, frames.shape[-1] // golden_backbone.patch_size


@pytest.fixture
def golden_tokenizer(read: Read, heads: int) -> Callable[[str], DeltaTok]:
    """A variant of the tokenizer with its golden weights, in eval mode."""

    def build(variant: str) -> DeltaTok:
        weights = read(f"deltatok_{variant}")
        layers = [
            1 + max(_block(name) for name in weights if name.startswith(part)) for part in ("enc", "dec")
        ]
        model = DeltaTok(weights["z_embed.weight"].shape[1], heads, *layers, **VARIANTS[variant])
        model.load_state_dict(weights)
        return model.eval()

    return build


@pytest.fixture
def golden_world(read: Read, heads: int) -> Callable[[str], DeltaWorld]:
    """``deltaworld`` or ``deltaworld_discriminative`` with its golden weights, in eval mode."""

    def build(name: str) -> DeltaWorld:
        weights = read(name)
        layers = 1 + max(_block(key) for key in weights if ".blocks." in key)
        query = "learned" if "q_embed.weight" in weights else "noise"
        model = DeltaWorld(weights["predictor.norm.weight"].shape[0], heads, layers, query=query)
        model.load_state_dict(weights)
        return model.eval()

    return build


def _block(name: str) -> int:
    return next(int(part) for part in name.split(".") if part.isdigit())


@pytest.fixture(scope="session")
def assert_golden() -> Callable[..., None]:
    """The tolerance promised for float32."""

    def check(actual: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)

    return check
