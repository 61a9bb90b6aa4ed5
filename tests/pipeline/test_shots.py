"""Clips within shots: where they may start, what the detector finds, and the way through a dataset."""

import json
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest

import deltacache
from deltacache.descriptions import describe_output
from deltacache.pipeline.decoding import shots as shots_module
from deltacache.pipeline.decoding.decode import frame_sources
from deltacache.pipeline.decoding.native_log import native_log
from deltacache.pipeline.decoding.sampling import draw_view, indices_within_shots
from deltacache.pipeline.decoding.shots import shots_of
from deltacache.schemas.datasets import SamplingSettings
from deltacache.schemas.errors import MismatchError, SettingsError, VideoRefusedError

BOUNDS = (0, 30, 75, 100)
COLOURS = ((200, 40, 40), (40, 40, 200), (230, 230, 60))


def write_shots(path: Path) -> Path:
    """100 frames at 25 a second: three shots, each a plain colour that gets a little brighter."""
    path.parent.mkdir(exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"g": "12"})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for number in range(BOUNDS[-1]):
            shot = np.searchsorted(BOUNDS, number, side="right") - 1
            picture = np.empty((64, 64, 3), np.uint8)
            picture[:] = np.array(COLOURS[shot]) + number % 10
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def test_the_cuts_of_a_video_are_found(tmp_path: Path) -> None:
    path = write_shots(tmp_path / "a.mp4")
    with native_log() as log:
        found = shots_of(next(frame_sources(str(path), log)))
    assert found == [range(0, 30), range(30, 75), range(75, 100)]


def test_starts_are_spread_evenly_over_the_shots_that_are_long_enough() -> None:
    """Against the obvious way: all starts in steps of a frame, one after the other."""
    times = np.arange(100) / 25
    shots = [range(*pair) for pair in pairwise(BOUNDS)]
    spacings = [0.4, 0.4, 0.4]  # 30 frames: the last shot is too short, the first has no room
    starts = [
        indices_within_shots(times, shots, spacings_s=spacings, start_fraction=fraction)
        for fraction in np.linspace(0, 1, 1000)
    ]
    for indices in starts:
        assert any(indices[0] >= shot.start and indices[-1] < shot.stop for shot in shots)
        assert np.allclose(np.diff(times[indices]), 0.4)
    rooms = [max(0, (len(shot) - 1) - 30) for shot in shots]
    assert rooms == [0, 14, 0]
    spacings = [0.2, 0.2]  # 10 frames: rooms of 19, 34 and 14
    firsts = [
        indices_within_shots(times, shots, spacings_s=spacings, start_fraction=fraction)[0]
        for fraction in np.linspace(0, 1, 5000)
    ]
    counts = [sum(first in shot for first in firsts) / 5000 for shot in shots]
    np.testing.assert_allclose(counts, np.array([19, 34, 14]) / 67, atol=0.01)
    assert firsts == sorted(firsts)
    too_long = indices_within_shots(times, shots, spacings_s=[1.0, 1.0], start_fraction=0.7)
    assert too_long == [30, 55, 74]  # the longest shot, whose last frame stands in


def test_a_single_shot_is_the_whole_video() -> None:
    times = (np.arange(100) / 25).astype(np.float32)
    for augment in (True, False):
        settings = SamplingSettings(augment=augment)
        for view in range(20):
            plain = draw_view("v", view, times, 64, 64, settings)
            within = draw_view("v", view, times, 64, 64, settings, shots=[range(100)])
            assert plain.frame_indices == within.frame_indices
            assert (plain.crop, plain.flip) == (within.crop, within.flip)


def test_without_duplicates_too_short_shots_are_refused() -> None:
    times = (np.arange(100) / 25).astype(np.float32)
    settings = SamplingSettings(
        frames=4, spacing_min_s=1, spacing_max_s=1, augment=False, allow_duplicates=False
    )
    draw_view("v", 0, times, 64, 64, settings)
    with pytest.raises(VideoRefusedError, match=r"span of 3\.000 s does not fit into 1\.960 s"):
        draw_view("v", 0, times, 64, 64, settings, shots=[range(50), range(50, 100)])


def test_clips_of_a_dataset_lie_within_shots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shots(tmp_path / "videos" / "a.mp4")
    settings = {"backbone": "tiny", "image_size": 64, "frames": 4, "views": 24, "encoders": 0}
    plain = deltacache.extract_features(tmp_path / "videos", tmp_path / "plain", **settings)
    within = deltacache.extract_features(tmp_path / "videos", tmp_path / "within", shots=True, **settings)

    def crossing(dataset: deltacache.Dataset) -> int:
        indices = np.array(dataset.column("frame_indices").to_pylist())
        shot = np.searchsorted(BOUNDS, indices, side="right")
        return int((shot[:, 0] != shot[:, -1]).sum())

    assert crossing(plain) > 0
    assert crossing(within) == 0
    assert json.loads((tmp_path / "within/dataset.json").read_text())["sampling"]["shots"] is True
    assert "shots" not in json.loads((tmp_path / "plain/dataset.json").read_text())["sampling"]
    assert "within shots" in describe_output(tmp_path / "within")
    with pytest.raises(MismatchError, match="shots"):
        deltacache.extract_features(tmp_path / "videos", tmp_path / "plain", shots=True, **settings)
    monkeypatch.setattr(shots_module, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"pip install 'deltacache\[shots\]'"):
        deltacache.extract_features(tmp_path / "videos", tmp_path / "other", shots=True, **settings)
