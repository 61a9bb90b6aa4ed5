"""Content hashes of weights: equal tensors, equal hash, whatever file they came from."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a trained model says about itself.

    Attributes:
        fingerprint: of the weights alone: a released file and our copy of it have the same.
        metadata: its config.json: arguments, and of our own models the data, steps and settings of the training.
    """

    fingerprint: str
    metadata: Mapping[str, Any]


def weights_fingerprint(state_dict: Mapping[str, Tensor]) -> str:
    """First 16 hex digits of the SHA-256 over the sorted names, dtypes, shapes and bytes of all tensors."""
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        digest.update(f"{name}|".encode())
        _add(digest, state_dict[name])
    return digest.hexdigest()[:16]


def tensors_sha256(tensors: Iterable[Tensor]) -> str:
    """SHA-256 (64 hex digits) over dtypes, shapes and bytes, without names or order.

    For models of a library, which renames their parameters from one version to the next.
    """
    digests: list[bytes] = []
    for tensor in tensors:
        digest = hashlib.sha256()
        _add(digest, tensor)
        digests.append(digest.digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def _add(digest: "hashlib._Hash", tensor: Tensor) -> None:
    tensor = tensor.detach().cpu().contiguous()
    digest.update(f"{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
