"""LeRobot datasets as sources: exact frames of episodes that share an MP4, their rows, cameras, changes, stores."""

import copy
import json
import os
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot_maker import CAMERA, draw_lerobot, task_of, write_frames
from upath import UPath
from video_maker import read_number

import deltacache
from deltacache.descriptions import describe_output
from deltacache.pipeline.datasets.dataset import open_dataset
from deltacache.pipeline.datasets.verification import verify_dataset
from deltacache.pipeline.decoding.decode import frame_sources
from deltacache.pipeline.decoding.native_log import native_log
from deltacache.pipeline.decoding.pixels import clip_pixels
from deltacache.pipeline.decoding.probe import probe_video
from deltacache.pipeline.inputs.fetching import fetched
from deltacache.pipeline.inputs.lerobot import LeRobotRows
from deltacache.pipeline.inputs.sources import find_videos
from deltacache.schemas.errors import DatasetError, DeltacacheError, SettingsError, VideoRefusedError
from hub_server import hub_server, use_hub

LENGTHS = (12, 9, 15, 11)
STARTS = (0, 12, 21, 36)
SETTINGS = {
    "backbone": "tiny",
    "image_size": 64,
    "frames": 4,
    "spacing": (0.1, 0.2),
    "augment": False,
    "encoders": 0,
    "videos_per_shard": 2,
}


def in_sequence(path: str) -> list[np.ndarray]:
    """All frames of a file, as a plain loop decodes them."""
    with av.open(path) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("libx264", {"g": "2", "bf": "0"}),
        ("libx264", {"g": "7", "bf": "2"}),
        ("libx264", {"g": "250", "bf": "3", "sc_threshold": "0"}),
        ("libsvtav1", {"g": "2", "crf": "30"}),
        ("mpeg4", {"g": "5"}),
        ("libx264", {"x264-params": "open-gop=1:keyint=6:min-keyint=6:bframes=2:scenecut=0"}),
    ],
)
def test_frames_of_episodes_are_those_of_decoding_the_mp4_in_sequence(
    codec: str, options: dict[str, str], tmp_path: Path
) -> None:
    root = draw_lerobot(tmp_path / "robot", "v3.0", LENGTHS, codec=codec, options=options)
    expected = in_sequence(str(root / f"videos/{CAMERA}/chunk-000/file-000.mp4"))
    videos = find_videos(str(root), None)
    assert [video.video_uri for video in videos] == [f"{CAMERA}/episode_{n:06d}" for n in range(4)]
    ways = 0
    for video, start, length in zip(videos, STARTS, LENGTHS, strict=True):
        with fetched(video.path, tmp_path) as file, native_log() as log:
            for source in frame_sources(file.path, log, span=file.span):
                np.testing.assert_allclose(source.timestamps_s, np.arange(length) / 10, atol=1e-5)
                for wanted in (list(range(length)), [length - 1], [2, 5]):
                    got = {frame.index: frame.rgb for frame in source.frames(wanted)}
                    assert list(got) == wanted
                    for index, rgb in got.items():
                        np.testing.assert_array_equal(rgb, expected[start + index])
                        assert read_number(rgb) == start + index
                ways += 1
            probe = probe_video(file.path, file.span)
            assert probe.index is not None
            if options.get("g") in ("2", "7"):  # only what lies around it is read
                assert probe.frames < length + 16
                assert (probe.begins_s > 0) == (start > 0)
    assert ways == 2 * len(videos)


def test_a_span_without_a_frame_is_refused(tmp_path: Path) -> None:
    write_frames(tmp_path / "a.mp4", range(10), 10, 64)
    with native_log() as log, pytest.raises(VideoRefusedError, match="no frame of its file lies between"):
        next(frame_sources(str(tmp_path / "a.mp4"), log, span=(5.0, 6.0)))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A v2.1 and a v3 dataset of the same episodes, and what the chain makes of them."""
    root = tmp_path_factory.mktemp("lerobot")
    draw_lerobot(root / "v2", "v2.1", LENGTHS)
    draw_lerobot(root / "v3", "v3.0", LENGTHS, files=((0, 1, 2), (3,)))
    for name in ("v2", "v3"):
        deltacache.extract_features(root / name, root / f"{name}-features", **SETTINGS)
    tokenizer = deltacache.train_tokenizer(
        root / "v3-features",
        root / "tokenizer",
        preset="tiny",
        steps=1,
        assignments=["training.batch_size=2"],
    )
    deltacache.tokenize(root / "v3-features", root / "deltas", tokenizer, encoders=0)
    deltacache.tokenize(
        root / "v3",
        root / "direct",
        tokenizer,
        frames=4,
        augment=False,
        encoders=0,
        spacing=(0.1, 0.2),
    )
    return {name: root / name for name in ("v2", "v3", "v2-features", "v3-features", "deltas", "direct")}


def numbers_of(dataset: deltacache.Dataset) -> np.ndarray:
    """(clips, T): the numbers that the frames of every clip show."""
    shown = dict(clip_pixels(dataset, dataset.clip_ids))
    return np.array([[read_number(frame) for frame in shown[clip]] for clip in dataset.clip_ids])


@pytest.mark.parametrize("name", ["v2-features", "v3-features"])
def test_actions_states_and_tasks_are_those_of_the_frames(made: dict[str, Path], name: str) -> None:
    dataset = open_dataset(made[name])
    numbers = numbers_of(dataset)
    assert sorted(np.searchsorted(STARTS, numbers[:, 0], side="right") - 1) == [0, 1, 2, 3]
    for clip, uri in enumerate(dataset.column("video_uri").to_pylist()):
        episode = int(uri.rpartition("_")[2])
        assert (numbers[clip] >= STARTS[episode]).all()
        assert (numbers[clip] < STARTS[episode] + LENGTHS[episode]).all()
        assert dataset.side_array("task")[clip] == [task_of(episode)] * 4
        own = dataset.column("frame_indices")[clip].as_py()
        np.testing.assert_array_equal(numbers[clip], STARTS[episode] + np.array(own))
    np.testing.assert_array_equal(dataset.side_array("action"), np.stack([numbers, -numbers], -1))
    np.testing.assert_array_equal(dataset.side_array("state"), numbers / 2)
    assert verify_dataset(made[name]) == []
    assert "action: 2 numbers a frame, nearest" in describe_output(made[name])


def test_both_versions_give_the_same_and_deltas_carry_it(made: dict[str, Path]) -> None:
    two, three = open_dataset(made["v2-features"]), open_dataset(made["v3-features"])
    assert two.clip_ids == three.clip_ids
    assert two.card.fingerprint == three.card.fingerprint
    np.testing.assert_array_equal(two.side_array("action"), three.side_array("action"))
    assert two.column("frame_indices") == three.column("frame_indices")
    for name in ("deltas", "direct"):
        deltas = open_dataset(made[name])
        np.testing.assert_array_equal(deltas.side_array("action"), three.side_array("action"))
        assert deltas.side_array("task") == three.side_array("task")
    batch = deltacache.ClipDataset(made["deltas"], columns=["action", "state", "task"])[0]
    np.testing.assert_array_equal(batch["action"].numpy(), three.side_array("action")[0])


def test_a_finished_dataset_is_not_made_again_and_what_changed_is_noticed(
    made: dict[str, Path], tmp_path: Path
) -> None:
    root = draw_lerobot(tmp_path / "robot", "v3.0", LENGTHS, files=((0, 1, 2), (3,)))
    out = tmp_path / "features"
    deltacache.extract_features(root, out, **SETTINGS)
    before = {path: path.read_bytes() for path in (out / "shards").iterdir()}
    data, video = root / "data/chunk-000/file-000.parquet", root / f"videos/{CAMERA}/chunk-000/file-001.mp4"
    for path in (data, video):  # touched or copied, not changed
        path.write_bytes(path.read_bytes())
    deltacache.extract_features(root, out, **SETTINGS)
    assert {path: path.read_bytes() for path in (out / "shards").iterdir()} == before
    write_frames(video, range(100, 111), 10, 64)
    with pytest.raises(
        DatasetError, match=r"1 video has changed .*: observation\.images\.top/episode_000003"
    ):
        deltacache.extract_features(root, out, **SETTINGS)
    deltacache.extract_features(root, out, changed_videos="recompute", **SETTINGS)
    assert numbers_of(open_dataset(out))[3].min() >= 100
    table = pq.read_table(data)
    action = pa.FixedSizeListArray.from_arrays(pc_double(table["action"]), 2)
    pq.write_table(table.set_column(0, table.schema.field(0), action), data)
    with pytest.raises(DatasetError, match="4 videos have changed"):
        deltacache.extract_features(root, out, **SETTINGS)
    deltacache.extract_features(root, out, changed_videos="recompute", **SETTINGS)
    dataset = open_dataset(out)
    np.testing.assert_array_equal(dataset.side_array("action")[:3, :, 0], 2 * numbers_of(dataset)[:3])
    episodes = root / "meta/episodes/chunk-000/file-000.parquet"
    about = pq.read_table(episodes).to_pylist()
    about[0]["length"] = 11
    pq.write_table(pa.Table.from_pylist(about), episodes)
    with pytest.raises(DatasetError, match=r"1 video has changed .*episode_000000"):
        deltacache.extract_features(root, out, **SETTINGS)


def pc_double(column: pa.ChunkedArray) -> pa.Array:
    """The numbers of lists, twice as large."""
    return pa.array(column.combine_chunks().flatten().to_numpy() * 2, pa.float32())


def test_a_camera_is_chosen_by_its_key(tmp_path: Path) -> None:
    cameras = ("observation.images.top", "observation.images.wrist")
    root = draw_lerobot(tmp_path / "robot", "v2.1", (5, 5), cameras=cameras)
    said = list[str]()
    with pytest.raises(
        SettingsError, match=r"2 cameras: give --camera observation\.images\.top or --camera obs"
    ):
        find_videos(str(root), None)
    with pytest.raises(SettingsError, match=r"--camera left: .* has observation\.images\.top, observation"):
        find_videos(str(root), None, cameras=["left"])
    for asked in ("wrist", cameras[1]):
        found = find_videos(str(root), None, cameras=[asked], tell=said.append)
        assert [video.video_uri for video in found] == [f"{cameras[1]}/episode_{n:06d}" for n in range(2)]
    assert said[0].endswith(
        "2 episodes of observation.images.wrist; not taken: observation.images.top (--camera NAME)"
    )
    assert len(find_videos(str(root), None, cameras=cameras)) == 4
    with pytest.raises(SettingsError, match="is not a LeRobot dataset"):
        find_videos(str(root / "videos"), None, cameras=["wrist"])
    with pytest.raises(DeltacacheError, match=r"holds LeRobot datasets .*: give one at a time"):
        find_videos(str(tmp_path), None)


def test_rules_and_own_side_arrays(made: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="has no column speed: it has action, state, task"):
        _ = LeRobotRows(str(made["v3"]), {"speed": "linear"}).arrays
    with pytest.raises(SettingsError, match=r"task of .* is text"):
        _ = LeRobotRows(str(made["v3"]), {"task": "linear"}).arrays
    rows = copy.copy(LeRobotRows(str(made["v3"]), {"action": "linear"}))  # as it is pickled to workers
    at = rows.at(f"{CAMERA}/episode_000001", np.array([0.0, 0.25], np.float32))
    np.testing.assert_allclose(at["action"][:, 0], [12, 14.5], atol=1e-4)
    assert at["task"] == [task_of(1)] * 2
    own = tmp_path / "own.csv"
    own.write_text(f"video_uri,time_s,speed\n{CAMERA}/episode_000002,0,7\n")
    features = deltacache.extract_features(made["v3"], tmp_path / "out", side_arrays=own, **SETTINGS)
    assert sorted(features.card.side_arrays) == ["speed"]
    with pytest.raises(SettingsError, match="give --side-arrays as well"):
        deltacache.extract_features(made["v3"] / "videos", tmp_path / "x", side_rule=["a=linear"], **SETTINGS)


def test_damaged_datasets_are_refused_in_words(tmp_path: Path) -> None:
    root = draw_lerobot(tmp_path / "robot", "v2.1", (5, 5))
    (root / "videos/chunk-000" / CAMERA / "episode_000001.mp4").unlink()
    with pytest.raises(DeltacacheError, match="unreadable 1"):
        deltacache.extract_features(root, tmp_path / "out", **SETTINGS)
    about = json.loads((root / "meta/info.json").read_text())

    def rewritten(**changes: object) -> str:
        (root / "meta/info.json").write_text(json.dumps(about | changes))
        return str(root)

    for changes, what in (
        ({"codebase_version": "v1.6"}, r"version 1\.6: v2\.0, v2\.1 and v3 are read"),
        ({"features": {}}, "has no camera with videos"),
        ({"fps": 0}, "fps is 0"),
        ({"video_path": "../{episode_index}.mp4"}, "is not a path below the dataset"),
        ({"video_path": "{nothing}.mp4"}, "is not what a LeRobot dataset holds"),
    ):
        with pytest.raises(DeltacacheError, match=what):
            find_videos(rewritten(**changes), None)
    rewritten()
    rows = LeRobotRows(str(root), {})
    (root / "data/chunk-000/episode_000000.parquet").write_bytes(b"no")
    with pytest.raises(DatasetError, match="cannot be read as rows of episode 0"):
        rows.at(f"{CAMERA}/episode_000000", np.zeros(1, np.float32))


def test_from_an_object_store_each_file_is_fetched_once(
    made: dict[str, Path], s3_root: UPath, tmp_path: Path
) -> None:
    for path in (path for path in made["v3"].rglob("*") if path.is_file()):
        (s3_root / path.relative_to(made["v3"]).as_posix()).write_bytes(path.read_bytes())
    videos = find_videos(str(s3_root), None)
    copies = set[tuple[str, int]]()
    for video in videos[:3]:
        with fetched(video.path, tmp_path) as file:
            copies.add((file.path, os.stat(file.path).st_ino))  # noqa: PTH116
            assert file.version == video.version
    assert len(copies) == 1
    features = deltacache.extract_features(str(s3_root), tmp_path / "out", **SETTINGS)
    local = open_dataset(made["v3-features"])
    assert features.card.fingerprint == local.card.fingerprint
    np.testing.assert_array_equal(features.read_all(), local.read_all())
    np.testing.assert_array_equal(features.side_array("action"), local.side_array("action"))


def test_from_the_hub_by_name(made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub_server() as hub:
        use_hub(hub, tmp_path / "cache", monkeypatch)
        monkeypatch.chdir(tmp_path)
        commit = hub.put_folder("lab/robot", made["v3"], kind="datasets")
        features = deltacache.extract_features("lab/robot", "out", **SETTINGS)
    assert features.card.sources == {"videos": f"hf://datasets/lab/robot@{commit}"}
    np.testing.assert_array_equal(features.read_all(), open_dataset(made["v3-features"]).read_all())
