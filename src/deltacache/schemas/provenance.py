"""Whether things belong together: what tokens were made with, what a model was trained on, and one check of both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from deltacache.schemas.datasets import DatasetCard, Size, parse_size, sides, size_text
from deltacache.schemas.errors import MismatchError


@dataclass(frozen=True, slots=True)
class Provenance:
    """What tokens were made with, or what the tokens were made with that a model was trained on.

    ``None`` means that it is not known, and then it is not compared: a released checkpoint says its width alone.

    Attributes:
        name: how messages call it, as "the tokenizer out/tokenizer" or "features/".
        hidden_size: D, the width of a token.
        backbone_sha256: of the backbone's weights; ``backbone`` is its id, for messages.
        selection: ``layers`` and ``pca_fingerprint``, as far as they are used; empty for the last hidden state.
        patch_grid: rows and columns of patches.
        tokenizer_fingerprint: of delta tokens.
    """

    name: str
    hidden_size: int
    backbone_sha256: str | None = None
    backbone: str | None = None
    selection: Mapping[str, Any] | None = None
    patch_grid: tuple[int, ...] | None = None
    image_size: Size | None = None
    tokenizer_fingerprint: str | None = None

    @classmethod
    def of_dataset(cls, card: DatasetCard, name: str) -> Self:
        """Of the patch tokens that a dataset holds, or that its delta tokens were made from."""
        return cls(
            name,
            card.hidden_size,
            card.backbone.weights_sha256,
            card.backbone.id,
            card.backbone.choice,
            card.patch_grid,
            card.image_size,
            card.tokenizer_fingerprint,
        )

    @classmethod
    def of_checkpoint(cls, metadata: Mapping[str, Any], hidden_size: int, name: str) -> Self:
        """Of what a model was trained on, as the ``config.json`` of its checkpoint says."""
        size, grid = metadata.get("image_size"), metadata.get("patch_grid")
        selection = {key: metadata[key] for key in _SELECTION if metadata.get(key) is not None}
        return cls(
            name,
            hidden_size,
            metadata.get("backbone_sha256"),
            metadata.get("backbone"),
            selection if "backbone_sha256" in metadata else None,
            None if grid is None else tuple(grid),
            None if size is None else parse_size(size),
            metadata.get("tokenizer_fingerprint"),
        )

    def tokens(self) -> str:
        """Its tokens in words, with what is known of them."""
        made_with = "" if self.backbone is None else f" of {self.backbone}"
        size = "" if self.image_size is None else f" at {size_text(self.image_size)} px"
        return f"{self.hidden_size}-wide tokens{made_with}{size}"


_SELECTION = ("layers", "pca_fingerprint")


def require_matches(model: Provenance, given: Provenance, way_out: str, *, any_size: bool = False) -> None:
    """Refuse a model for tokens of another kind than those that it was trained on.

    Args:
        model: of a checkpoint.
        given: of the tokens that it is to take.
        way_out: what to do about it.
        any_size: patch grids may differ where the image sizes are known to differ: a recipe goes from 256 to 512 px.

    Raises:
        MismatchError: another width, backbone, selection of layers, PCA, patch grid or tokenizer; names both sides.
    """
    trained, here = model, given
    if trained.hidden_size != here.hidden_size:
        raise MismatchError(
            f"{here.name} has {here.tokens()}, but {trained.name} expects {trained.hidden_size}: {way_out}"
        )

    def differ(ours: object, theirs: object) -> bool:
        return ours is not None and theirs is not None and ours != theirs

    if differ(trained.backbone_sha256, here.backbone_sha256):
        said = f" ({here.backbone})" if here.backbone else ""
        raise MismatchError(
            f"{trained.name} was trained on features of backbone {str(trained.backbone_sha256)[:16]}, but {here.name} "
            f"has those of {str(here.backbone_sha256)[:16]}{said}: {way_out}"
        )
    if differ(trained.selection, here.selection):
        raise MismatchError(
            f"{trained.name} was trained on {_selection(trained)}, but {here.name} has {_selection(here)}: "
            f"use the same --layers and --pca, or {way_out}"
        )
    sizes = [None if each.image_size is None else sides(each.image_size) for each in (trained, here)]
    if differ(trained.patch_grid, here.patch_grid) and not (any_size and differ(*sizes)):
        size = "" if here.image_size is None else f" ({size_text(here.image_size)} px)"
        raise MismatchError(
            f"{trained.name} was trained on {_grid(trained)} patches per frame, but {here.name} has "
            f"{_grid(here)}{size}: use its image size, or {way_out}"
        )
    if differ(trained.tokenizer_fingerprint, here.tokenizer_fingerprint):
        raise MismatchError(
            f"{trained.name} was trained on delta tokens of tokenizer {trained.tokenizer_fingerprint}, but {here.name} "
            f"is {here.tokenizer_fingerprint}: {way_out}"
        )


def _grid(of: Provenance) -> str:
    return " x ".join(map(str, of.patch_grid or ()))


def _selection(of: Provenance) -> str:
    chosen: Mapping[str, Any] = of.selection or {}
    layers: Sequence[int] | None = chosen.get("layers")
    pca = chosen.get("pca_fingerprint")
    joined = "the last hidden state" if layers is None else f"layers {','.join(map(str, layers))}"
    return joined + (" without PCA" if pca is None else f" reduced by PCA {pca}")
