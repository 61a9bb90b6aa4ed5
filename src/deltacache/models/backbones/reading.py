"""Encoders from a folder or the Hugging Face hub, with all their weights or not at all."""

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from deltacache.models.backbones.inputs import convention_of
from deltacache.models.backbones.normalisation import SETTINGS_FILES
from deltacache.schemas.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HUB_FILES = ["config.json", *SETTINGS_FILES, "model*.safetensors*"]


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
        with quiet_transformers():
            config = AutoConfig.from_pretrained(folder, **local)
            model, report = AutoModel.from_pretrained(
                folder, config=config, dtype=torch.float32, output_loading_info=True, **local
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"backbone {source!r} cannot be read: {error}. It must hold config.json and model.safetensors of a "
            "vision transformer that transformers knows: fetch it again"
        ) from error
    encoder = convention_of(model, source).encoder
    _check_weights(model, encoder, report["missing_keys"], report["unexpected_keys"], source)
    return encoder


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
