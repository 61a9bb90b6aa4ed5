"""Real clips: the frames are the right ones, however they are reached, and odd files end as they should.

The oracle is the slowest reader there is: PyAV from the first frame on, turned upright by hand.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from deltacache.pipeline.decoding.decode import VideoJob, decode_video, frame_sources
from deltacache.pipeline.decoding.native_log import native_log
from deltacache.schemas.clips import PixelClip
from deltacache.schemas.datasets import SamplingSettings
from deltacache.schemas.errors import FailureReason, VideoRefusedError

FIXTURE = [
    "asl_walk_fullrange.mkv",
    "bikes_scenecuts.mp4",
    "dog_720p.mp4",
    "driving_solidWhiteRight.mp4",
    "juggle_720p24.mp4",
    "kinetics_armwrestle_mmaction2.mp4",
    "kinetics_flipping_a_pancake.mkv",
    "makeup_mpeg4.avi",
    "making_cake_portrait.mp4",
    "rabbit_vp8.webm",
    "traffic_camera_720p.mp4",
    "yoga_568x320.mp4",
]
REFUSED = {
    "audio_only.mp4": FailureReason.NO_VIDEO_STREAM,
    "bitflips_mdat.mp4": FailureReason.CORRUPT_STREAM,
    "corrupted_13of50.mp4": FailureReason.CORRUPT_STREAM,
    "empty.mp4": FailureReason.EMPTY_FILE,
    "header_only_5544claimed.mp4": FailureReason.NO_FRAMES,
    "html_saved_as.mp4": FailureReason.NOT_A_VIDEO,
    "tiny_1x1_yuv444_5frames.mp4": FailureReason.TOO_SMALL,
    "truncated_moov_first.mp4": FailureReason.TRUNCATED,
}
ACCEPTED = {  # name: frames, (height, width), way
    "animated.gif": (30, (273, 314), "pyav-sequential"),
    "av1_640x360.mkv": (125, (360, 640), "pyav-sequential"),
    "editlist_discard_first_keyframe.mp4": (25, (64, 64), "pyav-sequential"),
    "hevc_10bit_bt2020.mp4": (60, (240, 320), "pyav-sequential"),
    "hevc_opengop_seekbug.mp4": (10, (128, 128), "pyav-sequential"),
    "lowfps_5fps_mpeg4.mp4": (40, (480, 640), "pyav-seek"),
    "multistream_2video_nasa.mp4": (390, (270, 480), "pyav-seek"),
    "oneframe_h264_320x240.mp4": (1, (240, 320), "decord-sequential"),
    "oneframe_real_720p.mp4": (1, (720, 1280), "decord-sequential"),
    "rot180_568x320.mov": (3, (320, 568), "pyav-sequential"),
    "rot90_568x320.mov": (3, (568, 320), "pyav-sequential"),
    "short_32frames_kinetics.mp4": (32, (256, 340), "pyav-sequential"),
    "start_8.33s.mp4": (12, (112, 200), "pyav-sequential"),
    "truncated_mkv.mkv": (140, (240, 426), "decord-sequential"),
    "vfr_traffic_camera.mp4": (576, (720, 1280), "pyav-seek"),
    "vp9_no_duration.webm": (74, (720, 1280), "pyav-sequential"),
    "vp9_odd_321x241.mp4": (25, (241, 321), "pyav-sequential"),
}
SHORT = [
    "lowfps_5fps_mpeg4.mp4",
    "oneframe_h264_320x240.mp4",
    "oneframe_real_720p.mp4",
    "short_32frames_kinetics.mp4",
]


def job_of(path: Path, *, views: int = 2, size: int = 64, **sampling: object) -> VideoJob:
    return VideoJob(str(path), path.name, path.stem.replace(".", "_"), 0, views, size, settings(**sampling))


def settings(**sampling: object) -> SamplingSettings:
    return SamplingSettings.model_validate(sampling)


def oracle(path: Path) -> Iterator[np.ndarray]:
    """Upright frames one after the other."""
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        assert stream is not None
        stream.codec_context.thread_count = 1
        for frame in container.decode(stream):
            assert isinstance(frame, av.VideoFrame)
            yield np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)


def frames_of(path: Path, wanted: Sequence[int]) -> dict[int, np.ndarray]:
    """The frames that the preferred way of decoding gives."""
    with native_log() as log:
        return {frame.index: frame.rgb for frame in next(frame_sources(str(path), log)).frames(wanted)}


def test_the_fixture_is_the_one_these_tests_name(real_videos: Path) -> None:
    """A file that is there and not named would go untested."""
    assert {file.name for file in (real_videos / "fixture").iterdir()} <= set(FIXTURE)
    assert {file.name for file in (real_videos / "odd").iterdir()} <= {*REFUSED, *ACCEPTED}


@pytest.mark.slow
@pytest.mark.parametrize("name", FIXTURE)
def test_frames_equal_the_recorded_ones_in_sequence_and_at_random(real_videos: Path, name: str) -> None:
    path = real_videos / "fixture" / name
    recorded = json.loads((real_videos / "fixture_frames.json").read_text())[name]
    expected = {int(index): md5 for index, md5 in recorded["md5_rgb24"].items()}
    with native_log() as log:
        source = next(frame_sources(str(path), log))
        assert len(source.timestamps_s) == recorded["frames"]
        assert [source.height, source.width, 3] == recorded["shape_hwc"]
        in_sequence = {
            frame.index: hashlib.md5(frame.rgb.tobytes()).hexdigest()
            for frame in source.frames(range(recorded["frames"]))
            if frame.index in expected
        }
        alone = {
            index: hashlib.md5(next(iter(source.frames([index]))).rgb.tobytes()).hexdigest()
            for index in reversed(expected)
        }
    assert in_sequence == expected
    assert alone == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", FIXTURE)
def test_every_ordinary_clip_is_decoded(real_videos: Path, name: str) -> None:
    clips = decode_video(job_of(real_videos / "fixture" / name, size=32))
    assert [clip.view for clip in clips] == [0, 1]
    for clip in clips:
        assert clip.pixels.shape == (8, 32, 32, 3)
        assert clip.duplicate_frames == 0
        assert clip.decoder in ("decord-seek", "decord-sequential", "pyav-seek", "pyav-sequential")
        assert clip.pixels.std() > 5


@pytest.mark.parametrize(("name", "reason"), REFUSED.items())
def test_files_without_trustworthy_frames_are_refused(
    real_videos: Path, name: str, reason: FailureReason
) -> None:
    with pytest.raises(VideoRefusedError) as refused:
        decode_video(job_of(real_videos / "odd" / name))
    assert refused.value.reason is reason
    assert str(real_videos) not in refused.value.message  # the same wherever the collection lies


@pytest.mark.parametrize(("name", "truth"), ACCEPTED.items())
def test_odd_files_are_understood(
    real_videos: Path, name: str, truth: tuple[int, tuple[int, int], str]
) -> None:
    with native_log() as log:
        source = next(frame_sources(str(real_videos / "odd" / name), log))
    assert (len(source.timestamps_s), (source.height, source.width), source.decoder) == truth
    assert source.timestamps_s[0] == 0
    assert (np.diff(source.timestamps_s) > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ACCEPTED)
def test_frames_of_odd_files_equal_those_decoded_in_sequence(real_videos: Path, name: str) -> None:
    path = real_videos / "odd" / name
    last = min(ACCEPTED[name][0], 130) - 1  # far enough for a second keyframe, and quick
    wanted = sorted({0, last // 3, last // 2, last})
    expected = {index: rgb for index, rgb in enumerate(islice(oracle(path), last + 1)) if index in wanted}
    together = frames_of(path, wanted)
    assert sorted(together) == wanted
    for index in wanted:
        np.testing.assert_array_equal(together[index], expected[index])
        np.testing.assert_array_equal(frames_of(path, [index])[index], expected[index])


@pytest.mark.parametrize("name", SHORT)
def test_short_videos_repeat_frames_or_are_refused(real_videos: Path, name: str) -> None:
    path = real_videos / "odd" / name
    clips = decode_video(job_of(path, spacing_max_s=0.18, spacing_min_s=0.18))
    for clip in clips:
        assert clip.duplicate_frames == sum(np.diff(clip.frame_indices) == 0) == repeats(clip)
    assert sum(clip.duplicate_frames for clip in clips) > 0
    with pytest.raises(VideoRefusedError) as refused:
        decode_video(job_of(path, allow_duplicates=False))
    assert refused.value.reason is FailureReason.TOO_SHORT


def repeats(clip: PixelClip) -> int:
    return sum((a == b).all() for a, b in zip(clip.pixels, clip.pixels[1:], strict=False))


def test_variable_rate_gives_the_frames_nearest_in_time(real_videos: Path) -> None:
    path = real_videos / "odd" / "vfr_traffic_camera.mp4"
    clip = decode_video(job_of(path, views=1, frames=4, spacing_min_s=0.2, spacing_max_s=0.2, augment=False))[
        0
    ]
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        times = np.array(sorted(packet.pts for packet in container.demux(stream) if packet.pts is not None))
    times = (times - times[0]) * float(stream.time_base or 0)
    wanted = (times[-1] - 0.6) / 2 + 0.2 * np.arange(4)
    assert clip.frame_indices == tuple(np.abs(times[:, None] - wanted).argmin(axis=0))
    np.testing.assert_allclose(clip.timestamps_s, times[list(clip.frame_indices)], atol=1e-5)


def test_times_are_relative_to_the_first_frame(real_videos: Path) -> None:
    clip = decode_video(job_of(real_videos / "odd" / "start_8.33s.mp4", views=1))[0]
    assert clip.timestamps_s[-1] == pytest.approx(11 / 30, abs=1e-3)


@pytest.mark.slow
def test_crop_flip_and_resize_are_what_the_clip_says(real_videos: Path) -> None:
    path = real_videos / "fixture" / "kinetics_armwrestle_mmaction2.mp4"
    clips = decode_video(job_of(path, views=4, size=48, seed=1))
    assert {clip.flip for clip in clips} == {False, True}
    for clip in clips:
        full = frames_of(path, sorted(set(clip.frame_indices)))
        for t, index in enumerate(clip.frame_indices):
            image = Image.fromarray(full[index])
            box = (clip.crop.left, clip.crop.top)
            corner = (clip.crop.left + clip.crop.width, clip.crop.top + clip.crop.height)
            cut = image.crop((*box, *corner)).resize((48, 48), Image.Resampling.BILINEAR)
            expected = np.asarray(cut)
            if clip.flip:
                expected = np.fliplr(expected)
            np.testing.assert_allclose(clip.pixels[t].astype(int), expected, atol=1)


def test_more_views_change_none_of_the_earlier(real_videos: Path) -> None:
    path = real_videos / "fixture" / "kinetics_flipping_a_pancake.mkv"
    three = decode_video(job_of(path, views=3))
    one = VideoJob(str(path), path.name, path.stem, 2, 1, 64, SamplingSettings())
    last = decode_video(one)[0]
    np.testing.assert_array_equal(three[2].pixels, last.pixels)
    assert three[2].clip_id == last.clip_id
    assert three[2].frame_indices == last.frame_indices
