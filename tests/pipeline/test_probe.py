"""What is seen of a file before it is decoded, and how files that lie are found out."""

import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from video_maker import write_video

from deltacache.pipeline.decoding.decord_frames import complaints, decord_is_exact
from deltacache.pipeline.decoding.probe import FrameIndex, open_video, packet_reader, probe_video, seconds_of
from deltacache.schemas.errors import FailureReason, VideoRefusedError

_CLOSED = "keyint=10:min-keyint=10:scenecut=0:bframes=3:b-adapt=0:threads=1"


def reason_of(path: Path | str) -> FailureReason:
    with pytest.raises(VideoRefusedError) as refused:
        probe_video(str(path))
    return refused.value.reason


def index_of(path: Path) -> FrameIndex:
    index = probe_video(str(path)).index
    assert index is not None
    return index


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probe")
    return write_video(folder / "closed.mp4", size=128, options={"x264-params": _CLOSED})


def test_a_plain_file(closed: Path) -> None:
    probe = probe_video(str(closed))
    assert (probe.codec, probe.pixel_format, probe.height, probe.width) == ("h264", "yuv420p", 128, 128)
    assert probe.orientation.is_upright
    assert probe.rate == 25
    index = index_of(closed)
    assert [index.pts.index(start) for start in index.starts] == [0, 10, 20, 30]
    assert index.every_keyframe_starts
    assert decord_is_exact(probe)


def test_keyframes_of_open_groups_are_no_starting_points(tmp_path: Path) -> None:
    path = write_video(tmp_path / "open.mp4", size=128, options={"x264-params": f"{_CLOSED}:open-gop=1"})
    index = index_of(path)
    assert index.starts == (0,)
    assert not index.every_keyframe_starts


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_seek_to_a_starting_point_leads_right_there(tmp_path: Path, suffix: str) -> None:
    """Whether FFmpeg takes the time for one of presentation or of decoding has changed; a detour costs time."""
    path = write_video(tmp_path / f"a.{suffix}", size=128, options={"x264-params": _CLOSED})
    with open_video(str(path)) as (container, stream):
        for start in reversed(index_of(path).starts):
            container.seek(start, stream=stream)
            assert next(container.demux(stream)).pts == start


def test_an_edit_list_that_hides_frames_leaves_no_index(real_videos: Path) -> None:
    assert probe_video(str(real_videos / "odd" / "editlist_discard_first_keyframe.mp4")).index is None


def test_of_two_video_streams_the_one_that_decord_takes(real_videos: Path) -> None:
    probe = probe_video(str(real_videos / "odd" / "multistream_2video_nasa.mp4"))
    assert (probe.height, probe.width) == (270, 480)


@pytest.mark.parametrize("kept", [0.02, 0.3, 0.6, 0.95])
def test_an_mp4_cut_off_anywhere_is_refused_as_truncated(closed: Path, tmp_path: Path, kept: float) -> None:
    """Once with its index at the end, which is then lost, and once in front, claiming all frames."""
    data = closed.read_bytes()
    for name, whole in {"index_last": data, "index_first": _index_first(data)}.items():
        path = tmp_path / f"{name}.mp4"
        path.write_bytes(whole)
        assert len(index_of(path).pts) == 40
        path.write_bytes(whole[: int(len(whole) * kept)])
        assert reason_of(path) in (FailureReason.TRUNCATED, FailureReason.NO_FRAMES)


def _index_first(data: bytes) -> bytes:
    """The same mp4 with ``moov`` before ``mdat``, its chunk offsets moved accordingly."""
    moov = data.index(b"moov") - 4
    mdat = data.index(b"mdat") - 4
    size = struct.unpack(">I", data[moov : moov + 4])[0]
    box = bytearray(data[moov : moov + size])
    table = box.index(b"stco") + 8
    for entry in range(struct.unpack(">I", box[table : table + 4])[0]):
        at = table + 4 + 4 * entry
        offset = struct.unpack(">I", box[at : at + 4])[0]
        box[at : at + 4] = struct.pack(">I", offset + size)
    return data[:mdat] + bytes(box) + data[mdat:moov] + data[moov + size :]


def test_frames_past_the_end_of_a_matroska_file_never_existed(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "a.mkv", size=128, frames=100, options={"x264-params": _CLOSED})
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert 10 < len(index_of(cut).pts) < 90


def test_a_broken_packet_is_found_without_decoding(closed: Path, tmp_path: Path) -> None:
    data = bytearray(closed.read_bytes())
    with open_video(str(closed)) as (container, stream):
        position = [packet.pos for packet in container.demux(stream) if packet.size][25]
    assert position is not None
    data[position : position + 4] = b"\xff\xff\xff\xff"
    path = tmp_path / "broken.mp4"
    path.write_bytes(data)
    with pytest.raises(
        VideoRefusedError, match="packet 25 is damaged: a unit of 4294967295 bytes"
    ) as refused:
        probe_video(str(path))
    assert refused.value.reason is FailureReason.CORRUPT_STREAM


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        (
            "playlist.mp4",
            b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n%s\n#EXT-X-ENDLIST\n",
            "not_a_video",
        ),
        ("list.mp4", b"ffconcat version 1.0\nfile %s\n", "not_a_video"),
        ("text.mp4", b"this is no video", "not_a_video"),
        ("zeros.mp4", bytes(5000), "not_a_video"),
        ("ftyp_only.mp4", b"\0\0\0\x18ftypisom\0\0\2\0isomiso2", "truncated"),
        ("empty.mp4", b"", "empty_file"),
    ],
)
def test_what_is_no_video_is_not_opened(
    closed: Path, tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    """Playlists above all: they would make us open other files than the one that was asked for."""
    path = tmp_path / name
    path.write_bytes(content.replace(b"%s", str(closed).encode()))
    assert reason_of(path) == FailureReason(reason)


def test_a_picture_is_no_video(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    assert reason_of(tmp_path / "a.png") is FailureReason.NOT_A_VIDEO


def test_what_cannot_be_read_is_unreadable(tmp_path: Path) -> None:
    assert reason_of(tmp_path / "missing.mp4") is FailureReason.UNREADABLE


def test_a_small_video_is_refused_and_one_patch_is_enough(tmp_path: Path) -> None:
    assert probe_video(str(write_video(tmp_path / "16.mp4", size=16, frames=3))).height == 16
    assert reason_of(write_video(tmp_path / "8.mp4", size=8, frames=3)) is FailureReason.TOO_SMALL


def test_an_unknown_codec_is_unsupported(closed: Path, tmp_path: Path) -> None:
    path = tmp_path / "unknown.mp4"
    path.write_bytes(closed.read_bytes().replace(b"avc1", b"zzzz").replace(b"avcC", b"zzzz"))
    assert reason_of(path) in (FailureReason.UNSUPPORTED_CODEC, FailureReason.NO_VIDEO_STREAM)


def test_metadata_need_not_be_text(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", size=128, frames=5)
    data = path.read_bytes()
    at = data.index(b"Lavf")
    path.write_bytes(data[:at] + b"\xff\xfe" + data[at + 2 :])
    assert len(index_of(path).pts) == 5


def test_seconds_are_exact_for_long_videos_and_absurd_times_refused() -> None:
    base = Fraction(1, 30000)
    pts = (100, 100 + 1001, 100 + 30000 * 3600)
    np.testing.assert_array_equal(seconds_of(pts, base), np.array([0, 1001 / 30000, 3600], dtype=np.float32))
    with pytest.raises(VideoRefusedError, match="ticks apart"):
        seconds_of((0, 1 << 62), base)


AVCC = b"\1\x64\0\x0b\xff\xe1\0\0"  # 4-byte lengths


def nal(*kinds: int) -> bytes:
    return b"".join(struct.pack(">IB", 3, kind) + b"\x80\0" for kind in kinds)


@pytest.mark.parametrize(
    ("codec", "extradata", "packet", "random_access", "shown", "headers"),
    [
        ("h264", AVCC, nal(0x67, 0x68, 0x65), True, True, "all"),
        ("h264", AVCC, nal(0x68, 0x41), False, True, "some"),
        ("h264", AVCC, nal(0x06, 0x41), False, True, "none"),
        ("h264", AVCC, nal(0x09), False, False, "none"),
        ("hevc", b"\1" + bytes(20) + b"\3\0", nal(0x40, 0x42, 0x44, 0x26), True, True, "all"),
        ("hevc", b"\1" + bytes(20) + b"\3\0", nal(0x2A), False, True, "none"),  # CRA: an open group
        ("vp8", b"", b"\x10\0\0\x9d", True, True, "none"),
        ("vp8", b"", b"\x11\0\0\0", False, True, "none"),
        ("vp8", b"", b"\x01\0\0\0", False, False, "none"),  # an alternate reference
        ("vp9", b"", b"\x82\x49\x83", True, True, "none"),
        ("vp9", b"", b"\x86\0\0", False, True, "none"),
        ("vp9", b"", b"\x88\0", False, True, "none"),  # shows an existing frame
        ("vp9", b"", b"\xb0\0", True, True, "none"),  # profile 3
        ("vp9", b"", b"\xb2\0", False, True, "none"),
        ("av1", b"", b"\x12\0\x0a\1\0\x32\1\x10", True, True, "none"),
        ("av1", b"", b"\x12\0\x32\1\x10", False, True, "none"),  # no sequence header
        ("av1", b"", b"\x12\0\x0a\1\0\x32\1\x30", False, True, "none"),  # an inter frame
        ("av1", b"", b"\x12\0", False, False, "none"),
        ("mpeg4", b"", b"\0\0\1\xb6\x10", True, True, "none"),
        ("mpeg4", b"", b"\0\0\1\xb6\x50", False, True, "none"),
        ("mpeg4", b"", b"\x7f", False, False, "none"),
    ],
)
def test_packet_facts(
    codec: str, extradata: bytes, packet: bytes, random_access: bool, shown: bool, headers: str
) -> None:
    read = packet_reader(codec, extradata)
    assert read is not None
    facts = read(packet)
    assert (facts.random_access, facts.shown, facts.headers, facts.damage) == (
        random_access,
        shown,
        headers,
        None,
    )


@pytest.mark.parametrize(
    ("codec", "packet", "damage"),
    [
        ("h264", nal(0x65)[:-1], "a unit of 3 bytes where 2 are left"),
        ("h264", nal(0xE5), "a unit's forbidden bit is set"),
        ("h264", nal(0x65) + b"\1", "1 stray bytes after the last unit"),
        ("vp8", b"\0", "a frame of 1 bytes"),
        ("vp9", b"\x42\0", "no VP9 frame marker"),
        ("av1", b"\x12", "an AV1 unit runs past its packet"),
    ],
)
def test_damaged_packets(codec: str, packet: bytes, damage: str) -> None:
    read = packet_reader(codec, AVCC)
    assert read is not None
    assert read(packet).damage == damage


def test_decord_must_not_be_loaded_before_pyav() -> None:
    """It would put its FFmpeg under PyAV, whose silence then hides the damage that decord meets."""
    script = "import decord, deltacache.pipeline.decoding.decord_frames"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "decord was imported before av" in ended.stderr


def test_remarks_of_filters_are_no_complaints() -> None:
    """A complaint costs a second decoding, so clean files must not cause any."""
    remark = "[in @ 0x5f] Changing video frame properties on the fly is not supported by all filters.\n"
    remark += (
        "[swscaler @ 0x7f0694391680] deprecated pixel format used, make sure you did set range correctly\n"
    )
    assert complaints(remark) == []
    damage = "[h264 @ 0x55c33b608f80] concealing 171 DC, 171 AC, 171 MV errors in B frame"
    assert complaints(remark + damage) == [damage]
