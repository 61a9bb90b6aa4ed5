"""Where models run."""

import functools
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from deltacache.schemas.datasets import Precision, TrainingPrecision
from deltacache.schemas.errors import DeltacacheError


def choose_device(name: str) -> torch.device:
    """``auto`` (CUDA if there is one, else the CPU), ``cpu``, ``cuda``, one of several such as ``cuda:1``, or ``mps``.

    Raises:
        DeltacacheError: another name, or no such device here.
    """
    kind, _, number = name.partition(":")
    if kind not in ("auto", "cpu", "cuda", "mps") or (number and not (kind == "cuda" and number.isdigit())):
        raise DeltacacheError(f"device {name!r} is not known: give auto, cpu, cuda or mps")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise DeltacacheError(
            f"device {name!r} needs a Mac's GPU that PyTorch can use, and there is none: give auto or cpu"
        )
    if kind == "cuda" and not torch.cuda.is_available():
        raise DeltacacheError(
            f"device {name!r} needs a GPU that PyTorch can use, and there is none: give auto or cpu"
        )
    if kind == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


@contextmanager
def shapes_only() -> Iterator[None]:
    """Modules that are built inside have shapes and no weights; initialisation draws no random numbers."""
    with torch.device("meta"), _WithoutNormal():
        yield


class _WithoutNormal(TorchFunctionMode):
    """Leaves out ``normal_``: on the meta device PyTorch imports its compiler for it, which takes a second or two."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.init.normal_:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def autocast_to(kind: str, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Autocast on a kind of device; ``None``: off. The meta device, which computes nothing, has none to turn off."""
    if kind == "meta":
        return nullcontext()
    return torch.autocast(kind, dtype=dtype, enabled=dtype is not None)


def processor_kind() -> dict[str, str]:
    """What the last bits of a forward pass depend on: processor and what torch uses of it, GPU if used, torch."""
    names = [platform.processor() or platform.machine()]
    about = Path("/proc/cpuinfo")
    if about.exists():
        lines = (line.partition(":") for line in about.read_text().splitlines())
        names = [value.strip() for name, _, value in lines if name.strip() == "model name"] or names
    kind = {
        "cpu": names[0],
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }
    return kind | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_initialized() else {})


def forward_precision(device: torch.device, asked: TrainingPrecision = "auto") -> torch.autocast:
    """What training computes its products in: bfloat16 if it is asked for, or by itself on CUDA.

    Weights, gradients and optimizer stay float32.
    """
    fast = asked == "bfloat16" or (asked == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def allow_tf32(device: torch.device, allowed: bool) -> None:
    """Whether products of float32 that are left on CUDA may take TF32, whose mantissa is as long as float16's.

    PyTorch has this switch for a whole process, and by default only convolutions take TF32. So importing this package
    changes nothing; each command sets it once, where its device is known: off for ``float32``, else on.
    """
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = allowed
        torch.backends.cudnn.allow_tf32 = allowed


# ----------------------------------------------------------------------------------------------------
# How much memory is free, of a GPU or of the host.
# ----------------------------------------------------------------------------------------------------


_CGROUPS = tuple(
    (*(f"/sys/fs/cgroup/{name}" for name in files), cached)
    for files, cached in (
        (("memory.max", "memory.current", "memory.stat"), "inactive_file"),
        (
            ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
            "total_inactive_file",
        ),
    )
)


def free_bytes(device: torch.device) -> int:
    """Memory that this process can still take: of the GPU, or of the host within its control group."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    except OSError:  # not Linux
        found = []
    for limit, used, stat, cached in _CGROUPS:
        try:
            left = int(Path(limit).read_text()) - int(Path(used).read_text())
            counts = dict(line.split() for line in Path(stat).read_text().splitlines())
        except (OSError, ValueError):  # no such group, or "max": no limit
            continue
        found.append(left + int(counts.get(cached, 0)))  # files that the kernel can drop
    return min(found) if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


# ----------------------------------------------------------------------------------------------------
# The precision that a trained model computes its results in: exact, or products in bfloat16.
# ----------------------------------------------------------------------------------------------------


_Model = TypeVar("_Model", bound="InPrecision")
_Given = ParamSpec("_Given")


class InPrecision(nn.Module):
    """A model whose methods marked with ``in_precision`` compute in the precision that ``to_precision`` names.

    Until it has named one they compute in that of their caller, as training under autocast does.
    """

    _products: torch.dtype | None = None
    _precision: Precision | None = None

    def to_precision(self, precision: Precision) -> Self:
        """Have results computed in ``precision`` from now on; they are float32 in any case.

        ``bfloat16_autocast``: products in bfloat16, residual stream and norms in float32. The weights of linear layers
        are rounded once instead of in every pass, which gives the same bits, so the model can be neither trained nor
        saved any more.
        """
        if precision == "bfloat16":
            raise ValueError("bfloat16 throughout is not computed: take bfloat16_autocast or float32")
        self._precision, self._products = precision, None
        if precision == "bfloat16_autocast":
            self._products = torch.bfloat16
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    module.to(torch.bfloat16)
        return self


def in_precision(
    method: Callable[Concatenate[_Model, _Given], Tensor],
) -> Callable[Concatenate[_Model, _Given], Tensor]:
    """Have a method of an ``InPrecision`` model compute in that model's own precision."""

    @functools.wraps(method)
    def run(self: _Model, *args: _Given.args, **kwargs: _Given.kwargs) -> Tensor:
        if self._precision is None:
            return method(self, *args, **kwargs)
        with autocast_to(next(self.parameters()).device.type, self._products):
            return method(self, *args, **kwargs).float()

    return run
