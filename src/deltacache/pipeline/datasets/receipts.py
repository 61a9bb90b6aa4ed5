"""Receipts: what a finished shard holds. Written last, so a shard without one does not exist."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import PurePosixPath
from typing import Any

from deltacache.pipeline.datasets.plan import PlannedVideo, check_shard_id
from deltacache.pipeline.inputs.side_arrays import SideValues
from deltacache.pipeline.storage.errors import read_file
from deltacache.pipeline.storage.files import seal_json, unseal_json
from deltacache.pipeline.storage.storage import AnyPath, names_in, read_many
from deltacache.schemas.clips import CropBox, DeltaClip, FeatureClip, check_id
from deltacache.schemas.datasets import canonical_json
from deltacache.schemas.errors import DatasetError
from deltacache.schemas.tables import INDEX_SCHEMA

RECEIPTS = "receipts"
SHARDS = "shards"
BESIDE = "side_arrays"
_SEAL = "receipt_crc32c"
_SHA256 = re.compile(r"([0-9a-f]{64})?")
_ROW_FIELDS = frozenset(INDEX_SCHEMA.names)


@dataclass(frozen=True, slots=True)
class StoredClip:
    """A clip with what its index row says about it, and its side arrays by name."""

    clip: FeatureClip | DeltaClip
    video_uri: str
    view: int
    frame_indices: tuple[int, ...]
    crop: CropBox
    flip: bool
    decoder: str
    duplicate_frames: int
    side_arrays: SideValues = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Failure:
    """One refused video (``view`` None) or clip: a row of ``failures.parquet``."""

    video_uri: str
    view: int | None
    stage: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """One planned video of a shard, refused or not, as it was when the shard was made.

    Attributes:
        version: changes when the file is replaced: mtime in ns of a local file (of the newest frame of a
            folder), ETag of an object; empty when unknown.
        sha256: of the whole content, hex; of frames, over their sorted relative names and contents; empty
            when it could not be read.
    """

    video_id: str
    video_uri: str
    size_bytes: int
    first_view: int
    views: int
    version: str
    sha256: str

    def __post_init__(self) -> None:
        check_id(self.video_id, "video id")
        for name in ("video_uri", "version", "sha256"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"source {self.video_id}: {name} is {getattr(self, name)!r}, must be text")
        if not _SHA256.fullmatch(self.sha256):
            raise ValueError(
                f"source {self.video_id}: sha256 is {self.sha256!r}, must be 64 hex digits or empty"
            )
        if any(type(count) is not int for count in (self.size_bytes, self.first_view, self.views)):
            raise TypeError(f"source {self.video_id}: size_bytes, first_view and views must be whole numbers")
        self.planned()

    def planned(self) -> PlannedVideo:
        """Its row of the plan.

        Raises:
            ValueError: a count is negative, or there are no views.
        """
        return PlannedVideo(self.video_id, self.video_uri, self.size_bytes, self.first_view, self.views)


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
        clips: rows of the index; with side arrays, their values under ``side_arrays`` too.
        sources: the planned videos in the plan's order, refused ones too: what the shard's rows of the plan
            can be rebuilt from.
        token_file: the file with the token arrays; empty without clips.
        token_offsets: where in that file the tokens of each clip begin, in bytes.
        frame_stride: bytes from one frame of a clip to the next.
        scale_file, scale_offsets, scale_stride: the same of the scales of int8 tokens; empty without.
        made_on: kind of processor and version of torch, which the last bits of the values depend on. For people:
            nothing is decided by it.
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
    sources: tuple[SourceRecord, ...] = ()
    scale_file: str = ""
    scale_offsets: tuple[int, ...] = ()
    scale_stride: int = 0
    made_on: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.files:
            parts = PurePosixPath(name).parts
            if len(parts) < 2 or parts[0] != SHARDS or ".." in parts or "\\" in name:
                raise ValueError(f"file {name!r} is not below {SHARDS}/")
        if self.clips and self.token_file not in self.files:
            raise ValueError(f"token file {self.token_file!r} is not one of its files")
        for row in self.clips:
            if row.keys() - {BESIDE} != _ROW_FIELDS:
                raise ValueError(f"a clip has the fields {sorted(row)}, must have {sorted(_ROW_FIELDS)}")
        ids = [row["clip_id"] for row in self.clips]
        if len(self.token_offsets) != len(ids) or list(self.arrays) != ids:
            raise ValueError("its clips, arrays and offsets are not of the same clips")
        if self.scale_file and (self.scale_file not in self.files or len(self.scale_offsets) != len(ids)):
            raise ValueError(f"scale file {self.scale_file!r} is not one of its files, or not of its clips")

    @property
    def index_rows(self) -> list[dict[str, Any]]:
        """Its rows of the index, without side arrays."""
        return [{name: row[name] for name in row if name != BESIDE} for row in self.clips]

    @property
    def total_bytes(self) -> int:
        """Size of the shard's files."""
        return sum(file.bytes for file in self.files.values())


def receipt_path(root: AnyPath, shard_id: str) -> AnyPath:
    """Where the receipt of a shard lies."""
    return root / RECEIPTS / f"{check_shard_id(shard_id)}.json"


def finished_shards(root: AnyPath) -> set[str]:
    """Ids of the shards that have a receipt."""
    return {
        name[:-5] for name in names_in(root / RECEIPTS) if name.endswith(".json") and not name.startswith(".")
    }


def receipt_bytes(receipt: Receipt) -> bytes:
    """The receipt as JSON with a checksum of itself: equal receipts give equal bytes."""
    body = asdict(receipt)
    # A list of pairs, not an object: the order of the clips is kept, and checked on reading.
    body["arrays"] = list(body["arrays"].items())
    return seal_json(canonical_json(body).encode(), _SEAL)


def unseal_receipt(content: bytes) -> bytes:
    """The JSON of a receipt without its checksum.

    Raises:
        ValueError: it is damaged.
    """
    return unseal_json(content, _SEAL)


def read_receipt(root: AnyPath, shard_id: str) -> Receipt:
    """The receipt of a finished shard.

    Raises:
        DatasetError: it is missing, damaged, or of another shard.
    """
    path = receipt_path(root, shard_id)
    try:
        return parse_receipt(root, shard_id, read_file(path))
    except FileNotFoundError:
        raise DatasetError(
            f"{path} is missing, and without its receipt shard {shard_id} does not count: {_way_out(root)}"
        ) from None
    except OSError as error:
        raise DatasetError(f"{path} is damaged ({error}): {_way_out(root)}") from error


def read_receipts(root: AnyPath, shard_ids: Iterable[str]) -> Iterator[Receipt]:
    """The receipts of finished shards, in this order; from an object store, many are read at once.

    Raises:
        DatasetError: one is missing, damaged, or of another shard.
    """
    ids, done = list(shard_ids), 0
    try:
        for content in read_many(receipt_path(root, shard_id) for shard_id in ids):
            yield parse_receipt(root, ids[done], content)
            done += 1
    except FileNotFoundError:
        for shard_id in ids[done:]:  # one of these: say which
            yield read_receipt(root, shard_id)


def receipts_sha256(root: AnyPath, shard_ids: Iterable[str]) -> str:
    """SHA-256 of the receipts' bytes in this order; reading them is far quicker than parsing them."""
    digest = hashlib.sha256()
    for content in read_many(receipt_path(root, shard_id) for shard_id in shard_ids):
        digest.update(content)
    return digest.hexdigest()


def _way_out(root: AnyPath) -> str:
    return (
        f"`deltacache verify {root} --repair` drops that shard, and the command that made the dataset, run again, "
        "makes it"
    )


def parse_receipt(root: AnyPath, shard_id: str, content: bytes) -> Receipt:
    """The receipt of a shard of ``root`` in the content of a file.

    Raises:
        DatasetError: it is damaged, or of another shard.
    """
    try:
        receipt = _parse(content)
        if receipt.shard_id != shard_id:
            raise ValueError(f"it is the receipt of shard {receipt.shard_id}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        path = receipt_path(root, shard_id)
        raise DatasetError(f"{path} is damaged ({error}): {_way_out(root)}") from error
    return receipt


def _parse(content: bytes) -> Receipt:
    body = json.loads(unseal_receipt(content))
    body["files"] = {name: FileRecord(**record) for name, record in body["files"].items()}
    body["arrays"] = dict(body["arrays"])
    body["failures"] = tuple(Failure(**failure) for failure in body["failures"])
    body["sources"] = tuple(SourceRecord(**source) for source in body["sources"])
    for name in ("clips", "token_offsets", "scale_offsets"):
        body[name] = tuple(body[name])
    body.setdefault("made_on", {})  # older receipts do not say
    return Receipt(**{each.name: body[each.name] for each in fields(Receipt)})
