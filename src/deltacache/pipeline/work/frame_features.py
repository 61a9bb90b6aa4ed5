"""Patch tokens of whole frames, made as extraction makes them: a frozen backbone's layers, reduced by a PCA.

Shapes: T frames, h x w pixels, N patches, D hidden.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltacache.models.backbone import Backbone, load_backbone
from deltacache.pipeline.work.encoders import black_patch_tokens_of
from deltacache.schemas.datasets import Size
from deltacache.schemas.foresight import FrameFeatureConfig
from deltacache.schemas.provenance import Provenance

_FRAMES = 8  # of a forward pass


class FrameFeatures:
    """Frames of one size in, tokens out.

    Attributes:
        backbone: frozen.
        grid: rows and columns of patches.
        hidden_size: D.
        metadata: what a model must have been trained on, under the names that its checkpoint uses.
        name: for tables.
    """

    def __init__(self, backbone: Backbone, size: Size) -> None:
        self.backbone, self._size = backbone, size
        self.grid, self.hidden_size = backbone.grid(size), backbone.hidden_size
        layers, pca = backbone.layers, backbone.pca
        self.metadata: dict[str, Any] = {
            "backbone_sha256": backbone.weights_sha256,
            "layers": None if layers is None else list(layers),
            "pca_fingerprint": None if pca is None else pca.fingerprint,
            "patch_grid": list(self.grid),
        }
        parts = [f"{backbone.id}@{backbone.weights_sha256[:16]}"]
        if layers is not None:
            parts.append("layers " + ",".join(map(str, layers)))
        if pca is not None:
            parts.append(f"PCA {pca.fingerprint}")
        self.name = ", ".join(parts)

    @property
    def provenance(self) -> Provenance:
        """What these features are made with."""
        return Provenance.of_checkpoint(self.metadata, self.hidden_size, "this backbone")

    @torch.inference_mode()
    def tokens(self, frames: Sequence[np.ndarray]) -> Tensor:
        """(T, N, D) float32 of frames (h, w, 3) uint8, rounded to float16 as feature datasets hold them."""
        parts = [
            self.backbone.patch_tokens(
                torch.from_numpy(np.stack(frames[at : at + _FRAMES])).permute(0, 3, 1, 2)
            )
            for at in range(0, len(frames), _FRAMES)
        ]
        return torch.cat(parts).half().float()

    def black(self) -> Tensor:
        """(N, D) of an all-black frame."""
        return self.backbone.black_patch_tokens(self._size).half().float()


def load_frame_features(config: FrameFeatureConfig, device: torch.device) -> FrameFeatures:
    """Load backbone and PCA.

    Raises:
        CheckpointError: one is missing or damaged.
        DeltacacheError: it gives tokens that are not finite.
        MismatchError: no such layers, a PCA of other features, or an image size that is not a multiple of the
            patch size.
    """
    backbone = load_backbone(config.backbone, config.precision, config.layers, config.pca).to(device)
    black_patch_tokens_of(backbone, config.image_size)
    return FrameFeatures(backbone, config.image_size)
