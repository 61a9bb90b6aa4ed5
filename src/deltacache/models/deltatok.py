"""DeltaTok: the change between two frames' patch tokens as one delta token."""

# B batch, T frames, N patches, M delta tokens of a frame, D hidden

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deltacache.models.blocks import (
    Rotation,
    SelfAttention,
    SelfAttentionBlock,
    check_heads,
    initialise,
    log_cosh,
    make_mlp,
    patch_rotation,
)
from deltacache.models.devices import InPrecision, in_precision
from deltacache.models.weights import ModelCard
from deltacache.schemas.texts import counted

Grid = tuple[int, int]  # rows, columns of patches


@dataclass(frozen=True, slots=True)
class TokenizerLoss:
    """One training step: the trained loss, the mean squared error beside it, the reconstruction (B, N, D)."""

    loss: Tensor
    mse: Tensor
    reconstruction: Tensor


class DeltaTok(InPrecision):
    """Encoder and decoder of delta tokens (method section 1).

    ``frame_compression`` is the ablation that encodes a frame alone: the decoder then starts from a
    learned vector or zeros in place of the previous frame. ``rope_rescale`` r multiplies the patch
    coordinates by a log-uniform factor in [1/r, r], in train mode and when a generator is given.

    Delta tokens of a frame are (B, D). With ``tokens_per_frame`` M > 1, which the paper does not have, they are
    (B, M, D): M learned vectors stand before the patches instead of one.

    ``card`` is set where a checkpoint was loaded by ``deltacache.load_tokenizer``.
    """

    card: ModelCard | None = None

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        encoder_layers: int,
        decoder_layers: int,
        *,
        qk_norm: bool = True,
        gated_attention: bool = True,
        mlp: Literal["gelu", "swiglu"] = "swiglu",
        frame_compression: Literal["off", "learned", "zeros"] = "off",
        rope_theta: float = 100.0,
        rope_rescale: float | None = 2.0,
        layer_scale_init: float = 1e-5,
        tokens_per_frame: int = 1,
    ) -> None:
        super().__init__()
        if tokens_per_frame < 1:
            raise ValueError(f"{tokens_per_frame} tokens per frame: give at least 1")
        check_heads(hidden_size, num_heads, multiple=4, least=4)
        self.arguments: dict[str, Any] = {
            "hidden_size": hidden_size,
            "num_heads": num_heads,
            "encoder_layers": encoder_layers,
            "decoder_layers": decoder_layers,
            "qk_norm": qk_norm,
            "gated_attention": gated_attention,
            "mlp": mlp,
            "frame_compression": frame_compression,
            "rope_theta": rope_theta,
            "rope_rescale": rope_rescale,
            "layer_scale_init": layer_scale_init,
            "tokens_per_frame": tokens_per_frame,
        }
        self.hidden_size, self.head_dim = hidden_size, hidden_size // num_heads
        self.frame_compression = frame_compression
        self.rope_theta, self.rope_rescale = rope_theta, rope_rescale
        self.tokens_per_frame = tokens_per_frame
        self.z_embed = nn.Embedding(tokens_per_frame, hidden_size)
        self.xy_embed = nn.Embedding(2, hidden_size)  # one vector for the previous frame, one for the current
        self.encoder_blocks = nn.ModuleList(self._block() for _ in range(encoder_layers))
        self.norm = nn.LayerNorm(hidden_size)
        self.decoder_blocks = nn.ModuleList(self._block() for _ in range(decoder_layers))
        initialise(self)

    @in_precision
    def encode(
        self,
        previous: Tensor,
        current: Tensor,
        grid: Grid | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Delta tokens (B, D) of the step from ``previous`` to ``current``, both (B, N, D).

        ``grid`` is the rows and columns of patches; ``None``: they form a square.
        """
        return self._encode(previous, current, self._rotation(current, grid, generator))

    @in_precision
    def decode(
        self,
        delta: Tensor,
        previous: Tensor,
        grid: Grid | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Patch tokens (B, N, D) of the frame that follows ``previous`` (B, N, D) by ``delta`` (B, D)."""
        return self._decode(delta, previous, self._rotation(previous, grid, generator))

    def training_loss(
        self,
        previous: Tensor,
        current: Tensor,
        grid: Grid,
        loss: Literal["mse", "log_cosh"],
        generator: torch.Generator | None = None,
    ) -> TokenizerLoss:
        """Reconstruct ``current`` through one delta token; one RoPE factor for encoder and decoder."""
        rotation = self._rotation(current, grid, generator)
        reconstruction = self._decode(self._encode(previous, current, rotation), previous, rotation)
        mse = (reconstruction - current).square().mean()
        trained = mse if loss == "mse" else log_cosh(reconstruction, current).mean()
        return TokenizerLoss(trained, mse.detach(), reconstruction.detach())

    @torch.no_grad()
    def encode_clip(self, patch_tokens: Tensor, black: Tensor, grid: Grid) -> Tensor:
        """Delta tokens (B, T, D) of clips (B, T, N, D), all at once; frame 0 follows ``black`` (N, D)."""
        first = black.to(patch_tokens).expand_as(patch_tokens[:, :1])
        previous = torch.cat((first, patch_tokens[:, :-1]), dim=1)
        deltas = self.encode(previous.flatten(0, 1), patch_tokens.flatten(0, 1), grid)
        return deltas.unflatten(0, patch_tokens.shape[:2])

    @torch.no_grad()
    def reconstruct_closed_loop(
        self, patch_tokens: Tensor, black: Tensor, grid: Grid, horizon: int
    ) -> Tensor:
        """The last ``horizon`` frames (B, horizon, N, D), each encoded against its own reconstruction.

        The encoder sees the error so far and can correct it: what the released evaluation does.
        """
        current = _frame_before(patch_tokens, black, horizon)
        frames: list[Tensor] = []
        for target in patch_tokens[:, -horizon:].unbind(dim=1):
            current = self.decode(self.encode(current, target, grid), current, grid)
            frames.append(current)
        return torch.stack(frames, dim=1)

    @torch.no_grad()
    def reconstruct_parallel(self, patch_tokens: Tensor, black: Tensor, grid: Grid, horizon: int) -> Tensor:
        """The last ``horizon`` frames (B, horizon, N, D) from delta tokens of true pairs.

        These are the tokens a delta dataset holds and a perfect world model would predict; each is
        decoded from the reconstruction before it, so errors add up.
        """
        current = _frame_before(patch_tokens, black, horizon)
        frames: list[Tensor] = []
        for delta in self.encode_clip(patch_tokens, black, grid)[:, -horizon:].unbind(dim=1):
            current = self.decode(delta, current, grid)
            frames.append(current)
        return torch.stack(frames, dim=1)

    def _block(self) -> SelfAttentionBlock:
        asked = self.arguments
        attention = SelfAttention(
            self.hidden_size, asked["num_heads"], qk_norm=asked["qk_norm"], gated=asked["gated_attention"]
        )
        mlp = make_mlp(self.hidden_size, asked["mlp"])
        return SelfAttentionBlock(self.hidden_size, attention, mlp, asked["layer_scale_init"])

    def _encode(self, previous: Tensor, current: Tensor, rotation: Rotation) -> Tensor:
        tokens = self.z_embed.weight.expand(len(current), -1, -1)
        from_previous, from_current = self.xy_embed.weight
        sequence = [tokens, previous + from_previous, current + from_current]
        if self.frame_compression != "off":
            del sequence[1]
        hidden = torch.cat(sequence, dim=1)
        rotation = _behind_tokens(rotation, self.tokens_per_frame, copies=len(sequence) - 1)
        for block in self.encoder_blocks:
            hidden = block(hidden, rotation)
        tokens = self.norm(hidden[:, : self.tokens_per_frame])
        return tokens[:, 0] if self.tokens_per_frame == 1 else tokens

    def _decode(self, delta: Tensor, previous: Tensor, rotation: Rotation) -> Tensor:
        tokens = delta[:, None] if self.tokens_per_frame == 1 else delta
        hidden = torch.cat((tokens, self._decoder_start(previous)), dim=1)
        rotation = _behind_tokens(rotation, self.tokens_per_frame, copies=1)
        for block in self.decoder_blocks:
            hidden = block(hidden, rotation)
        return hidden[:, self.tokens_per_frame :]

    def _decoder_start(self, previous: Tensor) -> Tensor:
        if self.frame_compression == "off":
            return previous
        if self.frame_compression == "zeros":
            return torch.zeros_like(previous)
        return self.xy_embed.weight[0].expand_as(previous)

    def _rotation(
        self, patch_tokens: Tensor, grid: Grid | None, generator: torch.Generator | None
    ) -> Rotation:
        if grid is None:
            side = math.isqrt(patch_tokens.shape[-2])
            if side * side != patch_tokens.shape[-2]:
                raise ValueError(
                    f"{patch_tokens.shape[-2]} patch tokens do not form a square: give grid=(rows, columns)"
                )
            grid = side, side
        if patch_tokens.shape[-2] != grid[0] * grid[1]:
            raise ValueError(
                f"{patch_tokens.shape[-2]} patch tokens do not form a grid of {grid[0]} x {grid[1]}"
            )
        scale = torch.ones((), device=patch_tokens.device)
        if self.training and self.rope_rescale is not None and generator is not None:
            exponent = torch.rand((), generator=generator, device=generator.device) * 2.0 - 1.0
            if scale.is_cuda and not exponent.is_cuda:
                exponent = exponent.pin_memory()  # else the copy would wait for all that the GPU has to do
            scale = self.rope_rescale ** exponent.to(scale.device, non_blocking=True)
        return patch_rotation(grid, self.head_dim, self.rope_theta, scale)


def _behind_tokens(rotation: Rotation, tokens: int, copies: int) -> Rotation:
    """Repeat the patches' rotation for each frame of the sequence, behind tokens that have no position."""
    cos, sin = rotation
    still = cos.new_ones(tokens, cos.shape[1]), sin.new_zeros(tokens, sin.shape[1])
    return Rotation(torch.cat([still[0]] + [cos] * copies), torch.cat([still[1]] + [sin] * copies))


def _frame_before(patch_tokens: Tensor, black: Tensor, horizon: int) -> Tensor:
    """The frame (B, N, D) before the last ``horizon`` ones: black when they are the whole clip."""
    frames = patch_tokens.shape[1]
    if not 1 <= horizon <= frames:
        raise ValueError(f"horizon {horizon} is not within the clip's {counted(frames, 'frame')}")
    if horizon == frames:
        return black.to(patch_tokens).expand_as(patch_tokens[:, 0])
    return patch_tokens[:, -horizon - 1]
