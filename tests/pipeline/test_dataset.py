"""Datasets: starting, continuing, refusing, reading and loading them."""

import gc
import json
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_datasets import (
    BLACK,
    FRAMES,
    HIDDEN,
    all_bytes,
    make_dataset,
    shard_of,
    small_card,
    sources_of,
    videos_named,
)

from deltacache.pipeline.datasets.dataset import (
    finish_dataset,
    finished_shards,
    load_deltas,
    open_dataset,
    prepare_dataset,
    read_plan,
    write_plan,
    write_shard,
)
from deltacache.pipeline.datasets.plan import extend_plan, shard_tasks
from deltacache.pipeline.datasets.receipts import read_receipt
from deltacache.pipeline.datasets.writing import read_card
from deltacache.pipeline.jobs.offline import extract_features
from deltacache.pipeline.storage.files import crc32c_of_npy
from deltacache.pipeline.storage.mapped import MappedFiles
from deltacache.schemas.datasets import BackboneCard, DatasetCard, SamplingSettings
from deltacache.schemas.errors import DatasetError, MismatchError
from deltacache.schemas.jobs import ExtractionSettings
from deltacache.schemas.progress import SilentReporter
from deltacache.schemas.tables import FAILURES_SCHEMA, INDEX_SCHEMA

STORES = ["webdataset", "zarr"]
FEATURES = small_card("features", "webdataset")


def test_dataset_json_holds_card_fingerprint_and_parents(tmp_path: Path) -> None:
    prepare_dataset(tmp_path, FEATURES, BLACK)
    body = json.loads((tmp_path / "dataset.json").read_text())
    assert (body.pop("fingerprint"), body.pop("parents")) == (FEATURES.fingerprint, FEATURES.parents)
    assert isinstance(body.pop("dataset_crc32c"), int)
    assert DatasetCard.model_validate(body) == FEATURES
    np.testing.assert_array_equal(np.load(tmp_path / "black_patch_tokens.npy", allow_pickle=False), BLACK)


def test_dtype_and_precision_determine_the_fingerprint() -> None:
    cards = [
        FEATURES,
        small_card("int8", "webdataset"),
        small_card("features", "webdataset", precision="bfloat16"),
        small_card("features", "webdataset", precision="bfloat16_autocast"),
    ]
    deltas = [card.deltas(store="zarr", tokenizer="0123456789abcdef", code_version="1") for card in cards]
    assert len({card.fingerprint for card in (*cards, *deltas)}) == 8
    assert [card.dtype for card in deltas] == ["float16"] * 4
    assert [card.features_dtype for card in deltas] == [None, "int8", None, None]
    for features, made in zip(cards, deltas, strict=True):
        assert made.parents["features"] == features.fingerprint == made.features_fingerprint
        assert made.precision == features.precision
        assert DatasetCard.model_validate_json(made.model_dump_json()) == made
    assert deltas[0] == small_card("deltas", "zarr", code_version="1")


def test_the_precision_of_a_tokenizer_determines_the_fingerprint_and_float32_is_not_written() -> None:
    """What older versions made says nothing of it, and was made in float32."""
    made_like = {"store": "zarr", "tokenizer": "0123456789abcdef", "code_version": "1"}
    exact, fast = (FEATURES.deltas(**made_like, precision=each) for each in ("float32", "bfloat16_autocast"))
    assert exact == FEATURES.deltas(**made_like)
    assert "tokenizer_precision" not in exact.model_dump(mode="json")
    assert DatasetCard.model_validate(exact.model_dump(mode="json")).tokenizer_precision == "float32"
    assert fast.fingerprint != exact.fingerprint
    assert fast.features_fingerprint == exact.features_fingerprint
    assert DatasetCard.model_validate_json(fast.model_dump_json()) == fast
    with pytest.raises(ValueError, match="tokenizer_precision is for deltas"):
        small_card("features", "webdataset", tokenizer_precision="bfloat16_autocast")


def test_deltas_are_float16_whatever_their_features_are() -> None:
    with pytest.raises(ValueError, match=r"dtype int8 is for features only: delta tokens .* stay float16"):
        small_card("deltas", "webdataset", dtype="int8")
    with pytest.raises(ValueError, match="features_dtype is for deltas"):
        small_card("features", "webdataset", features_dtype="int8")


def test_another_dtype_or_precision_is_refused_by_name(tmp_path: Path) -> None:
    prepare_dataset(tmp_path, FEATURES, BLACK)
    for name, value in (("dtype", "int8"), ("precision", "bfloat16")):
        changed = small_card("features", "webdataset", **{name: value})
        with pytest.raises(MismatchError, match=rf'{name} is "float\d+", asked for "{value}"'):
            prepare_dataset(tmp_path, changed, BLACK)


def test_equal_settings_are_accepted_and_nothing_is_rewritten(tmp_path: Path) -> None:
    make_dataset(tmp_path, "features", "webdataset", "a", "b")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    renamed = FEATURES.backbone.model_copy(update={"id": "the same weights elsewhere"})
    prepare_dataset(tmp_path, FEATURES.model_copy(update={"backbone": renamed, "code_version": "9.9"}), BLACK)
    finish_dataset(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_other_settings_are_refused_naming_each_with_both_values(tmp_path: Path) -> None:
    make_dataset(tmp_path, "features", "webdataset", "a")
    before = all_bytes(tmp_path)
    other = small_card("features", "zarr", sampling=SamplingSettings(frames=FRAMES, seed=7))
    with pytest.raises(MismatchError) as refused:
        prepare_dataset(tmp_path, other, BLACK)
    message = str(refused.value)
    assert 'store is "webdataset", asked for "zarr"' in message
    assert "sampling.seed is 0, asked for 7" in message
    assert FEATURES.fingerprint in message
    assert other.fingerprint in message
    assert message.count("asked for") == 3
    assert all_bytes(tmp_path) == before


def test_other_weights_are_refused(tmp_path: Path) -> None:
    prepare_dataset(tmp_path, FEATURES, BLACK)
    backbone = BackboneCard(**FEATURES.backbone.model_dump() | {"weights_sha256": "77" * 32})
    with pytest.raises(MismatchError, match=r'backbone\.weights_sha256 is "5e5e.*asked for "7777'):
        prepare_dataset(tmp_path, small_card("features", "webdataset", backbone=backbone), BLACK)


def test_folder_that_holds_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(
        DatasetError, match=r"not empty and not a dataset \(it holds 'thesis.tex'.*nothing was changed"
    ):
        prepare_dataset(tmp_path, FEATURES, BLACK)
    assert all_bytes(tmp_path) == {"thesis.tex": b"years of work"}
    with pytest.raises(DatasetError, match="is a file: give a folder"):
        prepare_dataset(tmp_path / "thesis.tex", FEATURES, BLACK)


def test_start_that_was_interrupted_is_continued(tmp_path: Path) -> None:
    prepare_dataset(tmp_path, FEATURES, BLACK)
    whole = all_bytes(tmp_path)
    (tmp_path / "black_patch_tokens.npy").unlink()
    (tmp_path / "receipts").rmdir()
    prepare_dataset(tmp_path, FEATURES, BLACK)
    assert all_bytes(tmp_path) == whole
    (tmp_path / "black_patch_tokens.npy").unlink()
    changed = small_card("features", "webdataset", black_crc32c=crc32c_of_npy(2 * BLACK))
    with pytest.raises(
        DatasetError, match=r"black_patch_tokens\.npy is missing, and this machine computes other"
    ):
        prepare_dataset(tmp_path, changed, 2 * BLACK)


def test_black_tokens_must_be_those_of_the_card(tmp_path: Path) -> None:
    for black in (BLACK.astype(np.float32), BLACK[:2], BLACK + np.float16(1)):
        with pytest.raises(ValueError, match=r"must be|but the array's is"):
            prepare_dataset(tmp_path, FEATURES, black)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 64}, r"its settings give [0-9a-f]{16}: it was changed after the dataset was made"),
        ({"fingerprint": "0" * 16}, "says fingerprint 0000000000000000, but its settings give"),
        ({"parents": {"backbone": "0" * 16}}, "it was changed after"),
        ({"format_version": 1}, "has format version 1, this program reads 2"),
        ({"image_size": "large"}, r"dataset\.json is damaged"),
        ({"colour": "red"}, r"dataset\.json is damaged"),
    ],
)
def test_changed_dataset_json_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    make_dataset(tmp_path, "features", "webdataset", "a")
    body = json.loads((tmp_path / "dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps(body | change))
    for use in (lambda: open_dataset(tmp_path), lambda: prepare_dataset(tmp_path, FEATURES, BLACK)):
        with pytest.raises(DatasetError, match=message):
            use()


def test_what_is_no_dataset_not_finished_or_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"is not a dataset, it has no dataset\.json: give one made by"):
        open_dataset(tmp_path / "nowhere")
    prepare_dataset(tmp_path / "new", FEATURES, BLACK)
    with pytest.raises(DatasetError, match=r"index\.parquet does not exist: the dataset is not finished"):
        open_dataset(tmp_path / "new")
    make_dataset(tmp_path / "features", "features", "webdataset", "a")
    with pytest.raises(DatasetError, match=r"holds features, but deltas are needed: .*deltacache tokenize"):
        load_deltas(tmp_path / "features")
    (tmp_path / "damaged").mkdir()
    for content in (b"", b"{", b"[]", b"\xff", b'{"fingerprint": 1}'):
        (tmp_path / "damaged" / "dataset.json").write_bytes(content)
        with pytest.raises(DatasetError, match=r"dataset\.json is damaged"):
            open_dataset(tmp_path / "damaged")


def test_index_is_in_the_order_of_the_plan_whatever_the_order_of_commits(tmp_path: Path) -> None:
    names = ("a", "b", "broken-c", "broken-d", "e", "broken-f")
    make_dataset(tmp_path / "one", "features", "webdataset", *names)
    root = tmp_path / "two"
    prepare_dataset(root, FEATURES, BLACK)
    write_plan(root, extend_plan(None, videos_named(*names), 2, 2))
    for task in reversed(shard_tasks(read_plan(root))):
        write_shard(root, FEATURES, task.shard_id, *shard_of("features", task), sources_of(task))
    finish_dataset(root)
    assert all_bytes(root) == all_bytes(tmp_path / "one")
    dataset = open_dataset(root, "features")
    assert dataset.index.schema.equals(INDEX_SCHEMA)
    assert dataset.failures.schema.equals(FAILURES_SCHEMA)
    assert dataset.index["video_uri"].to_pylist() == ["a", "a", "b", "b", "e", "e"]
    assert dataset.index["row"].to_pylist() == [0, 1, 2, 3, 0, 1]
    assert dataset.failures["video_uri"].to_pylist() == ["broken-c", "broken-d", "broken-f"]


def test_more_videos_and_views_leave_finished_shards_alone(tmp_path: Path) -> None:
    make_dataset(tmp_path, "deltas", "webdataset", "b", "c", views=1)
    before = {
        name: data for name, data in all_bytes(tmp_path).items() if name.startswith(("shards/", "receipts/"))
    }
    write_plan(tmp_path, extend_plan(read_plan(tmp_path), videos_named("a", "b", "c"), 2, 2))
    card, done = small_card("deltas", "webdataset"), finished_shards(tmp_path)
    pending = [task for task in shard_tasks(read_plan(tmp_path)) if task.shard_id not in done]
    for task in pending:
        write_shard(tmp_path, card, task.shard_id, *shard_of("deltas", task), sources_of(task))
    finish_dataset(tmp_path)
    assert all_bytes(tmp_path).items() >= before.items()
    dataset = open_dataset(tmp_path)
    pairs = zip(dataset.index["video_uri"].to_pylist(), dataset.index["view"].to_pylist(), strict=True)
    assert list(pairs) == [("b", 0), ("c", 0), ("a", 0), ("a", 1), ("b", 1), ("c", 1)]


def test_lost_tables_are_merged_again(tmp_path: Path) -> None:
    make_dataset(tmp_path, "features", "webdataset", "a", "broken")
    whole = all_bytes(tmp_path)
    for name in ("index.parquet", "failures.parquet", "tables.json"):
        (tmp_path / name).unlink()
        finish_dataset(tmp_path)
        assert all_bytes(tmp_path) == whole


def test_a_finish_that_was_broken_off_does_not_open_with_the_tables_of_before(tmp_path: Path) -> None:
    make_dataset(tmp_path, "deltas", "webdataset", "a", "b")
    old = {
        name: (tmp_path / name).read_bytes()
        for name in ("index.parquet", "failures.parquet", "sources.parquet")
    }
    make_dataset(tmp_path, "deltas", "webdataset", "a", "b", "c")
    for name, content in old.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "tables.json").unlink()  # it goes before the first table is replaced
    with pytest.raises(DatasetError, match="is not finished: its tables do not hold all planned shards"):
        open_dataset(tmp_path)
    (tmp_path / "tables.json").write_bytes(b"{}")  # as one of an older version, which stayed meanwhile
    with pytest.raises(DatasetError, match="is not finished: its tables do not hold all planned shards"):
        open_dataset(tmp_path)
    finish_dataset(tmp_path)
    assert len(open_dataset(tmp_path)) == 6


@pytest.mark.parametrize("store", STORES)
def test_deltas_are_loaded_whole(tmp_path: Path, store: str) -> None:
    names = [f"video-{n}" for n in range(7)]
    tasks = make_dataset(tmp_path, "deltas", store, *names, views=3)
    arrays = load_deltas(tmp_path)
    written = [stored.clip for task in tasks for stored in shard_of("deltas", task)[0]]
    assert arrays.delta_tokens.shape == (21, FRAMES, HIDDEN)
    assert arrays.delta_tokens.dtype == np.float16
    assert arrays.delta_tokens.flags.c_contiguous
    assert arrays.delta_tokens.flags.writeable
    assert arrays.timestamps_s.dtype == np.float32
    assert list(arrays.clip_ids) == [clip.clip_id for clip in written]
    np.testing.assert_array_equal(arrays.delta_tokens, [clip.delta_tokens for clip in written])  # pyright: ignore
    np.testing.assert_array_equal(arrays.timestamps_s, [clip.timestamps_s for clip in written])
    assert repr(arrays) == f"DeltaArrays(delta_tokens=(21, {FRAMES}, {HIDDEN}))"


def test_clips_of_a_shard(tmp_path: Path) -> None:
    tasks = make_dataset(
        tmp_path, "features", "webdataset", "a", "b", "broken-1", "broken-2", "d", videos_per_shard=2
    )
    dataset = open_dataset(tmp_path)
    assert [dataset.clips_of(task.shard_id) for task in tasks] == [range(4), range(0), range(4, 6)]
    assert [failure.video_uri for failure in read_receipt(tmp_path, tasks[1].shard_id).failures] == [
        "broken-1",
        "broken-2",
    ]


def test_positions_and_frames_out_of_range_are_refused(tmp_path: Path) -> None:
    make_dataset(tmp_path, "features", "webdataset", "a")
    dataset = open_dataset(tmp_path)
    assert dataset.read(-1).clip_id == dataset.clip_ids[1]
    with pytest.raises(IndexError):
        dataset.read(2)
    for start, stop in ((-1, 1), (0, FRAMES + 1), (2, 1)):
        with pytest.raises(IndexError, match=f"frames {start}..{stop} of a clip of {FRAMES}"):
            dataset.read_frames(0, start, stop)


@pytest.mark.slow
@pytest.mark.parametrize("store", STORES)
def test_datasets_travel_between_processes_and_serve_many_threads(tmp_path: Path, store: str) -> None:
    make_dataset(tmp_path, "features", store, *(f"video-{n}" for n in range(20)), videos_per_shard=1)
    dataset = open_dataset(tmp_path)
    expected = [np.array(dataset.read_frames(clip, 0, FRAMES)) for clip in range(len(dataset))]
    copy, wrong = pickle.loads(pickle.dumps(dataset)), []  # noqa: S301

    def read_all(seed: int) -> None:
        for clip in np.random.default_rng(seed).permutation(len(copy)).tolist():
            if not np.array_equal(copy.read_frames(clip, 0, FRAMES), expected[clip]):
                wrong.append(clip)

    threads = [threading.Thread(target=read_all, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.slow
def test_views_outlive_their_file_being_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltacache.pipeline.storage.mapped._OPEN_FILES", 2)
    make_dataset(tmp_path, "features", "webdataset", *"abcdef", videos_per_shard=1)
    dataset = open_dataset(tmp_path)
    views = [dataset.read_frames(clip, 0, FRAMES) for clip in range(len(dataset))]
    fresh = open_dataset(tmp_path)
    for clip, view in enumerate(views):
        np.testing.assert_array_equal(view, fresh.read_frames(clip, 0, FRAMES))
    del views, view, dataset
    gc.collect()
    targets = [str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    assert sum("shards" in target for target in targets) <= 2
    with pytest.raises(ValueError, match="size of buffer"):
        MappedFiles().float16(tmp_path / "dataset.json", 0, (10_000, 4), 8)


def damage(path: Path, how: str, offset: int) -> None:
    data = bytearray(path.read_bytes())
    path.chmod(0o644)
    if how == "missing":
        path.unlink()
    elif how == "short":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        data[offset] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize("how", ["missing", "short", "empty", "altered"])
@pytest.mark.parametrize("store", STORES)
def test_damaged_shard_is_an_error_that_names_shard_and_clip(tmp_path: Path, store: str, how: str) -> None:
    tasks = make_dataset(tmp_path, "features", store, "a", "b", "c", "d")
    receipt = read_receipt(tmp_path, tasks[1].shard_id)
    damage(tmp_path / receipt.token_file, how, receipt.token_offsets[2] + 5)
    dataset = open_dataset(tmp_path)
    for clip in range(6 if how == "altered" else 4):
        dataset.read(clip)
    what = {
        "missing": "is missing, but its receipt says",
        "short": r"has \d+ bytes, but its receipt says",
        "empty": "has 0 bytes, but its receipt says",
        "altered": "its tokens have crc32c",
    }
    message = rf"clip {dataset.clip_ids[6]} of shard {tasks[1].shard_id} is damaged: .*{what[how]}.*verify .* --repair"
    for _ in range(2):
        with pytest.raises(DatasetError, match=message):
            dataset.read(6)
        with pytest.raises(DatasetError, match=message):
            dataset.read_frames(6, 0, 1)


@pytest.mark.parametrize("store", STORES)
def test_frames_outside_the_ones_asked_for_are_verified_too(tmp_path: Path, store: str) -> None:
    (task,) = make_dataset(tmp_path, "features", store, "a")
    receipt = read_receipt(tmp_path, task.shard_id)
    damage(tmp_path / receipt.token_file, "altered", receipt.token_offsets[0] + 2 * receipt.frame_stride)
    with pytest.raises(DatasetError, match="its tokens have crc32c"):
        open_dataset(tmp_path).read_frames(0, 0, 1)


@pytest.mark.parametrize("store", STORES)
def test_loading_damaged_deltas_is_an_error(tmp_path: Path, store: str) -> None:
    (task,) = make_dataset(tmp_path, "deltas", store, "a", "b")
    receipt = read_receipt(tmp_path, task.shard_id)
    damage(tmp_path / receipt.token_file, "altered", receipt.token_offsets[3])
    with pytest.raises(
        DatasetError, match=rf"clip {receipt.clips[3]['clip_id']} of shard {task.shard_id} is damaged"
    ):
        load_deltas(tmp_path)


def test_damaged_tables_and_black_tokens_are_refused(tmp_path: Path) -> None:
    make_dataset(tmp_path, "features", "webdataset", "a", "broken")
    black, index = tmp_path / "black_patch_tokens.npy", tmp_path / "index.parquet"
    for path, message in ((black, "is not what dataset.json says"), (index, r"index\.parquet is damaged")):
        whole = path.read_bytes()
        damage(path, "altered", len(whole) - 3)
        with pytest.raises(DatasetError, match=message):
            open_dataset(tmp_path)
        damage(path, "short", 0)
        with pytest.raises(DatasetError, match="remove it and run the command"):
            open_dataset(tmp_path)
        path.write_bytes(whole)
    (tmp_path / "failures.parquet").replace(index)
    with pytest.raises(DatasetError, match=r"index\.parquet is damaged \(its columns are"):
        open_dataset(tmp_path)


def test_what_older_versions_made_in_bfloat16_is_read_and_never_continued(tmp_path: Path) -> None:
    """They rounded the whole forward pass: one dataset would hold two kinds of numbers."""
    prepare_dataset(tmp_path, small_card("features", "webdataset", precision="bfloat16"), BLACK)
    write_plan(tmp_path, extend_plan(None, videos_named("a"), 1, 1))
    before = all_bytes(tmp_path)
    asked = ExtractionSettings(source=str(tmp_path), backbone="tiny")
    for precision in ("auto", "bfloat16"):
        settings = asked.model_copy(update={"precision": precision})
        with pytest.raises(MismatchError, match=r"bfloat16 by an older version.*give another output folder"):
            extract_features(settings, tmp_path, SilentReporter())
    assert all_bytes(tmp_path) == before
    (task,) = shard_tasks(read_plan(tmp_path))
    write_shard(tmp_path, read_card(tmp_path), task.shard_id, *shard_of("features", task), sources_of(task))
    finish_dataset(tmp_path)
    assert open_dataset(tmp_path).card.precision == "bfloat16"
