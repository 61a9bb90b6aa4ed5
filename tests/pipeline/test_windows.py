"""All clips of a video: which frames they have, and that these are encoded and stored once, from shards to batches."""

import gc
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from lerobot_maker import CAMERA, draw_lerobot
from test_shots import BOUNDS, write_shots
from video_maker import read_number, write_video

import deltacache
from deltacache.descriptions import describe_output
from deltacache.pipeline.datasets.dataset import open_dataset
from deltacache.pipeline.datasets.receipts import read_receipt
from deltacache.pipeline.datasets.verification import repair_dataset, verify_dataset
from deltacache.pipeline.decoding.pixels import clip_pixels
from deltacache.pipeline.decoding.sampling import draw_view, draw_windows
from deltacache.schemas.datasets import SamplingSettings
from deltacache.schemas.errors import DatasetError, SettingsError, VideoRefusedError

LENGTHS = (12, 9, 15)
STARTS = (0, 12, 21)
WINDOWS = {"windows": "all", "stride": 2, "augment": False, "spacing": (0.1, 0.1)}
SETTINGS = {"backbone": "tiny", "image_size": 64, "frames": 4, "encoders": 0, "videos_per_shard": 2}


@pytest.mark.parametrize("stride", [1, 3, 4, 6])
@pytest.mark.parametrize("cuts", [None, (0, 11, 13, 40)])
def test_windows_are_those_of_the_obvious_way(stride: int, cuts: tuple[int, ...] | None) -> None:
    """Each clip by itself, on the grid of its shot."""
    rng = np.random.default_rng(stride)
    times = np.concatenate([[0], np.cumsum(rng.uniform(0.02, 0.08, 39))]).astype(np.float32)
    shots = None if cuts is None else [range(*cuts[at : at + 2]) for at in range(3)]
    settings = SamplingSettings(
        frames=4, spacing_min_s=0.1, spacing_max_s=0.1, augment=False, windows="all", stride=stride
    )
    expected = list[tuple[int, ...]]()
    for shot in shots or [range(40)]:
        own = times[shot.start : shot.stop].astype(np.float64) - times[shot.start]
        start = 0
        while (start + 3) * 0.1 <= own[-1]:
            wanted = [(start + t) * 0.1 for t in range(4)]
            expected.append(tuple(shot.start + int(np.abs(own - each).argmin()) for each in wanted))
            start += stride
    indices, begins = draw_windows(times, settings, shots)
    assert [tuple(indices[begin : begin + 4]) for begin in begins] == expected
    fewest = {frame for window in expected for frame in window}
    assert set(indices) == fewest
    if stride < 4 and cuts is None:
        assert len(indices) == begins[-1] + 4 == stride * (len(begins) - 1) + 4
    for view, own in enumerate(expected):
        assert draw_view("v", view, times, 64, 64, settings, shots=shots).frame_indices == own


def test_settings_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    write_video(tmp_path / "videos.mp4", frames=10)
    for changes, what in (
        ({"augment": True}, "give --no-augment as well"),
        ({"spacing": (0.1, 0.2)}, "give one time twice"),
        ({"views": 2}, "leave --views 2 out"),
        ({"store": "zarr"}, "WebDataset shards only"),
        ({"windows": None}, "give --windows all as well"),
    ):
        with pytest.raises(SettingsError, match=what):
            deltacache.extract_features(tmp_path, tmp_path / "out", **SETTINGS, **{**WINDOWS, **changes})
    with pytest.raises(VideoRefusedError, match=r"no clip of 4 frames 0\.1 s apart fits into 0\.200 s"):
        draw_windows(
            np.array([0, 0.1, 0.2]),
            SamplingSettings(frames=4, spacing_min_s=0.1, spacing_max_s=0.1, augment=False, windows="all"),
        )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Windows of episodes that share an MP4, float16 and int8, and what the chain makes of them."""
    root = tmp_path_factory.mktemp("windows")
    draw_lerobot(root / "robot", "v3.0", LENGTHS)
    for dtype in ("float16", "int8"):
        deltacache.extract_features(root / "robot", root / dtype, dtype=dtype, **SETTINGS, **WINDOWS)
    tokenizer = deltacache.train_tokenizer(
        root / "float16", root / "tokenizer", preset="tiny", steps=1, assignments=["training.batch_size=2"]
    )
    deltacache.tokenize(root / "float16", root / "deltas", tokenizer, encoders=0)
    with pytest.raises(SettingsError, match="Run extract-features with it, then tokenize its output"):
        deltacache.tokenize(root / "robot", root / "direct", tokenizer, frames=4, **WINDOWS)
    return {name: root / name for name in ("robot", "float16", "int8", "deltas", "tokenizer")}


def expected_numbers() -> np.ndarray:
    """(clips, T): what the frames of every clip show."""
    return np.array(
        [
            range(start + begin, start + begin + 4)
            for start, length in zip(STARTS, LENGTHS, strict=True)
            for begin in range(0, length - 3, 2)
        ]
    )


@pytest.mark.parametrize("name", ["float16", "int8", "deltas"])
def test_every_clip_has_its_frames_actions_and_times(made: dict[str, Path], name: str) -> None:
    dataset, expected = open_dataset(made[name]), expected_numbers()
    assert len(dataset) == len(expected) == 5 + 3 + 6
    np.testing.assert_array_equal(dataset.side_array("action"), np.stack([expected, -expected], -1))
    own = np.array(dataset.column("frame_indices").to_pylist())
    starts = np.repeat(STARTS, [5, 3, 6])[:, None]
    np.testing.assert_array_equal(own, expected - starts)
    np.testing.assert_allclose(dataset.timestamps_s, own / 10, atol=1e-5)
    assert dataset.clip_ids[1].endswith("-v001")
    assert verify_dataset(made[name]) == []
    assert "all clips with stride 2" in describe_output(made[name])
    assert json.loads((made[name] / "dataset.json").read_text())["sampling"]["stride"] == 2


@pytest.mark.parametrize("name", ["float16", "int8"])
def test_tokens_are_those_of_the_pixels_and_stored_once(made: dict[str, Path], name: str) -> None:
    dataset = open_dataset(made[name])
    shown = dict(clip_pixels(dataset, dataset.clip_ids))
    numbers = np.array([[read_number(frame) for frame in shown[clip]] for clip in dataset.clip_ids])
    np.testing.assert_array_equal(numbers, expected_numbers())
    tokens = dataset.read_all()
    backbone = deltacache.load_backbone("tiny", device="cpu")
    import torch

    for clip in (0, 4, 9):
        pixels = torch.from_numpy(shown[dataset.clip_ids[clip]]).permute(0, 3, 1, 2)
        with torch.inference_mode():
            own = backbone.patch_tokens(pixels).numpy()
        np.testing.assert_allclose(tokens[clip].astype(np.float32), own, atol=0.05)
    frames = {}
    for clip, of_clip in zip(numbers.tolist(), tokens, strict=True):
        for number, frame in zip(clip, of_clip, strict=True):
            np.testing.assert_array_equal(frames.setdefault(number, frame), frame)
    assert len(frames) == 12 + 8 + 14  # an odd frame at the end is in no clip
    stored = list[int]()
    for path in (made[name] / "shards").glob("*.tar"):
        with tarfile.open(path) as tar:
            stored += [member.size for member in tar if member.name.endswith(".patch_tokens.npy")]
    header, width = 128, 2 if name == "float16" else 1
    assert sum(stored) == len(frames) * tokens[0, 0].size * width + 3 * header


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_plain_readers_find_whole_videos(made: dict[str, Path]) -> None:
    dataset = open_dataset(made["float16"])
    tars = sorted(map(str, (made["float16"] / "shards").glob("*.tar")))
    samples = list(wds.WebDataset(tars, shardshuffle=False, empty_check=False).decode())
    gc.collect()  # webdataset leaves its tars open
    assert [sample["json"]["video_uri"] for sample in samples] == [
        f"{CAMERA}/episode_{n:06d}" for n in range(3)
    ]
    clips = dict(zip(dataset.clip_ids, dataset.read_all(), strict=True))
    for sample, start, frames in zip(samples, STARTS, (12, 8, 14), strict=True):
        assert sample["patch_tokens.npy"].shape[0] == len(sample["timestamps_s.npy"]) == frames
        np.testing.assert_array_equal(sample["action.npy"][:, 0], start + np.arange(frames))
        assert len(sample["json"]["task"]) == frames
        for about in sample["json"]["clips"]:
            own = slice(about["begins"], about["begins"] + 4)
            np.testing.assert_array_equal(sample["patch_tokens.npy"][own], clips.pop(about["clip_id"]))
    assert not clips


def test_loaders_and_trainers_take_them(made: dict[str, Path], tmp_path: Path) -> None:
    dataset = open_dataset(made["float16"])
    tokens = dataset.read_all()
    clips = deltacache.ClipDataset(made["float16"], columns=["action", "view"])
    for clip in (0, 6, 13):
        np.testing.assert_array_equal(clips[clip]["tokens"].numpy(), tokens[clip])
    stream = deltacache.ClipStream(made["float16"], columns=["clip_id"], shuffle=False)
    assert [item["clip_id"] for item in stream] == dataset.clip_ids
    deltacache.train_world(
        made["deltas"], tmp_path / "world", preset="tiny", steps=1, assignments=["training.batch_size=2"]
    )


def test_damage_is_found_and_made_again(made: dict[str, Path], tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(made["float16"], root)
    first, *_ = sorted((root / "shards").glob("*.tar"))
    whole = first.read_bytes()
    with tarfile.open(first) as tar:
        members = {member.name.partition(".")[2]: member for member in tar.getmembers()}
    for name in ("patch_tokens.npy", "json", "action.npy", "timestamps_s.npy"):
        place = members[name].offset_data + members[name].size - 2
        first.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert any(problem.clip_id for problem in verify_dataset(root)), name
    first.write_bytes(whole[: members["patch_tokens.npy"].offset_data + 600])
    with pytest.raises(DatasetError, match="damaged"):
        open_dataset(root).read_all()
    repair_dataset(root)
    deltacache.extract_features(made["robot"], root, **SETTINGS, **WINDOWS)
    assert first.read_bytes() == whole
    assert verify_dataset(root) == []


def test_a_rerun_does_nothing_and_a_refused_video_joins_later(made: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(made["robot"], tmp_path / "robot")
    video = tmp_path / "robot" / f"videos/{CAMERA}/chunk-000/file-000.mp4"
    episodes = tmp_path / "robot" / "meta/episodes/chunk-000/file-000.parquet"
    assert episodes.exists()
    out = tmp_path / "out"
    shutil.copytree(made["float16"], out)
    before = {path.name: path.stat().st_mtime_ns for path in (out / "shards").iterdir()}
    deltacache.extract_features(made["robot"], out, **SETTINGS, **WINDOWS)
    assert {path.name: path.stat().st_mtime_ns for path in (out / "shards").iterdir()} == before
    content = video.read_bytes()
    video.unlink()
    fresh = tmp_path / "fresh"
    deltacache.extract_features(tmp_path / "robot", fresh, max_failed_fraction=1, **SETTINGS, **WINDOWS)
    assert len(open_dataset(fresh)) == 0
    video.write_bytes(content)
    deltacache.extract_features(tmp_path / "robot", fresh, retry_failed=True, **SETTINGS, **WINDOWS)
    assert verify_dataset(fresh) == []
    np.testing.assert_array_equal(open_dataset(fresh).read_all(), open_dataset(made["float16"]).read_all())
    shard = open_dataset(fresh).shard_ids[0]
    offsets = read_receipt(open_dataset(fresh).root, shard).token_offsets
    stride = read_receipt(open_dataset(fresh).root, shard).frame_stride
    assert np.diff(offsets[:5]).tolist() == [2 * stride] * 4


def test_windows_within_shots_share_frames_within_their_shot_alone(tmp_path: Path) -> None:
    write_shots(tmp_path / "videos" / "a.mp4")
    dataset = deltacache.extract_features(
        tmp_path / "videos", tmp_path / "out", shots=True, **SETTINGS, **{**WINDOWS, "spacing": (0.2, 0.2)}
    )
    indices = np.array(dataset.column("frame_indices").to_pylist())
    shot = np.searchsorted(BOUNDS, indices, side="right")
    assert (shot[:, 0] == shot[:, -1]).all()
    assert [int((shot[:, 0] == each).sum()) for each in (1, 2, 3)] == [2, 3, 1]
    assert verify_dataset(dataset.root) == []
    offsets = np.array(read_receipt(dataset.root, dataset.shard_ids[0]).token_offsets)
    stride = read_receipt(dataset.root, dataset.shard_ids[0]).frame_stride
    assert ((offsets - offsets[0]) // stride).tolist() == [0, 2, 6, 8, 10, 14]
    frames = {}
    for own, tokens in zip(indices.tolist(), dataset.read_all(), strict=True):
        for index, frame in zip(own, tokens, strict=True):
            np.testing.assert_array_equal(frames.setdefault(index, frame), frame)
