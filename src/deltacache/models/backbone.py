"""Frozen image encoders: frames in, patch tokens out."""

# B batch, H height, W width in pixels, N patches, D hidden

from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from deltacache.models.backbones.inputs import convention_of
from deltacache.models.backbones.normalisation import IMAGENET, Normalisation, read_normalisation
from deltacache.models.backbones.reading import fetch, read_encoder
from deltacache.models.backbones.tiny import tiny_encoder
from deltacache.models.devices import autocast_to
from deltacache.models.layers import LayerOutputs
from deltacache.models.pca import Pca, check_pca, load_pca
from deltacache.models.weights import tensors_sha256
from deltacache.schemas.datasets import BackboneCard, Precision
from deltacache.schemas.errors import MismatchError
from deltacache.schemas.images import Size, sides

__all__ = ["IMAGENET", "Backbone", "Normalisation", "load_backbone"]


class Backbone(nn.Module):
    """A vision transformer of transformers, frozen and always in eval mode.

    The released training code leaves its frozen backbone in train mode, where DINOv3 rescales its RoPE
    coordinates at random; here equal frames always give equal tokens. What an encoder takes for an image is
    the business of its ``InputConvention``.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        name: str,
        normalisation: Normalisation,
        layers: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self._inputs = convention_of(model, name)
        self.model = self._inputs.encoder
        self.id = name
        self.weights_sha256 = tensors_sha256(self.model.state_dict().values())
        self.patch_size = self._inputs.patch_size
        self.width: int = self.model.config.hidden_size
        self.layers, self.pca = layers, None
        self._dtype: torch.dtype | None = None  # of products, if not float32
        self._layer_outputs = LayerOutputs(self.model, layers, name) if layers is not None else None
        self.image_mean, self.image_std = normalisation
        registers = getattr(self.model.config, "num_register_tokens", 0)
        self._most_prefix_tokens = 2 + registers  # CLS, distillation
        mean, std = (torch.tensor(part).view(3, 1, 1) for part in normalisation)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.requires_grad_(False).eval()

    @property
    def hidden_size(self) -> int:
        """D of the tokens: the encoder's width, times the layers, or what a PCA leaves."""
        return self.pca.size if self.pca is not None else self.width * len(self.layers or (None,))

    @property
    def card(self) -> BackboneCard:
        """What datasets record of it."""
        return BackboneCard(
            id=self.id,
            weights_sha256=self.weights_sha256,
            patch_size=self.patch_size,
            hidden_size=self.width,
            image_mean=self.image_mean,
            image_std=self.image_std,
            layers=self.layers,
            pca_fingerprint=self.pca.fingerprint if self.pca else None,
        )

    def reduce_by(self, pca: Pca, path: Path) -> Self:
        """Have the tokens projected by ``pca``, float32, from now on.

        Raises:
            MismatchError: it was fitted on other tokens.
        """
        check_pca(pca, path, self.hidden_size, self.weights_sha256, self.layers)
        self.pca: Pca | None = pca.to(self.mean.device)
        return self

    def to_precision(self, precision: Precision) -> Self:
        """Have the forward pass run in ``precision`` from now on.

        Under autocast the products take bfloat16; residual stream, norms and LayerScale stay float32, as in the
        released code. The weights of linear layers are rounded once instead of in every pass, which gives the same
        bits; those of patch embeddings are not, for encoders take the precision of their rotation angles from them.
        ``weights_sha256`` stays that of the weights as they were read.
        """
        if precision == "bfloat16":
            raise ValueError(
                "bfloat16 throughout is what older versions computed: take bfloat16_autocast or float32"
            )
        self._dtype = torch.bfloat16 if precision == "bfloat16_autocast" else None
        for module in self.model.modules():
            if isinstance(module, nn.Linear):
                module.to(self._dtype or torch.float32)
        return self

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, whatever the module that holds this one does."""
        return super().train(False)

    def grid(self, image_size: Size) -> tuple[int, int]:
        """Rows and columns of patches of an image."""
        return self._grid(*sides(image_size))

    @torch.no_grad()
    def patch_tokens(self, frames: Tensor) -> Tensor:
        """Patch tokens (B, N, D) float32 of RGB ``frames`` (B, 3, H, W) uint8: the last hidden state.

        The model's own final norm is included where the architecture has one; CLS and registers are
        dropped. With ``layers``: the outputs of these blocks side by side, each through the final norm; with a
        PCA: what it makes of them. Sides that are no multiple of the patch size, or a model that gives other
        tokens than one a patch, are a ``MismatchError``.
        """
        rows, columns = self._grid(*frames.shape[-2:])
        pixels = frames.to(self.mean.device).contiguous().to(torch.float32, copy=True)  # to change in place
        pixels = pixels.div_(255.0).sub_(self.mean).div_(self.std)
        outputs = self._layer_outputs
        with autocast_to(pixels.device.type, self._dtype):
            hidden = (
                self._inputs.hidden_states(pixels)
                if outputs is None
                else outputs.of(lambda: self._inputs.hidden_states(pixels))
            )
        prefix = hidden.shape[1] - rows * columns
        if not 0 <= prefix <= self._most_prefix_tokens:
            raise MismatchError(
                f"{self.id} gives {hidden.shape[1]} tokens for {rows} x {columns} patches and at most "
                f"{self._most_prefix_tokens} others: take a ViT that gives one token a patch"
            )
        tokens = hidden[:, prefix:].float()
        return tokens if self.pca is None else self.pca.project(tokens)

    def black_patch_tokens(self, image_size: Size) -> Tensor:
        """Patch tokens (N, D) of an all-black frame, which stands before every clip."""
        return self.patch_tokens(torch.zeros(1, 3, *sides(image_size), dtype=torch.uint8))[0]

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        if height % self.patch_size or width % self.patch_size or not (height and width):
            nearest = max(1, round(height / self.patch_size)) * self.patch_size
            raise MismatchError(
                f"image size {height} x {width} is not a multiple of the patch size {self.patch_size} of "
                f"{self.id}: take for example {nearest}"
            )
        return height // self.patch_size, width // self.patch_size


def load_backbone(
    source: str,
    precision: Precision = "float32",
    layers: tuple[int, ...] | None = None,
    pca: Path | None = None,
) -> Backbone:
    """``tiny`` (built in), a Hugging Face directory, or a hub id; its forward in ``precision``.

    A directory is read without touching the network. Weights that are missing, gated, damaged or do not
    fit their config are a ``CheckpointError``.

    Args:
        layers: blocks, counted from 0, whose outputs are joined; ``None``: the last hidden state.
        pca: output of fit-pca that reduces the tokens; one of other tokens is a ``MismatchError``.
    """
    backbone = _load(source, layers).to_precision(precision)
    return backbone if pca is None else backbone.reduce_by(load_pca(pca), pca)


def _load(source: str, layers: tuple[int, ...] | None) -> Backbone:
    if source == "tiny":
        return Backbone(tiny_encoder(), "tiny", IMAGENET, layers)
    folder, name = Path(source).expanduser(), source
    if folder.is_dir():
        name = folder.resolve().name
    else:
        folder = fetch(source)
    encoder: Any = read_encoder(folder, source)
    normalisation = read_normalisation(folder, encoder.config.model_type)
    return Backbone(encoder, name, normalisation, layers)
