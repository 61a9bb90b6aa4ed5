"""Receipts: what a finished shard holds. Written last, so a shard without one does not exist."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

from crc32c import crc32c

from deltacache.pipeline.atomic import write_bytes
from deltacache.pipeline.plan import check_shard_id
from deltacache.schemas.clips import CropBox, DeltaClip, FeatureClip
from deltacache.schemas.errors import DatasetError
from deltacache.schemas.fingerprints import canonical_json

RECEIPTS = "receipts"
SHARDS = "shards"
_SEAL = b',"receipt_crc32c":'


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
        token_file: the file with the token arrays; empty without clips.
        token_offsets: where in that file the tokens of each clip begin, in bytes.
        frame_stride: bytes from one frame of a clip to the next.
    """

    shard_id: str
    fingerprint: str
    files: Mapping[str, FileRecord]
    arrays: Mapping[str, Mapping[str, int]]
    clips: tuple[dict[str, Any], ...]
    failures: tuple[Failure, ...]
    token_file: str
    token_offsets: tuple[int, ...]
    frame_stride: int

    def __post_init__(self) -> None:
        for name in self.files:
            parts = PurePosixPath(name).parts
            if len(parts) < 2 or parts[0] != SHARDS or ".." in parts or "\\" in name:
                raise ValueError(f"file {name!r} is not below {SHARDS}/")
        if self.clips and self.token_file not in self.files:
            raise ValueError(f"token file {self.token_file!r} is none of its files")
        ids = [row["clip_id"] for row in self.clips]
        if len(self.token_offsets) != len(ids) or list(self.arrays) != ids:
            raise ValueError("its clips, arrays and offsets are not of the same clips")

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
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries]
    return {name[:-5] for name in names if name.endswith(".json") and not name.startswith(".")}


def receipt_bytes(receipt: Receipt) -> bytes:
    """The receipt as JSON with a checksum of itself: equal receipts give equal bytes."""
    body = asdict(receipt)
    # A list of pairs, not an object: the order of the clips is kept, and checked on reading.
    body["arrays"] = list(body["arrays"].items())
    return _sealed(canonical_json(body).encode())


def _sealed(body: bytes) -> bytes:
    return body[:-1] + _SEAL + f"{crc32c(body)}}}\n".encode()


def write_receipt(root: Path, receipt: Receipt) -> None:
    """Write the receipt whole or not at all."""
    path = receipt_path(root, receipt.shard_id)
    path.parent.mkdir(exist_ok=True)
    write_bytes(path, receipt_bytes(receipt))


def read_receipt(root: Path, shard_id: str) -> Receipt:
    """The receipt of a finished shard.

    Raises:
        DatasetError: it is missing, damaged, or of another shard.
    """
    path = receipt_path(root, shard_id)
    try:
        receipt = _parse(path.read_bytes())
        if receipt.shard_id != shard_id:
            raise ValueError(f"it is the receipt of shard {receipt.shard_id}")
    except FileNotFoundError:
        raise DatasetError(
            f"{path} is missing, and without its receipt shard {shard_id} does not count: "
            "run the command that made the dataset again"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(
            f"{path} is damaged ({error}): remove it and run the command that made the dataset again"
        ) from error
    return receipt


def _parse(content: bytes) -> Receipt:
    unsealed = content.rpartition(_SEAL)[0] + b"}"
    if _sealed(unsealed) != content:
        raise ValueError("its checksum does not match")
    body = json.loads(unsealed)
    body["files"] = {name: FileRecord(**record) for name, record in body["files"].items()}
    body["arrays"] = dict(body["arrays"])
    body["failures"] = tuple(Failure(**failure) for failure in body["failures"])
    for name in ("clips", "token_offsets"):
        body[name] = tuple(body[name])
    return Receipt(**{field.name: body[field.name] for field in fields(Receipt)})
