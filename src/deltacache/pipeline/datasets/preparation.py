"""The start of a dataset: ``dataset.json`` and the black frame's patch tokens."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from crc32c import crc32c
from pydantic import ValidationError

from deltacache.pipeline.datasets.commits import STAGING, settle_commits
from deltacache.pipeline.datasets.receipts import (
    RECEIPTS,
    SHARDS,
    finished_shards,
    read_receipts,
    receipt_path,
)
from deltacache.pipeline.storage.atomic import is_temporary, readable_errors, remove_leftovers, write_bytes
from deltacache.pipeline.storage.checksums import crc32c_of_npy, npy_bytes, npy_view
from deltacache.pipeline.storage.errors import read_file
from deltacache.pipeline.storage.locking import LOCK_FILE
from deltacache.pipeline.storage.sealing import seal_json, unseal_json
from deltacache.pipeline.storage.storage import AnyPath, dataset_root, is_local, make_folder, names_in
from deltacache.schemas.datasets import FORMAT_VERSION, DatasetCard
from deltacache.schemas.errors import DatasetError, MismatchError
from deltacache.schemas.fingerprints import canonical_json
from deltacache.schemas.refusals import problems_of
from deltacache.schemas.secrets import has_secrets

CARD_FILE = "dataset.json"
BLACK_FILE = "black_patch_tokens.npy"
DATASET_FILES = frozenset(
    {
        CARD_FILE,
        BLACK_FILE,
        LOCK_FILE,
        RECEIPTS,
        SHARDS,
        "parts",
        STAGING,
        "plan.parquet",
        "index.parquet",
        "failures.parquet",
        "sources.parquet",
        "tables.json",
        "config.yaml",
        "throughput.json",
    }
)
"""All that the commands put into a dataset's folder."""
_SEAL = "dataset_crc32c"
_MAKE_AGAIN = "run the command that made the dataset again"
_NOT_SETTINGS = frozenset({"code_version", "black_crc32c", "backbone.id", "tokenizer_image_size"})
"""What may differ when a dataset is continued: who wrote it, and what the weights determine."""


def prepare_dataset(root: AnyPath | str, card: DatasetCard, black_patch_tokens: np.ndarray) -> None:
    """Create the dataset at ``root``, or accept the one that is there if its settings are equal.

    Args:
        root: A folder that does not exist, is empty, or is a dataset. One that lost its ``dataset.json`` gets it
            again, if all its receipts are of this very dataset.
        card: What the dataset is to hold.
        black_patch_tokens: (N, D) float16, patch tokens of an all-black frame.

    Raises:
        DatasetError: the folder holds something else, or ``dataset.json`` is damaged.
        MismatchError: it is a dataset with other settings; the message names each.
    """
    root = dataset_root(root)
    _check_black(black_patch_tokens, card)
    with readable_errors(root):
        held = names_in(root)
        if CARD_FILE in held:
            _check_same_settings(root, read_card(root), card)
        else:
            _check_free(root, card, held)
        make_folder(root)
        if is_local(root):
            settle_commits(root, alone=False)
        if CARD_FILE not in held:
            write_bytes(root / CARD_FILE, card_bytes(card))
        for folder in (root, root / SHARDS, root / RECEIPTS):
            make_folder(folder)
            remove_leftovers(folder)
        if BLACK_FILE not in held:
            _check_same_black(root, card)
            write_bytes(root / BLACK_FILE, npy_bytes(black_patch_tokens))


def is_dataset(root: AnyPath | str) -> bool:
    """Whether there is a ``dataset.json`` at ``root``.

    Raises:
        StorageError: its store refuses or does not answer.
    """
    if has_secrets(str(root)):
        return False  # a list of videos
    path = dataset_root(root) / CARD_FILE
    with readable_errors(path, "read"):
        return path.is_file()


def card_bytes(card: DatasetCard) -> bytes:
    """The content of ``dataset.json``."""
    body = card.model_dump(mode="json") | {"fingerprint": card.fingerprint, "parents": card.parents}
    return seal_json(json.dumps(body, indent=2).encode(), _SEAL)


def read_card(root: AnyPath) -> DatasetCard:
    """Read ``dataset.json``; check its checksum, and that its fingerprint is that of its settings.

    Raises:
        DatasetError: not there, damaged, changed by hand, or of another version of the format.
    """
    card = existing_card(root)
    if card is None:
        raise DatasetError(
            f"{root} is not a dataset, it has no {CARD_FILE}: give one made by extract-features or tokenize"
        )
    return card


def existing_card(root: AnyPath) -> DatasetCard | None:
    """``read_card``, or None where there is no ``dataset.json``."""
    path = root / CARD_FILE
    way_out = (
        f"restore it from a copy, or remove it (`deltacache verify {root} --repair` does) and {_MAKE_AGAIN}"
    )
    try:
        content = read_file(path)
        body = json.loads(content)
        fingerprint, parents = body.pop("fingerprint"), body.pop("parents")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DatasetError(f"{path} is damaged ({error!r}): {way_out}") from error
    if body.get("format_version") != FORMAT_VERSION:
        raise DatasetError(
            f"{path} has format version {body.get('format_version')}, this program reads {FORMAT_VERSION}: "
            "use the version of deltacache that wrote it, or make the dataset again"
        )
    body.pop(_SEAL, None)
    try:
        card = DatasetCard.model_validate(body)
    except ValidationError as error:
        raise DatasetError(f"{path} is damaged ({problems_of(error, DatasetCard)}): {way_out}") from error
    if (fingerprint, parents) != (card.fingerprint, card.parents):
        raise DatasetError(
            f"{path} says fingerprint {fingerprint}, but its settings give {card.fingerprint}: it was changed "
            f"after the dataset was made; {way_out}"
        )
    try:
        unseal_json(content, _SEAL)
    except ValueError as error:
        raise DatasetError(f"{path} is damaged ({error}): {way_out}") from error
    return card


def read_black(root: AnyPath, card: DatasetCard) -> np.ndarray:
    """The black frame's patch tokens, (N, D) float16.

    Raises:
        DatasetError: missing, damaged, or not those of the dataset.
    """
    path = root / BLACK_FILE
    try:
        content = read_file(path)
        if crc32c(content) != card.black_crc32c:
            raise ValueError(
                f"it is not what {CARD_FILE} says: crc32c {crc32c(content):08x}, must be {card.black_crc32c:08x}"
            )
        return npy_view(memoryview(content)).copy()
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path} cannot be read ({error}): remove it and {_MAKE_AGAIN}") from error


def _check_black(black: np.ndarray, card: DatasetCard) -> None:
    shape = (card.patch_grid[0] * card.patch_grid[1], card.hidden_size)
    if black.shape != shape or black.dtype != np.float16:
        raise ValueError(f"black_patch_tokens are {black.dtype}{black.shape}, must be float16{shape}")
    if crc32c_of_npy(black) != card.black_crc32c:
        raise ValueError(
            f"card.black_crc32c is {card.black_crc32c}, but the array's is {crc32c_of_npy(black)}"
        )


def _check_same_black(root: AnyPath, card: DatasetCard) -> None:
    if read_card(root).black_crc32c != card.black_crc32c:
        raise DatasetError(
            f"{root / BLACK_FILE} is missing, and this machine computes other values than the one that made the "
            "dataset: restore it from a copy, or run the command there"
        )


def _check_free(root: AnyPath, card: DatasetCard, names: list[str]) -> None:
    """Refuse a folder that is neither empty nor this dataset without its ``dataset.json``."""
    if is_local(root) and root.exists() and not root.is_dir():
        raise DatasetError(f"{root} is a file: give a folder for the output")
    held = [name for name in names if not is_temporary(name) and name != LOCK_FILE]
    if not held:
        return
    strange, shards = sorted(set(held) - DATASET_FILES), sorted(finished_shards(root))
    if strange or not shards:
        raise DatasetError(
            f"{root} is not empty and not a dataset (it holds {(strange or held)[0]!r}, but no {CARD_FILE}): "
            "give another folder, new or empty; nothing was changed"
        )
    for receipt in read_receipts(root, shards):
        if receipt.fingerprint != card.fingerprint:
            raise MismatchError(
                f"{root} has lost its {CARD_FILE}, and {receipt_path(root, receipt.shard_id)} is of a dataset "
                f"with fingerprint {receipt.fingerprint}, asked for {card.fingerprint}: use its settings, or "
                "another output folder; nothing was changed"
            )
    if BLACK_FILE in held:
        try:
            read_black(root, card)
        except DatasetError as error:
            raise DatasetError(
                f"{root} has lost its {CARD_FILE}, and its black tokens are not those that this machine computes: "
                f"remove {root / BLACK_FILE} and {_MAKE_AGAIN}; nothing was changed"
            ) from error


def _check_same_settings(root: AnyPath, existing: DatasetCard, wanted: DatasetCard) -> None:
    old, new = (dict(_flat(card.model_dump(mode="json"))) for card in (existing, wanted))
    differing = [
        f"{name} is {canonical_json(old.get(name))}, asked for {canonical_json(new.get(name))}"
        for name in {**old, **new}
        if name not in _NOT_SETTINGS and old.get(name) != new.get(name)
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
