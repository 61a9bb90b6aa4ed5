"""What turns the pixels of one clip into the tokens that are stored.

Shapes: T frames, S image size, N patches, D hidden size.

Every forward has the same shape (one clip), so a clip's tokens depend neither on its neighbours nor on how
the work was split. Tokens are rounded to float16 before anything else uses them: what is computed straight
from videos then equals what is computed from shards.
"""

from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from deltacache.models.backbone import Backbone, load_backbone
from deltacache.models.checkpoints import load_tokenizer
from deltacache.models.deltatok import DeltaTok
from deltacache.models.devices import choose_device
from deltacache.schemas.clips import DeltaClip, FeatureClip, PixelClip


class ClipEncoder(Protocol):
    """A seam: pixels of one clip in, the stored clip out."""

    def encode(self, clip: PixelClip) -> FeatureClip | DeltaClip:
        """Tokens of one clip, float16, on the host."""
        ...


def patch_tokens_of(backbone: Backbone, pixels: np.ndarray, device: torch.device) -> torch.Tensor:
    """(T, S, S, 3) uint8 to (T, N, D) float16 on ``device``."""
    frames = torch.from_numpy(np.ascontiguousarray(pixels)).to(device).permute(0, 3, 1, 2)
    return backbone.patch_tokens(frames).half()


def black_patch_tokens_of(backbone: Backbone, image_size: int) -> np.ndarray:
    """(N, D) float16 of an all-black frame: a constant of backbone and size."""
    return backbone.black_patch_tokens(image_size).half().cpu().numpy()


class FeatureEncoder:
    """Patch tokens of a frozen backbone."""

    def __init__(self, backbone: Backbone, device: torch.device) -> None:
        self._backbone = backbone.to(device)
        self._device = device

    @torch.inference_mode()
    def encode(self, clip: PixelClip) -> FeatureClip:
        """(T, S, S, 3) pixels to (T, N, D) patch tokens."""
        tokens = patch_tokens_of(self._backbone, clip.pixels, self._device)
        return FeatureClip(clip.clip_id, tokens.cpu().numpy(), clip.timestamps_s)


class DeltaEncoder:
    """Delta tokens from patch tokens, or from pixels through a frozen backbone."""

    def __init__(
        self,
        tokenizer: DeltaTok,
        black_patch_tokens: np.ndarray,
        grid: tuple[int, int],
        device: torch.device,
        backbone: Backbone | None = None,
    ) -> None:
        self._tokenizer = tokenizer.to(device).eval()
        self._black = torch.from_numpy(black_patch_tokens).to(device).float()
        self._grid = grid
        self._device = device
        self._backbone = backbone.to(device) if backbone is not None else None

    @torch.inference_mode()
    def encode(self, clip: PixelClip) -> DeltaClip:
        """(T, S, S, 3) pixels to (T, D) delta tokens."""
        if self._backbone is None:
            raise ValueError("this encoder was built without a backbone: use encode_features")
        tokens = patch_tokens_of(self._backbone, clip.pixels, self._device)
        return self._deltas(clip.clip_id, tokens, clip.timestamps_s)

    @torch.inference_mode()
    def encode_features(self, clip: FeatureClip) -> DeltaClip:
        """(T, N, D) patch tokens to (T, D) delta tokens."""
        tokens = torch.from_numpy(np.array(clip.patch_tokens)).to(self._device)
        return self._deltas(clip.clip_id, tokens, clip.timestamps_s)

    def _deltas(self, clip_id: str, patch_tokens: torch.Tensor, timestamps_s: np.ndarray) -> DeltaClip:
        deltas = self._tokenizer.encode_clip(patch_tokens.float()[None], self._black, self._grid)[0]
        return DeltaClip(clip_id, deltas.half().cpu().numpy(), timestamps_s)


def build_feature_encoder(backbone: str, device: str) -> FeatureEncoder:
    """Load what a worker needs to extract features."""
    return FeatureEncoder(load_backbone(backbone), choose_device(device))


def build_delta_encoder(
    tokenizer: Path, black_patch_tokens: np.ndarray, grid: tuple[int, int], device: str, backbone: str | None
) -> DeltaEncoder:
    """Load what a worker needs to tokenize; ``backbone`` only when it starts from pixels."""
    return DeltaEncoder(
        load_tokenizer(tokenizer).model,
        black_patch_tokens,
        grid,
        choose_device(device),
        load_backbone(backbone) if backbone else None,
    )
