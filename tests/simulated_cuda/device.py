"""A CUDA device without a GPU: shapes, dtypes and devices, but no numbers (``simulated_cuda.cpp`` has the hooks).

Import this before torch, in a process of its own; it compiles the hooks once and keeps them. In ``simulated`` a step
runs on tensors of "cuda" as it would on a GPU. What depends on their numbers, and so would make the host wait for a
GPU, is an error.

Not covered: streams and races of pinned memory, NCCL, kernels, generators on the device, numerics, time.
"""

import ctypes
import hashlib
import os
import subprocess
import sys
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_SOURCE = Path(__file__).with_name("simulated_cuda.cpp")
_TORCH = next(Path(place) / "torch" for place in sys.path if (Path(place) / "torch" / "lib").is_dir())
FREE, TOTAL = 139 << 30, 141 << 30
"""Memory of an H200."""


def build() -> Path:
    """The compiled hooks: made once for each source and each torch, some 4 seconds, then kept."""
    version = (_TORCH / "version.py").read_bytes()
    name = hashlib.sha256(_SOURCE.read_bytes() + version).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"deltacache-simulated-cuda-{os.getuid()}-{name}.so"
    if not library.exists():
        new = library.with_suffix(f".{os.getpid()}")
        flags = ["-std=c++20", "-O1", "-shared", "-fPIC", f"-I{_TORCH / 'include'}"]
        subprocess.run(["g++", *flags, str(_SOURCE), "-o", str(new)], check=True)
        new.rename(library)
    return library


def _load(library: Path) -> None:
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(_TORCH / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


if "torch" in sys.modules:
    raise ImportError("the simulated device must be imported before torch")
_load(build())

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.amp import autocast_mode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda")
_PRODUCTS = (
    "aten.mm",
    "aten.bmm",
    "aten.addmm",
    "aten.baddbmm",
    "aten.conv",
    "aten.linear",
    "aten.matmul",
    "aten._scaled_dot",
)
_SIZED_BY_NUMBERS = (
    "aten.nonzero",
    "aten.index.Tensor",
    "aten.bincount",
    "aten.masked_select",
    "aten.unique",
)
_NO_KERNEL = ("aten.detach", "aten.empty", "aten.resize_", "aten.new_empty", "aten.set_", "aten.lift")


class Watch(TorchDispatchMode):
    """Counts what a step does on the device.

    Attributes:
        launches: kernels by name of the operation; views and allocations are none.
        waits: what the host would wait for: copies into pageable memory or out of it, blocking ones, and results
            whose size depends on numbers.
        live, peak: bytes of living storages on the device.
        dtypes: of the inputs of matrix products and convolutions, by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.waits: list[str] = []
        self.dtypes: Counter[str] = Counter()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def follow(self, tensor: Any) -> None:
        """Count a tensor's storage while it lives."""
        if not isinstance(tensor, Tensor) or tensor.device.type != "cuda":
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if not isinstance(size, int):  # as many as numbers say: not known here
            return
        if key not in self._seen:
            self._seen.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, key, size).atexit = False

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func)
        inputs = [each for each in tree_leaves((args, kwargs or {})) if isinstance(each, Tensor)]
        outputs = [each for each in tree_leaves(out) if isinstance(each, Tensor)]
        devices = {each.device.type for each in (*inputs, *outputs) if each.dim() or len(inputs) < 2}
        if any(each.device.type == "cuda" for each in outputs):
            if not func.is_view and not name.startswith(_NO_KERNEL):
                self.launches[name] += 1
            if name.startswith(_PRODUCTS):
                # The first of attention: others are sums that its backward pass keeps in float32.
                first = "_scaled_dot" in name or "conv" in name
                self.dtypes[str(inputs[0 if first else -1].dtype)] += 1
        if name.startswith(("aten._to_copy", "aten.copy_", "aten.to.")) and devices == {"cpu", "cuda"}:
            blocking = not (kwargs or {}).get("non_blocking", len(args) > 2 and args[2])
            host = [each for each in (*inputs, *outputs) if each.device.type == "cpu"]
            if blocking or not all(_pinned(each) for each in host):
                self.waits.append(f"{name} {[tuple(each.shape) for each in inputs]}")
        if (kwargs or {}).get("pin_memory"):
            _PINNED.update(each.untyped_storage()._cdata for each in outputs)
        if any(not isinstance(size, int) for each in outputs for size in each.shape) and name.startswith(
            _SIZED_BY_NUMBERS
        ):
            self.waits.append(name)
        for each in outputs:
            self.follow(each)
        return out


_PINNED: set[int] = set()
"""Storages of pinned memory; a fake tensor does not know."""


def _pinned(tensor: Tensor) -> bool:
    return tensor.untyped_storage()._cdata in _PINNED


def _pin(tensor: Tensor) -> Tensor:
    pinned = torch.empty_like(tensor)
    _PINNED.add(pinned.untyped_storage()._cdata)
    return pinned


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """The fused kernel that a GPU would choose; without one here PyTorch would hold all scores."""
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (each.to(torch.get_autocast_dtype("cuda")) for each in (query, key, value))
    aten = torch.ops.aten
    if attn_mask is None and query.dtype != torch.float32:
        return aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )[0]
    bias = attn_mask
    if bias is not None:
        shape = (*query.shape[:2], query.shape[2], key.shape[2])
        bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill(~bias, float("-inf")).expand(shape)
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, True, dropout_p, is_causal, scale=scale
    )[0]


def _to(module: nn.Module, *asked: Any, **_: Any) -> nn.Module:
    """Modules are built where they stay; another dtype is new weights."""
    for dtype in (each for each in asked if isinstance(each, torch.dtype)):
        for part in module.modules():
            for name, weight in part._parameters.items():
                if weight is not None:
                    part._parameters[name] = nn.Parameter(weight.detach().to(dtype), weight.requires_grad)
    return module


@contextmanager
def simulated() -> Iterator[FakeTensorMode]:
    """Inside, "cuda" is there, and tensors have no numbers. Modules are built under ``torch.device("cuda")``."""
    FakeTensorMode.avoid_device_init = True
    cuda = torch.cuda
    cuda.is_available = lambda: True
    cuda.is_bf16_supported = lambda *_, **__: True
    cuda.mem_get_info = lambda *_, **__: (FREE, TOTAL)
    cuda.synchronize = lambda *_, **__: None
    cuda.current_device = lambda: 0
    cuda.is_initialized = lambda: True
    cuda.max_memory_allocated = lambda *_, **__: 0
    autocast_mode._cuda_ok = True
    nn.init.trunc_normal_ = nn.init._no_grad_trunc_normal_ = lambda tensor, *_, **__: tensor
    nn.Module.to = _to
    nn.functional.scaled_dot_product_attention = _attention
    Tensor.pin_memory = lambda tensor, *_: _pin(tensor)
    Tensor.is_pinned = lambda tensor, *_: _pinned(tensor)
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()) as mode:
        yield mode
