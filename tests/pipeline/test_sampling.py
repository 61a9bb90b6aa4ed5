"""Sampling against the golden cases, and what its randomness may and may not depend on."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltacache.pipeline.decoding.sampling import (
    clip_indices,
    draw_view,
    largest_crop,
    middle_clip_indices,
    random_crop,
    van_der_corput,
)
from deltacache.schemas.datasets import SamplingSettings
from deltacache.schemas.errors import FailureReason, VideoRefusedError

AT_25_FPS = (np.arange(100) / 25).astype(np.float32)


def test_clip_indices_equal_the_released_code(golden: Path) -> None:
    cases = json.loads((golden / "sampling.json").read_text())["clip_sampling"]
    for case in cases:
        indices = clip_indices(
            case["timestamps"], spacings_s=case["deltas"], start_fraction=case["start_fraction"]
        )
        assert indices == case["indices"]


def test_middle_clips_equal_the_released_code(golden: Path) -> None:
    for case in json.loads((golden / "sampling.json").read_text())["middle_clip"]:
        indices = middle_clip_indices(
            frame_count=case["frames"],
            fps=case["fps"],
            num_frames=case["num_frames"],
            stride_s=case["stride_s"],
        )
        assert indices == case["indices"]


def test_a_middle_clip_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="7 frames 5 apart do not fit around the middle of 20 frames"):
        middle_clip_indices(frame_count=20, fps=25, num_frames=7, stride_s=0.2)


@given(
    gaps=st.lists(st.floats(0, 1), min_size=0, max_size=30),
    spacings=st.lists(st.floats(0.01, 0.5), min_size=1, max_size=8),
    fraction=st.floats(0, 1),
)
def test_every_index_is_the_nearest_frame(gaps: list[float], spacings: list[float], fraction: float) -> None:
    times = np.concatenate([[0.0], np.cumsum(gaps)])
    indices = clip_indices(times, spacings_s=spacings, start_fraction=fraction)
    room = max(0.0, times[-1] - sum(spacings))
    wanted = fraction * room + np.concatenate([[0.0], np.cumsum(spacings)])
    for index, time in zip(indices, wanted, strict=True):
        assert abs(times[index] - time) == pytest.approx(np.abs(times - time).min())
    assert indices == sorted(indices)


def test_a_view_depends_on_seed_video_and_view_only() -> None:
    settings = SamplingSettings()
    first = draw_view("a", 0, AT_25_FPS, 240, 320, settings)
    again = draw_view("a", 0, AT_25_FPS, 240, 320, settings)
    assert (first.frame_indices, first.crop, first.flip) == (again.frame_indices, again.crop, again.flip)
    others = [
        draw_view("b", 0, AT_25_FPS, 240, 320, settings),
        draw_view("a", 1, AT_25_FPS, 240, 320, settings),
        draw_view("a", 0, AT_25_FPS, 240, 320, settings.model_copy(update={"seed": 1})),
    ]
    assert all(other.frame_indices != first.frame_indices for other in others)


def test_a_drawn_view_never_changes() -> None:
    """Datasets on disk were drawn with these numbers: a change here makes them disagree with new views."""
    sample = draw_view("a", 0, AT_25_FPS, 240, 320, SamplingSettings())
    assert sample.frame_indices == (12, 17, 22, 24, 32, 37, 45, 47)
    crop = sample.crop
    assert (crop.top, crop.left, crop.height, crop.width, sample.flip) == (11, 51, 213, 260, False)


def test_timestamps_are_real_and_relative_to_the_first_frame() -> None:
    times = np.array([5.0, 5.1, 5.5, 5.6, 6.4, 7.5], dtype=np.float32)
    sample = draw_view("a", 0, times, 64, 64, SamplingSettings(frames=4))
    assert sample.timestamps_s.dtype == np.float32
    np.testing.assert_array_equal(sample.timestamps_s, times[list(sample.frame_indices)] - times[0])


def test_without_augmentation_views_are_centred_and_spread_over_the_video() -> None:
    settings = SamplingSettings(frames=2, spacing_min_s=0.1, spacing_max_s=0.2, augment=False)
    views = [draw_view("a", view, AT_25_FPS, 240, 320, settings) for view in range(4)]
    starts = [view.frame_indices[0] for view in views]
    room = 3.96 - 0.15
    assert starts == [round(room * fraction * 25) for fraction in (0.5, 0.25, 0.75, 0.125)]
    assert all(view.frame_indices[1] - view.frame_indices[0] in (3, 4) for view in views)
    crop = views[0].crop
    assert (crop.top, crop.left, crop.height, crop.width) == (0, 40, 240, 240)
    assert not any(view.flip for view in views)


def test_van_der_corput() -> None:
    assert [van_der_corput(n) for n in range(1, 8)] == [0.5, 0.25, 0.75, 0.125, 0.625, 0.375, 0.875]


@pytest.mark.parametrize(("times", "repeats"), [(AT_25_FPS[:9], 6), (np.arange(40) / 5, 4), ([0.0], 7)])
def test_repeated_frames_are_counted_or_refused(times: np.ndarray, repeats: int) -> None:
    times = np.asarray(times, dtype=np.float32)
    settings = SamplingSettings(augment=False, spacing_min_s=0.1, spacing_max_s=0.1)
    if repeats == 6:
        settings = settings.model_copy(update={"spacing_min_s": 0.3, "spacing_max_s": 0.3})
    assert draw_view("a", 0, times, 64, 64, settings).duplicate_frames == repeats
    with pytest.raises(VideoRefusedError, match="allow duplicates") as refused:
        draw_view("a", 0, times, 64, 64, settings.model_copy(update={"allow_duplicates": False}))
    assert refused.value.reason is FailureReason.TOO_SHORT


def test_a_clip_that_fits_is_not_refused() -> None:
    settings = SamplingSettings(allow_duplicates=False)
    assert draw_view("a", 0, AT_25_FPS, 64, 64, settings).duplicate_frames == 0


@given(height=st.integers(1, 300), width=st.integers(1, 300), seed=st.integers(0, 1000))
def test_random_crops_stay_inside(height: int, width: int, seed: int) -> None:
    crop = random_crop(height, width, (0.6, 1.0), (3 / 4, 4 / 3), np.random.default_rng(seed))
    assert crop.top + crop.height <= height
    assert crop.left + crop.width <= width


def test_random_crops_fill_the_asked_ranges_of_area_and_aspect() -> None:
    rng = np.random.default_rng(0)
    crops = [random_crop(240, 320, (0.6, 1.0), (3 / 4, 4 / 3), rng) for _ in range(2000)]
    areas = np.array([crop.height * crop.width / (240 * 320) for crop in crops])
    aspects = np.array([crop.width / crop.height for crop in crops])
    assert 0.59 < areas.min() < 0.62
    assert 0.97 < areas.max() <= 1.0
    assert 0.8 < aspects.min() < 1.0
    assert 1.3 < aspects.max() < 1.345
    assert max(crop.top for crop in crops) > 20
    assert min(crop.top for crop in crops) == 0


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(100, 1000, (0, 433, 100, 133)), (1000, 100, (433, 0, 133, 100))],
)
def test_no_fitting_crop_falls_back_to_the_centre(
    height: int, width: int, expected: tuple[int, int, int, int]
) -> None:
    crop = random_crop(height, width, (0.6, 1.0), (3 / 4, 4 / 3), np.random.default_rng(0))
    assert (crop.top, crop.left, crop.height, crop.width) == expected


def test_central_square() -> None:
    crop = largest_crop(101, 64, (1, 1))
    assert (crop.top, crop.left, crop.height, crop.width) == (18, 0, 64, 64)
