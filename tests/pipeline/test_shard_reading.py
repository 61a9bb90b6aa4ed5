"""Shards read by their receipts alone: all of a clip or an error, and the same bytes when written again."""

import re
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_datasets import BLACK, FRAMES, make_dataset, shard_of, small_card, sources_of

from deltacache.pipeline.datasets.dataset import open_dataset, prepare_dataset, stored_clips, write_shard
from deltacache.pipeline.datasets.receipts import StoredClip, read_receipt, receipt_path
from deltacache.pipeline.datasets.stores import SCALES
from deltacache.pipeline.datasets.verification import verify_dataset
from deltacache.pipeline.storage.mapped import MappedFiles
from deltacache.schemas.clips import DeltaClip, FeatureClip
from deltacache.schemas.errors import DatasetError

STORES, KINDS = ["webdataset", "zarr"], ["features", "int8", "deltas"]


def files_below(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def flip(path: Path, offset: int) -> None:
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("store", STORES)
def test_a_shard_written_from_its_own_clips_is_byte_identical(tmp_path: Path, store: str, kind: str) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    task, empty = make_dataset(one, kind, store, "a", "broken-1", "broken-2", views=3)
    card = small_card(kind, store)
    prepare_dataset(two, card, BLACK)
    for each in (task, empty):
        receipt = read_receipt(one, each.shard_id)
        (one / "index.parquet").unlink(missing_ok=True)
        clips = stored_clips(one, card, receipt)
        again = write_shard(two, card, each.shard_id, clips, receipt.failures, receipt.sources)
        assert again == receipt
        assert receipt_path(one, each.shard_id).read_bytes() == receipt_path(two, each.shard_id).read_bytes()
    assert files_below(one / "shards") == files_below(two / "shards")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("store", STORES)
def test_clips_are_the_ones_that_were_written(tmp_path: Path, store: str, kind: str) -> None:
    (task,) = make_dataset(tmp_path, kind, store, "a", "b", views=3)
    read = stored_clips(tmp_path, small_card(kind, store), read_receipt(tmp_path, task.shard_id))
    for got, wrote in zip(read, shard_of(kind, task)[0], strict=True):
        assert numbers(got) == numbers(wrote)
        assert about(got) == about(wrote)


def numbers(stored: StoredClip) -> list[tuple[object, ...]]:
    clip = stored.clip
    arrays = [clip.timestamps_s, clip.delta_tokens] if isinstance(clip, DeltaClip) else []
    if isinstance(clip, FeatureClip):
        arrays = [clip.timestamps_s, clip.patch_tokens, *([] if clip.scales is None else [clip.scales])]
    return [(array.dtype, array.shape, array.tobytes()) for array in arrays]


def about(stored: StoredClip) -> tuple[object, ...]:
    names = ("video_uri", "view", "frame_indices", "crop", "flip", "decoder", "duplicate_frames")
    return stored.clip.clip_id, *(getattr(stored, name) for name in names)


@pytest.mark.parametrize("array", ["tokens", "scales"])
@pytest.mark.parametrize("store", STORES)
def test_a_flipped_bit_is_an_error_for_every_reader(tmp_path: Path, store: str, array: str) -> None:
    (task,) = make_dataset(tmp_path, "int8", store, "a", "b")
    receipt, card = read_receipt(tmp_path, task.shard_id), small_card("int8", store)
    file = receipt.token_file if array == "tokens" else receipt.scale_file
    offset = receipt.token_offsets[2] if array == "tokens" else receipt.scale_offsets[2]
    flip(tmp_path / file, offset + 3)
    clip_id = receipt.clips[2]["clip_id"]
    message = rf"clip {clip_id} of shard {task.shard_id} is damaged: its {array} have crc32c"
    clips = stored_clips(tmp_path, card, receipt)
    assert [next(clips).clip.clip_id for _ in range(2)] == [row["clip_id"] for row in receipt.clips[:2]]
    with pytest.raises(DatasetError, match=rf"{file}: {message}"):
        next(clips)
    dataset = open_dataset(tmp_path)
    dataset.read(1)
    for _ in range(2):
        with pytest.raises(DatasetError, match=message):
            dataset.read(2)
        with pytest.raises(DatasetError, match=message):
            dataset.read_frames(2, 0, 1)
    found = {(problem.file, problem.clip_id) for problem in verify_dataset(tmp_path)}
    assert found == {(file, None), (file, clip_id)}


@pytest.mark.parametrize("how", ["missing", "short", "longer"])
@pytest.mark.parametrize("array", ["tokens", "scales"])
@pytest.mark.parametrize("store", STORES)
def test_a_file_of_another_size_is_an_error_before_the_first_clip(
    tmp_path: Path, store: str, array: str, how: str
) -> None:
    (task,) = make_dataset(tmp_path, "int8", store, "a", "b")
    receipt, card = read_receipt(tmp_path, task.shard_id), small_card("int8", store)
    path = tmp_path / (receipt.token_file if array == "tokens" else receipt.scale_file)
    whole = path.read_bytes()
    path.unlink()
    if how != "missing":
        path.write_bytes(whole[:-1] if how == "short" else whole + b"\0")
    what = "is missing" if how == "missing" else f"has {len(whole) + (1 if how == 'longer' else -1)} bytes"
    with pytest.raises(DatasetError, match=rf"clip a-.* is damaged: {path} {what}, but its receipt says"):
        next(stored_clips(tmp_path, card, receipt))
    with pytest.raises(DatasetError, match=rf"{path} {what}"):
        open_dataset(tmp_path).read(0)


def bytes_of_clips(path: Path) -> int:
    """How many bytes at the beginning of a shard's file belong to clips."""
    if path.suffix == ".tar":
        with tarfile.open(path) as tar:
            last = tar.getmembers()[-1]
        return last.offset_data + -(-last.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    if path.name == "zarr.json":
        return 0
    chunks = 1 if "timestamps_s" in path.parts else FRAMES
    return path.stat().st_size - (16 * chunks + 4)


@pytest.mark.slow
@pytest.mark.parametrize("store", STORES)
def test_every_flipped_byte_of_an_int8_shard_is_found_and_its_clip_named(tmp_path: Path, store: str) -> None:
    (task,) = make_dataset(tmp_path, "int8", store, "a", views=1)
    receipt = read_receipt(tmp_path, task.shard_id)
    clip_id = receipt.clips[0]["clip_id"]
    for name in receipt.files:
        size, of_clips = (tmp_path / name).stat().st_size, bytes_of_clips(tmp_path / name)
        for offset in range(0, size, 3 if size < 500 else 97):
            flip(tmp_path / name, offset)
            found = {(problem.file, problem.clip_id) for problem in verify_dataset(tmp_path)}
            flip(tmp_path / name, offset)
            assert (name, None) in found
            assert (name, clip_id) in found or offset >= of_clips, (name, offset)
    assert verify_dataset(tmp_path) == []


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("kind", ["features", "int8"])
def test_clips_of_the_other_dtype_are_bugs(tmp_path: Path, store: str, kind: str) -> None:
    task = make_dataset(tmp_path / "made", kind, store, "a")[0]
    other = small_card("int8" if kind == "features" else "features", store)
    prepare_dataset(tmp_path / "other", other, BLACK)
    clips = shard_of(kind, task)[0]
    with pytest.raises(ValueError, match=rf"must have .* the dtype {other.dtype}, not"):
        write_shard(tmp_path / "other", other, task.shard_id, clips, [], sources_of(task))


def test_a_receipt_without_the_checksum_of_the_scales_is_no_proof(tmp_path: Path) -> None:
    (task,) = make_dataset(tmp_path, "int8", "webdataset", "a", views=1)
    receipt = read_receipt(tmp_path, task.shard_id)
    (crcs,) = receipt.arrays.values()
    bare = {clip: {name: crcs[name] for name in crcs if name != SCALES} for clip in receipt.arrays}
    without = replace(receipt, arrays=bare)
    with pytest.raises(DatasetError, match="and the receipt has none"):
        next(stored_clips(tmp_path, small_card("int8", "webdataset"), without))


def test_times_that_are_not_those_of_their_checksum_are_an_error(tmp_path: Path) -> None:
    (task,) = make_dataset(tmp_path, "deltas", "webdataset", "a", views=1)
    receipt = read_receipt(tmp_path, task.shard_id)
    row = receipt.clips[0]
    altered = replace(receipt, clips=({**row, "timestamps_s": [0.0] * FRAMES},))
    with pytest.raises(DatasetError, match=rf"clip {row['clip_id']} .*its times do not have their crc32c"):
        next(stored_clips(tmp_path, small_card("deltas", "webdataset"), altered))


@pytest.mark.slow
def test_what_was_read_is_no_memory_of_the_process_after_its_release(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).normal(size=(4096, 4096)).astype(np.float16)  # 32 MiB
    numbers.tofile(tmp_path / "numbers")
    files = MappedFiles()

    def mapped_mib() -> float:
        """Pages of files that count as memory of this process."""
        (line,) = re.findall(r"RssFile:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(line) / 1024

    before = mapped_mib()
    view = files.float16(tmp_path / "numbers", 0, numbers.shape, numbers.strides[0])
    assert (view == numbers).all()
    assert mapped_mib() > before + 30
    files.release()
    assert mapped_mib() < before + 2
    assert (view == numbers).all()
