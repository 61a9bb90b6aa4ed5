"""Content hashes of weights: equal tensors under equal names, equal hash, whatever file they came from."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def weights_sha256(state_dict: Mapping[str, Tensor]) -> str:
    """SHA-256 (64 hex digits) over the sorted names, dtypes, shapes and bytes of all tensors."""
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().cpu()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weights_fingerprint(state_dict: Mapping[str, Tensor]) -> str:
    """First 16 hex digits of ``weights_sha256``: what configs and dataset cards carry."""
    return weights_sha256(state_dict)[:16]
