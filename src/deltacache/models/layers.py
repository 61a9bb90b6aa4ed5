"""Outputs of several blocks of an encoder, each through its final norm, as dense heads and forecasters take them.

DINO-Foresight (Karypidis et al. 2024, arXiv 2412.11673; method section 4, Table D) joins blocks 2, 5, 8 and 11 of a
DINOv2 ViT-B/14 with registers: blocks are counted from 0, and the final norm that was trained for the last of them
is applied to all.

Shapes: B images, P prefix tokens, N patches, D width of the encoder, L layers.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltacache.schemas.errors import MismatchError

_NORMS = ("layernorm", "norm", "post_layernorm")
"""Names of the final norm in the encoders of transformers."""


class LayerOutputs:
    """Listens to blocks of an encoder. Safe to use from several threads at once: each hears its own forward.

    Raises:
        MismatchError: the encoder has no such blocks, or they are not in increasing order.
    """

    def __init__(self, encoder: nn.Module, layers: Sequence[int], name: str) -> None:
        path, blocks = _blocks(encoder, name)
        if not layers or min(layers) < 0 or max(layers) >= len(blocks) or sorted(set(layers)) != list(layers):
            raise MismatchError(
                f"layers {','.join(map(str, layers))} of {name}: give block numbers from 0 to {len(blocks) - 1}, "
                "in increasing order and none twice"
            )
        self._norm = _final_norm(encoder, path)
        self._heard = threading.local()
        for place, layer in enumerate(layers):
            blocks[layer].register_forward_hook(self._hook(place))

    def of(self, forward: Callable[[], Tensor]) -> Tensor:
        """What the blocks give in ``forward``: (B, P + N, L * D), the first layer's channels first.

        Args:
            forward: runs the encoder once, giving its last hidden state (B, P + N, D).
        """
        heard = self._heard.outputs = dict[int, Tensor]()
        try:
            forward()
        finally:
            del self._heard.outputs
        return torch.cat([self._norm(heard[place]) for place in sorted(heard)], dim=-1)

    def _hook(self, place: int) -> Callable[[nn.Module, Any, Any], None]:
        def hear(_module: nn.Module, _inputs: Any, output: Any) -> None:
            outputs = getattr(self._heard, "outputs", None)
            if outputs is not None:
                outputs[place] = output[0] if isinstance(output, tuple) else output

        return hear


def _blocks(encoder: nn.Module, name: str) -> tuple[str, nn.ModuleList]:
    """The transformer blocks: the one list of as many modules as the config has layers."""
    count = getattr(getattr(encoder, "config", None), "num_hidden_layers", None)
    lists = {path: part for path, part in encoder.named_modules() if isinstance(part, nn.ModuleList)}
    outermost = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    found = [(path, lists[path]) for path in outermost if len(lists[path]) == count]
    if len(found) != 1:
        raise MismatchError(
            f"layers of {name} are not known: {type(encoder).__name__} has no single list of {count} blocks; "
            "leave --layers out, or take a ViT such as DINOv2 or DINOv3"
        )
    return found[0]


def _final_norm(encoder: nn.Module, blocks: str) -> nn.Module:
    """What comes after the last block; nothing in encoders without one."""
    norms = [
        part
        for path, part in encoder.named_modules()
        if path.rpartition(".")[2] in _NORMS and not path.startswith(f"{blocks}.")
    ]
    return norms[-1] if norms else nn.Identity()
