"""What ``inspect`` says of models: checkpoints, trainings, heads, released files, backbones, PCAs."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from deltacache.chain.descriptions.lines import line, size_of
from deltacache.models.backbone import load_backbone
from deltacache.models.checkpoints import (
    CONFIG_FILE,
    LoadedModel,
    load_tokenizer,
    load_world,
    recorded_config,
)
from deltacache.models.heads import load_head
from deltacache.models.pca import load_pca
from deltacache.schemas.errors import CheckpointError
from deltacache.train.checkpoints import finished_checkpoints

LOADERS: Mapping[str, Callable[[Path], LoadedModel[Any]]] = {
    "tokenizer": load_tokenizer,
    "world": load_world,
    "depth head": lambda path: load_head(path, "depth"),  # first: 256 channels are its bins
    "segmentation head": lambda path: load_head(path, "segmentation"),
}
_MADE_FROM = (
    "architecture",
    "fingerprint",
    "sha256",
    "step",
    "image_size",
    "code_version",
    "benchmark",
    "patch_grid",
)


def describe_model(path: Path) -> Iterator[str]:
    """A checkpoint folder, a training output (its newest checkpoint), a head, a released file.

    Raises:
        CheckpointError: it is damaged, or none of our models.
    """
    recorded = recorded_config(path)
    if recorded is not None and recorded["kind"] == "rgb_decoder":
        yield from _rgb_decoder(path, recorded)  # its weights need the backbone whose norm they undo
        return
    loaded = _load(path, None if recorded is None else str(recorded["kind"]))
    yield f"{path}: {type(loaded.model).__name__}, {_parameters(loaded.model)}, {size_of(path)}"
    yield line("fingerprint", loaded.fingerprint)
    yield from _metadata(loaded.metadata)


def describe_training(path: Path) -> Iterator[str]:
    """A training output, from its newest checkpoint if there is one yet."""
    if not finished_checkpoints(path):
        yield f"{path}: a training without a checkpoint yet, {size_of(path)}"
        return
    yield from describe_model(path)


def describe_pca(path: Path) -> Iterator[str]:
    """The output of fit-pca.

    Raises:
        CheckpointError: it is damaged.
    """
    pca = load_pca(path)
    yield (
        f"{path}: a PCA, {pca.size} components of {pca.channels} channels, which explain {pca.explained:.2%} of the "
        f"variance, {size_of(path)}"
    )
    yield line("fingerprint", pca.fingerprint)
    for name, value in pca.metadata.items():
        yield line(name, value["id"] if name == "backbone" else value)


def describe_backbone(path: Path) -> Iterator[str]:
    """A Hugging Face directory.

    Raises:
        CheckpointError: it is damaged, or holds no image encoder.
    """
    backbone = load_backbone(str(path))
    yield (
        f"{path}: a backbone, {type(backbone.model).__name__}, {_parameters(backbone.model)}, {size_of(path)}"
    )
    yield line("weights_sha256", backbone.weights_sha256)
    yield line("patch tokens", f"{backbone.hidden_size} wide, of {backbone.patch_size} px patches")
    config = read_config(path)
    for name in ("model_type", "_name_or_path", "transformers_version"):
        if config.get(name):
            yield line(name.removeprefix("_"), config[name])


def read_config(folder: Path) -> Mapping[str, Any]:
    """``config.json`` of any folder; nothing where there is none, or it is no JSON object."""
    try:
        config = json.loads((folder / CONFIG_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def made_from(metadata: Mapping[str, Any]) -> Iterator[str]:
    """Fingerprints of what a model was made from."""
    for name, value in metadata.items():
        if name.endswith(("_fingerprint", "sha256")):
            yield line("", f"of {name.replace('_', ' ')} {str(value)[:16]}")


def _metadata(metadata: Mapping[str, Any]) -> Iterator[str]:
    for name, value in metadata.items():
        if name != "fingerprint" and name.endswith(_MADE_FROM):
            yield line(name, value)
    said = metadata.get("trained_on")
    if isinstance(said, Mapping):
        yield line("trained_on", ", ".join(f"{name} {value}" for name, value in said.items()))


def _load(path: Path, kind: str | None) -> LoadedModel[Any]:
    """The model at ``path``; without a record of its kind, whichever its tensors fit."""
    refusals: dict[str, CheckpointError] = {}
    for name, load in LOADERS.items():
        if kind is None or name.endswith(kind):
            try:
                return load(path)
            except CheckpointError as error:
                refusals[name] = error
    reasons = list(dict.fromkeys(str(error).split("\n")[0] for error in refusals.values()))
    if len(reasons) == 1 or kind == "head":
        raise next(iter(refusals.values()))  # damaged
    raise CheckpointError(
        f"{path} is none of deltacache's models, looked for a {', '.join(LOADERS)}: {reasons[0]}"
        if kind is None
        else f"{path} says that it is a {kind}, looked for a {', '.join((*LOADERS, 'rgb_decoder', 'pca'))}"
    )


def _parameters(model: Any) -> str:
    return f"{sum(tensor.numel() for tensor in model.parameters()) / 1e6:.2f} M parameters"


def _rgb_decoder(path: Path, config: Mapping[str, Any]) -> Iterator[str]:
    yield f"{path}: RgbDecoder, {size_of(path)}"
    yield line("fingerprint", config["fingerprint"])
    yield from _metadata(config)
