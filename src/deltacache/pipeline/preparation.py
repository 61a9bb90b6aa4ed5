"""The start of a dataset: ``dataset.json`` and the black frame's patch tokens."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from deltacache.pipeline.atomic import is_temporary, readable_errors, remove_leftovers, write_bytes
from deltacache.pipeline.checksums import crc32c_of_npy, npy_bytes, npy_view
from deltacache.pipeline.receipts import RECEIPTS, SHARDS
from deltacache.schemas.datasets import FORMAT_VERSION, DatasetCard
from deltacache.schemas.errors import DatasetError, MismatchError
from deltacache.schemas.fingerprints import canonical_json

CARD_FILE = "dataset.json"
BLACK_FILE = "black_patch_tokens.npy"
_NOT_SETTINGS = frozenset({"code_version", "black_crc32c", "backbone.id"})
"""What may differ when a dataset is continued: who wrote it, and what the backbone's weights determine."""


def prepare_dataset(root: Path, card: DatasetCard, black_patch_tokens: np.ndarray) -> None:
    """Create the dataset at ``root``, or accept the one that is there if its settings are equal.

    Args:
        root: A folder that does not exist, is empty, or is a dataset.
        card: What the dataset is to hold.
        black_patch_tokens: (N, D) float16, patch tokens of an all-black frame.

    Raises:
        DatasetError: the folder holds something else, or ``dataset.json`` is damaged.
        MismatchError: it is a dataset with other settings; the message names each.
    """
    _check_black(black_patch_tokens, card)
    exists = (root / CARD_FILE).exists()
    if exists:
        _check_same_settings(root, read_card(root), card)
    else:
        _check_empty(root)
    with readable_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        if not exists:
            write_bytes(root / CARD_FILE, card_bytes(card))
        for folder in (root, root / SHARDS, root / RECEIPTS):
            folder.mkdir(exist_ok=True)
            remove_leftovers(folder)
        if not (root / BLACK_FILE).exists():
            _check_same_black(root, card)
            write_bytes(root / BLACK_FILE, npy_bytes(black_patch_tokens))


def card_bytes(card: DatasetCard) -> bytes:
    """The content of ``dataset.json``."""
    body = card.model_dump(mode="json") | {"fingerprint": card.fingerprint, "parents": card.parents}
    return json.dumps(body, indent=2).encode() + b"\n"


def read_card(root: Path) -> DatasetCard:
    """Read ``dataset.json`` and check that its fingerprint is that of its content.

    Raises:
        DatasetError: not there, damaged, changed by hand, or of another version of the format.
    """
    path = root / CARD_FILE
    try:
        body = json.loads(path.read_bytes())
        fingerprint, parents = body.pop("fingerprint"), body.pop("parents")
    except FileNotFoundError:
        raise DatasetError(
            f"{root} is not a dataset, it has no {CARD_FILE}: give one made by extract-features or tokenize"
        ) from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DatasetError(f"{path} is damaged ({error!r}): restore it from a copy") from error
    if body.get("format_version") != FORMAT_VERSION:
        raise DatasetError(
            f"{path} has format version {body.get('format_version')}, this program reads {FORMAT_VERSION}: "
            "use the version of deltacache that wrote it, or make the dataset again"
        )
    try:
        card = DatasetCard.model_validate(body)
    except ValidationError as error:
        raise DatasetError(f"{path} is damaged ({error}): restore it from a copy") from error
    if (fingerprint, parents) != (card.fingerprint, card.parents):
        raise DatasetError(
            f"{path} says fingerprint {fingerprint}, but its settings give {card.fingerprint}: it was changed "
            "after the dataset was made. Restore it from a copy"
        )
    return card


def read_black(root: Path, card: DatasetCard) -> np.ndarray:
    """The black frame's patch tokens, (N, D) float16.

    Raises:
        DatasetError: missing, damaged, or not those of the dataset.
    """
    path = root / BLACK_FILE
    try:
        black = npy_view(memoryview(path.read_bytes())).copy()
    except (OSError, ValueError) as error:
        raise DatasetError(
            f"{path} cannot be read ({error}): remove it and run the command that made the dataset again"
        ) from error
    if crc32c_of_npy(black) != card.black_crc32c:
        raise DatasetError(
            f"{path} is not what {CARD_FILE} says (crc32c {crc32c_of_npy(black):08x}, must be "
            f"{card.black_crc32c:08x}): remove it and run the command that made the dataset again"
        )
    return black


def _check_black(black: np.ndarray, card: DatasetCard) -> None:
    shape = (card.patch_grid[0] * card.patch_grid[1], card.hidden_size)
    if black.shape != shape or black.dtype != np.float16:
        raise ValueError(f"black_patch_tokens are {black.dtype}{black.shape}, must be float16{shape}")
    if crc32c_of_npy(black) != card.black_crc32c:
        raise ValueError(
            f"card.black_crc32c is {card.black_crc32c}, but the array's is {crc32c_of_npy(black)}"
        )


def _check_same_black(root: Path, card: DatasetCard) -> None:
    if read_card(root).black_crc32c != card.black_crc32c:
        raise DatasetError(
            f"{root / BLACK_FILE} is missing, and this machine computes other values than the one that made the "
            "dataset: restore it from a copy, or run the command there"
        )


def _check_empty(root: Path) -> None:
    if root.exists() and not root.is_dir():
        raise DatasetError(f"{root} is a file: give a folder for the output")
    held = [entry.name for entry in root.iterdir() if not is_temporary(entry.name)] if root.exists() else []
    if held:
        raise DatasetError(
            f"{root} is not empty and not a dataset (it holds {sorted(held)[0]!r}, but no {CARD_FILE}): "
            "give another folder, new or empty; nothing was changed"
        )


def _check_same_settings(root: Path, existing: DatasetCard, wanted: DatasetCard) -> None:
    new = dict(_flat(wanted.model_dump(mode="json")))
    differing = [
        f"{name} is {canonical_json(value)}, asked for {canonical_json(new.get(name))}"
        for name, value in _flat(existing.model_dump(mode="json"))
        if name not in _NOT_SETTINGS and new.get(name) != value
    ]
    if differing:
        raise MismatchError(
            f"{root} holds a dataset made with other settings (fingerprint {existing.fingerprint}, asked for "
            f"{wanted.fingerprint}): {'; '.join(differing)}. Use its settings, or another output folder"
        )


def _flat(body: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in body.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
