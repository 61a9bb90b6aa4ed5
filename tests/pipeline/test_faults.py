"""Single flipped bits, anywhere: verification names the file and the clip, readers never give other values.

Faults of files that are checked apart from each other are injected at once, which makes hundreds of positions
of every file affordable.
"""

import io
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from crc32c import crc32c
from small_datasets import BLACK, all_bytes, make_dataset, write_sealed

from deltacache.pipeline.datasets.dataset import load_deltas, open_dataset
from deltacache.pipeline.datasets.receipts import Receipt, read_receipt
from deltacache.pipeline.datasets.verification import verify_dataset
from deltacache.pipeline.storage.files import (
    PARQUET_KEY,
    open_parquet,
    open_sealed,
    seal_json,
    unseal_json,
)
from deltacache.schemas.errors import DatasetError
from deltacache.schemas.tables import PLAN_SCHEMA

ROUNDS = 100
NAMES = ("a", "broken-b", "c")

every_dataset = pytest.mark.parametrize(
    ("kind", "store"),
    [("features", "webdataset"), ("features", "zarr"), ("deltas", "webdataset"), ("deltas", "zarr")],
)


@contextmanager
def flipped(root: Path, names: list[str], rng: np.random.Generator) -> Iterator[dict[str, int]]:
    """One bit of each of these files is flipped; the byte by file."""
    whole = {name: (root / name).read_bytes() for name in names}
    places = {}
    for name, content in whole.items():
        bit = int(rng.integers(8 * len(content)))
        places[name] = bit // 8
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        (root / name).write_bytes(damaged)
    yield places
    for name, content in whole.items():
        (root / name).write_bytes(content)


def clip_at(root: Path, receipt: Receipt, name: str, content: bytes, place: int) -> str | None:
    """To which clip the byte of a file of the shard belongs, found without the code under test."""
    ids = [row["clip_id"] for row in receipt.clips]
    if name.endswith(".tar"):
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            members = tar.getmembers()
        ends = [*(member.offset for member in members[1:]), members[-1].offset_data + 512]
        for member, end in zip(members, ends, strict=True):
            if member.offset <= place < end:
                return member.name.partition(".")[0]
    if "/c/0/" in name:
        clips = len(ids)
        chunks = clips if "patch_tokens" not in name else clips * len(receipt.clips[0]["timestamps_s"])
        data = len(content) - 16 * chunks - 4  # behind the chunks lie their offsets and sizes, and a crc32c
        return ids[place // (data // clips)] if place < data else None
    return None


def test_the_map_of_bytes_to_clips_is_right(tmp_path: Path) -> None:
    for store in ("webdataset", "zarr"):
        (task, _) = make_dataset(tmp_path / store, "features", store, *NAMES)
        receipt = read_receipt(tmp_path / store, task.shard_id)
        content = (tmp_path / store / receipt.token_file).read_bytes()
        for row, offset in enumerate(receipt.token_offsets):
            at = clip_at(tmp_path / store, receipt, receipt.token_file, content, offset)
            assert at == receipt.clips[row]["clip_id"]


@pytest.mark.slow
@every_dataset
def test_flipped_bits_are_found_in_their_file_and_clip(tmp_path: Path, kind: str, store: str) -> None:
    tasks = make_dataset(tmp_path, kind, store, *NAMES)
    receipts = [read_receipt(tmp_path, task.shard_id) for task in tasks]
    whole = all_bytes(tmp_path)
    of_shards = {name: receipt for receipt in receipts for name in receipt.files}
    rng = np.random.default_rng(5)
    apart = [
        [*of_shards, "index.parquet", "failures.parquet", "sources.parquet", "black_patch_tokens.npy"]
        + (["shards/zarr.json"] if store == "zarr" else []),
        [f"receipts/{task.shard_id}.json" for task in tasks] + ["tables.json", "plan.parquet"],
        ["dataset.json"],
    ]
    assert {name for names in apart for name in names} == set(whole)
    for _ in range(ROUNDS):
        for names in apart:
            with flipped(tmp_path, names, rng) as places:
                problems = verify_dataset(tmp_path)
                found = {(problem.file, problem.clip_id) for problem in problems}
                assert {file for file, _ in found} == set(names), places
                for name, place in places.items():
                    assert (name, None) in found, (name, place)
                    if name in of_shards:
                        clip = clip_at(tmp_path, of_shards[name], name, whole[name], place)
                        named = {clip_id for file, clip_id in found if file == name} - {None}
                        assert named >= ({clip} if clip else set()), (name, place)
    assert verify_dataset(tmp_path) == []


@pytest.mark.slow
@every_dataset
def test_readers_give_true_values_or_raise(tmp_path: Path, kind: str, store: str) -> None:
    tasks = make_dataset(tmp_path, kind, store, *NAMES)
    truth = {clip.clip_id: values(clip) for clip in map(open_dataset(tmp_path).read, range(4))}
    names = sorted(all_bytes(tmp_path))
    rng, refused = np.random.default_rng(6), 0
    of_first = [f"receipts/{tasks[0].shard_id}.json", *read_receipt(tmp_path, tasks[0].shard_id).files]
    for round_ in range(ROUNDS):
        for damaged in ([name] for name in (of_first if round_ % 3 else names)):
            with flipped(tmp_path, damaged, rng) as places:
                refused += check_readers(tmp_path, kind, truth, places)
    assert refused > ROUNDS


def values(clip: object) -> tuple[bytes, bytes]:
    tokens = getattr(clip, "patch_tokens", None)
    tokens = clip.delta_tokens if tokens is None else tokens  # pyright: ignore[reportAttributeAccessIssue]
    return tokens.tobytes(), clip.timestamps_s.tobytes()  # pyright: ignore[reportAttributeAccessIssue]


def check_readers(root: Path, kind: str, truth: dict[str, tuple[bytes, bytes]], places: object) -> int:
    """How many reads were refused; all others gave what was written."""
    try:
        dataset = open_dataset(root)
    except DatasetError:
        return 1
    assert dataset.clip_ids == list(truth), places
    assert np.array_equal(dataset.black_patch_tokens, BLACK)
    refused = 0
    for position, clip_id in enumerate(truth):
        try:
            clip = dataset.read(position)
            assert (clip.clip_id, values(clip)) == (clip_id, truth[clip_id]), places
            assert dataset.read_frames(position, 0, 3).tobytes() == truth[clip_id][0], places
        except DatasetError:
            refused += 1
    if kind == "deltas":
        try:
            tokens = load_deltas(root).delta_tokens
            assert tokens.tobytes() == b"".join(tokens for tokens, _ in truth.values()), places
        except DatasetError:
            refused += 1
    return refused


@pytest.mark.slow
@every_dataset
def test_readers_of_what_is_missing_cut_or_longer_raise(tmp_path: Path, kind: str, store: str) -> None:
    make_dataset(tmp_path, kind, store, *NAMES)
    truth = {clip.clip_id: values(clip) for clip in map(open_dataset(tmp_path).read, range(4))}
    for name, content in all_bytes(tmp_path).items():
        for damaged in (
            None,
            b"",
            content[: len(content) // 2],
            content[:-1],
            content + b"\0",
            bytes(len(content)),
        ):
            (tmp_path / name).unlink()
            if damaged is not None:
                (tmp_path / name).write_bytes(damaged)
            if damaged is None and name.startswith("receipts/"):  # then its shard does not count
                assert any(problem.file.startswith("shards/shard-") for problem in verify_dataset(tmp_path))
            else:
                assert name in {problem.file for problem in verify_dataset(tmp_path)}, (name, damaged)
            check_readers(tmp_path, kind, truth, name)
            (tmp_path / name).write_bytes(content)
    assert verify_dataset(tmp_path) == []


@pytest.mark.slow
def test_every_single_bit_of_sealed_files_counts(tmp_path: Path) -> None:
    make_dataset(tmp_path, "features", "webdataset", "a")
    plan = (tmp_path / "plan.parquet").read_bytes()
    sealed = seal_json(b'{"a":[1.5,"\\u00e9"],"receipt_crc32c":2}', "receipt_crc32c")
    checks = {
        plan: lambda damaged: open_sealed(pa.BufferReader(damaged), PLAN_SCHEMA),
        sealed: lambda damaged: unseal_json(damaged, "receipt_crc32c"),
    }
    for content, check in checks.items():
        for bit in range(8 * len(content)):
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            with pytest.raises(ValueError, match=r"checksum does not match|holds no deltacache\.crc32c"):
                check(bytes(damaged))
    open_sealed(pa.BufferReader(plan), PLAN_SCHEMA)
    assert unseal_json(sealed, "receipt_crc32c") == b'{"a":[1.5,"\\u00e9"],"receipt_crc32c":2}'


def test_a_checksum_in_the_values_of_a_table_is_not_that_of_the_file(tmp_path: Path) -> None:
    """A text that looks like the footer's checksum lies in the footer too, as the smallest value of its column."""
    text = f"{PARQUET_KEY}\x18\x0800000000"
    table = pa.table({"video_uri": [text]})
    write_sealed(tmp_path / "own.parquet", table)
    assert open_parquet(tmp_path / "own.parquet", table.schema).read() == table
    pq.write_table(table, tmp_path / "foreign.parquet", compression="none")
    content = bytearray((tmp_path / "foreign.parquet").read_bytes())
    start = content.rindex(text.encode()) + len(text) - 8
    content[start : start + 8] = f"{crc32c(bytes(content)):08x}".encode()
    with pytest.raises(ValueError, match=f"holds no {PARQUET_KEY} of its own"):
        open_sealed(pa.BufferReader(bytes(content)), table.schema)
    (tmp_path / "foreign.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=f"holds no {PARQUET_KEY} of its own"):
        open_parquet(tmp_path / "foreign.parquet", table.schema)
