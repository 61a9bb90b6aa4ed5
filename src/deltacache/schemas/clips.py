"""The data objects that stages hand to each other. Checked on creation; later stages trust them.

Shapes: T frames, H x W pixels, N patches, D hidden size.
"""

import re
from dataclasses import dataclass

import numpy as np

_SAFE_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")


def check_id(name: str, what: str = "id") -> str:
    """Return ``name`` if it is safe as a file name and as a WebDataset key (no dots, no slashes)."""
    if not _SAFE_ID.fullmatch(name):
        raise ValueError(f"{what} {name!r} must be 1-128 letters, digits, '_' or '-'")
    return name


def clip_id_of(video_id: str, view: int) -> str:
    """One video under one view: ``<video_id>-v<view>``."""
    return check_id(f"{video_id}-v{view:03d}", "clip id")


def _check_timestamps(clip_id: str, timestamps_s: np.ndarray, frames: int) -> None:
    if timestamps_s.shape != (frames,) or timestamps_s.dtype != np.float32:
        raise ValueError(
            f"{clip_id}: timestamps_s is {timestamps_s.dtype}{timestamps_s.shape}, must be float32({frames},)"
        )
    if not np.isfinite(timestamps_s).all() or (np.diff(timestamps_s) < 0).any():
        raise ValueError(f"{clip_id}: timestamps_s must be finite and non-decreasing, got {timestamps_s}")


def _check_scales(clip_id: str, scales: np.ndarray, shape: tuple[int, ...]) -> None:
    if scales.shape != shape or scales.dtype != np.float32:
        raise ValueError(f"{clip_id}: scales are {scales.dtype}{scales.shape}, must be float32{shape}")
    if not (scales >= 0).all() or not np.isfinite(scales).all():
        raise ValueError(
            f"{clip_id}: scales must be finite and not negative, they go from {scales.min()} to "
            f"{scales.max()}: the backbone's tokens are not finite"
        )


@dataclass(frozen=True, slots=True)
class CropBox:
    """A crop in pixels of the upright frame."""

    top: int
    left: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if self.top < 0 or self.left < 0 or self.height < 1 or self.width < 1:
            raise ValueError(f"{self} is not inside any frame")


@dataclass(frozen=True, slots=True)
class PixelClip:
    """Decoded frames of one clip, cropped, flipped and resized.

    Attributes:
        pixels: (T, H, W, 3) uint8 RGB.
        timestamps_s: (T,) float32, seconds from the first frame of the video, non-decreasing.
        frame_indices: T indices in presentation order.
        decoder: ``decord`` or ``pyav``, with the way of access, such as ``decord-seek``.
        duplicate_frames: how many of the T frames repeat the one before (spacing finer than the
            video, or the video ended).
        windows: of a piece of a video, not a clip: at which frames of all its pieces the video's clips begin.
    """

    clip_id: str
    video_uri: str
    view: int
    pixels: np.ndarray
    timestamps_s: np.ndarray
    frame_indices: tuple[int, ...]
    crop: CropBox
    flip: bool
    decoder: str
    duplicate_frames: int
    windows: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_id(self.clip_id, "clip id")
        frames = len(self.frame_indices)
        shape = self.pixels.shape
        if self.pixels.dtype != np.uint8 or len(shape) != 4 or shape[0] != frames or shape[3] != 3:
            raise ValueError(
                f"{self.clip_id}: pixels are {self.pixels.dtype}{shape}, must be uint8({frames}, H, W, 3)"
            )
        _check_timestamps(self.clip_id, self.timestamps_s, frames)


@dataclass(frozen=True, slots=True, repr=False)
class FeatureClip:
    """Patch tokens of one clip as they lie on disk.

    Attributes:
        patch_tokens: (T, N, D) float16, or int8 with ``scales``.
        timestamps_s: (T,) float32, seconds from the first frame of the video.
        scales: (T, N) float32 of int8 tokens, finite and not negative: a token is its values times its
            scale. None of float16 ones.
    """

    clip_id: str
    patch_tokens: np.ndarray
    timestamps_s: np.ndarray
    scales: np.ndarray | None = None

    def __post_init__(self) -> None:
        check_id(self.clip_id, "clip id")
        wanted = np.float16 if self.scales is None else np.int8
        if self.patch_tokens.ndim != 3 or self.patch_tokens.dtype != wanted:
            raise ValueError(
                f"{self.clip_id}: patch_tokens are {self.patch_tokens.dtype}{self.patch_tokens.shape} "
                f"{'with' if self.scales is not None else 'without'} scales, must be float16(T, N, D) without "
                "or int8(T, N, D) with them"
            )
        if self.scales is not None:
            _check_scales(self.clip_id, self.scales, self.patch_tokens.shape[:2])
        _check_timestamps(self.clip_id, self.timestamps_s, self.patch_tokens.shape[0])

    def __repr__(self) -> str:
        return f"FeatureClip({self.clip_id}, patch_tokens={self.patch_tokens.shape})"


@dataclass(frozen=True, slots=True, repr=False)
class DeltaClip:
    """Delta tokens of one clip; token t encodes frame t against frame t-1, frame -1 being black.

    Attributes:
        delta_tokens: (T, D) float16; (T, M, D) of a tokenizer with M > 1 tokens per frame.
        timestamps_s: (T,) float32, seconds from the first frame of the video.
    """

    clip_id: str
    delta_tokens: np.ndarray
    timestamps_s: np.ndarray

    def __post_init__(self) -> None:
        check_id(self.clip_id, "clip id")
        if self.delta_tokens.ndim not in (2, 3) or self.delta_tokens.dtype != np.float16:
            raise ValueError(
                f"{self.clip_id}: delta_tokens are {self.delta_tokens.dtype}{self.delta_tokens.shape}, "
                "must be float16(T, D), or (T, M, D) with M tokens per frame"
            )
        _check_timestamps(self.clip_id, self.timestamps_s, self.delta_tokens.shape[0])

    def __repr__(self) -> str:
        return f"DeltaClip({self.clip_id}, delta_tokens={self.delta_tokens.shape})"
