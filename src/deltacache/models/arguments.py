"""Constructor arguments read off a checkpoint's parameter names and shapes: released files carry no config."""

import re
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from deltacache.schemas.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]
_RELEASED_HEAD_DIM = 64  # of every ViT the method uses


def tokenizer_arguments(shapes: Shapes) -> dict[str, Any]:
    """Arguments of the ``DeltaTok`` that wrote these weights.

    What leaves no trace keeps the released value: 64 dims a head where neither gate nor QK-norm tell,
    RoPE's base and augmentation, and no frame compression.
    """
    if not any(name.startswith("encoder_blocks.") for name in shapes):
        raise CheckpointError(f"holds no tokenizer: {_what_it_holds(shapes)}; DeltaTok has encoder_blocks.*")
    hidden_size = _size(shapes, "z_embed.weight", "xy_embed.weight", "norm1.weight")
    return {
        "hidden_size": hidden_size,
        "num_heads": _tokenizer_heads(shapes, hidden_size),
        "encoder_layers": _layers(shapes, "encoder_blocks."),
        "decoder_layers": _layers(shapes, "decoder_blocks."),
        "qk_norm": _usual(shapes, "q_norm.weight") is not None,
        "gated_attention": _usual(shapes, "attn_gate.weight") is not None,
        "mlp": "gelu" if _usual(shapes, "mlp.gate_proj.weight") is None else "swiglu",
        "tokens_per_frame": shapes.get("z_embed.weight", (1,))[0],
    }


def world_arguments(shapes: Shapes) -> dict[str, Any]:
    """Arguments of the ``DeltaWorld`` that wrote these weights; heads are taken to have 64 dims."""
    if not any(name.startswith("predictor.") for name in shapes):
        raise CheckpointError(f"holds no world model: {_what_it_holds(shapes)}; DeltaWorld has predictor.*")
    hidden_size = _size(shapes, "predictor.norm.weight", "predictor.head.bias", "norm1.weight")
    mlp_width = _usual(shapes, "mlp.up_proj.weight")
    return {
        "hidden_size": hidden_size,
        "num_heads": max(1, hidden_size // _RELEASED_HEAD_DIM),
        "num_layers": _layers(shapes, "predictor.blocks."),
        "mlp_ratio": mlp_width[0] / hidden_size if mlp_width else 4.0,
        "query": "learned" if "q_embed.weight" in shapes else "noise",
        **({"tokens_per_frame": shapes["place_embed.weight"][0]} if "place_embed.weight" in shapes else {}),
    }


def _tokenizer_heads(shapes: Shapes, hidden_size: int) -> int:
    gate, norm = _usual(shapes, "attn_gate.bias"), _usual(shapes, "q_norm.weight")
    if gate:
        return gate[0]
    return max(1, hidden_size // (norm[0] if norm else _RELEASED_HEAD_DIM))


def _usual(shapes: Shapes, suffix: str) -> tuple[int, ...] | None:
    """The shape most parameters of that name have, so that one misshapen block stands out; None for none."""
    found = [shape for name, shape in shapes.items() if name.endswith(suffix) and shape]
    return statistics.mode(found) if found else None


def _size(shapes: Shapes, *suffixes: str) -> int:
    """Last dimension of the first of these parameters that is there."""
    for suffix in suffixes:
        shape = _usual(shapes, suffix)
        if shape:
            return shape[-1]
    raise CheckpointError(f"does not tell its width: none of {', '.join(suffixes)} is there")


def _layers(shapes: Iterable[str], prefix: str) -> int:
    """Highest block number plus one, so that a block missing in between is reported, not skipped."""
    numbers = (re.match(re.escape(prefix) + r"(\d+)\.", name) for name in shapes)
    return max((int(match[1]) + 1 for match in numbers if match), default=0)


def _what_it_holds(shapes: Shapes) -> str:
    heads = sorted({name.split(".")[0] for name in shapes})
    return f"its parameters are {', '.join(heads[:5])}{', …' if len(heads) > 5 else ''}"
