"""Real files that lie about times, sizes, fields or beginnings. The oracle decodes all frames in sequence with PyAV."""

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.packet import Packet
from video_maker import read_number, write_video

from deltacache.pipeline.datasets.plan import PlannedVideo
from deltacache.pipeline.decoding import work
from deltacache.pipeline.decoding.child import ChildDecoder
from deltacache.pipeline.decoding.decode import frame_sources
from deltacache.pipeline.decoding.frame_source import SourceFailedError
from deltacache.pipeline.decoding.native_log import native_log
from deltacache.pipeline.decoding.probe import h264_sequences, parse_h264_sequence, probe_video
from deltacache.pipeline.decoding.work import DecodeSettings, decode_group
from deltacache.schemas.datasets import SamplingSettings
from deltacache.schemas.errors import FailureReason, VideoRefusedError
from deltacache.schemas.jobs import DecodeLimits

_X264 = "keyint=10:min-keyint=10:scenecut=0:bframes=0:threads=1"


def decoded(path: Path, every: int = 1) -> tuple[str, np.ndarray, list[np.ndarray]]:
    """Way, times of all frames, and every so manieth frame, as extraction gets them."""
    with native_log() as log:
        for source in frame_sources(str(path), log):
            try:
                frames = list(source.frames(range(0, len(source.timestamps_s), every)))
            except SourceFailedError:
                continue
            return source.decoder, source.timestamps_s, [frame.rgb for frame in frames]
    raise AssertionError("no way gives the frames")


def oracle(path: Path) -> tuple[np.ndarray, list[np.ndarray]]:
    """Times from the first one on, in order, and frames in the order of coming out."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        times = np.sort([float((frame.pts or 0) * (stream.time_base or 0)) for frame in frames])
        return times - times[0], [frame.to_ndarray(format="rgb24") for frame in frames]


def refusal(path: Path) -> VideoRefusedError:
    with pytest.raises(VideoRefusedError) as refused:
        decoded(path)
    assert str(path.parent) not in refused.value.message
    return refused.value


@pytest.mark.parametrize(
    ("name", "frames", "last_s"),
    [
        ("repeated_time_vfr.mkv", 40, 20.76),
        ("repeated_time_vfr_vp9.webm", 40, 20.76),
        ("pause_and_repeated_time.mp4", 89, 12.904),
        ("pause_and_repeated_time_vp8.webm", 89, 12.904),
        ("avi_dropped_frames_bframes.avi", 69, 4.0 - 0.04),
        ("interlaced_from_frame_20.mp4", 40, 1.56),
        ("mjpeg_frames_with_exif.avi", 20, 1.9),
    ],
)
def test_frames_and_times_are_the_files_own(faults: Path, name: str, frames: int, last_s: float) -> None:
    times, pictures = oracle(faults / name)
    way, seen, got = decoded(faults / name)
    assert "constant-rate" not in way
    assert (len(seen), float(seen[-1])) == (frames, pytest.approx(last_s, abs=1e-3))
    np.testing.assert_allclose(seen, times, atol=1e-5)
    np.testing.assert_array_equal(got, pictures)


_REPEATED = [0, 100, 200, 300, 300, 5000, *range(5100, 8500, 100)]


@pytest.mark.parametrize(
    ("name", "how"),
    {
        "a.flv": {"options": {"x264-params": _X264}},
        "b.flv": {"codec": "flv"},
        "vp8.mkv": {"codec": "libvpx", "options": {"g": "10", "lag-in-frames": "0", "cpu-used": "8"}},
        "mjpeg.mkv": {"codec": "mjpeg", "pixel_format": "yuvj420p"},
    }.items(),
)
def test_a_repeated_time_stamp_is_one_time_stamp(tmp_path: Path, name: str, how: dict[str, Any]) -> None:
    """Written in order and then set back, since encoders refuse repeated times."""
    plain = write_video(
        tmp_path / f"plain_{name}", size=128, milliseconds=[t + i for i, t in enumerate(_REPEATED)], **how
    )
    path = tmp_path / name

    def repeat(place: int, packet: Packet) -> Iterator[Packet]:
        step = int(0.001 / packet.time_base)
        assert packet.pts is not None
        number = round(packet.pts / step)
        number = min(range(40), key=lambda i: abs(_REPEATED[i] + i - number))
        packet.pts = packet.dts = _REPEATED[number] * step
        yield packet

    remux(plain, path, repeat)
    times, _ = oracle(path)
    assert (np.diff(times) == 0).sum() == 1
    way, seen, frames = decoded(path)
    assert "constant-rate" not in way
    np.testing.assert_allclose(seen, np.array(_REPEATED) / 1000, atol=2e-3)
    assert [read_number(frame) for frame in frames] == list(range(40))


def remux(source: Path, target: Path, change: Callable[[int, Packet], Iterator[Packet]]) -> None:
    """The packets of a video after ``change``."""
    with av.open(str(source)) as reader, av.open(str(target), "w") as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        packets = [packet for packet in reader.demux(video=0) if packet.size]
        for place, packet in enumerate(packets):
            for changed in change(place, packet):
                changed.stream = stream
                writer.mux(changed)


@pytest.mark.parametrize("name", ["size_change_320x192_480x288.mkv", "size_change_160x96_320x192.mp4"])
def test_a_change_of_size_is_refused_by_name(faults: Path, name: str) -> None:
    error = refusal(faults / name)
    assert error.reason is FailureReason.CORRUPT_STREAM
    assert "frames change size from 320x192 to " in error.message


def test_sequence_parameter_sets_are_read(tmp_path: Path) -> None:
    """Size and fields of what encoders write: baseline, high with its own matrices, 4:4:4, interlaced."""
    for number, (options, pixel_format) in enumerate(
        [
            ("bframes=0:8x8dct=0:cabac=0", "yuv420p"),
            ("cqm=jvt", "yuv420p"),
            ("", "yuv444p"),
            ("interlaced=1", "yuv420p"),
        ]
    ):
        path = write_video(
            tmp_path / f"{number}.mp4",
            size=144,
            frames=4,
            pixel_format=pixel_format,
            options={"x264-params": f"threads=1:{options}"},
        )
        with av.open(str(path)) as container:
            extradata = bytes(container.streams.video[0].codec_context.extradata or b"")
        [unit] = h264_sequences(extradata)
        sequence = parse_h264_sequence(unit)
        assert sequence is not None
        is_interlaced = "interlaced" in options
        assert sequence.frames_only is not is_interlaced
        assert sequence.macroblocks == (9, 10 if is_interlaced else 9)
        assert probe_video(str(path)).interlaced is is_interlaced
        for cut in range(1, len(unit)):
            parse_h264_sequence(unit[:cut])


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("content", [b"\6\5\4\1\2\3\4\x80", b"\x09\xf0"], ids=["SEI", "AUD"])
def test_samples_without_a_picture_are_passed_over(tmp_path: Path, suffix: str, content: bytes) -> None:
    plain = write_video(tmp_path / f"plain.{suffix}", size=128, options={"x264-params": _X264})

    def insert(place: int, packet: Packet) -> Iterator[Packet]:
        assert packet.pts is not None
        assert packet.dts is not None
        if place in (0, 7, 23):
            extra = Packet(struct.pack(">I", len(content)) + content)
            extra.pts, extra.dts, extra.time_base = packet.pts, packet.dts, packet.time_base
            yield extra
            packet.pts, packet.dts = packet.pts + 2, packet.dts + 2
        yield packet

    path = tmp_path / f"a.{suffix}"
    remux(plain, path, insert)
    _, times, frames = decoded(path)
    assert [read_number(frame) for frame in frames] == list(range(40))
    np.testing.assert_allclose(times, np.arange(40) / 25, atol=3e-3)


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mp4", "mpeg4"),
        ("a.avi", "mpeg4"),
        ("a.wmv", "wmv2"),
        ("a.flv", "flv"),
        ("h263.avi", "h263p"),
        ("ms.avi", "msmpeg4"),
    ],
)
def test_a_video_that_does_not_begin_with_a_keyframe_is_refused(
    tmp_path: Path, name: str, codec: str
) -> None:
    how: dict[str, Any] = {"codec": codec, "options": {"g": "10", "bf": "0"}, "size": 128}
    plain = write_video(tmp_path / f"plain_{name}", **how)
    assert len(decoded(plain)[1]) == 40
    path = tmp_path / name
    remux(plain, path, lambda place, packet: iter([packet] if place else []))
    assert refusal(path).reason is FailureReason.CORRUPT_STREAM


@pytest.mark.parametrize(
    ("name", "how"),
    {
        "ffv1.mkv": {"codec": "ffv1", "options": {"level": "3", "slicecrc": "1"}},
        "a.mp4": {"options": {"x264-params": "keyint=20:bframes=0:threads=1"}},
        "a.mkv": {"options": {"x264-params": "keyint=20:bframes=0:threads=1"}},
    }.items(),
)
def test_damage_that_is_only_logged_refuses_the_video(tmp_path: Path, name: str, how: dict[str, Any]) -> None:
    """A flipped bit in FFV1, whose slices carry checksums; a lost reference frame elsewhere."""
    plain = write_video(tmp_path / f"plain_{name}", size=128, **how)
    path = tmp_path / name

    def damage(place: int, packet: Packet) -> Iterator[Packet]:
        if "ffv1" in name and place == 5:
            data = bytearray(bytes(packet))
            data[len(data) // 2] ^= 16
            damaged = Packet(bytes(data))
            damaged.pts, damaged.dts, damaged.time_base = packet.pts, packet.dts, packet.time_base
            damaged.is_keyframe = packet.is_keyframe
            yield damaged
        elif "ffv1" in name or place != 5:
            yield packet

    remux(plain, path, damage)
    error = refusal(path)
    assert error.reason is FailureReason.CORRUPT_STREAM
    assert "the decoder ffv1 says" in error.message or "which others depend on, is lost" in error.message


@pytest.mark.slow
def test_damage_between_two_frames_of_a_matroska_file_is_seen(tmp_path: Path) -> None:
    """Its demuxer finds the next good element by itself, and the frames before it are gone: VP8 would not notice."""
    plain = write_video(
        tmp_path / "plain.mkv",
        codec="libvpx",
        size=128,
        milliseconds=range(0, 20000, 500),
        options={"g": "10", "lag-in-frames": "0"},
    )
    data = bytearray(plain.read_bytes())
    with av.open(str(plain)) as container:
        place = [packet.pos for packet in container.demux(video=0) if packet.size][15]
    assert place is not None
    data[place - 8 : place + 4] = b"\0" * 12
    path = tmp_path / "a.mkv"
    path.write_bytes(data)
    error = refusal(path)
    assert error.reason is FailureReason.CORRUPT_STREAM
    assert "damaged between two frames" in error.message


# --- documented as it is today -------------------------------------------------------------------------------


def write_pictures(path: Path, pictures: list[np.ndarray], options: dict[str, str]) -> Path:
    """An H.264 file of (H, W, 3) pictures."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options=options)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def test_hdr_is_not_tone_mapped(tmp_path: Path) -> None:
    """PQ and BT.709 give the same numbers: the transfer curve is not looked at."""
    ramp = np.repeat(np.linspace(0, 255, 128).astype(np.uint8)[None, :, None], 128, axis=0).repeat(3, axis=2)
    seen = []
    for transfer in ("smpte2084", "arib-std-b67", "bt709"):
        options = {"x264-params": f"threads=1:qp=4:transfer={transfer}"}
        path = write_pictures(tmp_path / f"{transfer}.mp4", [ramp] * 3, options)
        seen.append(decoded(path)[2])
    np.testing.assert_array_equal(seen[0], seen[2])
    np.testing.assert_array_equal(seen[1], seen[2])


def test_interlacing_is_kept(tmp_path: Path) -> None:
    """Both fields of a frame stay woven: here the upper one is white, the lower one black."""
    picture = np.zeros((128, 128, 3), np.uint8)
    picture[::2] = 255
    path = write_pictures(
        tmp_path / "a.mp4", [picture] * 4, {"x264-params": "threads=1:qp=4:interlaced=1:tff=1"}
    )
    way, _, frames = decoded(path)
    assert way.startswith("pyav")
    assert frames[2][::2].mean() - frames[2][1::2].mean() > 200


def test_orientation_is_that_of_the_first_frame(tmp_path: Path) -> None:
    """From frame 10 on the stream says that a player must turn it by 90 degrees."""
    plain = write_video(tmp_path / "plain.mkv", size=128, frames=20, options={"x264-params": _X264})
    path = tmp_path / "a.mkv"
    turn = b"\x06\x2f\x03\x08\x00\x09\x80"  # display orientation: 90 degrees, from here on

    def insert(place: int, packet: Packet) -> Iterator[Packet]:
        if place >= 10:
            turned = Packet(struct.pack(">I", len(turn)) + turn + bytes(packet))
            turned.pts, turned.dts, turned.time_base = packet.pts, packet.dts, packet.time_base
            turned.is_keyframe, packet = packet.is_keyframe, turned
        yield packet

    remux(plain, path, insert)
    with av.open(str(path)) as container:
        assert [frame.rotation for frame in container.decode(video=0)][::10] == [0, 90]
    assert [read_number(frame) for frame in decoded(path)[2]] == list(range(20))


def test_a_clock_that_jumps_back_gives_a_constant_rate_that_the_index_tells(tmp_path: Path) -> None:
    """Two programme streams, one behind the other."""
    plain = write_video(tmp_path / "plain.mpg", codec="mpeg2video", size=128, options={"g": "10", "bf": "0"})
    path = tmp_path / "a.mpg"
    path.write_bytes(plain.read_bytes() * 2)
    way, times, frames = decoded(path)
    assert way == "pyav-sequential-constant-rate"
    assert [read_number(frame) for frame in frames] == [*range(40), *range(40)]
    np.testing.assert_allclose(times, np.arange(80) / 25, atol=1e-5)


def test_a_stream_without_times_gets_a_constant_rate_that_the_index_tells(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.h264", size=128, options={"x264-params": f"{_X264}:bframes=2"})
    way, times, frames = decoded(path)
    assert way == "pyav-sequential-constant-rate"
    assert [read_number(frame) for frame in frames] == list(range(40))
    np.testing.assert_allclose(times, np.arange(40) / 25, atol=1e-5)


def test_bad_videos_in_a_row_are_rows_and_end_nothing(faults: Path, tmp_path: Path) -> None:
    """Twenty videos of which every one makes a library raise: twenty failures, and the next is decoded."""
    good = write_video(tmp_path / "good.mp4", frames=12, options={"x264-params": _X264})
    videos = [PlannedVideo(f"v{n}", f"bug/{n}", 1, 0, 1) for n in range(20)]
    bad = tmp_path / "bug"
    bad.mkdir()
    (bad / "a_0.0.png").write_bytes((faults / "exif_damaged.png").read_bytes())
    settings = DecodeSettings(32, SamplingSettings(frames=2), DecodeLimits())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deltacache.pipeline.decoding.work.ChildDecoder", _raising)
        patch.setattr("deltacache.pipeline.decoding.work._decoders", type(work._decoders)())
        group = decode_group(videos, {video.video_uri: str(bad) for video in videos}, settings, {})
        assert [failure.reason for failure in group.failures] == ["decoder_crashed"] * 20
        work._decoders.close()
    group = decode_group([PlannedVideo("v", "good", 1, 0, 1)], {"good": str(good)}, settings, {})
    assert len(group.clips) == 1


def _raising(timeout_s: float, memory_bytes: int) -> ChildDecoder:
    return ChildDecoder(timeout_s, memory_bytes, decode="decode_stubs:behave")
