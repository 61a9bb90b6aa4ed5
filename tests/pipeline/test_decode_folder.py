"""Folders of frames."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from video_maker import number_picture, read_number

from deltacache.pipeline.decoding.decode import VideoJob, decode_video, frame_sources
from deltacache.pipeline.decoding.native_log import native_log
from deltacache.schemas.clips import PixelClip
from deltacache.schemas.datasets import SamplingSettings
from deltacache.schemas.errors import FailureReason, VideoRefusedError


def decode(folder: Path, **sampling: object) -> PixelClip:
    settings = SamplingSettings.model_validate({"augment": False, **sampling})
    return decode_video(VideoJob(str(folder), folder.name, "video", 0, 1, 64, settings))[0]


def write_frames(folder: Path, suffix: str = "png", times: tuple[float, ...] = ()) -> Path:
    folder.mkdir()
    for number, time in enumerate(times or [10 + 0.1 * n for n in range(20)]):
        Image.fromarray(number_picture(number, 64)).save(folder / f"frame_{number}_{time:.3f}.{suffix}")
    (folder / "readme.txt").write_text("not a frame")
    return folder


@pytest.mark.parametrize("suffix", ["png", "jpg", "JPEG"])
def test_frames_are_taken_by_their_times(tmp_path: Path, suffix: str) -> None:
    clip = decode(write_frames(tmp_path / "v", suffix), frames=4, spacing_min_s=0.3, spacing_max_s=0.3)
    assert clip.decoder == "frames"
    assert clip.frame_indices == (5, 8, 11, 14)
    assert [read_number(pixels) for pixels in clip.pixels] == [5, 8, 11, 14]
    np.testing.assert_allclose(clip.timestamps_s, [0.5, 0.8, 1.1, 1.4], atol=1e-6)


def test_times_order_the_frames_not_names(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "v", times=(9.0, 10.0, 8.0))
    with native_log() as log:
        source = next(frame_sources(str(folder), log))
        assert [read_number(frame.rgb) for frame in source.frames(range(3))] == [2, 0, 1]
    np.testing.assert_array_equal(source.timestamps_s, np.array([0, 1, 2], np.float32))


def test_a_picture_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    folder = tmp_path / "v"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    for number in range(2):
        lying = np.ascontiguousarray(np.rot90(number_picture(number, 64)))
        Image.fromarray(lying).save(folder / f"a_{number}.png", exif=exif)
    assert read_number(decode(folder, frames=2, spacing_min_s=1, spacing_max_s=1).pixels[1]) == 1


def refused(folder: Path) -> VideoRefusedError:
    with pytest.raises(VideoRefusedError) as error:
        decode(folder)
    return error.value


def test_folders_that_are_no_video(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path / "empty").reason is FailureReason.NO_FRAMES
    same = write_frames(tmp_path / "same", times=(1.0, 1.0))
    assert refused(same).message.endswith("two frames have the same time")


def test_damaged_and_unequal_frames_are_refused(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "cut")
    for file in folder.glob("*.png"):
        file.write_bytes(file.read_bytes()[:60])
    assert refused(folder).reason is FailureReason.CORRUPT_STREAM
    folder = write_frames(tmp_path / "sizes")
    for file in sorted(folder.glob("*.png"))[1:]:
        Image.new("RGB", (32, 64)).save(file)
    error = refused(folder)
    assert error.reason is FailureReason.CORRUPT_STREAM
    assert "32x64 pixels, the first frame has 64x64" in error.message


def test_a_text_file_named_like_a_frame_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a_0.jpg").write_text("no picture")
    assert refused(tmp_path).reason is FailureReason.CORRUPT_STREAM


def test_a_picture_of_absurd_size_is_refused(tmp_path: Path) -> None:
    Image.new("1", (20000, 20000)).save(tmp_path / "a_0.png")
    assert refused(tmp_path).reason is FailureReason.OUT_OF_MEMORY
