"""Encoders from a folder or the Hugging Face hub, with all their weights or not at all."""

import json
import re
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from deltacache.models.backbones.inputs import convention_of
from deltacache.schemas.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SETTINGS_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
"""Where transformers writes how pixels are prepared; the last holds a section for each kind of input."""
_HUB_FILES = ["config.json", *SETTINGS_FILES, "model*.safetensors*"]
_MARKS = (b"\xef\xbb", b"\xff\xfe", b"\xfe\xff")  # how UTF-8 and UTF-16 with a mark begin


def fetch(source: str) -> Path:
    """Fetch (or find in the local cache) what a backbone needs of a hub repository.

    Raises:
        CheckpointError: there is none of this name, it is gated, or the hub does not answer.
    """
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
        raise ValueError(f"{path.name} holds no settings by name")
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
