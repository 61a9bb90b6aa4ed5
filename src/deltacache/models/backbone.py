"""Frozen image encoders: frames in, patch tokens out."""

# B batch, H height, W width in pixels, N patches, D hidden

import inspect
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from deltacache.models.weights import tensors_sha256
from deltacache.schemas.datasets import Precision
from deltacache.schemas.errors import CheckpointError, MismatchError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RGB = tuple[float, float, float]
_TINY_SEED = 2604_04913
_HUB_FILES = ["config.json", "preprocessor_config.json", "model*.safetensors*"]


class Normalisation(NamedTuple):
    """Mean and standard deviation of each channel, for pixels in [0, 1]."""

    mean: RGB
    std: RGB


IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Backbone(nn.Module):
    """A vision transformer of transformers, frozen and always in eval mode.

    The released training code leaves its frozen backbone in train mode, where DINOv3 rescales its RoPE
    coordinates at random; here equal frames always give equal tokens.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: "PreTrainedModel", name: str, normalisation: Normalisation) -> None:
        super().__init__()
        self.model = model
        self.id = name
        self.weights_sha256 = tensors_sha256(model.state_dict().values())
        self.patch_size = _one_number(model.config.patch_size)
        self.hidden_size: int = model.config.hidden_size
        self.image_mean, self.image_std = normalisation
        self._most_prefix_tokens = 2 + getattr(model.config, "num_register_tokens", 0)  # CLS, distillation
        mean, std = (torch.tensor(part).view(3, 1, 1) for part in normalisation)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.requires_grad_(False).eval()

    def to_precision(self, precision: Precision) -> Self:
        """Cast the weights once; the forward then runs in ``precision``.

        Buffers stay float32 (rotary frequencies would lose position in bfloat16), and so does normalising
        pixels. ``weights_sha256`` stays that of the weights as they were read.
        """
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(dtype)
        return self

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, whatever the module that holds this one does."""
        return super().train(False)

    def grid(self, image_size: int) -> tuple[int, int]:
        """Rows and columns of patches of a square image."""
        return self._grid(image_size, image_size)

    @torch.no_grad()
    def patch_tokens(self, frames: Tensor) -> Tensor:
        """Patch tokens (B, N, D) float32 of RGB ``frames`` (B, 3, H, W) uint8: the last hidden state.

        The model's own final norm is included where the architecture has one; CLS and registers are
        dropped. Sides that are no multiple of the patch size, or a model that gives other tokens than one
        a patch, are a ``MismatchError``.
        """
        rows, columns = self._grid(*frames.shape[-2:])
        pixels = frames.to(self.mean.device).contiguous().to(torch.float32, copy=True)  # to change in place
        pixels = pixels.div_(255.0).sub_(self.mean).div_(self.std).to(self._dtype)
        hidden = self.model(pixels, **_interpolation(self.model)).last_hidden_state
        prefix = hidden.shape[1] - rows * columns
        if not 0 <= prefix <= self._most_prefix_tokens:
            raise MismatchError(
                f"{self.id} gives {hidden.shape[1]} tokens for {rows} x {columns} patches and at most "
                f"{self._most_prefix_tokens} others: take a ViT that gives one token a patch"
            )
        return hidden[:, prefix:].float()

    def black_patch_tokens(self, image_size: int) -> Tensor:
        """Patch tokens (N, D) of an all-black frame, which stands before every clip."""
        return self.patch_tokens(torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8))[0]

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        if height % self.patch_size or width % self.patch_size or not (height and width):
            nearest = max(1, round(height / self.patch_size)) * self.patch_size
            raise MismatchError(
                f"image size {height} x {width} is not a multiple of the patch size {self.patch_size} of "
                f"{self.id}: take for example {nearest}"
            )
        return height // self.patch_size, width // self.patch_size


def load_backbone(source: str, precision: Precision = "float32") -> Backbone:
    """``tiny`` (built in), a Hugging Face directory, or a hub id; its forward in ``precision``.

    A directory is read without touching the network. Weights that are missing, gated, damaged or do not
    fit their config are a ``CheckpointError``.
    """
    if source == "tiny":
        return _tiny_backbone().to_precision(precision)
    folder, name = Path(source).expanduser(), source
    if folder.is_dir():
        name = folder.resolve().name
    else:
        folder = _download(source)
    return Backbone(_read_model(folder, source), name, _normalisation(folder)).to_precision(precision)


def _download(source: str) -> Path:
    """Fetch (or find in the local cache) what a backbone needs of a hub repository."""
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, HFValidationError

    page = f"https://huggingface.co/{source}"
    way_out = "give the path of a directory with config.json and model.safetensors, or use 'tiny'"
    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=_HUB_FILES))
    except GatedRepoError:
        raise CheckpointError(
            f"backbone {source!r} is gated: accept its licence at {page} and log in with 'hf auth login'; or "
            + way_out
        ) from None
    except HFValidationError:
        raise CheckpointError(
            f"backbone {source!r} is neither a directory nor a Hugging Face hub id: {way_out}"
        ) from None
    except OSError as error:  # the hub's own errors and those of the network
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"backbone {source!r} is no directory here and could not be fetched from {page} ({reason}): "
            f"check the name and the connection; or {way_out}"
        ) from error


def _read_model(folder: Path, source: str) -> "PreTrainedModel":
    """The vision model of a Hugging Face directory; weights that are not in the file are refused."""
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModel

    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        with _quiet_transformers():
            config = AutoConfig.from_pretrained(folder, **local)
            model, report = AutoModel.from_pretrained(
                folder, config=config, dtype=torch.float32, output_loading_info=True, **local
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"backbone {source!r} cannot be read: {error}. It must hold config.json and model.safetensors of a "
            "vision transformer that transformers knows: fetch it again"
        ) from error
    model = getattr(model, "vision_model", model)  # two-tower models: only the image side is needed
    _check_is_vit(model, source)
    unread = sorted(name for name in report["missing_keys"] if "pooler." not in name)
    if unread:
        raise CheckpointError(
            f"backbone {source!r} lacks {len(unread)} weights of a {type(model).__name__}, the first is "
            f"{unread[0]}: its config.json belongs to another model, or the file is incomplete"
        )
    return _without_pooler(model)


def _check_is_vit(model: nn.Module, source: str) -> None:
    """Refuse what cannot answer ``model(pixels)`` with patch tokens."""
    parameters = inspect.signature(model.forward).parameters.values()
    needed = {one.name for one in parameters if one.default is one.empty and one.kind is not one.VAR_KEYWORD}
    if not needed <= {"pixel_values"} or not hasattr(model.config, "patch_size"):
        raise CheckpointError(
            f"backbone {source!r} is a {type(model).__name__}, which does not turn an image into patch "
            "tokens: take a vision transformer such as DINOv3"
        )


def _without_pooler(model: Any) -> "PreTrainedModel":
    """Drop the pooling layer: it never reaches the patch tokens, and its weights may be random."""
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model


def _normalisation(folder: Path) -> Normalisation:
    """Of ``preprocessor_config.json`` when there is one, else ImageNet's."""
    path = folder / "preprocessor_config.json"
    if not path.exists():
        return IMAGENET
    try:
        settings = json.loads(path.read_text())
        if not settings.get("do_normalize", True):
            return Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        return Normalisation(
            _three(settings.get("image_mean", IMAGENET.mean)), _three(settings.get("image_std", IMAGENET.std))
        )
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} does not hold image_mean and image_std of three numbers each ({error}): fetch it again"
        ) from error


def _three(values: Any) -> RGB:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _one_number(patch_size: Any) -> int:
    """Configs write a square patch as a number or a pair."""
    sides = {int(side) for side in (patch_size if isinstance(patch_size, list | tuple) else [patch_size])}
    if len(sides) != 1:
        raise CheckpointError(f"patch size {patch_size} is not square: take a ViT with square patches")
    return sides.pop()


def _tiny_backbone() -> Backbone:
    """A two-layer DINOv3 ViT of width 64 on 16-px patches, with the same random weights everywhere."""
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    config = DINOv3ViTConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        patch_size=16,
        num_register_tokens=4,
        image_size=64,
    )
    with torch.random.fork_rng(devices=[]), _quiet_transformers():
        model = DINOv3ViTModel(config)
    generator = torch.Generator().manual_seed(_TINY_SEED)
    for name, parameter in sorted(model.named_parameters()):
        parameter.data = _tiny_weights(name, parameter.shape, generator)
    return Backbone(model, "tiny", IMAGENET)


def _tiny_weights(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Uniform weights that keep the size of what passes through; norms 1, biases 0, LayerScale 0.3.

    Tokens then say above all what their own patch shows and a little what surrounds them and where they
    are, as trained features do. With the usual std of 0.02, a model this narrow passes on almost nothing
    but the patch itself. Uniform, because that comes from integers exactly: a normal draw may differ in the
    last bit between processors, and so would the hash.
    """
    if "patch_embeddings.weight" in name:
        return _smooth_filters(shape, generator)
    if name.endswith("bias") or "mask_token" in name:
        return torch.zeros(shape)
    if "norm" in name or "layer_scale" in name:
        return torch.full(shape, 0.3 if "layer_scale" in name else 1.0)
    inputs = math.prod(shape[1:]) if name.endswith("weight") else 1  # CLS and registers: std 1
    return (torch.rand(shape, generator=generator) * 2.0 - 1.0) * math.sqrt(3.0 / inputs)


def _smooth_filters(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Patch filters (D, 3, P, P) that see shapes and colours but no single pixels, as trained ones do.

    With independent weights a shape that moves by a pixel gives unrelated tokens, and nothing small can
    learn its motion. Every step is exact in float32: 4 x 4 multiples of 1/128, stretched by weights that
    are multiples of 1/64, times a power of two.
    """
    coarse = torch.randint(-127, 128, (*shape[:2], 4, 4), generator=generator) / 128.0
    return nn.functional.interpolate(coarse, size=tuple(shape[2:]), mode="bilinear") / 64.0


def _interpolation(model: nn.Module) -> dict[str, bool]:
    """ViTs with learned positions stretch them to other image sizes only when asked to."""
    asked = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    return {"interpolate_pos_encoding": True} if asked else {}


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bar and no notes while weights load: what matters is checked from the loading report."""
    from transformers.utils import logging

    verbosity, progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if progress:
            logging.enable_progress_bar()
