"""Where models run."""

import torch

from deltacache.schemas.errors import DeltacacheError


def choose_device(name: str) -> torch.device:
    """``auto`` (CUDA if there is one), ``cpu`` or ``cuda``.

    Raises:
        DeltacacheError: another name, or no CUDA device here.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise DeltacacheError(f"device {name!r} is not known: give auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise DeltacacheError(
            "device 'cuda' needs a GPU that PyTorch can use, and there is none: give auto or cpu"
        )
    cuda = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if cuda else "cpu")
