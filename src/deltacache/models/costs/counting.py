"""Counting the FLOP of whatever runs: torch's counter, with every kernel of attention registered.

A multiplication and the addition behind it are 2 FLOP; only matrix products, convolutions and attention count. Torch's
own table lacks several kernels of ``scaled_dot_product_attention``, the CPU's among them, and takes them for nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

Shape = torch.Size
_aten: Any = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Flops:
    """FLOP of one computation.

    Attributes:
        total: of all products.
        attention: those of queries with keys and of weights with values, in the forward pass; part of ``total``.
    """

    total: int
    attention: int = 0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.total + other.total, self.attention + other.attention)

    def __mul__(self, times: int) -> "Flops":
        return Flops(self.total * times, self.attention * times)

    @property
    def attention_twice(self) -> int:
        """What comes out if attention is counted as one operation and once more as the products in it."""
        return self.total + self.attention


def count_flops(run: Callable[[], Any]) -> Flops:
    """FLOP of what ``run`` does, on any device; tensors on meta are counted without being computed.

    Raises:
        NotImplementedError: it runs an attention kernel that has no formula here.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    counter.mod_tracker = _NoModules()
    with _UnknownAttention(counter), counter, _AttentionShare(counter) as share:
        run()
    return Flops(counter.get_total_flops(), share.flop)


class _NoModules(ModuleTracker):
    """Follows no modules: its hooks refuse views that were made without gradients, and take half of the time."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class _AttentionShare(TorchFunctionMode):
    """How much of what is counted happens within ``scaled_dot_product_attention``, whatever it is made of."""

    def __init__(self, counter: FlopCounterMode) -> None:
        super().__init__()
        self._counter, self.flop = counter, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self._counter.get_total_flops()
        out = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            self.flop += self._counter.get_total_flops() - before
        return out


class _UnknownAttention(TorchDispatchMode):
    """Refuses attention that the counter would take for nothing."""

    def __init__(self, counter: FlopCounterMode) -> None:
        super().__init__()
        self._known = counter.flop_registry

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func._overloadpacket
        if "attention" in str(packet) and packet not in self._known:
            raise NotImplementedError(
                f"{packet} has no formula, so its products would not count: add one to {__name__}._FORMULAS"
            )
        return func(*args, **(kwargs or {}))


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Scores, and values mixed by them: query (..., Q, d), key (..., T, d), value (..., T, v)."""
    return 2 * query.numel() * key[-2] + 2 * query[:-1].numel() * key[-2] * value[-1]


def _attention_backward(_gradient: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """The scores again, then the gradients of weights, values, queries and keys."""
    with_keys, with_values = 2 * query.numel() * key[-2], 2 * query[:-1].numel() * key[-2] * value[-1]
    return 3 * with_keys + 2 * with_values


def _added_product(_added: Shape, left: Shape, right: Shape, *_: Any, **__: Any) -> int:
    return 2 * left.numel() * right[-1]


_FORMULAS: dict[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _aten._scaled_dot_product_fused_attention_overrideable: _attention,
    _aten._scaled_dot_product_fused_attention_overrideable_backward: _attention_backward,
    _aten._scaled_dot_product_attention_math_for_mps: _attention,
    _aten.baddbmm_: _added_product,
    _aten.addmm_: _added_product,
}
