"""Pictures from patch tokens: the decoder of RAE (Zheng et al. 2025, arXiv 2510.11690; method section 1)."""

# B batch, D hidden of the features, W width of the decoder, h rows and w columns of patches, p patch side

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltacache.models.backbone import IMAGENET, Backbone, Normalisation
from deltacache.models.blocks import initialise, split_heads
from deltacache.models.checkpoints import LoadedModel, load_model
from deltacache.schemas.errors import CheckpointError
from deltacache.schemas.provenance import Provenance, require_matches

_NORM_EPSILON = 1e-12
_RELEASED_HEAD_DIM = 72  # 1152 in 16 heads
_SLOWEST = 10_000.0  # of the sin-cos positions (MAE)


class FinalNorm(NamedTuple):
    """Gain and offset (D,) of the last norm of a backbone, which the decoder takes back."""

    weight: Tensor
    bias: Tensor


class RgbDecoder(nn.Module):
    """A plain ViT from features to pixels, under the released parameter names.

    ``image_size`` is that of the positions; features of another grid get them stretched (bicubic).
    Before use, ``undo`` says what backbone the features come from; a new decoder undoes nothing.
    """

    norm_weight: Tensor
    norm_bias: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        hidden_size: int,
        width: int = 1152,
        layers: int = 28,
        num_heads: int = 16,
        mlp_width: int = 4096,
        patch_size: int = 16,
        image_size: int = 256,
    ) -> None:
        super().__init__()
        if width % num_heads or width % 4 or image_size % patch_size:
            raise ValueError(
                f"width {width} must split into {num_heads} heads and by 4, image size {image_size} into patches of "
                f"{patch_size}"
            )
        self.arguments: dict[str, Any] = {
            "hidden_size": hidden_size,
            "width": width,
            "layers": layers,
            "num_heads": num_heads,
            "mlp_width": mlp_width,
            "patch_size": patch_size,
            "image_size": image_size,
        }
        self.hidden_size, self.patch_size = hidden_size, patch_size
        side = image_size // patch_size
        self.decoder_embed = nn.Linear(hidden_size, width)
        self.decoder_pos_embed = nn.Parameter(_positions(side, width)[None], requires_grad=False)
        self.trainable_cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_layers = nn.ModuleList(_Block(width, num_heads, mlp_width) for _ in range(layers))
        self.decoder_norm = nn.LayerNorm(width, eps=_NORM_EPSILON)
        self.decoder_pred = nn.Linear(width, 3 * patch_size**2)
        initialise(self)
        for name, values in _without_norm(hidden_size)._asdict().items():
            self.register_buffer(f"norm_{name}", values, persistent=False)
        self._keep(IMAGENET)

    def undo(self, norm: FinalNorm, normalisation: Normalisation) -> None:
        """Take the features of a backbone with this last norm, and pixels normalised like this."""
        self.norm_weight, self.norm_bias = (
            part.detach().to(self.norm_weight, copy=True) for part in (norm.weight, norm.bias)
        )
        self._keep(normalisation)

    def forward(self, features: Tensor) -> Tensor:
        """Pictures (B, 3, p h, p w) in [0, 1] of features (B, D, h, w)."""
        return self.unclamped(features).clamp(0.0, 1.0)

    def unclamped(self, features: Tensor) -> Tensor:
        """The same before it is cut to [0, 1]: what training descends."""
        rows, columns = features.shape[-2:]
        tokens = (features.flatten(2).transpose(1, 2) - self.norm_bias) / self.norm_weight
        hidden = self.decoder_embed(tokens) + self._stretched(rows, columns)
        first = (self.trainable_cls_token + self.decoder_pos_embed[:, :1]).expand(len(hidden), -1, -1)
        hidden = torch.cat((first.to(hidden), hidden), dim=1)
        for block in self.decoder_layers:
            hidden = block(hidden)
        patches = self.decoder_pred(self.decoder_norm(hidden))[:, 1:].float()
        patches = patches.unflatten(2, (self.patch_size, self.patch_size, 3)).unflatten(1, (rows, columns))
        pixels = patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return pixels * self.std + self.mean

    def _stretched(self, rows: int, columns: int) -> Tensor:
        """Positions (1, h w, W) of a grid."""
        positions = self.decoder_pos_embed[:, 1:]
        side = math.isqrt(positions.shape[1])
        if (rows, columns) == (side, side):
            return positions
        square = positions.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        stretched = F.interpolate(square, size=(rows, columns), mode="bicubic", align_corners=False)
        return stretched.flatten(2).transpose(1, 2)

    def _keep(self, normalisation: Normalisation) -> None:
        for name, values in normalisation._asdict().items():
            device = self.norm_weight.device
            self.register_buffer(name, torch.tensor(values, device=device).view(3, 1, 1), persistent=False)


class _Block(nn.Module):
    """Pre-norm ViT block under the names of Hugging Face's ViT."""

    def __init__(self, width: int, num_heads: int, mlp_width: int) -> None:
        super().__init__()
        self.attention = _Attention(width, num_heads)
        self.layernorm_before = nn.LayerNorm(width, eps=_NORM_EPSILON)
        self.layernorm_after = nn.LayerNorm(width, eps=_NORM_EPSILON)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, mlp_width)})
        self.output = nn.ModuleDict({"dense": nn.Linear(mlp_width, width)})

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attention(self.layernorm_before(hidden))
        grown = F.gelu(self.intermediate["dense"](self.layernorm_after(hidden)))
        return hidden + self.output["dense"](grown)


class _Attention(nn.Module):
    """Attention of every token to every token."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})
        self.output = nn.ModuleDict({"dense": nn.Linear(width, width)})

    def forward(self, hidden: Tensor) -> Tensor:
        queries, keys, values = (
            split_heads(self.attention[name](hidden), self.num_heads) for name in ("query", "key", "value")
        )
        mixed = F.scaled_dot_product_attention(queries, keys, values)
        return self.output["dense"](mixed.transpose(1, 2).flatten(2))


def load_rgb_decoder(path: Path, backbone: Backbone, num_heads: int | None = None) -> LoadedModel[RgbDecoder]:
    """Read a decoder from a ``train-head rgb`` output or a released file, strictly, for features of ``backbone``.

    ``num_heads`` settles what a released file of another width than 1152 does not tell.

    Raises:
        CheckpointError: missing, damaged, or no decoder.
        MismatchError: made for features of another width or backbone.
    """
    loaded = load_model(path, "rgb_decoder", RgbDecoder, lambda shapes: _arguments(shapes, num_heads))
    decoder = loaded.model
    require_matches(
        Provenance.of_checkpoint(loaded.metadata, decoder.hidden_size, f"the decoder {path}"),
        Provenance(backbone.id, backbone.hidden_size, backbone.weights_sha256),
        "give the decoder that was trained on this backbone",
    )
    undo_backbone(decoder, backbone)
    return loaded


def undo_backbone(decoder: RgbDecoder, backbone: Backbone) -> None:
    """Tell ``decoder`` whose features it gets. A backbone whose last module is not a norm has nothing to undo."""
    norms = [part for part in backbone.model.children() if isinstance(part, nn.LayerNorm)]
    norm = _without_norm(backbone.hidden_size)
    if norms and norms[-1].elementwise_affine:
        norm = FinalNorm(norms[-1].weight.detach(), norms[-1].bias.detach())
    decoder.undo(norm, Normalisation(backbone.image_mean, backbone.image_std))


def _without_norm(hidden_size: int) -> FinalNorm:
    """On the CPU also where the weights are made on the meta device: no file holds them."""
    return FinalNorm(torch.ones(hidden_size, device="cpu"), torch.zeros(hidden_size, device="cpu"))


def _positions(side: int, width: int) -> Tensor:
    """Sin-cos positions (1 + side², W) of MAE: rows in the first half, columns in the second; zeros first."""
    frequencies = 1.0 / _SLOWEST ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    places = torch.arange(side, dtype=torch.float64)
    rows, columns = torch.meshgrid(places, places, indexing="ij")
    parts = [axis.flatten()[:, None] * frequencies for axis in (rows, columns)]
    waves = torch.cat([wave for angles in parts for wave in (angles.sin(), angles.cos())], dim=1)
    return torch.cat((torch.zeros_like(waves[:1]), waves)).float()


def _arguments(shapes: Mapping[str, tuple[int, ...]], num_heads: int | None) -> dict[str, Any]:
    """Constructor arguments of the decoder that wrote these weights, heads taken to have 72 dims if not given."""
    embed, predicted = shapes.get("decoder_embed.weight", ()), shapes.get("decoder_pred.weight", ())
    positions = shapes.get("decoder_pos_embed", ())
    if len(embed) != 2 or len(predicted) != 2 or len(positions) != 3:
        raise CheckpointError(
            "holds no RGB decoder: expected decoder_embed, decoder_pos_embed and decoder_pred"
        )
    width, patch_size, side = embed[0], math.isqrt(predicted[0] // 3), math.isqrt(positions[1] - 1)
    if num_heads is None and width % _RELEASED_HEAD_DIM:
        raise CheckpointError(
            f"has a width of {width}, which does not split into heads of {_RELEASED_HEAD_DIM}: give num_heads"
        )
    numbers = [int(name.split(".")[1]) for name in shapes if name.startswith("decoder_layers.")]
    return {
        "hidden_size": embed[1],
        "width": width,
        "layers": max(numbers, default=-1) + 1,
        "mlp_width": shapes.get("decoder_layers.0.intermediate.dense.weight", (4 * width,))[0],
        "patch_size": patch_size,
        "image_size": side * patch_size,
        "num_heads": num_heads or width // _RELEASED_HEAD_DIM,
    }
