"""Every way of reaching a frame, on videos whose pixels say which frame it is."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from video_maker import number_picture, read_number, write_video

from deltacache.pipeline.decoding import probe, pyav_frames
from deltacache.pipeline.decoding.decode import frame_sources
from deltacache.pipeline.decoding.native_log import native_log
from deltacache.pipeline.decoding.probe import frames_of, packet_reader

_X264 = "keyint=10:min-keyint=10:scenecut=0:bframes=3:b-adapt=0:threads=1"
_X265 = f"{_X264.removesuffix(':threads=1')}:pools=1:log-level=none"
_VPX = {"g": "10", "cpu-used": "5", "auto-alt-ref": "1", "lag-in-frames": "16", "threads": "1"}
_SQUARES = [(i * i * 3 + i * 7) for i in range(40)]  # milliseconds

CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "h264.mp4": (
        {"size": 128, "options": {"x264-params": _X264}},
        ["pyav-seek", "pyav-sequential"],
    ),
    "h264.mkv": (
        {"size": 128, "options": {"x264-params": _X264}},
        ["pyav-seek", "pyav-sequential"],
    ),
    "one_keyframe.mp4": (
        {"size": 128, "options": {"x264-params": "keyint=250:threads=1"}},
        ["pyav-sequential", "pyav-sequential"],
    ),
    "every_second_a_keyframe.mp4": (
        {"size": 128, "options": {"x264-params": _X264.replace("=10", "=2")}},
        ["decord-seek", "pyav-seek", "pyav-sequential"],
    ),
    "no_b_frames.mp4": (
        {"size": 128, "options": {"x264-params": f"{_X264}:bframes=0"}},
        ["decord-seek", "pyav-seek", "pyav-sequential"],
    ),
    "deep_pyramid.mp4": (
        {"size": 128, "options": {"x264-params": f"{_X264}:bframes=7:b-pyramid=normal:b-adapt=0"}},
        ["pyav-seek", "pyav-sequential"],
    ),
    "narrow.mp4": ({"options": {"x264-params": _X264}}, ["pyav-seek", "pyav-sequential"]),
    "open_gop.mp4": (
        {"size": 128, "options": {"x264-params": f"{_X264}:open-gop=1"}},
        ["pyav-sequential", "pyav-sequential"],
    ),
    "intra_refresh.mp4": (
        {"size": 128, "options": {"x264-params": "keyint=10:intra-refresh=1:bframes=0:threads=1"}},
        ["pyav-sequential", "pyav-sequential"],
    ),
    "variable_rate.mp4": (
        {"size": 128, "options": {"x264-params": _X264}, "milliseconds": _SQUARES},
        ["pyav-seek", "pyav-sequential"],
    ),
    "ten_bit.mp4": (
        {"size": 128, "options": {"x264-params": _X264}, "pixel_format": "yuv420p10le"},
        ["pyav-seek", "pyav-sequential"],
    ),
    "hevc_open.mp4": (
        {"codec": "libx265", "options": {"x265-params": f"{_X265}:open-gop=1"}},
        ["pyav-sequential", "pyav-sequential"],
    ),
    "hevc_closed.mp4": (
        {"codec": "libx265", "options": {"x265-params": f"{_X265}:open-gop=0"}},
        ["pyav-seek", "pyav-sequential"],
    ),
    "hevc_leading.mp4": (
        {"codec": "libx265", "options": {"x265-params": f"{_X265}:open-gop=0:radl=2"}},
        ["pyav-seek", "pyav-sequential"],
    ),
    "hevc_layers.mp4": (
        {"codec": "libx265", "options": {"x265-params": f"{_X265}:open-gop=0:temporal-layers=3:b-adapt=0"}},
        ["pyav-seek", "pyav-sequential"],
    ),
    "mpeg4.mp4": ({"codec": "mpeg4", "options": {"g": "10", "bf": "2"}}, ["pyav-seek", "pyav-sequential"]),
    "mpeg4.avi": ({"codec": "mpeg4", "options": {"g": "10", "bf": "2"}}, ["pyav-sequential"]),
    "vp8.webm": (
        {"codec": "libvpx", "options": _VPX},
        ["pyav-seek", "pyav-sequential"],
    ),
    "vp9.webm": ({"codec": "libvpx-vp9", "options": _VPX}, ["pyav-seek", "pyav-sequential"]),
    "mpeg2.ts": ({"codec": "mpeg2video", "options": {"g": "10", "bf": "2"}}, ["pyav-sequential"] * 2),
    "h264.ts": ({"options": {"x264-params": _X264}}, ["pyav-sequential"] * 2),
    "h264.flv": ({"options": {"x264-params": _X264}}, ["pyav-sequential"] * 2),
    "plain_mpeg4.avi": ({"codec": "mpeg4", "options": {"g": "10"}}, ["pyav-sequential"] * 2),
    "mjpeg.mkv": ({"codec": "mjpeg", "pixel_format": "yuvj420p"}, ["pyav-sequential"] * 2),
}


@pytest.mark.parametrize("name", CASES)
def test_every_way_gives_the_frame_that_was_asked_for(tmp_path: Path, name: str) -> None:
    how, ways = CASES[name]
    path = write_video(tmp_path / name, **how)
    with native_log() as log:
        sources = list(frame_sources(str(path), log))
        assert [source.decoder for source in sources] == ways
        for source in sources:
            expected = np.array(how.get("milliseconds") or range(0, 40 * 40, 40)) / 1000
            np.testing.assert_allclose(source.timestamps_s, expected, atol=2e-3)
            rng = random.Random(name)
            for _ in range(8):
                wanted = sorted(rng.sample(range(40), rng.randint(1, 6)))
                frames = list(source.frames(wanted))
                assert [frame.index for frame in frames] == wanted
                assert [read_number(frame.rgb) for frame in frames] == wanted
        some = [[frame.rgb for frame in source.frames([3, 11, 29])] for source in sources]
        for other in some[1:]:
            np.testing.assert_array_equal(other, some[0])


@pytest.mark.parametrize("name", ["deep_pyramid.mp4", "hevc_closed.mp4", "hevc_layers.mp4"])
def test_frames_that_nothing_needs_are_not_decoded(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    how, _ = CASES[name]
    path = write_video(tmp_path / name, **how)
    decoded: list[int | None] = []

    def counted(packet: Any) -> list[Any]:
        decoded.append(packet.pts)
        return frames_of(packet)

    with native_log() as log:
        source = next(frame_sources(str(path), log))
        monkeypatch.setattr(pyav_frames, "frames_of", counted)
        (frame,) = source.frames([8])  # of a group of ten
    assert read_number(frame.rgb) == 8
    assert len(decoded) <= 6


def test_only_pictures_of_the_highest_temporal_layer_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if all were sub-layer non-reference pictures: a lower layer's may be referenced by a higher one."""
    path = write_video(tmp_path / "layers.mp4", **CASES["hevc_layers.mp4"][0])

    def reader(codec: str, extradata: bytes) -> probe.PacketReader:
        read = packet_reader(codec, extradata)
        assert read is not None
        return lambda data: replace(read(data), unreferenced=True)

    monkeypatch.setattr(probe, "packet_reader", reader)
    index = probe.probe_video(str(path)).index
    assert index is not None
    assert len(index.unreferenced) == 16  # of 40, in groups of ten
    assert not set(index.starts) & index.unreferenced


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotated_videos_come_upright(tmp_path: Path, rotation: int) -> None:
    """The grid lies on its side in the file, so reading a number means that it was turned the right way."""
    path = write_video(tmp_path / "rotated.mp4", size=128, frames=5, rotation=rotation)
    with native_log() as log:
        frame = next(iter(next(frame_sources(str(path), log)).frames([3])))
    np.testing.assert_allclose(frame.rgb, np.rot90(number_picture(3, 128), rotation // 90), atol=20)


def test_a_number_picture_that_was_mixed_or_turned_reads_as_none() -> None:
    assert read_number(number_picture(181, 64)) == 181
    mixed = np.vstack([number_picture(3, 64)[:32], number_picture(4, 64)[32:]])
    with pytest.raises(ValueError, match="no number"):
        read_number(mixed)
