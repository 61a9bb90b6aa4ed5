"""What turns the pixels of clips into the tokens that are stored.

Shapes: B clips of a forward pass, T frames, H x W pixels, N patches, D hidden size.

Every forward has the same shape (B clips, padded with zeros), so a clip's tokens do not depend on how many
clips were left for it. Tokens are rounded to float16 before anything else uses them: what is computed straight
from videos then equals what is computed from shards. int8 tokens are those float16 ones, quantised.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from deltacache.models.backbone import Backbone, load_backbone
from deltacache.models.checkpoints import load_tokenizer
from deltacache.models.deltatok import DeltaTok
from deltacache.models.devices import allow_tf32, choose_device
from deltacache.pipeline.datasets.dataset import dequantise_on_device, quantise
from deltacache.pipeline.work.lanes import OverlappedForward
from deltacache.schemas.clips import DeltaClip, FeatureClip, PixelClip
from deltacache.schemas.datasets import AskedPrecision, Precision, Size, size_text
from deltacache.schemas.errors import DeltacacheError

_CUDA_FRAMES = 64
"""Frames in a forward pass on a GPU. On a CPU a clip at a time is as fast, and pads nothing (docs/benchmarks.md)."""


class ClipEncoder(Protocol):
    """A seam: pixels of clips in, the stored clips out. Safe to use from several threads at once."""

    batch_clips: int

    def encode(self, clips: Sequence[PixelClip]) -> Sequence[FeatureClip | DeltaClip | None]:
        """Tokens of at most ``batch_clips`` clips, on the host; None for a clip that has some that are not finite."""
        ...


def default_batch_clips(device: torch.device, frames: int) -> int:
    """Clips of ``frames`` frames in a forward pass: about 64 frames on a GPU, one clip on a CPU."""
    return max(1, _CUDA_FRAMES // frames) if device.type == "cuda" else 1


def resolve_precision(device: str | torch.device, precision: AskedPrecision = "auto") -> Precision:
    """``precision``, or for ``auto`` what this device computes fast: bfloat16 on CUDA that has it, else float32.

    bfloat16 is always that of autocast.

    Raises:
        DeltacacheError: an unknown precision, or no such device here.
    """
    if precision not in get_args(AskedPrecision):
        raise DeltacacheError(f"precision {precision!r} is not known: give auto, float32 or bfloat16")
    if precision != "auto":
        return "float32" if precision == "float32" else "bfloat16_autocast"
    chosen = choose_device(device) if isinstance(device, str) else device
    fast = chosen.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16_autocast" if fast else "float32"


def black_patch_tokens_of(backbone: Backbone, image_size: Size) -> np.ndarray:
    """(N, D) float16 of an all-black frame: a constant of backbone, its precision and size.

    Raises:
        DeltacacheError: they are not finite.
    """
    black = backbone.black_patch_tokens(image_size).half().cpu().numpy()
    wrong = int((~np.isfinite(black)).sum())
    if wrong:
        raise DeltacacheError(
            f"backbone {backbone.id} gives tokens that are not finite for a black frame of {size_text(image_size)} px: "
            f"{wrong} of {black.size} numbers are NaN, or beyond 65504, where float16 ends. Its weights are damaged, "
            "or of another model: give others"
        )
    return black


class FeatureEncoder:
    """Patch tokens of a frozen backbone."""

    def __init__(
        self,
        backbone: Backbone,
        device: torch.device,
        batch_clips: int = 1,
        dtype: Literal["float16", "int8"] = "float16",
    ) -> None:
        self.batch_clips = batch_clips
        self._backbone = backbone.to(device)
        self._lanes = OverlappedForward(device)
        self._dtype = dtype

    @torch.inference_mode()
    def encode(self, clips: Sequence[PixelClip]) -> list[FeatureClip | None]:
        """(T, H, W, 3) pixels to (T, N, D) patch tokens, of up to ``batch_clips`` clips of equal shape.

        None for a clip that has some that are not finite.

        Raises:
            ValueError: more clips than a batch, or of different shapes.
        """
        encoded = self._lanes.run([[clip.pixels for clip in clips]], self.batch_clips, self._forward)
        # Scales of int8 tokens are not finite when the tokens are not.
        return [
            FeatureClip(clip.clip_id, tokens, clip.timestamps_s, *scales)
            if np.isfinite(scales[0] if scales else tokens).all()
            else None
            for clip, (tokens, *scales) in zip(clips, encoded, strict=True)
        ]

    def _forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        tokens = patch_tokens_of(self._backbone, pixels)
        return quantise(tokens) if self._dtype == "int8" else (tokens,)


class DeltaEncoder:
    """Delta tokens from patch tokens, or from pixels through a frozen backbone."""

    def __init__(
        self,
        tokenizer: DeltaTok,
        black_patch_tokens: np.ndarray,
        grid: tuple[int, int],
        device: torch.device,
        backbone: Backbone | None = None,
        batch_clips: int = 1,
    ) -> None:
        self.batch_clips = batch_clips
        self._tokenizer = tokenizer.to(device).eval()
        self._black = torch.from_numpy(black_patch_tokens).to(device).float()
        self._grid = grid
        self._backbone = backbone.to(device) if backbone is not None else None
        self._lanes = OverlappedForward(device)

    @torch.inference_mode()
    def encode(self, clips: Sequence[PixelClip]) -> list[DeltaClip | None]:
        """(T, H, W, 3) pixels to (T, D) delta tokens, of up to ``batch_clips`` clips of equal shape.

        None for a clip that has some that are not finite.

        Raises:
            ValueError: built without a backbone, more clips than a batch, or of different shapes.
        """
        if self._backbone is None:
            raise ValueError("this encoder was built without a backbone: use encode_features")
        return self._encode(clips, [[clip.pixels for clip in clips]], self._deltas_of_pixels)

    @torch.inference_mode()
    def encode_features(self, clips: Sequence[FeatureClip]) -> list[DeltaClip | None]:
        """(T, N, D) patch tokens, float16 or int8, to (T, D) delta tokens, of up to ``batch_clips`` clips.

        int8 tokens are dequantised to float16 first, as readers do. None as for ``encode``.

        Raises:
            ValueError: more clips than a batch, of different shapes, or both float16 and int8.
        """
        arrays = [[clip.patch_tokens for clip in clips]]
        scales = [clip.scales for clip in clips if clip.scales is not None]
        if scales:
            arrays.append(scales)
        return self._encode(clips, arrays, self._deltas_of_features)

    def _encode(
        self,
        clips: Sequence[PixelClip] | Sequence[FeatureClip],
        arrays: list[list[np.ndarray]],
        forward: Callable[..., tuple[Tensor, ...]],
    ) -> list[DeltaClip | None]:
        encoded = self._lanes.run(arrays, self.batch_clips, forward)
        return [
            DeltaClip(clip.clip_id, deltas, clip.timestamps_s) if np.isfinite(deltas).all() else None
            for clip, (deltas,) in zip(clips, encoded, strict=True)
        ]

    def _deltas_of_pixels(self, pixels: Tensor) -> tuple[Tensor, ...]:
        assert self._backbone is not None  # checked by encode
        tokens = patch_tokens_of(self._backbone, pixels)
        (deltas,) = self._deltas_of_features(tokens)
        # A clip whose features would be refused is refused here too.
        wrong = ~tokens.isfinite().flatten(1).all(1)
        return (deltas.masked_fill(wrong.view(-1, *[1] * (deltas.ndim - 1)), torch.nan),)

    def _deltas_of_features(self, tokens: Tensor, scales: Tensor | None = None) -> tuple[Tensor, ...]:
        tokens = tokens if scales is None else dequantise_on_device(tokens, scales)
        return (self._tokenizer.encode_clip(tokens.float(), self._black, self._grid).half(),)


def patch_tokens_of(backbone: Backbone, pixels: Tensor) -> Tensor:
    """(B, T, H, W, 3) uint8 to (B, T, N, D) float16, on the device of both."""
    frames = pixels.flatten(0, 1).permute(0, 3, 1, 2)
    return backbone.patch_tokens(frames).half().unflatten(0, pixels.shape[:2])


@dataclass(frozen=True, slots=True)
class ChosenBackbone:
    """Where a backbone is read from, and what is taken of it; see ``load_backbone``."""

    source: str
    layers: tuple[int, ...] | None = None
    pca: Path | None = None

    def load(self, precision: Precision = "float32") -> Backbone:
        """Read it."""
        return load_backbone(self.source, precision, self.layers, self.pca)


def _load(backbone: ChosenBackbone | str, precision: Precision) -> Backbone:
    chosen = ChosenBackbone(backbone) if isinstance(backbone, str) else backbone
    return chosen.load(precision)


def build_feature_encoder(
    backbone: "ChosenBackbone | str",
    device: str,
    *,
    frames: int,
    dtype: Literal["float16", "int8"] = "float16",
    precision: Precision = "float32",
    batch_clips: int | None = None,
) -> FeatureEncoder:
    """Load what a worker needs to extract features of clips of ``frames`` frames."""
    chosen = choose_device(device)
    allow_tf32(chosen, precision != "float32")
    size = batch_clips or default_batch_clips(chosen, frames)
    return FeatureEncoder(_load(backbone, precision), chosen, size, dtype)


def build_delta_encoder(
    tokenizer: Path,
    black_patch_tokens: np.ndarray,
    grid: tuple[int, int],
    device: str,
    backbone: "ChosenBackbone | str | None",
    *,
    frames: int,
    precision: Precision = "float32",
    tokenizer_precision: Precision = "float32",
    batch_clips: int | None = None,
) -> DeltaEncoder:
    """Load what a worker needs to tokenize; ``backbone``, in ``precision``, only when it starts from pixels."""
    chosen = choose_device(device)
    allow_tf32(
        chosen, "float32" not in ({tokenizer_precision, precision} if backbone else {tokenizer_precision})
    )
    return DeltaEncoder(
        load_tokenizer(tokenizer).model.to_precision(tokenizer_precision),
        black_patch_tokens,
        grid,
        chosen,
        _load(backbone, precision) if backbone else None,
        batch_clips or default_batch_clips(chosen, frames),
    )
