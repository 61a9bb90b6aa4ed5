"""Receipts: what a finished shard holds. Written last, so a shard without one does not exist."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deltacache.pipeline.atomic import hash_text, write_bytes
from deltacache.pipeline.plan import check_shard_id
from deltacache.schemas.clips import CropBox, DeltaClip, FeatureClip
from deltacache.schemas.errors import DatasetError
from deltacache.schemas.fingerprints import canonical_json

RECEIPTS = "receipts"


@dataclass(frozen=True, slots=True)
class StoredClip:
    """A clip with what its index row says about it."""

    clip: FeatureClip | DeltaClip
    video_uri: str
    view: int
    frame_indices: tuple[int, ...]
    crop: CropBox
    flip: bool
    decoder: str
    duplicate_frames: int


@dataclass(frozen=True, slots=True)
class Failure:
    """One refused video (``view`` None) or clip: a row of ``failures.parquet``."""

    video_uri: str
    view: int | None
    stage: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size and CRC-32C of one file."""

    bytes: int
    crc32c: int


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a finished shard holds.

    Attributes:
        fingerprint: of the dataset it belongs to.
        files: by path relative to the dataset's folder; none when every video was refused.
        arrays: CRC-32C of the values of every array, by clip id and array name.
        clips: rows of the index.
    """

    shard_id: str
    fingerprint: str
    files: Mapping[str, FileRecord]
    arrays: Mapping[str, Mapping[str, int]]
    clips: tuple[dict[str, Any], ...]
    failures: tuple[Failure, ...]

    @property
    def total_bytes(self) -> int:
        """Size of the shard's files."""
        return sum(file.bytes for file in self.files.values())


def receipt_path(root: Path, shard_id: str) -> Path:
    """Where the receipt of a shard lies."""
    return root / RECEIPTS / f"{check_shard_id(shard_id)}.json"


def finished_shards(root: Path) -> set[str]:
    """Ids of the shards that have a receipt."""
    folder = root / RECEIPTS
    if not folder.is_dir():
        return set()
    names = (entry.name for entry in os.scandir(folder))
    return {name[:-5] for name in names if name.endswith(".json") and not name.startswith(".")}


def receipt_bytes(receipt: Receipt) -> bytes:
    """The receipt as JSON with a checksum of itself: equal receipts give equal bytes."""
    body = asdict(receipt)
    return canonical_json(body | {"receipt_crc32c": hash_text(canonical_json(body))}).encode() + b"\n"


def write_receipt(root: Path, receipt: Receipt) -> None:
    """Write the receipt whole or not at all."""
    path = receipt_path(root, receipt.shard_id)
    path.parent.mkdir(exist_ok=True)
    write_bytes(path, receipt_bytes(receipt))


def read_receipt(root: Path, shard_id: str) -> Receipt:
    """The receipt of a finished shard.

    Raises:
        DatasetError: it is missing or damaged.
    """
    path = receipt_path(root, shard_id)
    try:
        return parse_receipt(path.read_bytes(), path)
    except OSError as error:
        raise DatasetError(
            f"{path} cannot be read ({error.strerror}), and without its receipt shard {shard_id} does not count: "
            "run the command that made the dataset again"
        ) from error


def parse_receipt(content: bytes, path: Path) -> Receipt:
    """Read a receipt's bytes; ``path`` is for messages and must be named after its shard.

    Raises:
        DatasetError: damaged, or of another shard.
    """
    try:
        body = json.loads(content)
        if body.pop("receipt_crc32c") != hash_text(canonical_json(body)):
            raise ValueError("its checksum does not match")
        files = {name: FileRecord(**record) for name, record in body.pop("files").items()}
        failures = tuple(Failure(**failure) for failure in body.pop("failures"))
        receipt = Receipt(**body | {"files": files, "failures": failures, "clips": tuple(body["clips"])})
        if receipt.shard_id != path.stem:
            raise ValueError(f"it is the receipt of shard {receipt.shard_id}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(
            f"{path} is damaged ({error}): remove it and run the command that made the dataset again"
        ) from error
    return receipt
