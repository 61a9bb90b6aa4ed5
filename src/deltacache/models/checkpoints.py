"""Write and read checkpoints of DeltaTok and DeltaWorld: our folders and the released files, strictly."""

import json
import pickle
import re
import statistics
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from deltacache.models.deltatok import DeltaTok
from deltacache.models.devices import shapes_only
from deltacache.models.weights import weights_fingerprint
from deltacache.models.world_model import WorldModel
from deltacache.models.worlds import architecture_of, is_known, world_class
from deltacache.schemas.errors import CheckpointError

# ----------------------------------------------------------------------------------------------------
# Constructor arguments read off a checkpoint's parameter names and shapes: released files carry no config.
# ----------------------------------------------------------------------------------------------------


Shapes = Mapping[str, tuple[int, ...]]
_RELEASED_HEAD_DIM = 64  # of every ViT the method uses


def tokenizer_arguments(shapes: Shapes) -> dict[str, Any]:
    """Arguments of the ``DeltaTok`` that wrote these weights.

    What leaves no trace keeps the released value: 64 dims per head where neither gate nor QK-norm tell,
    RoPE's base and augmentation, and no frame compression.
    """
    if not any(name.startswith("encoder_blocks.") for name in shapes):
        raise CheckpointError(f"holds no tokenizer: {_what_it_holds(shapes)}; DeltaTok has encoder_blocks.*")
    hidden_size = _size(shapes, "z_embed.weight", "xy_embed.weight", "norm1.weight")
    return {
        "hidden_size": hidden_size,
        "num_heads": _tokenizer_heads(shapes, hidden_size),
        "encoder_layers": _layers(shapes, "encoder_blocks."),
        "decoder_layers": _layers(shapes, "decoder_blocks."),
        "qk_norm": _usual(shapes, "q_norm.weight") is not None,
        "gated_attention": _usual(shapes, "attn_gate.weight") is not None,
        "mlp": "gelu" if _usual(shapes, "mlp.gate_proj.weight") is None else "swiglu",
        "tokens_per_frame": shapes.get("z_embed.weight", (1,))[0],
    }


def world_arguments(shapes: Shapes) -> dict[str, Any]:
    """Arguments of the ``DeltaWorld`` that wrote these weights; heads are taken to have 64 dims."""
    if not any(name.startswith("predictor.") for name in shapes):
        raise CheckpointError(f"holds no world model: {_what_it_holds(shapes)}; DeltaWorld has predictor.*")
    hidden_size = _size(shapes, "predictor.norm.weight", "predictor.head.bias", "norm1.weight")
    mlp_width = _usual(shapes, "mlp.up_proj.weight")
    return {
        "hidden_size": hidden_size,
        "num_heads": max(1, hidden_size // _RELEASED_HEAD_DIM),
        "num_layers": _layers(shapes, "predictor.blocks."),
        "mlp_ratio": mlp_width[0] / hidden_size if mlp_width else 4.0,
        "query": "learned" if "q_embed.weight" in shapes else "noise",
        **({"tokens_per_frame": shapes["place_embed.weight"][0]} if "place_embed.weight" in shapes else {}),
    }


def _tokenizer_heads(shapes: Shapes, hidden_size: int) -> int:
    gate, norm = _usual(shapes, "attn_gate.bias"), _usual(shapes, "q_norm.weight")
    if gate:
        return gate[0]
    return max(1, hidden_size // (norm[0] if norm else _RELEASED_HEAD_DIM))


def _usual(shapes: Shapes, suffix: str) -> tuple[int, ...] | None:
    """The shape most parameters of that name have, so that one misshapen block stands out; None for none."""
    found = [shape for name, shape in shapes.items() if name.endswith(suffix) and shape]
    return statistics.mode(found) if found else None


def _size(shapes: Shapes, *suffixes: str) -> int:
    """Last dimension of the first of these parameters that is there."""
    for suffix in suffixes:
        shape = _usual(shapes, suffix)
        if shape:
            return shape[-1]
    raise CheckpointError(f"does not show its width: none of {', '.join(suffixes)} is there")


def _layers(shapes: Iterable[str], prefix: str) -> int:
    """Highest block number plus one, so that a block missing in between is reported, not skipped."""
    numbers = (re.match(re.escape(prefix) + r"(\d+)\.", name) for name in shapes)
    return max((int(match[1]) + 1 for match in numbers if match), default=0)


def _what_it_holds(shapes: Shapes) -> str:
    heads = sorted({name.split(".")[0] for name in shapes})
    return f"its parameters are {', '.join(heads[:5])}{', …' if len(heads) > 5 else ''}"


__all__ = [
    "LoadedModel",
    "holds_checkpoint",
    "load_model",
    "load_tokenizer",
    "load_world",
    "recorded_config",
    "save_model",
    "save_weights",
    "weights_fingerprint",
]

Kind = Literal["tokenizer", "world", "head", "rgb_decoder"]
Arguments = Mapping[str, Any]


class SavedModel(Protocol):
    """A seam: a model that says what it was built with."""

    arguments: dict[str, Any]

    def state_dict(self) -> dict[str, Any]:
        """Weights and buffers by name."""
        ...

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Take weights and buffers over."""
        ...

    def eval(self) -> Any:
        """Change to eval mode."""
        ...


ModelT = TypeVar("ModelT", bound=SavedModel)

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
_RELEASED_FILES = ("pytorch_model.bin", "last.ckpt")
_NAMES_SHOWN = 8
_FIRST_ARCHITECTURE = "deltaworld"
"""Of checkpoints from before there were others."""


@dataclass(frozen=True, slots=True)
class LoadedModel(Generic[ModelT]):
    """A model in eval mode, float32, on the CPU; ``metadata`` is what its config.json says.

    The fingerprint depends on the weights alone: a released file and our copy of it have the same.
    """

    model: ModelT
    fingerprint: str
    metadata: Mapping[str, Any]


def save_model(folder: Path, model: SavedModel, kind: Kind, metadata: Mapping[str, Any]) -> None:
    """Write config.json and model.safetensors into ``folder``; equal weights give equal bytes.

    Plain writes: a caller that needs all or nothing writes to a temporary folder and renames it.
    """
    if isinstance(model, WorldModel):
        metadata = {"architecture": architecture_of(model), **metadata}
    save_weights(folder, model.state_dict(), model.arguments, kind, metadata)


def save_weights(
    folder: Path, weights: Mapping[str, Tensor], arguments: Arguments, kind: Kind, metadata: Mapping[str, Any]
) -> None:
    """``save_model`` from the parts of a model: its ``state_dict`` and its constructor's arguments."""
    state_dict = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    config = {"kind": kind, "arguments": dict(arguments), "fingerprint": weights_fingerprint(state_dict)}
    if taken := config.keys() & metadata.keys():
        raise ValueError(f"metadata must not name {sorted(taken)}: these describe the model")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state_dict, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps({**config, **metadata}, indent=2) + "\n")


def load_tokenizer(path: Path, arguments: Arguments | None = None) -> LoadedModel[DeltaTok]:
    """Read a DeltaTok from a checkpoint folder, a training output (its newest checkpoint) or a released file.

    Released files (``pytorch_model.bin``, a Lightning ``last.ckpt``, or safetensors) carry no config:
    their arguments are read off names and shapes, and ``arguments`` settles what those do not tell
    (``num_heads`` without gate and QK-norm, ``frame_compression``). Anything missing, unexpected,
    misshapen or damaged is a ``CheckpointError``.
    """
    return load_model(path, "tokenizer", DeltaTok, tokenizer_arguments, arguments)


def load_world(
    path: Path, arguments: Arguments | None = None, architecture: str | None = None
) -> LoadedModel[WorldModel]:
    """Read a world model, as ``load_tokenizer`` does; ``arguments`` may settle ``num_heads``.

    A folder says which architecture it is; a released file is a DeltaWorld unless ``architecture`` says otherwise:
    DINO-world's parameters have the same names and shapes.
    """
    place = _locate(path)
    if place.is_dir():
        said = _read_config(place, "world").get("architecture", _FIRST_ARCHITECTURE)
        if architecture not in (None, said):
            raise CheckpointError(f"{path} is a {said}, not a {architecture}: leave the architecture out")
        if architecture is None and not is_known(said):
            raise CheckpointError(
                f"{path} is a {said}, code outside of deltacache, which is imported only when it is named: give "
                f"{said}={path} as the world model"
            )
        architecture = said
    return load_model(
        path, "world", world_class(architecture or _FIRST_ARCHITECTURE), world_arguments, arguments
    )


def recorded_config(path: Path) -> dict[str, Any] | None:
    """``config.json`` of the checkpoint folder that ``path`` is or holds the newest of; ``None`` of a released file.

    Raises:
        CheckpointError: there is no checkpoint, or its config is damaged.
    """
    place = _locate(path)
    return _read_any_config(place) if place.is_dir() else None


def load_model(
    path: Path,
    kind: Kind,
    model_class: type[ModelT],
    infer: Callable[[Mapping[str, tuple[int, ...]]], dict[str, Any]],
    arguments: Arguments | None = None,
) -> LoadedModel[ModelT]:
    """Read any of our models, as ``load_tokenizer`` does; ``infer`` reads arguments off names and shapes."""
    place = _locate(path)
    config: dict[str, Any] = {}
    if place.is_dir():
        if arguments is not None:
            raise ValueError(f"{place} has its own arguments in {CONFIG_FILE}: give none")
        config = _read_config(place, kind)
        state_dict = _read_safetensors(place / WEIGHTS_FILE)
    else:
        state_dict = _read_released(place)
        try:
            inferred = infer({name: tuple(tensor.shape) for name, tensor in state_dict.items()})
        except CheckpointError as error:
            raise CheckpointError(f"{place} {error}") from None
        config = {"kind": kind, "arguments": {**inferred, **(arguments or {})}}
    model = _build(model_class, config["arguments"], place)
    _fill(model, state_dict, place)
    fingerprint = weights_fingerprint(model.state_dict())
    if fingerprint != config.get("fingerprint", fingerprint):
        raise CheckpointError(
            f"{place / WEIGHTS_FILE} has the fingerprint {fingerprint}, but {CONFIG_FILE} says "
            f"{config['fingerprint']}: the weights were damaged or exchanged; take another checkpoint"
        )
    return LoadedModel(model, fingerprint, {**config, "arguments": model.arguments})


def holds_checkpoint(folder: Path) -> bool:
    """Whether there is a checkpoint or a released file in ``folder``, in its steps, or in those of a training."""
    return _found(folder) is not None


def _locate(path: Path) -> Path:
    """The checkpoint folder or weights file that ``path`` means."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: give a checkpoint folder, a training output or a file")
    if path.is_file():
        return path
    found = _found(path)
    if found is None:
        raise CheckpointError(
            f"{path} holds no checkpoint: expected {CONFIG_FILE} and {WEIGHTS_FILE}, checkpoints/step-*, "
            f"or {' or '.join(_RELEASED_FILES)}"
        )
    return found


def _found(folder: Path) -> Path | None:
    for place in (folder, *_steps_newest_first(folder / "checkpoints"), *_steps_newest_first(folder)):
        if (place / CONFIG_FILE).is_file() and (place / WEIGHTS_FILE).is_file():
            return place
    return next((folder / name for name in _RELEASED_FILES if (folder / name).is_file()), None)


def _steps_newest_first(folder: Path) -> list[Path]:
    """``step-<number>`` folders; temporary names of unfinished ones do not match."""
    if not folder.is_dir():
        return []
    steps = [place for place in folder.iterdir() if re.fullmatch(r"step-\d+", place.name)]
    return sorted(steps, key=lambda place: int(place.name.removeprefix("step-")), reverse=True)


def _read_config(folder: Path, kind: Kind) -> dict[str, Any]:
    config = _read_any_config(folder)
    if config["kind"] != kind:
        raise CheckpointError(f"{folder} holds a {config['kind']}, but a {kind} is needed: give its path")
    return config


def _read_any_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}): take another checkpoint") from error
    if not isinstance(config, dict) or not {"kind", "arguments", "fingerprint"} <= config.keys():
        raise CheckpointError(f"{path} is not a checkpoint's: it must hold kind, arguments and fingerprint")
    return config


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} is damaged or not a safetensors file ({error}): fetch it again"
        ) from error


def _read_released(path: Path) -> dict[str, Tensor]:
    """Parameters by name, of a safetensors file, a ``pytorch_model.bin`` or a Lightning checkpoint."""
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    _check_records(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # The first line only: torch goes on to recommend loading without the check, which would run code.
        reason = str(error).split("\n")[0]
        raise CheckpointError(
            f"{path} is damaged, or holds Python objects besides tensors, which are never run ({reason}): "
            "fetch it again, or save its state_dict alone as safetensors"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(f"{path} is damaged or not a PyTorch file ({error}): fetch it again") from error
    state_dict = content.get("state_dict", content) if isinstance(content, dict) else {}
    if not state_dict or not all(isinstance(value, Tensor) for value in state_dict.values()):
        raise CheckpointError(f"{path} holds no named parameters: expected a state_dict")
    return state_dict


def _check_records(path: Path) -> None:
    """Compare the checksums that ``torch.save`` writes: ``torch.load`` takes flipped bytes as they are.

    Files from before PyTorch 1.6 are not zip archives and are refused, as is everything else that is not one.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged or not a PyTorch file ({error}): fetch it again") from error
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged: {damaged} does not match its checksum; fetch it again")


def _build(model_class: type[ModelT], arguments: Arguments, place: Path) -> ModelT:
    """An empty model."""
    try:
        with shapes_only():
            return model_class(**arguments)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{place} asks for a {model_class.__name__} that cannot be built ({error}): "
            "give its arguments, or take another checkpoint"
        ) from error


def _fill(model: SavedModel, state_dict: Mapping[str, Tensor], place: Path) -> None:
    """Load strictly, in float32; what does not fit is listed before anything is assigned."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    misshapen = [
        f"{name} is {tuple(state_dict[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in state_dict and tuple(state_dict[name].shape) != shape
    ]
    problems = {
        "missing": [name for name in expected if name not in state_dict],
        "unexpected": [name for name in state_dict if name not in expected],
        "misshapen": misshapen,
    }
    if any(problems.values()):
        arguments = ", ".join(f"{name}={value!r}" for name, value in model.arguments.items())
        lines = [f"  {_listed(word, names)}" for word, names in problems.items() if names]
        raise CheckpointError(
            f"{place} does not fit {type(model).__name__}({arguments}):\n" + "\n".join(lines) + "\n"
            "Give a checkpoint of this model, or the arguments that made this one."
        )
    weights = {
        name: tensor.to(
            torch.float32 if tensor.is_floating_point() else tensor.dtype,
            copy=True,
            memory_format=torch.contiguous_format,
        )
        for name, tensor in state_dict.items()
    }
    model.load_state_dict(weights, assign=True)
    model.eval()


def _listed(word: str, names: list[str]) -> str:
    more = f", and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return f"{len(names)} {word}: {', '.join(names[:_NAMES_SHOWN])}{more}"
