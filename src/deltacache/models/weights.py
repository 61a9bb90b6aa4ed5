"""Content hashes of weights: equal tensors, equal hash, whatever file they came from."""

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


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
