"""What is drawn at which step: pure functions of (seed, step), so that a resumed run continues exactly.

B batch size, C clips.
"""

import hashlib
from functools import lru_cache

import numpy as np
import torch

from deltacache.schemas.fingerprints import canonical_json


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed from what it is for, such as ``seed_of("noise", seed, step)``."""
    digest = hashlib.sha256(canonical_json(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def step_rng(purpose: str, seed: int, step: int) -> np.random.Generator:
    """The numpy generator of one step, for one purpose."""
    return np.random.Generator(np.random.PCG64(seed_of(purpose, seed, step)))


def step_generator(purpose: str, seed: int, step: int, device: torch.device) -> torch.Generator:
    """The torch generator of one step, for one purpose. Draws differ between kinds of device."""
    return torch.Generator(device).manual_seed(seed_of(purpose, seed, step))


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """All of ``range(count)`` in the order of one epoch, (C,) int64, read-only."""
    order = step_rng("order", seed, epoch).permutation(count)
    order.setflags(write=False)
    return order


def batch_items(seed: int, step: int, batch_size: int, count: int) -> np.ndarray:
    """Which of ``count`` items form the batch of ``step``, (B,) int64.

    Batches are cut from one endless sequence, epoch after epoch, so every item appears once an epoch
    and no batch is short. Any worker can take any part of a batch.
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, places = np.divmod(positions, count)
    items = np.empty(batch_size, dtype=np.int64)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        chosen = epochs == epoch
        items[chosen] = epoch_order(seed, epoch, count)[places[chosen]]
    return items
