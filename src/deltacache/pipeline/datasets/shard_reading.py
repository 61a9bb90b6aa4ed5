"""Reading one shard by its receipt: no index, no other shard, neither zarr nor webdataset.

T frames, N patches, D hidden size.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from deltacache.pipeline.datasets.receipts import Receipt, StoredClip
from deltacache.pipeline.datasets.stores import (
    SCALES,
    TIMESTAMPS,
    ClipArrays,
    scale_shape,
    token_array,
    token_dtype,
    token_shape,
)
from deltacache.pipeline.storage.checksums import crc32c_of_array
from deltacache.pipeline.storage.mapped import MappedFiles
from deltacache.pipeline.storage.storage import AnyPath
from deltacache.schemas.clips import CropBox, DeltaClip, FeatureClip
from deltacache.schemas.datasets import DatasetCard
from deltacache.schemas.errors import DatasetError, StorageError


class ShardLayout(NamedTuple):
    """In which files of a shard the arrays of its clips lie, and how many bytes apart their frames."""

    token_file: AnyPath
    frame_stride: int
    scale_file: AnyPath
    scale_stride: int

    @classmethod
    def of(cls, root: AnyPath, receipt: Receipt) -> "ShardLayout":
        """Of the shard of this receipt."""
        return cls(
            root / receipt.token_file, receipt.frame_stride, root / receipt.scale_file, receipt.scale_stride
        )

    def arrays(
        self, files: MappedFiles, card: DatasetCard, token_offset: int, scale_offset: int
    ) -> ClipArrays:
        """Read-only views of the clip at these offsets, not verified. ``scale_offset`` matters for int8 only.

        Raises:
            OSError: a file cannot be opened.
            ValueError: a file ends before the array does.
        """
        tokens = files.array(
            self.token_file, token_dtype(card), token_offset, token_shape(card), self.frame_stride
        )
        shape = scale_shape(card)
        if shape is None:
            return ClipArrays(tokens, None)
        return ClipArrays(
            tokens, files.array(self.scale_file, np.float32, scale_offset, shape, self.scale_stride)
        )


def clip_arrays(
    files: MappedFiles, root: AnyPath, card: DatasetCard, receipt: Receipt, row: int
) -> ClipArrays:
    """The arrays of one clip of a shard as ``ShardLayout.arrays`` gives them."""
    scale_offset = receipt.scale_offsets[row] if receipt.scale_offsets else 0
    return ShardLayout.of(root, receipt).arrays(files, card, receipt.token_offsets[row], scale_offset)


def check_sizes(root: AnyPath, receipt: Receipt) -> None:
    """Refuse missing and short files before anybody can take them for zeros.

    Raises:
        DatasetError: a file of the shard is missing or has another size.
    """
    for name, record in receipt.files.items():
        path = root / name
        size = path.stat().st_size if path.is_file() else None
        if size != record.bytes:
            held = "is missing" if size is None else f"has {size} bytes"
            raise DatasetError(f"{path} {held}, but its receipt says {record.bytes} bytes")


class Altered(NamedTuple):
    """An array of a clip whose values are not the ones that were written."""

    array: str
    message: str


def altered_array(card: DatasetCard, arrays: ClipArrays, crcs: Mapping[str, int]) -> Altered | None:
    """The first array of a clip whose values do not have the CRC-32C that ``crcs`` has for its name."""
    words = {token_array(card): "tokens", SCALES: "scales"}
    for name, crc in arrays.crcs(card).items():
        if crc != crcs.get(name):
            must = f"must be {crcs[name]:08x}" if name in crcs else "and the receipt has none"
            return Altered(name, f"its {words[name]} have crc32c {crc:08x}, {must}")
    return None


def stored_clips(root: AnyPath, card: DatasetCard, receipt: Receipt) -> Iterator[StoredClip]:
    """The clips of a finished shard in its order, as they are stored: writing them again gives the same bytes.

    Tokens and scales are views of the files, verified clip by clip as they are taken. Times and the rest come
    from the receipt, which has a checksum of itself.

    Raises:
        DatasetError: a file is missing, short or long, or a clip altered: names file and clip.
        StorageError: the store refuses or does not answer.
    """
    if not receipt.clips:
        return
    try:
        check_sizes(root, receipt)
    except DatasetError as error:
        first = receipt.clips[0]["clip_id"]
        raise _damaged(root, receipt, receipt.token_file, first, str(error)) from error
    files = MappedFiles()
    for position, row in enumerate(receipt.clips):
        clip_id, crcs = row["clip_id"], receipt.arrays[row["clip_id"]]
        try:
            arrays = clip_arrays(files, root, card, receipt, position)
        except StorageError:
            raise
        except (OSError, ValueError) as error:
            raise _damaged(root, receipt, receipt.token_file, clip_id, str(error)) from error
        times = np.asarray(row[TIMESTAMPS], np.float32)
        altered = altered_array(card, arrays, crcs)
        if altered is not None:
            file = receipt.scale_file if altered.array == SCALES else receipt.token_file
            raise _damaged(root, receipt, file, clip_id, altered.message)
        if crc32c_of_array(times) != crcs.get(TIMESTAMPS):
            raise _damaged(root, receipt, receipt.token_file, clip_id, "its times do not have their crc32c")
        yield _stored(card, row, arrays, times)


def _damaged(root: AnyPath, receipt: Receipt, file: str, clip_id: str, what: str) -> DatasetError:
    return DatasetError(
        f"{root / file}: clip {clip_id} of shard {receipt.shard_id} is damaged: {what}. `deltacache verify {root} "
        "--repair` lists all damage and drops that shard; run the command that made the dataset again then"
    )


def _stored(card: DatasetCard, row: dict[str, Any], arrays: ClipArrays, times: np.ndarray) -> StoredClip:
    if card.kind == "features":
        clip = FeatureClip(row["clip_id"], arrays.tokens, times, arrays.scales)
    else:
        clip = DeltaClip(row["clip_id"], arrays.tokens, times)
    return StoredClip(
        clip=clip,
        video_uri=row["video_uri"],
        view=row["view"],
        frame_indices=tuple(row["frame_indices"]),
        crop=CropBox(*row["crop"]),
        flip=row["flip"],
        decoder=row["decoder"],
        duplicate_frames=row["duplicate_frames"],
    )
