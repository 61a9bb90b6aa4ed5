"""The drawn world: one past, two futures, the same bytes every time."""

import csv
import io
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from deltacache.demo.world import (
    CONTEXT_FRAMES,
    FRAMES,
    FRAMES_PER_SECOND,
    DrawnScene,
    Outcome,
    draw_scene,
    draw_video,
    draw_world,
    encode_mp4,
)
from deltacache.schemas.errors import DatasetError, DeltacacheError

SIZE = 64


def _scene(seed: int = 0) -> DrawnScene:
    return draw_scene(np.random.default_rng(seed))


def _decode(video: bytes) -> tuple[np.ndarray, list[float]]:
    with av.open(io.BytesIO(video)) as container:
        decoded = list(container.decode(video=0))
    return np.stack([frame.to_ndarray(format="rgb24") for frame in decoded]), [
        frame.time or 0.0 for frame in decoded
    ]


def _files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("size", [64, 96])
def test_futures_share_the_context_and_nothing_after_it(size: int) -> None:
    left, right = draw_video(_scene(), "left", size), draw_video(_scene(), "right", size)
    assert left.shape == (FRAMES, size, size, 3)
    np.testing.assert_array_equal(left[:CONTEXT_FRAMES], right[:CONTEXT_FRAMES])
    changed = (left != right).any(axis=-1).mean(axis=(1, 2))
    assert (changed[CONTEXT_FRAMES:] > 0.02).all()


@pytest.mark.parametrize(("outcome", "side"), [("left", -1), ("right", 1)])
def test_the_shape_drives_up_and_then_turns(outcome: Outcome, side: int) -> None:
    scene = _scene(3)
    x, y = np.array([scene.position(frame, outcome) for frame in range(FRAMES)]).T
    steps_x, steps_y = np.diff(x), np.diff(y)
    np.testing.assert_allclose(steps_y[: CONTEXT_FRAMES - 1], -scene.speed)
    np.testing.assert_allclose(steps_x[: CONTEXT_FRAMES - 1], 0, atol=1e-12)
    np.testing.assert_allclose(steps_x[CONTEXT_FRAMES - 1 :], side * scene.speed)
    np.testing.assert_allclose(steps_y[CONTEXT_FRAMES - 1 :], 0, atol=1e-12)


@pytest.mark.parametrize("kind", ["disc", "square", "diamond"])
def test_the_shape_is_drawn_where_it_is_said_to_be(kind: str) -> None:
    scene = replace(_scene(5), kind=kind)
    frames = draw_video(scene, "right", SIZE)
    scenery = np.median(frames, axis=0)
    for frame in (0, 2, 3, 5):
        moved = np.abs(frames[frame] - scenery).sum(axis=-1) > 120
        rows, columns = np.nonzero(moved)
        centre = (np.array([columns.mean(), rows.mean()]) + 0.5) / SIZE
        np.testing.assert_allclose(centre, scene.position(frame, "right"), atol=0.035)


def test_coded_futures_share_the_context_exactly() -> None:
    drawn = {outcome: draw_video(_scene(1), outcome, SIZE) for outcome in ("left", "right")}
    left, times = _decode(encode_mp4(drawn["left"]))
    right, _ = _decode(encode_mp4(drawn["right"]))
    np.testing.assert_array_equal(left[:CONTEXT_FRAMES], right[:CONTEXT_FRAMES])
    assert (left[CONTEXT_FRAMES:] != right[CONTEXT_FRAMES:]).any(axis=(1, 2, 3)).all()
    np.testing.assert_allclose(times, np.arange(FRAMES) / FRAMES_PER_SECOND)
    assert np.abs(left.astype(int) - drawn["left"]).mean() < 5


def test_scenes_vary_and_do_not_tell_the_outcome() -> None:
    scenes = [_scene(seed) for seed in range(60)]
    assert len({scene.palette for scene in scenes}) == 6
    assert len({scene.kind for scene in scenes}) == 3
    assert len({scene.speed for scene in scenes}) == 60


def test_world_on_disk(tmp_path: Path) -> None:
    world = draw_world(tmp_path, seed=7, train_videos=5, test_scenes=2, image_size=SIZE)
    assert sorted(path.name for path in world.train.iterdir()) == [f"train-{i:04d}.mp4" for i in range(5)]
    with world.futures_csv.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["scene"], row["outcome"]) for row in rows} == {
        (scene, outcome) for scene in ("scene-000", "scene-001") for outcome in ("left", "right")
    }
    assert {row["video_uri"] for row in rows} == {path.name for path in world.test.iterdir()}
    for row in rows:
        frames, _ = _decode((world.test / row["video_uri"]).read_bytes())
        expected = draw_video(_test_scene(7, row["scene"]), row["outcome"], SIZE)
        assert np.abs(frames.astype(int) - expected).mean() < 5


def _test_scene(seed: int, name: str) -> DrawnScene:
    return draw_scene(np.random.default_rng((seed, 1, int(name.removeprefix("scene-")))))


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        draw_world(tmp_path / name, seed=seed, train_videos=3, test_scenes=1, image_size=SIZE)
    first = _files(tmp_path / "a")
    assert first == _files(tmp_path / "b")
    assert all(first[name] != content for name, content in _files(tmp_path / "c").items() if "mp4" in name)
    draw_world(tmp_path / "a", seed=0, train_videos=3, test_scenes=1, image_size=SIZE)
    assert first == _files(tmp_path / "a")


def test_more_training_videos_keep_those_that_were_there(tmp_path: Path) -> None:
    draw_world(tmp_path, seed=0, train_videos=2, test_scenes=1, image_size=SIZE)
    before = _files(tmp_path)
    draw_world(tmp_path, seed=0, train_videos=4, test_scenes=1, image_size=SIZE)
    after = _files(tmp_path)
    assert before.items() <= after.items()
    assert len(after) == len(before) + 2


@pytest.mark.parametrize(("odds", "fewest", "most"), [(0.5, 12, 28), (0.8, 26, 38), (1.0, 40, 40)])
def test_training_videos_turn_left_by_the_odds(tmp_path: Path, odds: float, fewest: int, most: int) -> None:
    world = draw_world(tmp_path, seed=0, train_videos=40, test_scenes=1, image_size=32, odds=odds)
    lefts = 0
    for path in world.train.iterdir():
        frames, _ = _decode(path.read_bytes())
        change = np.abs(frames[5].astype(int) - frames[3]).sum(axis=-1)[:20].sum(axis=0)
        lefts += int(change[:10].sum() > change[22:].sum())
    assert fewest <= lefts <= most
    with world.futures_csv.open(newline="") as file:
        chances = {row["outcome"]: float(row["probability"]) for row in csv.DictReader(file)}
    assert chances == pytest.approx({"left": odds, "right": 1 - odds})


def test_other_odds_change_the_outcomes_and_not_the_scenes(tmp_path: Path) -> None:
    for odds in (0.5, 0.8):
        draw_world(tmp_path / f"{odds}", seed=0, train_videos=12, test_scenes=1, image_size=32, odds=odds)
    even, other = (_files(tmp_path / f"{odds}" / "videos") for odds in (0.5, 0.8))
    assert all(even[name] == other[name] for name in even if name.startswith("test"))
    assert 0 < sum(even[name] != other[name] for name in even) < 12
    for name in (each for each in even if each.startswith("train")):
        first, second = (_decode(each[name])[0][:CONTEXT_FRAMES] for each in (even, other))
        np.testing.assert_array_equal(first, second)
    with pytest.raises(DeltacacheError, match=r"odds 1\.5 are not a probability"):
        draw_world(tmp_path, seed=0, train_videos=1, test_scenes=1, image_size=32, odds=1.5)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"image_size": 33}, "image size 33 cannot be drawn: give an even number from 32 up"),
        ({"image_size": 16}, "image size 16 cannot be drawn"),
        ({"train_videos": 0}, "0 training videos and 1 test scenes: give at least one of each"),
    ],
)
def test_sizes_that_cannot_be_drawn_are_refused(tmp_path: Path, sizes: dict[str, int], message: str) -> None:
    arguments = {"train_videos": 1, "test_scenes": 1, "image_size": 64} | sizes
    with pytest.raises(DeltacacheError, match=message):
        draw_world(tmp_path, seed=0, **arguments)
    assert not _files(tmp_path)


def test_videos_of_somebody_else_are_not_mixed_in(tmp_path: Path) -> None:
    draw_world(tmp_path, seed=0, train_videos=2, test_scenes=1, image_size=SIZE)
    before = _files(tmp_path)
    with pytest.raises(
        DatasetError, match=r"holds 1 file that are not part of this world, such as train-0001"
    ):
        draw_world(tmp_path, seed=0, train_videos=1, test_scenes=1, image_size=SIZE)
    assert before == _files(tmp_path)
