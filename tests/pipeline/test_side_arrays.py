"""Side arrays: which row a frame gets, and the way from a table through shards of both stores to a batch."""

import gc
import io
import json
import shutil
import tarfile
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import webdataset as wds
import zarr
from PIL import Image
from small_datasets import BLACK, all_bytes, shard_of, small_card, sources_of, videos_named

import deltacache
from deltacache.descriptions import describe_output
from deltacache.pipeline.datasets.dataset import (
    finish_dataset,
    open_dataset,
    prepare_dataset,
    stored_clips,
    write_plan,
    write_shard,
)
from deltacache.pipeline.datasets.plan import extend_plan, read_plan, shard_tasks
from deltacache.pipeline.datasets.receipts import read_receipt
from deltacache.pipeline.datasets.verification import verify_dataset
from deltacache.pipeline.inputs.side_arrays import SideTable, side_row, side_values
from deltacache.schemas.datasets import SideArray
from deltacache.schemas.errors import DatasetError, MismatchError, SettingsError
from shared_ray import SharedRay

NAN = float("nan")
VIDEOS, FRAMES = 3, 8


def table(path: Path, **columns: object) -> str:
    """A file of side arrays, CSV or Parquet by its name."""
    written = pa.table(columns)
    if path.suffix == ".csv":
        pyarrow.csv.write_csv(written, path)
    else:
        pq.write_table(written, path)
    return str(path)


def obvious(times: list[float], values: list[float], frame: float, rule: str) -> float:
    """One frame at a time, for rows that are in order."""
    known = [(time, value) for time, value in zip(times, values, strict=True)]
    if rule == "previous":
        return next((value for time, value in reversed(known) if time <= frame), NAN)
    if rule == "nearest":
        return min(known, key=lambda row: (abs(row[0] - frame), row[0]))[1] if known else NAN
    for (left, low), (right, high) in pairwise(known):
        if left <= frame <= right:
            return low + (high - low) * (frame - left) / (right - left)
    return next((value for time, value in known if time == frame), NAN)


@pytest.mark.parametrize("rule", ["previous", "nearest", "linear"])
def test_each_frame_gets_the_row_that_the_rule_says(tmp_path: Path, rule: str) -> None:
    rng = np.random.default_rng(1)
    uris, times, values = list[str](), list[float](), list[float]()
    for video, rows in (("a.mp4", 1), ("b.mp4", 2), ("c.mp4", 30)):
        uris += [video] * rows
        times += rng.permutation(np.sort(rng.uniform(1, 3, rows))).tolist()
        values += rng.normal(size=rows).tolist()
    path = table(tmp_path / "side.parquet", video_uri=uris, time_s=times, speed=values)
    found = SideTable(path, {"speed": rule})  # type: ignore[dict-item]
    frames = np.sort(rng.uniform(0, 4, 200)).astype(np.float32)
    for video in ("a.mp4", "b.mp4", "c.mp4", "unknown.mp4"):
        rows = sorted(
            (time, value) for uri, time, value in zip(uris, times, values, strict=True) if uri == video
        )
        own, known = [time for time, _ in rows], [value for _, value in rows]
        expected = [obvious(own, known, float(frame), rule) for frame in frames]
        np.testing.assert_allclose(found.at(video, frames)["speed"], expected, rtol=1e-4, atol=1e-4)


def test_a_row_at_a_frames_time_is_that_frames(tmp_path: Path) -> None:
    """Times of frames are float32, often just below the number that a table says."""
    times = [n / 10 for n in range(100)]
    path = table(tmp_path / "side.csv", video_uri=["a"] * 100, time_s=times, frame=list(range(100)))
    frames = np.asarray(times, np.float32)
    assert any(float(frame) < time for frame, time in zip(frames, times, strict=True))
    for rule in ("previous", "nearest", "linear"):
        found = SideTable(path, {"frame": rule}).at("a", frames)["frame"]  # type: ignore[dict-item]
        np.testing.assert_allclose(found, np.arange(100), atol=1e-4)


def test_columns_become_arrays_by_their_type(tmp_path: Path) -> None:
    path = table(
        tmp_path / "side.parquet",
        video_uri=["a", "a"],
        time_s=[0, 1],
        action=[[1.0, 2.0], [3.0, 4.0]],
        gripper=[True, False],
        task=["push", None],
    )
    found = SideTable(path, {})
    assert {name: (each.kind, each.width) for name, each in found.arrays.items()} == {
        "action": ("numbers", 2),
        "gripper": ("numbers", None),
        "task": ("text", None),
    }
    at = found.at("a", np.array([-1, 0.5, 1.5], np.float32))
    np.testing.assert_array_equal(at["action"], np.array([[NAN, NAN], [1, 2], [3, 4]], np.float32))
    np.testing.assert_array_equal(at["gripper"], np.array([NAN, 1, 0], np.float32))
    assert at["task"] == ["", "push", ""]
    back = side_values(json.loads(json.dumps(side_row(at), allow_nan=False)), found.arrays)
    for name, values in at.items():
        np.testing.assert_array_equal(back[name], values)


@pytest.mark.parametrize(
    ("columns", "what"),
    [
        ({"time_s": [0.0], "x": [1]}, "has no column video_uri"),
        ({"video_uri": ["a"], "time_s": ["now"], "x": [1]}, "must be numbers of seconds"),
        ({"video_uri": ["a"], "time_s": [None], "x": [1]}, "must be numbers|without a finite time_s"),
        ({"video_uri": ["a"], "time_s": [0.0]}, "nothing to add"),
        ({"video_uri": ["a"], "time_s": [0.0], "crop": [1]}, "column crop of .* cannot be a side array"),
        ({"video_uri": ["a"], "time_s": [0.0], "a.b": [1]}, "column a.b of .* cannot be a side array"),
        ({"video_uri": ["a"], "time_s": [0.0], "a.0": [1], "a.2": [1]}, "number them from 0 without a gap"),
        (
            {"video_uri": ["a", "a"], "time_s": [0.0, 1.0], "x": [[1.0], [1.0, 2.0]]},
            "lists of different lengths",
        ),
        ({"video_uri": ["a"], "time_s": [0.0], "x": [float("inf")]}, "infinite"),
        ({"video_uri": ["a"], "time_s": [0.0], "x": [b"bytes"]}, "is binary: give numbers"),
    ],
)
def test_tables_that_cannot_be_used_are_refused(
    tmp_path: Path, columns: dict[str, object], what: str
) -> None:
    with pytest.raises(DatasetError, match=what):
        _ = SideTable(table(tmp_path / "side.parquet", **columns), {}).arrays


@pytest.mark.parametrize("store", ["webdataset", "zarr"])
@pytest.mark.parametrize("kind", ["features", "deltas", "int8"])
def test_every_kind_of_shard_holds_them(kind: str, store: str, tmp_path: Path) -> None:
    """Written, verified, read back bit for bit, and written from what was read with the same bytes."""
    arrays = {"action": SideArray(width=2), "speed": SideArray(rule="linear"), "task": SideArray(kind="text")}
    card = small_card(kind, store, side_arrays=arrays)
    action = np.array([[1, 2], [NAN, 0.1], [5, 6]], np.float32)
    beside = {"action": action, "speed": np.arange(3, dtype=np.float32) / 3, "task": ["x", "", "é"]}
    roots = tmp_path / "first", tmp_path / "again"
    for root in roots:
        prepare_dataset(root, card, BLACK)
        plan = extend_plan(read_plan(root), videos_named("a.mp4", "b.mp4", "c.mp4"), 2, 2)
        write_plan(root, plan)
        for task in shard_tasks(plan):
            clips, failures = shard_of(kind, task)
            filled = [replace(clip, side_arrays=beside) for clip in clips]
            if root == roots[1]:
                filled = list(stored_clips(roots[0], card, read_receipt(roots[0], task.shard_id)))
            write_shard(root, card, task.shard_id, filled, failures, sources_of(task))
        finish_dataset(root)
        assert verify_dataset(root) == []
    first, again = (
        {name: each for name, each in all_bytes(root).items() if "tables" not in name} for root in roots
    )
    assert first == again
    dataset = open_dataset(roots[1])
    np.testing.assert_array_equal(dataset.side_array("action"), np.stack([action] * 6))
    np.testing.assert_array_equal(dataset.side_array("speed")[0], beside["speed"])
    assert dataset.side_array("task") == [["x", "", "é"]] * 6
    with pytest.raises(ValueError, match=r"side array .* is not kind="):
        write_shard(roots[1], card, "00099-00000000", [replace(filled[0], side_arrays={})], [], [])


@pytest.fixture(scope="module")
def made(shared_ray: SharedRay, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of frames and a table; features in both stores, and deltas of the first, made through the front door.

    Delta tokens straight from the videos are made on Ray.
    """
    root = tmp_path_factory.mktemp("side-arrays")
    rng = np.random.default_rng(0)
    uris, times = list[str](), list[float]()
    for video in range(VIDEOS):
        folder = root / "videos" / f"clip{video}"
        folder.mkdir(parents=True)
        for frame in range(FRAMES):
            pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"frame_{frame * 0.1:.1f}.png")
        if video < VIDEOS - 1:  # the last one has no rows
            uris += [f"clip{video}"] * FRAMES
            times += [frame * 0.1 for frame in range(FRAMES)]
    count = len(uris)
    side = table(
        root / "side.csv",
        **{
            "video_uri": uris,
            "time_s": times,
            "action.0": [float(n) for n in range(count)],
            "action.1": [-0.5 * n for n in range(count)],
            "task": [f"task {n}" for n in range(count)],
        },
    )
    settings = {"backbone": "tiny", "image_size": 32, "spacing": (0.1, 0.1), "augment": False, "encoders": 0}
    for store in ("webdataset", "zarr"):
        deltacache.extract_features(
            root / "videos",
            root / store,
            store=store,
            side_arrays=side,
            side_rule=["action=linear"],
            **settings,
        )
    tokenizer = deltacache.train_tokenizer(
        root / "webdataset", root / "tokenizer", preset="tiny", steps=1, assignments=["training.batch_size=2"]
    )
    deltacache.tokenize(root / "webdataset", root / "deltas", tokenizer, encoders=0)
    shared_ray.start()
    deltacache.tokenize(
        root / "videos",
        root / "direct",
        tokenizer,
        augment=False,
        side_arrays=side,
        side_rule=["action=linear"],
    )
    names = ("videos", "webdataset", "zarr", "tokenizer", "deltas", "direct", "side.csv")
    return {name: root / name for name in names}


def expected(root: Path) -> tuple[np.ndarray, list[list[str]]]:
    """Of the clips in the order of the index."""
    dataset = open_dataset(root)
    actions, tasks = np.full((VIDEOS, FRAMES, 2), np.nan, np.float32), []
    for clip, uri in enumerate(dataset.column("video_uri").to_pylist()):
        video = int(uri.removeprefix("clip"))
        rows = np.arange(video * FRAMES, (video + 1) * FRAMES)
        if video < VIDEOS - 1:
            actions[clip] = np.stack([rows, -0.5 * rows], 1)
        tasks.append([f"task {n}" if video < VIDEOS - 1 else "" for n in rows])
    return actions, tasks


@pytest.mark.parametrize("name", ["webdataset", "zarr", "deltas", "direct"])
def test_side_arrays_are_read_back_as_they_were_given(made: dict[str, Path], name: str) -> None:
    dataset = open_dataset(made[name])
    actions, tasks = expected(made[name])
    np.testing.assert_allclose(dataset.side_array("action"), actions, rtol=1e-5, atol=1e-5)
    assert dataset.side_array("task") == tasks
    with pytest.raises(DatasetError, match="has no side array 'state'; it has: action, task"):
        dataset.side_array("state")
    assert verify_dataset(made[name]) == []
    assert "action: 2 numbers a frame, linear" in describe_output(made[name])


def test_a_loader_gives_them_beside_the_tokens(made: dict[str, Path]) -> None:
    actions, tasks = expected(made["deltas"])
    clips = deltacache.ClipDataset([made["deltas"], made["direct"]], columns=["action", "task", "view"])
    batch = clips.__getitems__([4, 0]).batch
    np.testing.assert_allclose(batch["action"].numpy(), actions[[1, 0]], rtol=1e-5, atol=1e-5)
    assert batch["task"] == [tasks[1], tasks[0]]
    stream = deltacache.ClipStream(made["webdataset"], columns=["action", "task"], shuffle=False)
    for clip, item in enumerate(stream):
        np.testing.assert_allclose(item["action"].numpy(), actions[clip], rtol=1e-5, atol=1e-5)
        assert item["task"] == tasks[clip]
    with pytest.raises(DatasetError, match="'state' is not a column of the index"):
        deltacache.ClipDataset(made["deltas"], columns=["state"])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_plain_readers_find_them(made: dict[str, Path]) -> None:
    actions, tasks = expected(made["webdataset"])
    tars = sorted(map(str, (made["webdataset"] / "shards").glob("*.tar")))
    samples = list(wds.WebDataset(tars, shardshuffle=False, empty_check=False).decode())
    gc.collect()  # webdataset leaves its tars open
    assert len(samples) == VIDEOS
    for clip, sample in enumerate(samples):
        np.testing.assert_allclose(sample["action.npy"], actions[clip], rtol=1e-5, atol=1e-5)
        assert sample["json"]["task"] == tasks[clip]
        assert "action" not in sample["json"]
    (group,) = (zarr.open_group(path, mode="r") for path in (made["zarr"] / "shards").glob("shard-*"))
    np.testing.assert_allclose(group["action"][:], actions, rtol=1e-5, atol=1e-5)
    assert group.attrs["texts"] == [{"task": each} for each in tasks]


@pytest.mark.parametrize("name", ["webdataset", "zarr"])
def test_an_altered_side_array_is_found(made: dict[str, Path], name: str, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(made[name], root)
    if name == "zarr":
        (file,) = root.glob("shards/shard-*/action/c/0/0/0")
        place = 4
    else:
        (file,) = root.glob("shards/*.tar")
        with tarfile.open(file) as tar:
            (member, *_) = [each for each in tar.getmembers() if each.name.endswith(".action.npy")]
            content = tar.extractfile(member)
            assert content is not None
            place = member.offset_data + len(content.read()) - 1
    with file.open("r+b") as opened:
        opened.seek(place)
        byte = opened.read(1)
        opened.seek(place, io.SEEK_SET)
        opened.write(bytes([byte[0] ^ 1]))
    assert any("altered" in problem.message and problem.clip_id for problem in verify_dataset(root))


def test_rows_that_change_later_are_noticed(made: dict[str, Path], tmp_path: Path) -> None:
    """One value of one video, in a finished dataset and in one that is to grow; then the rows are made again."""
    settings = {"backbone": "tiny", "image_size": 32, "spacing": (0.1, 0.1), "augment": False, "encoders": 0}
    side, out = tmp_path / "side.csv", tmp_path / "out"
    side.write_bytes(made["side.csv"].read_bytes())

    def extract(**more: Any) -> None:
        deltacache.extract_features(
            made["videos"], out, side_arrays=side, side_rule=["action=linear"], **settings, **more
        )

    extract()
    extract()
    text = side.read_text()
    side.write_text(text.replace("task 1\n", "task one\n").replace('"task 1"', '"task one"'))
    assert side.read_text() != text
    for grown in ({}, {"views": 2}):
        with pytest.raises(DatasetError, match=r"1 video has changed .* in side arrays: clip0\. Put"):
            extract(**grown)
    extract(changed_videos="recompute")
    tasks = open_dataset(out).side_array("task")
    assert "task one" in [task for clip in tasks for task in clip]
    assert verify_dataset(out) == []
    extract()
    # Deltas that were made before have the rows of before
    shutil.copytree(made["deltas"], tmp_path / "deltas")
    tokenize = partial(deltacache.tokenize, out, tmp_path / "deltas", made["tokenizer"], encoders=0)
    with pytest.raises(DatasetError, match=r"The side arrays of .* have changed since .* in 1 shard such as"):
        tokenize()
    tokenize(changed_videos="recompute")
    assert open_dataset(tmp_path / "deltas").side_array("task") == tasks
    tokenize()


def test_other_side_arrays_are_another_dataset(made: dict[str, Path], tmp_path: Path) -> None:
    settings = {"backbone": "tiny", "image_size": 32, "spacing": (0.1, 0.1), "augment": False, "encoders": 0}
    with pytest.raises(MismatchError, match="side_arrays"):
        deltacache.extract_features(made["videos"], made["webdataset"], **settings)
    with pytest.raises(MismatchError, match="side_arrays"):
        deltacache.extract_features(
            made["videos"], made["webdataset"], side_arrays=made["side.csv"], **settings
        )
    with pytest.raises(SettingsError, match=r"side_rule: .*has no column state"):
        deltacache.extract_features(
            made["videos"],
            tmp_path / "x",
            side_arrays=made["side.csv"],
            side_rule=["state=linear"],
            **settings,
        )
    with pytest.raises(SettingsError, match="which has no mean"):
        deltacache.extract_features(
            made["videos"],
            tmp_path / "x",
            side_arrays=made["side.csv"],
            side_rule=["task=linear"],
            **settings,
        )
    with pytest.raises(SettingsError, match="give COLUMN=RULE"):
        deltacache.extract_features(
            made["videos"],
            tmp_path / "x",
            side_arrays=made["side.csv"],
            side_rule=["action=cubic"],
            **settings,
        )
    plain = deltacache.extract_features(made["videos"], tmp_path / "plain", **settings)
    with_them = open_dataset(made["webdataset"])
    assert "side_arrays" not in json.loads((tmp_path / "plain/dataset.json").read_text())
    assert plain.card.features_fingerprint == with_them.card.features_fingerprint
    np.testing.assert_array_equal(plain.read_all(), with_them.read_all())
