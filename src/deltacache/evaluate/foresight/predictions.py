"""What each method says the labelled frame looks like.

Shapes: T frames of a sequence, H horizon, N patches, D hidden, C context.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from deltacache.evaluate.rows import Method
from deltacache.models.deltatok import DeltaTok, Grid
from deltacache.models.futures import decode_future
from deltacache.models.world_model import WorldModel


@dataclass(frozen=True)
class Systems:
    """The models that take part, on one device.

    Attributes:
        worlds: each with its name and fingerprints.
        tokenizer: of the worlds that predict delta tokens, and its fingerprint.
        black: (N, D) of an all-black frame.
        spacing_s: seconds between frames.
    """

    worlds: tuple[tuple[Method, WorldModel], ...]
    tokenizer: tuple[str, DeltaTok] | None
    black: Tensor
    grid: Grid
    context: int
    spacing_s: float

    @torch.inference_mode()
    def predictions(self, frames: Tensor, horizon: int) -> Iterator[tuple[Method, Tensor]]:
        """Yield (N, D) of the last of ``frames`` (T, N, D) from the context that ends ``horizon`` frames before it.

        The bounds are first: the last context frame repeated, and the truth itself. What compression alone costs is
        ``deltatok_one_step``, the delta token of the true last two frames decoded from the true frame before, and, over
        the whole horizon, ``deltatok_parallel`` and ``deltatok`` (closed loop).
        """
        seen = frames[-horizon - self.context : -horizon]
        yield Method("copy_last"), seen[-1]
        yield Method("present"), frames[-1]
        if self.tokenizer is not None:
            fingerprint, tokenizer = self.tokenizer
            yield Method("deltatok", tokenizer=fingerprint), self.reconstruction(frames, horizon)[-1]
            clip = frames[None, -horizon - 1 :]
            parallel = tokenizer.reconstruct_parallel(clip, self.black, self.grid, horizon)
            yield Method("deltatok_parallel", tokenizer=fingerprint), parallel[0, -1]
            one_step = tokenizer.reconstruct_parallel(clip[:, -2:], self.black, self.grid, 1)
            yield Method("deltatok_one_step", tokenizer=fingerprint), one_step[0, -1]
        for method, future in self.futures(frames, horizon):
            yield method, future[-1]

    @torch.inference_mode()
    def futures(self, frames: Tensor, horizon: int) -> Iterator[tuple[Method, Tensor]]:
        """Yield every world model's (H, N, D) of the last ``horizon`` of ``frames`` (T, N, D)."""
        seen = frames[-horizon - self.context : -horizon]
        for method, world in self.worlds:
            yield method, self._future(world, seen, horizon)

    @torch.inference_mode()
    def reconstruction(self, frames: Tensor, horizon: int) -> Tensor:
        """The last frames (H, N, D) through DeltaTok, closed loop; no frames without a tokenizer."""
        if self.tokenizer is None:
            return frames[:0]
        return self.tokenizer[1].reconstruct_closed_loop(frames[None], self.black, self.grid, horizon)[0]

    def _future(self, world: WorldModel, seen: Tensor, horizon: int) -> Tensor:
        count = len(seen) + horizon
        seconds = self.spacing_s * torch.arange(count, device=seen.device, dtype=torch.float32)[None]
        if world.trains_on == "features":
            return world.rollout(seen[None], seconds, grid=self.grid)[0, 0]
        assert self.tokenizer is not None  # checked on opening
        tokenizer = self.tokenizer[1]
        deltas = tokenizer.encode_clip(seen[None], self.black, self.grid)
        futures = world.rollout(deltas, seconds, grid=self.grid)
        return decode_future(tokenizer, seen[None, -1], futures, self.grid)[0, 0]
