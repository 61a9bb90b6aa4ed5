"""Both ways of keeping shards: equal numbers, equal bytes each time, open to the formats' own readers."""

import gc
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
import zarr
from small_datasets import (
    BLACK,
    FRAMES,
    GRID,
    HIDDEN,
    all_bytes,
    drawn_clip,
    make_dataset,
    shard_of,
    small_card,
)

from deltacache.pipeline.datasets.dataset import (
    finish_dataset,
    open_dataset,
    prepare_dataset,
    read_plan,
    write_plan,
    write_shard,
)
from deltacache.pipeline.datasets.plan import extend_plan, shard_tasks
from deltacache.pipeline.datasets.receipts import StoredClip, read_receipt
from deltacache.pipeline.inputs.sources import VideoSource
from deltacache.pipeline.storage.files import crc32c_of_array, npy_bytes, npy_view
from deltacache.schemas.clips import FeatureClip

STORES, KINDS = ["webdataset", "zarr"], ["features", "int8", "deltas"]
VIDEOS = ("one.mp4", "broken.mp4", "sub/two.mp4", "three.mp4", "broken-2.mp4")


def stored_clips(root: Path, kind: str) -> list[StoredClip]:
    return [clip for task in shard_tasks(read_plan(root)) for clip in shard_of(kind, task)[0]]


def values_of(stored: StoredClip) -> np.ndarray:
    """The tokens as they are stored."""
    clip = stored.clip
    return clip.patch_tokens if isinstance(clip, FeatureClip) else clip.delta_tokens


def scales_of(stored: StoredClip) -> np.ndarray:
    clip = stored.clip
    assert isinstance(clip, FeatureClip)
    assert clip.scales is not None
    return clip.scales


def tokens_of(stored: StoredClip) -> np.ndarray:
    """The tokens as readers get them."""
    values = values_of(stored)
    if values.dtype == np.float16:
        return values
    return (values * scales_of(stored)[..., None]).astype(np.float16)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("store", STORES)
def test_what_was_written_is_read_back(tmp_path: Path, store: str, kind: str) -> None:
    make_dataset(tmp_path, kind, store, *VIDEOS, views=3)
    dataset, written = open_dataset(tmp_path), stored_clips(tmp_path, kind)
    assert len(dataset) == len(written) == 9
    for position, stored in enumerate(written):
        clip = dataset.read(position)
        assert type(clip) is type(stored.clip)
        tokens = clip.patch_tokens if isinstance(clip, FeatureClip) else clip.delta_tokens
        np.testing.assert_array_equal(tokens, tokens_of(stored))
        assert tokens.dtype == np.float16
        assert clip.clip_id == stored.clip.clip_id == dataset.clip_ids[position]
        np.testing.assert_array_equal(clip.timestamps_s, stored.clip.timestamps_s)
        for start, stop in ((0, FRAMES), (1, 2), (1, 3), (2, 2)):
            frames = dataset.read_frames(position, start, stop)
            np.testing.assert_array_equal(frames, tokens_of(stored)[start:stop])
            assert frames.dtype == np.float16
            assert frames.flags.writeable == (kind == "int8")


@pytest.mark.parametrize("kind", KINDS)
def test_both_stores_hold_the_same_numbers(tmp_path: Path, kind: str) -> None:
    tar, group = tmp_path / "tar", tmp_path / "group"
    make_dataset(tar, kind, "webdataset", *VIDEOS)
    make_dataset(group, kind, "zarr", *VIDEOS)
    one, other = open_dataset(tar), open_dataset(group)
    assert one.index.equals(other.index)
    assert one.failures.equals(other.failures)
    for position in range(len(one)):
        np.testing.assert_array_equal(
            one.read_frames(position, 0, FRAMES), other.read_frames(position, 0, FRAMES)
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("store", STORES)
def test_the_same_input_gives_the_same_bytes(tmp_path: Path, store: str, kind: str) -> None:
    make_dataset(tmp_path / "one", kind, store, *VIDEOS)
    make_dataset(tmp_path / "two", kind, store, *VIDEOS)
    assert all_bytes(tmp_path / "one") == all_bytes(tmp_path / "two")


def read_with_webdataset(tars: list[Path]) -> list[dict[str, Any]]:
    """All samples, decoded as the package does by default."""
    samples = list(webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False).decode())
    gc.collect()
    return samples


# The package opens tars and leaves it to the garbage collector to close them.
leaves_files_open = pytest.mark.filterwarnings(
    r"ignore:Exception ignored in. <_io\.FileIO:pytest.PytestUnraisableExceptionWarning"
)


@pytest.mark.slow
@leaves_files_open
@pytest.mark.parametrize("kind", KINDS)
def test_plain_webdataset_reads_the_tars(tmp_path: Path, kind: str) -> None:
    make_dataset(tmp_path, kind, "webdataset", *VIDEOS)
    name = "delta_tokens.npy" if kind == "deltas" else "patch_tokens.npy"
    scales = {"patch_tokens_scale.npy"} if kind == "int8" else set()
    samples = read_with_webdataset(sorted(tmp_path.glob("shards/*.tar")))
    written = stored_clips(tmp_path, kind)
    assert [sample["__key__"] for sample in samples] == [stored.clip.clip_id for stored in written]
    for sample, stored in zip(samples, written, strict=True):
        names = {key for key in sample if not key.startswith("__")}
        assert names == {name, "timestamps_s.npy", "json"} | scales
        assert sample[name].dtype == values_of(stored).dtype
        np.testing.assert_array_equal(sample[name], values_of(stored))
        if scales:
            assert sample["patch_tokens_scale.npy"].dtype == np.float32
            np.testing.assert_array_equal(sample["patch_tokens_scale.npy"], scales_of(stored))
        np.testing.assert_array_equal(sample["timestamps_s.npy"], stored.clip.timestamps_s)
        about = sample["json"]
        assert (about["video_uri"], about["view"]) == (stored.video_uri, stored.view)
        assert tuple(about["frame_indices"]) == stored.frame_indices
        assert (about["crop"], about["flip"]) == ([1, 2, 30, 40], stored.flip)
        assert about["crc32c"] == crc32c_of_array(values_of(stored))


def test_tar_members_are_plain_files_at_time_zero(tmp_path: Path) -> None:
    (task,) = make_dataset(tmp_path, "features", "webdataset", "a")
    with tarfile.open(tmp_path / f"shards/shard-{task.shard_id}.tar") as tar:
        members = tar.getmembers()
    assert [(m.type, m.mode, m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members] == [
        (tarfile.REGTYPE, 0o444, 0, 0, 0, "", "")
    ] * 6
    assert [member.name.split(".", 1)[1] for member in members[:3]] == [
        "json",
        "patch_tokens.npy",
        "timestamps_s.npy",
    ]


@pytest.mark.slow
@leaves_files_open
def test_long_ids_fit_into_tars(tmp_path: Path) -> None:
    card = small_card("features", "webdataset")
    prepare_dataset(tmp_path, card, BLACK)
    plan = extend_plan(None, [VideoSource("v" * 120, "v", "v", 1)], 1, 1)
    write_plan(tmp_path, plan)
    (task,) = shard_tasks(plan)
    stored = drawn_clip("features", task.videos[0], 0)
    write_shard(tmp_path, card, task.shard_id, [stored], [], [])
    finish_dataset(tmp_path)
    (sample,) = read_with_webdataset(list(tmp_path.glob("shards/*.tar")))
    assert sample["__key__"] == stored.clip.clip_id
    np.testing.assert_array_equal(sample["patch_tokens.npy"], tokens_of(stored))
    np.testing.assert_array_equal(open_dataset(tmp_path).read_frames(0, 0, FRAMES), tokens_of(stored))


@pytest.mark.parametrize("kind", KINDS)
def test_plain_zarr_reads_the_groups(tmp_path: Path, kind: str) -> None:
    tasks = make_dataset(tmp_path, kind, "zarr", *VIDEOS)
    name = "delta_tokens" if kind == "deltas" else "patch_tokens"
    root = zarr.open_group(tmp_path / "shards", mode="r")
    assert root.metadata.zarr_format == 3
    with_clips = [task for task in tasks if shard_of(kind, task)[0]]
    assert sorted(root.group_keys()) == [f"shard-{task.shard_id}" for task in with_clips]
    for task in with_clips:
        written, _ = shard_of(kind, task)
        group = root[f"shard-{task.shard_id}"]
        assert isinstance(group, zarr.Group)
        assert group.attrs["clip_ids"] == [stored.clip.clip_id for stored in written]
        tokens = group[name]
        assert isinstance(tokens, zarr.Array)
        assert tokens.dtype == values_of(written[0]).dtype
        np.testing.assert_array_equal(tokens[:], np.stack([values_of(stored) for stored in written]))
        np.testing.assert_array_equal(tokens[1, 1:3], values_of(written[1])[1:3])
        times = [stored.clip.timestamps_s for stored in written]
        np.testing.assert_array_equal(np.asarray(group["timestamps_s"]), times)
        assert ("patch_tokens_scale" in group) == (kind == "int8")
        if kind == "int8":
            scales = group["patch_tokens_scale"]
            assert isinstance(scales, zarr.Array)
            assert (scales.dtype, scales.chunks) == (np.float32, (1, 1, GRID[0] * GRID[1]))
            np.testing.assert_array_equal(np.asarray(scales), [scales_of(stored) for stored in written])


def test_zarr_arrays_are_one_shard_file_each_with_frames_as_chunks(tmp_path: Path) -> None:
    (task,) = make_dataset(tmp_path, "features", "zarr", "a", "b")
    array = zarr.open_array(tmp_path / f"shards/shard-{task.shard_id}/patch_tokens", mode="r")
    assert (array.shards, array.chunks) == (
        (4, FRAMES, GRID[0] * GRID[1], HIDDEN),
        (1, 1, GRID[0] * GRID[1], HIDDEN),
    )
    codec = json.loads((tmp_path / f"shards/shard-{task.shard_id}/patch_tokens/zarr.json").read_text())[
        "codecs"
    ][0]
    assert codec["name"] == "sharding_indexed"
    assert [inner["name"] for inner in codec["configuration"]["codecs"]] == ["bytes", "crc32c"]
    assert [inner["name"] for inner in codec["configuration"]["index_codecs"]] == ["bytes", "crc32c"]
    files = [path for path in (tmp_path / "shards").rglob("*") if path.is_file() and path.name != "zarr.json"]
    assert len(files) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_zarr_chunks_of_zeros_are_on_disk(tmp_path: Path, kind: str) -> None:
    (task,) = make_dataset(tmp_path, kind, "zarr", "a", views=2)
    receipt = read_receipt(tmp_path, task.shard_id)
    index_bytes = 16 * (2 if kind == "deltas" else 2 * FRAMES) + 4
    data = (tmp_path / receipt.token_file).read_bytes()
    index = np.frombuffer(data[-index_bytes:-4], "<u8").reshape(-1, 2)
    assert (index != np.iinfo(np.uint64).max).all()
    assert index[:, 1].sum() + index_bytes == len(data)


def test_zarr_itself_notices_a_flipped_bit(tmp_path: Path) -> None:
    (task,) = make_dataset(tmp_path, "features", "zarr", "a")
    receipt = read_receipt(tmp_path, task.shard_id)
    path = tmp_path / receipt.token_file
    data = bytearray(path.read_bytes())
    data[receipt.token_offsets[1] + 1] ^= 4
    path.write_bytes(data)
    array = zarr.open_array(tmp_path / f"shards/shard-{task.shard_id}/patch_tokens", mode="r")
    array[0]
    with pytest.raises(ValueError, match="checksum"):
        array[1]


@pytest.mark.parametrize("store", STORES)
def test_reading_needs_neither_package(tmp_path: Path, store: str) -> None:
    make_dataset(tmp_path, "deltas", store, *VIDEOS)
    code = (
        "import sys; from pathlib import Path; from deltacache.pipeline.datasets.dataset import load_deltas\n"
        f"assert len(load_deltas(Path({str(tmp_path)!r})).clip_ids) == 6\n"
        "print(sorted({'zarr', 'webdataset', 'ray', 'av', 'decord', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


def test_npy_view_takes_only_plain_arrays_of_the_right_length() -> None:
    array = np.arange(6, dtype=np.float16).reshape(2, 3)
    whole = npy_bytes(array)
    np.testing.assert_array_equal(npy_view(memoryview(whole)), array)
    pickled = npy_bytes(np.zeros(1)).replace(b"'<f8'", b"'|O' ")
    fortran = whole.replace(b"False", b"True ")
    for bad in (
        whole[:-1],
        whole + b"\0",
        whole[:20],
        b"",
        pickled,
        fortran,
        whole.replace(b"NUMPY\x01", b"NUMPY\x03"),
    ):
        with pytest.raises(ValueError, match=r".+"):
            npy_view(memoryview(bad))
