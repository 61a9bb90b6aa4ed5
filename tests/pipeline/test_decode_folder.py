"""Folders of frames."""

import shutil
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from video_maker import number_picture, read_number

from deltacache.pipeline.datasets.plan import PlannedVideo
from deltacache.pipeline.decoding.decode import VideoJob, decode_video, frame_sources
from deltacache.pipeline.decoding.native_log import native_log
from deltacache.pipeline.decoding.work import DecodeSettings, decode_group
from deltacache.pipeline.inputs.fetching import content_sha256, fetched
from deltacache.pipeline.inputs.lists import read_list
from deltacache.pipeline.inputs.sources import find_videos
from deltacache.schemas.clips import PixelClip
from deltacache.schemas.datasets import SamplingSettings
from deltacache.schemas.errors import DeltacacheError, FailureReason, VideoRefusedError
from deltacache.schemas.jobs import DecodeLimits


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
        Image.fromarray(lying).save(folder / f"a_{number}.0.png", exif=exif)
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


@pytest.mark.slow
def test_a_picture_of_absurd_size_is_refused(tmp_path: Path) -> None:
    Image.new("1", (20000, 20000)).save(tmp_path / "a_0.png")
    assert refused(tmp_path).reason is FailureReason.OUT_OF_MEMORY


def write_named(folder: Path, names: list[str]) -> Path:
    folder.mkdir()
    for number, name in enumerate(names):
        Image.fromarray(number_picture(number, 64)).save(folder / name)
    return folder


def test_names_that_only_count_need_a_rate(tmp_path: Path) -> None:
    folder = write_named(tmp_path / "v", [f"img_{number:05d}.jpg" for number in range(1, 21)])
    error = refused(folder)
    assert error.reason is FailureReason.NO_TIMES
    assert error.message.startswith("img_00001.jpg, img_00002.jpg, ... are numbered without a decimal point")
    assert "--frames-per-second" in error.message
    clip = decode(folder, frames=3, spacing_min_s=0.2, spacing_max_s=0.2, frames_per_second=10)
    assert clip.decoder == "frames-given-rate"
    np.testing.assert_allclose(np.diff(clip.timestamps_s), 0.2, atol=1e-6)
    assert [read_number(pixels) for pixels in clip.pixels] == list(clip.frame_indices) == [7, 9, 11]


def test_names_in_milliseconds_are_not_seconds(tmp_path: Path) -> None:
    folder = write_named(tmp_path / "v", [f"frame_{number:06d}.png" for number in range(0, 1000, 40)])
    assert refused(folder).reason is FailureReason.NO_TIMES
    with native_log() as log:
        source = next(frame_sources(str(folder), log, frames_per_second=1000))
    np.testing.assert_allclose(source.timestamps_s, np.arange(25) * 0.04, atol=1e-6)


def test_a_rate_changes_no_names_that_tell_seconds_and_one_picture_needs_none(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "v")
    assert decode(folder, frames_per_second=3).timestamps_s.tolist() == decode(folder).timestamps_s.tolist()
    assert decode(write_named(tmp_path / "one", ["a_7.png"])).duplicate_frames == 7


def test_a_rate_is_part_of_what_determines_the_numbers() -> None:
    """And without one the settings read as they always did, so that fingerprints stay."""
    assert "frames_per_second" not in SamplingSettings().model_dump(mode="json")
    dumped = SamplingSettings(frames_per_second=25).model_dump(mode="json")
    assert SamplingSettings.model_validate(dumped).frames_per_second == 25


def test_hidden_files_beside_frames_are_passed_over(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "v")
    before = decode(folder, frames=4)
    with fetched(str(folder), tmp_path) as video:
        sha256 = video.sha256
    for name in ("._frame_0_10.000.png", ".frame_1_99.000.png"):
        (folder / name).write_bytes(b"\0\5\x16\7\0")
    np.testing.assert_array_equal(decode(folder, frames=4).pixels, before.pixels)
    with fetched(str(folder), tmp_path) as video:
        assert video.sha256 == sha256


@pytest.mark.parametrize("suffix", ["webp", "bmp", "avif"])
def test_other_kinds_of_pictures_are_frames_too(tmp_path: Path, suffix: str) -> None:
    clip = decode(write_frames(tmp_path / "v", suffix), frames=4, spacing_min_s=0.3, spacing_max_s=0.3)
    assert [read_number(pixels) for pixels in clip.pixels] == [5, 8, 11, 14]
    [video] = find_videos(str(tmp_path), None)
    assert video.video_uri == "v"


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "RGB", "LA", "RGBA"])
def test_pictures_of_16_bits_keep_their_range(tmp_path: Path, mode: str) -> None:
    """A ramp over the whole range, of grey, colour, and both with alpha."""
    ramp = np.linspace(0, 65535, 256 * 64).reshape(64, 256).astype(np.uint16)
    file = tmp_path / "a_0.0.png"
    if mode == "I;16B":
        Image.frombytes(mode, (256, 64), ramp.astype(">u2").tobytes()).save(file)
    elif mode == "I;16":
        Image.fromarray(ramp).save(file)
    else:  # Pillow writes only eight bits of these
        colours = {"RGB": 3, "LA": 2, "RGBA": 4}[mode]
        write_png(file, np.repeat(ramp[..., None], colours, axis=2), {"RGB": 2, "LA": 4, "RGBA": 6}[mode])
    with native_log() as log:
        [frame] = next(frame_sources(str(tmp_path), log)).frames([0])
    assert frame.rgb.shape == (64, 256, 3)
    np.testing.assert_allclose(frame.rgb, np.repeat((ramp >> 8)[..., None], 3, axis=2), atol=1)
    assert frame.rgb.mean() == pytest.approx(127.5, abs=0.6)


def write_png(file: Path, pixels: np.ndarray, colour_type: int) -> None:
    """A PNG of 16 bits a channel, by the specification."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    file.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks
        )
    )


@pytest.mark.parametrize("name", ["exif_damaged.jpg", "exif_damaged.png"])
def test_a_picture_with_damaged_exif_is_used_without_it(faults: Path, tmp_path: Path, name: str) -> None:
    for time in ("0.0", "0.5"):
        shutil.copy(faults / name, tmp_path / f"x_{time}{Path(name).suffix}")
    with Image.open(faults / name) as image:
        expected = np.asarray(image.convert("RGB"))
    with native_log() as log:
        frames = list(next(frame_sources(str(tmp_path), log)).frames([0, 1]))
    np.testing.assert_array_equal(frames[1].rgb, expected)


@pytest.mark.parametrize("number", ["9" * 200, "9" * 200 + ".5", "1" + "0" * 30 + ".0"])
def test_a_time_beyond_any_video_is_refused(tmp_path: Path, number: str) -> None:
    write_named(tmp_path / "v", ["x_0.0.png", f"x_{number}.png"])
    error = refused(tmp_path / "v")
    assert error.reason is FailureReason.CORRUPT_STREAM
    assert "too many seconds after the first frame" in error.message


def test_a_list_tells_the_rate_of_each_folder(tmp_path: Path) -> None:
    """Of folders and of folders in a zip archive; another rate is another content."""
    names = [f"img_{number:05d}.png" for number in range(30)]
    for name in ("a", "b"):
        write_named(tmp_path / name, names)
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        for name in names:
            archive.write(tmp_path / "a" / name, f"in/{name}")
    settings = DecodeSettings(
        32, SamplingSettings(frames=2, frames_per_second=3, augment=False), DecodeLimits()
    )
    listed = tmp_path / "list.csv"
    seen: dict[str, dict[str, float]] = {}
    versions: dict[str, set[tuple[str, str]]] = {}
    for rate in ("10", "20"):
        listed.write_text(f"path,fps\na,{rate}\nb,\nz.zip/in,{rate}\n")
        videos = find_videos(str(listed), None)
        planned = [PlannedVideo(v.video_id, v.video_uri, v.size_bytes, 0, 1) for v in videos]
        group = decode_group(planned, {v.video_uri: v.path for v in videos}, settings, {})
        assert not group.failures
        seen[rate] = {
            clip.video_uri: round(float(clip.timestamps_s[-1]) / clip.frame_indices[-1], 5)
            for clip in group.clips
        }
        for video, source in zip(videos, group.sources, strict=True):
            assert video.version == source.version
            assert content_sha256(video.path) == source.sha256
            versions.setdefault(video.video_uri, set()).add((source.version, source.sha256))
    assert seen == {
        "10": {"a": 0.1, "b": 0.33333, "z.zip/in": 0.1},
        "20": {"a": 0.05, "b": 0.33333, "z.zip/in": 0.05},
    }
    assert {uri: len(known) for uri, known in versions.items()} == {"a": 2, "b": 1, "z.zip/in": 2}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "tsv"])
def test_rates_in_lists_of_other_kinds(tmp_path: Path, suffix: str) -> None:
    listed = tmp_path / f"list.{suffix}"
    if suffix == "jsonl":
        listed.write_text('{"path": "a", "frames_per_second": 12.5}\n{"path": "b"}\n')
    elif suffix == "tsv":
        listed.write_text("path\tframe_rate\na\t12.5\nb\tunknown\n")
    else:
        pq.write_table(pa.table({"path": ["a", "b"], "fps": [12.5, None]}), listed)
    rates = [getattr(entry, "frames_per_second", None) for entry in read_list(str(listed))]
    assert rates == [12.5, None]


@pytest.mark.parametrize(
    ("text", "rates"),
    [
        ("folder,fps\na,10\nb,20\n", [10, 20]),
        ("frame_rate;dir\n30000/1001;a\n0/0;b\n", [30000 / 1001, None]),
    ],
)
def test_a_rate_makes_a_header(
    tmp_path: Path, text: str, rates: list[float | None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the other columns are called; and ffprobe writes rates as fractions."""
    for name in ("a", "b"):
        write_named(tmp_path / name, ["img_00001.png", "img_00002.png"])
    (tmp_path / "list.csv").write_text(text)
    entries = read_list(str(tmp_path / "list.csv"), tell=print)
    assert entries == ["a", "b"]
    assert [getattr(entry, "frames_per_second", None) for entry in entries] == rates
    assert "not taken: fps" not in capsys.readouterr().out


def test_a_folder_of_frames_named_like_a_video_keeps_its_rate(tmp_path: Path) -> None:
    write_named(tmp_path / "clip.mp4", ["img_00001.png", "img_00002.png"])
    (tmp_path / "list.csv").write_text("path,fps\nclip.mp4,10\n")
    [video] = find_videos(str(tmp_path / "list.csv"), None)
    with fetched(video.path, tmp_path) as read:
        assert read.frames_per_second == 10


def test_one_folder_with_two_rates_is_refused(tmp_path: Path) -> None:
    write_named(tmp_path / "a", ["img_00001.png", "img_00002.png"])
    (tmp_path / "list.csv").write_text("path,fps\na,10\n./a,20\n")
    with pytest.raises(DeltacacheError, match=r"a is listed with 10\.0 and with 20\.0 frames per second"):
        find_videos(str(tmp_path / "list.csv"), None)


def test_frames_named_by_a_number_alone(tmp_path: Path) -> None:
    """As DAVIS has them, in a folder and unpacked from a zip archive."""
    folder = write_named(tmp_path / "bear", [f"{number:05d}.png" for number in range(20)])
    assert refused(folder).reason is FailureReason.NO_TIMES
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"in/{file.name}")
    rated = {"frames": 3, "spacing_min_s": 0.2, "spacing_max_s": 0.2, "frames_per_second": 10}
    sha256 = set[str]()
    for video in find_videos(str(tmp_path), None, frames_per_second=10):
        with fetched(video.path, tmp_path) as read:
            clip = decode(Path(read.path), **rated)
            sha256.add(read.sha256)
        assert [read_number(pixels) for pixels in clip.pixels] == list(clip.frame_indices)
        np.testing.assert_allclose(np.diff(clip.timestamps_s), 0.2, atol=1e-6)
    assert len(sha256) == 1
