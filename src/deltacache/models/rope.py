"""Rotary position embeddings: 2-D on patches (DINOv3) and 1-D on seconds (DeltaWorld)."""

# B batch, T tokens, N patches, R rotated dims of a head

import math
from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from torch import Tensor

_SLOWEST_EXPONENT, _FASTEST_EXPONENT = -2.0, 2.0  # periods of 10^-2 to 10^2 seconds


class Rotation(NamedTuple):
    """Cosines and sines of one position each, broadcastable to (..., tokens, R).

    The R dims are as many groups as ``axes``; within a group, dim i pairs with the one half a group further.
    """

    cos: Tensor
    sin: Tensor
    axes = 1

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same change of cosines and sines."""
        return type(self)(change(self.cos), change(self.sin))


class SpaceTimeRotation(Rotation):
    """A group of dims each for seconds, columns and rows."""

    axes = 3


def rotate(states: Tensor, rotation: Rotation) -> Tensor:
    """Turn the first R dims of ``states`` (..., tokens, head_dim); dims beyond R pass unchanged."""
    cos, sin = (part.to(states.dtype) for part in rotation)
    rotated_dims = cos.shape[-1]
    turning, still = states[..., :rotated_dims], states[..., rotated_dims:]
    first, second = turning.unflatten(-1, (rotation.axes, 2, -1)).unbind(dim=-2)
    partner = torch.stack((-second, first), dim=-2).flatten(-3)
    turned = turning * cos + partner * sin
    return torch.cat((turned, still), dim=-1) if still.shape[-1] else turned


def patch_rotation(
    grid: tuple[int, int], head_dim: int, theta: float, scale: Tensor | None = None
) -> Rotation:
    """Rotation (N, head_dim) of the patch centres in [-1, 1], rows first (DINOv3).

    ``scale`` multiplies the coordinates; it also says on which device the result lies.
    """
    device = scale.device if scale is not None else None
    rows, columns = (((torch.arange(n, device=device) + 0.5) / n) * 2.0 - 1.0 for n in grid)
    centres = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)
    if scale is not None:
        centres = centres * scale
    frequencies = theta ** -torch.arange(0, 1, 4 / head_dim, device=device)
    angles = 2.0 * math.pi * centres[:, :, None] * frequencies
    angles = angles.flatten(1).tile(2)
    return Rotation(angles.cos(), angles.sin())


def time_rotation(seconds: Tensor, head_dim: int) -> Rotation:
    """Rotation (B, 1, T, R) of times (B, T) in seconds, R = the largest multiple of 6 within ``head_dim``.

    Multiples of 6 keep R divisible by the three axes of the patch variant of this predictor.
    """
    half = head_dim // 6 * 3
    exponents = torch.linspace(_SLOWEST_EXPONENT, _FASTEST_EXPONENT, half, device=seconds.device)
    angles = 2.0 * math.pi * seconds[:, None, :, None] / 10.0**exponents
    angles = angles.tile(2)
    return Rotation(angles.cos(), angles.sin())


def space_time_rotation(seconds: Tensor, grid: tuple[int, int], head_dim: int) -> SpaceTimeRotation:
    """Rotation (B, 1, T N, R) of N patches, row by row, of frames at times (B, T) in seconds (DINO-world).

    A third of the turning dims each for seconds, columns and rows, the latter from -1 to 1; R is the largest
    multiple of 6 within ``head_dim``.
    """
    device, third = seconds.device, head_dim // 6
    exponents = torch.linspace(_SLOWEST_EXPONENT, _FASTEST_EXPONENT, third, device=device)
    rows, columns = (torch.linspace(-1.0, 1.0, count, device=device) for count in grid)
    down, across = (part.flatten() for part in torch.meshgrid(rows, columns, indexing="ij"))
    batch, frames = seconds.shape
    places = torch.stack((across, down), dim=-1).expand(batch, frames, -1, -1)  # (B, T, N, 2)
    times = seconds[:, :, None, None].expand(-1, -1, places.shape[2], -1)
    positions = torch.cat((times, places), dim=-1).flatten(1, 2)  # (B, T N, 3)
    angles = 2.0 * math.pi * positions[:, None, :, :, None] / 10.0**exponents
    angles = angles.tile(2).flatten(3)
    return SpaceTimeRotation(angles.cos(), angles.sin())
