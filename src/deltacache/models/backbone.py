"""Frozen image encoders: frames in, patch tokens out."""

import json
import math
import re
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from deltacache.models.devices import autocast_to
from deltacache.models.encoders import convention_of, outside_encoder
from deltacache.models.outside import is_python_path
from deltacache.models.pca import Pca, check_pca, load_pca
from deltacache.models.weights import tensors_sha256
from deltacache.schemas.datasets import BackboneCard, Precision, Size, sides
from deltacache.schemas.errors import CheckpointError, MismatchError
from deltacache.schemas.hub import backbone_folder, origin_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# ----------------------------------------------------------------------------------------------------
# Encoders from a folder or the Hugging Face hub, with all their weights or not at all.
# ----------------------------------------------------------------------------------------------------


SETTINGS_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
"""Where transformers writes how pixels are prepared; the last holds a section for each kind of input."""
_HUB_FILES = ["config.json", *SETTINGS_FILES, "model*.safetensors*"]
_MARKS = (b"\xef\xbb", b"\xff\xfe", b"\xfe\xff")  # how UTF-8 and UTF-16 with a mark begin


def fetch(source: str) -> Path:
    """Fetch (or find in the local cache) what a backbone needs of a hub repository.

    Raises:
        CheckpointError: there is none of this name, it is gated, or the hub does not answer.
    """
    return backbone_folder(source, _HUB_FILES)


def read_encoder(folder: Path, source: str) -> nn.Module:
    """The image encoder of a Hugging Face directory, float32, without touching the network.

    Raises:
        CheckpointError: damaged, no vision transformer, or weights and config are not of the same model.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModel

    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        with readable_folder(folder, source) as readable:
            config = AutoConfig.from_pretrained(readable, **local)
            model, report = AutoModel.from_pretrained(
                readable, config=config, dtype=torch.float32, output_loading_info=True, **local
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"backbone {source!r} cannot be read: {error}. It must hold config.json and model.safetensors of a "
            "vision transformer that transformers knows: fetch it again"
        ) from error
    encoder = convention_of(model, source).encoder
    _check_weights(model, encoder, report["missing_keys"], report["unexpected_keys"], source)
    return encoder


@contextmanager
def readable_folder(folder: Path, source: str) -> Iterator[Path]:
    """Where transformers can read the encoder of ``folder`` inside the context.

    Raises:
        CheckpointError: a format that is not read, or one that needs a package which is not installed.
    """
    try:
        with quiet_transformers(), _without_marks(folder) as readable:
            _refuse_foreign(readable, source)
            yield readable
    except ImportError as error:
        raise CheckpointError(
            f"backbone {source!r} needs a package that is not installed: {' '.join(str(error).split())} Or take a "
            "vision transformer that needs none, such as facebook/dinov3-vitb16-pretrain-lvd1689m"
        ) from error


@contextmanager
def _without_marks(folder: Path) -> Iterator[Path]:
    """``folder``, or one of links to it whose JSON files are plain UTF-8: transformers refuses byte-order marks."""
    marked = [path for path in folder.glob("*.json") if path.read_bytes()[:2] in _MARKS]
    if not marked:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="deltacache-backbone-") as copy:
        for path in folder.iterdir():
            Path(copy, path.name).symlink_to(path.resolve())
        for path in marked:
            target = Path(copy, path.name)
            target.unlink()
            target.write_text(json.dumps(json.loads(path.read_bytes())), encoding="utf-8")
        yield Path(copy)


def _refuse_foreign(folder: Path, source: str) -> None:
    """Formats that no package makes usable here: timm's own, and weights that are packed."""
    path = folder / "config.json"
    config = json.loads(path.read_bytes()) if path.is_file() else {}
    if not isinstance(config, dict):
        raise ValueError(f"{path.name} is not a mapping of settings")
    if "pretrained_cfg" in config or str(config.get("model_type", "")).startswith("timm"):
        raise CheckpointError(
            f"backbone {source!r} is a model of timm ({config.get('architecture', 'unnamed')}), whose patch tokens are "
            "not read, with timm installed or not: take the same encoder in the format of transformers, such as "
            "facebook/dinov3-vitb16-pretrain-lvd1689m for timm/vit_base_patch16_dinov3"
        )
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method", "unnamed") if isinstance(quantised, dict) else quantised
        raise CheckpointError(
            f"backbone {source!r} has quantised weights ({method}), which are not read, whatever is installed: take "
            "the repository or directory with its weights in float32, float16 or bfloat16"
        )


def _check_weights(
    model: "PreTrainedModel",
    encoder: nn.Module,
    missing: Collection[str],
    unexpected: Collection[str],
    source: str,
) -> None:
    """Refuse random weights in the encoder, and layers in the file that its config does not have.

    What is missing or too much elsewhere (pooling, a classifier, a text tower) does not matter.
    """
    prefix = next(name + "." if name else "" for name, part in model.named_modules() if part is encoder)
    kept = {prefix + name for name in encoder.state_dict()}
    wrong = f"{type(encoder).__name__}, the first is {{}}: its config.json belongs to another model"
    if unread := sorted(kept & set(missing)):
        raise CheckpointError(
            f"backbone {source!r} lacks {len(unread)} weights of a {wrong.format(unread[0])}, or the file is "
            "incomplete: fetch both again"
        )
    layers = {_any_number(name) for name in kept}
    if beyond := sorted(name for name in unexpected if _any_number(name) in layers):
        raise CheckpointError(
            f"backbone {source!r} holds {len(beyond)} weights of more layers than its config.json says for a "
            f"{wrong.format(beyond[0])}: fetch both again"
        )


def _any_number(name: str) -> str:
    return re.sub(r"\d+", "#", name)


@contextmanager
def quiet_transformers() -> Iterator[None]:
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


# ----------------------------------------------------------------------------------------------------
# How pixels are scaled before an encoder sees them, as its folder says or as its family has it.
# ----------------------------------------------------------------------------------------------------


RGB = tuple[float, float, float]


class Normalisation(NamedTuple):
    """Mean and standard deviation of each channel, for pixels in [0, 1]."""

    mean: RGB
    std: RGB


IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_CLIP = Normalisation((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_OF_FAMILY: Mapping[str, Normalisation] = MappingProxyType({"siglip": _HALF, "siglip2": _HALF, "clip": _CLIP})

_PIXELS = 255.0
_UNSUPPORTED = ("do_flip_channel_order", "do_grayscale", "do_color_quantize", "offset", "rescale_offset")
"""Settings of single processors that change pixels in other ways than scaling each channel."""


def read_normalisation(folder: Path, model_type: str) -> Normalisation:
    """What the processor of transformers computes with the settings in ``folder``; without any, the family's.

    ``(pixel * rescale_factor - image_mean) / image_std``, either step left out by ``do_rescale`` or ``do_normalize``,
    is written here for pixels in [0, 1]. A setting that the file lacks is the default of the processor class.

    Args:
        model_type: of the model's config; families that are not SigLIP or CLIP have ImageNet's numbers.

    Raises:
        CheckpointError: the file holds something else, or a setting that is not followed here.
    """
    family = model_type.removesuffix("_vision_model")
    usual = _OF_FAMILY.get(family, IMAGENET)
    for path, settings in _sections(folder):
        defaults = {"image_mean": usual.mean, "image_std": usual.std, "rescale_factor": 1 / _PIXELS}
        defaults |= {"do_rescale": True, "do_normalize": True} | _class_defaults(settings, family)
        chosen = {**defaults, **settings}
        if followed := next((name for name in _UNSUPPORTED if chosen.get(name)), None):
            raise CheckpointError(
                f"{path} sets {followed} to {chosen[followed]}, which changes pixels in a way that is not followed "
                "here: take an encoder whose processor only rescales and normalises"
            )
        try:
            return _folded(chosen)
        except (ValueError, TypeError, OverflowError) as error:
            raise CheckpointError(
                f"{path} does not hold image_mean and image_std of three numbers each and a rescale_factor "
                f"({error}): fetch it again"
            ) from error
    return usual


def _sections(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Settings about pixels in the order in which transformers looks for them; those of videos come last."""
    found: dict[str, dict[str, Any]] = {}
    for path in (folder / name for name in SETTINGS_FILES if (folder / name).exists()):
        try:
            content = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path} cannot be read as JSON settings ({error}): fetch it again"
            ) from error
        if not isinstance(content, dict):
            raise CheckpointError(f"{path} is not a mapping of settings: fetch it again")
        found[path.name] = content
    images, videos, all_kinds = SETTINGS_FILES
    several = found.get(all_kinds, {})
    if isinstance(several.get("image_processor"), dict):
        yield folder / all_kinds, several["image_processor"]
    for name in (images, videos):
        if name in found:
            nested = found[name].get("image_processor") or found[name].get("video_processor")
            yield folder / name, nested if isinstance(nested, dict) else found[name]
    if isinstance(several.get("video_processor"), dict):
        yield folder / all_kinds, several["video_processor"]
    if {"image_mean", "image_std", "do_rescale", "rescale_factor", "do_normalize"} & several.keys():
        yield folder / all_kinds, several


def _class_defaults(settings: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Of the processor class that the settings name, else of the family's; nothing where it cannot be imported.

    The classes without torchvision ("...Pil") have the same defaults. Those that exist with torchvision only, such
    as DINOv3's, have ImageNet's numbers, which are the family's here too.
    """
    import transformers
    from transformers.models.auto import image_processing_auto

    named = (
        settings.get(key)
        for key in ("image_processor_type", "video_processor_type", "feature_extractor_type")
    )
    names: Any = image_processing_auto.IMAGE_PROCESSOR_MAPPING_NAMES  # pyright: ignore[reportPrivateImportUsage]
    of_family = names.get(family, {})
    name = str(next((each for each in named if each), of_family.get("torchvision") or ""))
    name = name.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
    wanted = ("image_mean", "image_std", "do_rescale", "rescale_factor", "do_normalize", *_UNSUPPORTED)
    with quiet_transformers():
        for each in (f"{name}Pil", name):
            try:
                kind = getattr(transformers, each)
                return {key: getattr(kind, key) for key in wanted if getattr(kind, key, None) is not None}
            except (AttributeError, ImportError):
                continue
    return {}


def _folded(settings: Mapping[str, Any]) -> Normalisation:
    """Rescaling and normalising as one mean and one deviation a channel, for pixels in [0, 1]."""
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if settings["do_normalize"]:
        mean, std = _three(settings["image_mean"]), _three(settings["image_std"])
    factor = float(settings["rescale_factor"]) if settings["do_rescale"] else 1.0
    if not (math.isfinite(factor) and factor > 0 and all(each > 0 for each in std)):
        raise ValueError(f"rescale_factor {factor} and image_std {std} must be positive")
    scale = _PIXELS * factor
    if math.isclose(scale, 1.0, rel_tol=1e-6):
        return Normalisation(mean, std)
    return Normalisation(_three([each / scale for each in mean]), _three([each / scale for each in std]))


def _three(values: Any) -> RGB:
    """One number stands for three equal ones, as in transformers."""
    red, green, blue = (
        float(value) for value in ([values] * 3 if isinstance(values, int | float) else values)
    )
    if not all(math.isfinite(value) for value in (red, green, blue)):
        raise ValueError(f"{values} must be finite")
    return red, green, blue


# ----------------------------------------------------------------------------------------------------
# The built-in encoder: small, random, the same everywhere.
# ----------------------------------------------------------------------------------------------------


_SEED = 2604_04913


def tiny_encoder() -> "PreTrainedModel":
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
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        model = DINOv3ViTModel(config)
    generator = torch.Generator().manual_seed(_SEED)
    for name, parameter in sorted(model.named_parameters()):
        parameter.data = _weights(name, parameter.shape, generator)
    return model


def _weights(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
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


# ----------------------------------------------------------------------------------------------------
# Outputs of several blocks of an encoder, each through its final norm, as dense heads and forecasters take
# them.
#
# DINO-Foresight (Karypidis et al. 2024, arXiv 2412.11673; method section 4, Table D) joins blocks 2, 5, 8 and
# 11 of a DINOv2 ViT-B/14 with registers: blocks are counted from 0, and the final norm that was trained for
# the last of them is applied to all.
#
# Shapes: B images, P prefix tokens, N patches, D width of the encoder, L layers.
# ----------------------------------------------------------------------------------------------------


_NORMS = ("layernorm", "norm", "post_layernorm")
"""Names of the final norm in the encoders of transformers."""


class LayerOutputs:
    """Listens to blocks of an encoder. Safe to use from several threads at once: each hears its own forward.

    Raises:
        MismatchError: the encoder has no such blocks, or they are not in increasing order.
    """

    def __init__(self, encoder: nn.Module, layers: Sequence[int], name: str) -> None:
        path, blocks = _blocks(encoder, name)
        if not layers or min(layers) < 0 or max(layers) >= len(blocks) or sorted(set(layers)) != list(layers):
            raise MismatchError(
                f"layers {','.join(map(str, layers))} of {name}: give block numbers from 0 to {len(blocks) - 1}, "
                "in increasing order and none twice"
            )
        self._norm = _final_norm(encoder, path)
        self._heard = threading.local()
        for place, layer in enumerate(layers):
            blocks[layer].register_forward_hook(self._hook(place))

    def of(self, forward: Callable[[], Tensor]) -> Tensor:
        """What the blocks give in ``forward``: (B, P + N, L * D), the first layer's channels first.

        Args:
            forward: runs the encoder once, giving its last hidden state (B, P + N, D).
        """
        heard = self._heard.outputs = dict[int, Tensor]()
        try:
            forward()
        finally:
            del self._heard.outputs
        return torch.cat([self._norm(heard[place]) for place in sorted(heard)], dim=-1)

    def _hook(self, place: int) -> Callable[[nn.Module, Any, Any], None]:
        def hear(_module: nn.Module, _inputs: Any, output: Any) -> None:
            outputs = getattr(self._heard, "outputs", None)
            if outputs is not None:
                outputs[place] = output[0] if isinstance(output, tuple) else output

        return hear


def _blocks(encoder: nn.Module, name: str) -> tuple[str, nn.ModuleList]:
    """The transformer blocks: the one list of as many modules as the config has layers."""
    count = getattr(getattr(encoder, "config", None), "num_hidden_layers", None)
    lists = {path: part for path, part in encoder.named_modules() if isinstance(part, nn.ModuleList)}
    outermost = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    found = [(path, lists[path]) for path in outermost if len(lists[path]) == count]
    if len(found) != 1:
        raise MismatchError(
            f"layers of {name} are not known: {type(encoder).__name__} has no single list of {count} blocks; "
            "leave --layers out, or take a ViT such as DINOv2 or DINOv3"
        )
    return found[0]


def _final_norm(encoder: nn.Module, blocks: str) -> nn.Module:
    """What comes after the last block; nothing in encoders without one."""
    norms = [
        part
        for path, part in encoder.named_modules()
        if path.rpartition(".")[2] in _NORMS and not path.startswith(f"{blocks}.")
    ]
    return norms[-1] if norms else nn.Identity()


# B batch, H height, W width in pixels, N patches, D hidden


__all__ = ["IMAGENET", "Backbone", "Normalisation", "load_backbone"]


class Backbone(nn.Module):
    """An image encoder, of transformers or from outside of the package, frozen and always in eval mode.

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
        self.width: int = self._inputs.width
        self.layers, self.pca = layers, None
        self.source: str | None = None  # on the hub, with its commit
        self._dtype: torch.dtype | None = None  # of products, if not float32
        self._layer_outputs = LayerOutputs(self.model, layers, name) if layers is not None else None
        self.image_mean, self.image_std = normalisation
        self._most_prefix_tokens = self._inputs.most_prefix_tokens
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
            source=self.source,
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
    """``tiny`` (built in), a Hugging Face directory, a hub id, or ``package.module:factory``; forward in ``precision``.

    A Python path is imported: it must come from the user, never from a dataset or a checkpoint.
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
    if is_python_path(source):
        outside = outside_encoder(source)
        return Backbone(outside, source, Normalisation(outside.image_mean, outside.image_std), layers)
    folder, name = Path(source).expanduser(), source
    if folder.is_dir():
        name = folder.resolve().name
    else:
        folder = fetch(source)
    encoder: Any = read_encoder(folder, source)
    normalisation = read_normalisation(folder, encoder.config.model_type)
    backbone = Backbone(encoder, name, normalisation, layers)
    backbone.source = origin_of(folder)
    return backbone
