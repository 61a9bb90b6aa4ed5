"""YAML files of settings: what one seems to be, and what is wrong with it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from deltacache.schemas.datasets import Frozen
from deltacache.schemas.errors import DeltacacheError
from deltacache.schemas.refusals import problems_of
from deltacache.schemas.texts import decoded

ConfigT = TypeVar("ConfigT", bound=Frozen)

TOKENIZER = "a recipe of a tokenizer"
WORLD = "a recipe of a world model"
SYSTEMS = "a list of systems"
CHAIN = "a chain"
_COMMANDS = {
    TOKENIZER: "deltacache train-tokenizer --preset FILE.yaml",
    WORLD: "deltacache train-world --preset FILE.yaml",
    SYSTEMS: "deltacache train-systems --preset FILE.yaml",
    CHAIN: "deltacache run FILE.yaml",
    "settings of an evaluation": "deltacache report with the folder of FILE.yaml",
    "settings of an extraction": "deltacache extract-features, as flags",
}
_WANTED = {
    "TokenizerConfig": TOKENIZER,
    "WorldConfig": WORLD,
    "SystemsConfig": SYSTEMS,
    "ChainConfig": CHAIN,
}
"""What a config's file is called."""
_TELLING = {
    SYSTEMS: {"systems"},
    CHAIN: {"train_videos", "test_videos", "worlds"},
    "settings of an evaluation": {"horizons"},
    "settings of an extraction": {"source"},
}
"""One of these keys tells the kind of file, in this order."""
_OF_A_TOKENIZER = {"loss", "black_first_fraction", "encoder_layers", "decoder_layers", "frame_compression"}
_OF_A_WORLD = {"candidates", "smooth_l1_beta", "architecture", "num_layers", "query", "noise_std", "options"}
"""What only one of the two recipes, or its model, has."""


def read_yaml(path: Path) -> Any:
    """The content as plain values.

    Raises:
        DeltacacheError: there is no such file, or it is no YAML.
    """
    try:
        return yaml.safe_load(decoded(path.read_bytes()))
    except FileNotFoundError:
        raise DeltacacheError(f"{path} does not exist: give the path of a YAML config") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DeltacacheError(f"{path} cannot be read ({error}): give the path of a YAML config") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "somewhere"
        raise DeltacacheError(f"{path} is no YAML: {line}: {error.problem}; correct that line") from error
    except yaml.YAMLError as error:
        raise DeltacacheError(f"{path} is no YAML: {error}; give the path of a YAML config") from error


def load_config(path: Path, kind: type[ConfigT]) -> ConfigT:
    """Read one YAML file as ``kind``; unknown or ill-typed fields are refused by name."""
    content = read_yaml(path)
    wanted = _WANTED.get(kind.__name__, "a YAML file of settings")
    if not isinstance(content, Mapping):
        what = "is empty" if content is None else f"holds a {type(content).__name__}"
        names = ", ".join(kind.model_fields)
        raise DeltacacheError(f"{path} {what}, and {wanted} holds settings by name: give {names}")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        seems = kind_of(content)
        if seems in _COMMANDS and kind.__name__ in _WANTED and seems != wanted:
            raise DeltacacheError(
                f"{path} is not {wanted} but seems to be {seems}, which is for {_COMMANDS[seems]}"
            ) from error
        raise DeltacacheError(f"{path} is not {wanted}: {problems_of(error, kind)}") from error


def kind_of(content: Any) -> str | None:
    """What a YAML file seems to be, by its keys; None for what is none of ours."""
    if not isinstance(content, Mapping):
        return None
    for kind, keys in _TELLING.items():
        if keys & set(content):
            return kind
    model = content.get("model")
    if not isinstance(model, Mapping):
        return None
    keys = {*content, *model}
    tokenizer, world = len(keys & _OF_A_TOKENIZER), len(keys & _OF_A_WORLD)
    return None if tokenizer == world else TOKENIZER if tokenizer > world else WORLD
