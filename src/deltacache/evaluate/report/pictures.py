"""Features and frames as small pictures that lie inside the page.

Shapes: N patches, D hidden.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

_GAP = 0.04  # between pictures of a film, as a share of their width
_COLOUR_RANGE = (1.0, 99.0)  # percentiles of the true features that become dark and bright


@dataclass(frozen=True)
class Projection:
    """From features to colours, the same for true and predicted ones.

    Attributes:
        mean: (D,).
        axes: (3, D) the first three principal axes: red, green, blue.
        low: (3,) what becomes 0.
        high: (3,) what becomes 255.
    """

    mean: np.ndarray
    axes: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def picture(self, tokens: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
        """(rows, columns, 3) uint8 of one frame's tokens (N, D); a pixel a patch."""
        values = (tokens.astype(np.float32) - self.mean) @ self.axes.T
        scaled = (values - self.low) / np.maximum(self.high - self.low, 1e-12)
        return np.round(255 * scaled.clip(0, 1)).astype(np.uint8).reshape(*grid, 3)


def fit_projection(features: Sequence[np.ndarray]) -> Projection:
    """Principal axes of true features, each (..., N, D); predictions take no part."""
    tokens = np.concatenate([each.reshape(-1, each.shape[-1]) for each in features]).astype(np.float32)
    mean = tokens.mean(0)
    covariance = np.cov(tokens - mean, rowvar=False).reshape(tokens.shape[1], tokens.shape[1])
    axes = np.linalg.eigh(covariance)[1][:, ::-1][:, :3].T
    axes = axes * np.where(
        axes.sum(1, keepdims=True) < 0, -1, 1
    )  # a sign that does not depend on the library
    low, high = np.percentile((tokens - mean) @ axes.T, _COLOUR_RANGE, axis=0)
    return Projection(mean, axes.astype(np.float32), low, high)


def change_picture(
    tokens: np.ndarray, before: np.ndarray, grid: tuple[int, int], largest: float
) -> np.ndarray:
    """(rows, columns, 4) uint8: how far each patch (N, D) moved, opaque at ``largest``."""
    distance = np.linalg.norm(tokens.astype(np.float32) - before.astype(np.float32), axis=-1)
    picture = np.empty((*grid, 4), np.uint8)
    picture[..., :3] = (213, 94, 0)
    picture[..., 3] = np.round(255 * (distance / max(largest, 1e-12)).clip(0, 1)).reshape(grid)
    return picture


def largest_change(futures: np.ndarray, before: np.ndarray) -> float:
    """The largest distance of a patch of true futures (..., N, D) from ``before`` (N, D)."""
    distance = np.linalg.norm(futures.astype(np.float32) - before.astype(np.float32), axis=-1)
    return float(distance.max())


def film(cells: Sequence[np.ndarray | None], side: int) -> np.ndarray:
    """Pictures of one size side by side, (h, n (w + gap), 4) uint8; what is missing stays transparent.

    Args:
        cells: (h, w, 3 or 4) uint8 each; those of more than ``side`` pixels are made smaller.
    """
    known = [_fitted(each, side) for each in cells if each is not None]
    height, width = known[0].shape[:2]
    gap = gap_of(width)
    strip = np.zeros((height, len(cells) * (width + gap), 4), np.uint8)
    left = iter(known)
    for at, cell in enumerate(cells):
        if cell is not None:
            start = at * (width + gap)
            strip[:, start : start + width] = next(left)
    return strip


def gap_of(width: int) -> int:
    """Pixels between pictures of a film."""
    return max(1, round(width * _GAP))


def _fitted(picture: np.ndarray, side: int) -> np.ndarray:
    image = Image.fromarray(picture).convert("RGBA")
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.asarray(image)


def webp_uri(picture: np.ndarray, *, lossless: bool) -> str:
    """A picture (h, w, 4) uint8 as a ``data:`` address."""
    buffer = io.BytesIO()
    options = {"lossless": True, "exact": False} if lossless else {"quality": 82, "alpha_quality": 100}
    Image.fromarray(picture).save(buffer, format="webp", method=4, **options)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
