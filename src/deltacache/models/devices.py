"""Where models run."""

import platform
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from deltacache.schemas.datasets import TrainingPrecision
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
