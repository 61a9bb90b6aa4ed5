"""``extract-features`` on real videos, through a real Ray, as a user runs it."""

import gc
import hashlib
import json
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset as wds
import zarr

from deltacache.pipeline.datasets.dataset import open_dataset
from warm_process import start_command

FLAGS = ("--backbone", "tiny", "--image-size", "256", "--views", "2", "--videos-per-shard", "4")

ODD = {
    "animated.gif": None,
    "audio_only.mp4": {"no_video_stream"},
    "av1_640x360.mkv": None,
    "corrupted_13of50.mp4": {"corrupt_stream", "truncated"},
    "editlist_discard_first_keyframe.mp4": None,
    "empty.mp4": {"empty_file"},
    "header_only_5544claimed.mp4": {"truncated", "no_frames", "corrupt_stream"},
    "hevc_10bit_bt2020.mp4": None,
    "hevc_opengop_seekbug.mp4": None,
    "html_saved_as.mp4": {"not_a_video"},
    "lowfps_5fps_mpeg4.mp4": None,
    "multistream_2video_nasa.mp4": None,
    "rot180_568x320.mov": None,
    "rot90_568x320.mov": None,
    "short_32frames_kinetics.mp4": None,
    "start_8.33s.mp4": None,
    "tiny_1x1_yuv444_5frames.mp4": {"too_small"},
    "truncated_mkv.mkv": None,
    "truncated_moov_first.mp4": {"truncated", "corrupt_stream"},
    "vfr_traffic_camera.mp4": None,
    "vp9_no_duration.webm": None,
    "vp9_odd_321x241.mp4": None,
}
"""Reason for which a file must be refused; None where it must be extracted."""


def contents(root: Path) -> dict[str, str]:
    """SHA-256 of every file that a dataset's numbers lie in."""
    names = ["dataset.json", "plan.parquet", "index.parquet", "failures.parquet", "shards", "receipts"]
    files = [path for name in names for path in _files(root / name)]
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


def test_all_ordinary_clips_are_extracted(real_features: Path) -> None:
    dataset = open_dataset(real_features, "features")
    assert len(dataset) == 24
    assert dataset.failures.num_rows == 0
    assert dataset.card.patch_grid == (16, 16)
    for position in range(len(dataset)):
        clip = dataset.read(position)
        assert clip.patch_tokens.shape == (8, 256, dataset.card.hidden_size)
        assert np.isfinite(clip.patch_tokens).all()
        assert clip.patch_tokens.astype(np.float32).std() > 0.1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_plain_webdataset_reads_the_shards(real_features: Path) -> None:
    dataset = open_dataset(real_features, "features")
    tars = sorted(map(str, (real_features / "shards").glob("*.tar")))
    assert len(tars) == 3
    samples = list(wds.WebDataset(tars, shardshuffle=False, empty_check=False).decode())
    gc.collect()  # webdataset leaves its tars open: let that be noticed here, where it is expected
    assert {sample["__key__"] for sample in samples} == set(dataset.clip_ids)
    first = dataset.read(dataset.clip_ids.index(samples[0]["__key__"]))
    np.testing.assert_array_equal(samples[0]["patch_tokens.npy"], first.patch_tokens)
    np.testing.assert_array_equal(samples[0]["timestamps_s.npy"], first.timestamps_s)


def test_a_finished_run_is_a_noop(
    deltacache, real_videos: Path, real_features: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*_: object) -> None:
        raise AssertionError("there is nothing to do, so no process is needed")

    before = {path: path.stat().st_mtime_ns for path in _files(real_features)}
    monkeypatch.setattr("deltacache.pipeline.jobs.offline.cluster", started)
    outcome = deltacache("extract-features", real_videos / "fixture", real_features, *FLAGS).done()
    assert "nothing to do" in outcome.stdout
    assert {path: path.stat().st_mtime_ns for path in _files(real_features)} == before


def test_killed_and_started_again_with_other_workers_gives_the_same_bytes(
    deltacache_on_ray, real_videos: Path, real_features: Path, tmp_path: Path
) -> None:
    out = tmp_path / "features"
    with start_command(
        "extract-features", real_videos / "fixture", out, *FLAGS, "--decoders", "1"
    ) as process:
        deadline = time.monotonic() + 120
        while not any((out / "receipts").glob("*.json")) and time.monotonic() < deadline:
            assert process.poll() is None, "the command ended before it committed a shard"
            time.sleep(0.02)
        process.kill()
        process.wait()
    finished = len(list((out / "receipts").glob("*.json")))
    assert 1 <= finished < 3, "killed too late: nothing was left to do"
    command = ("extract-features", real_videos / "fixture", out, *FLAGS, "--decoders", "2")
    outcome = deltacache_on_ray(*command).done()
    assert "24 clips of 12 videos" in outcome.stdout
    assert contents(out) == contents(real_features)
    assert not [path for path in _files(out) if "tmp" in path.name or "part" in path.name]


def test_without_ray_the_bytes_are_the_same(
    deltacache, real_videos: Path, real_features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--encoders 0``, which most tests of commands rely on."""

    def started(*_: object, **__: object) -> None:
        raise AssertionError("--encoders 0 needs no Ray")

    monkeypatch.setattr("deltacache.pipeline.cluster.session.ray_running", started)
    out = tmp_path / "features"
    done = deltacache("extract-features", real_videos / "fixture", out, *FLAGS).done()
    assert "extract-features: this process decodes and encodes on the CPU, without Ray" in done.stdout
    assert contents(out) == contents(real_features)
    throughput = json.loads((out / "throughput.json").read_text())
    assert (throughput["decoders"], throughput["encoders"], throughput["shards"]) == (1, 1, 3)
    assert all(0 <= share <= 1 for share in throughput["busy"].values())


def test_zarr_holds_the_same_numbers(deltacache, real_videos: Path, real_features: Path, tmp_path) -> None:
    out = tmp_path / "features"
    deltacache("extract-features", real_videos / "fixture", out, *FLAGS, "--store", "zarr").done()
    tar, zarrs = open_dataset(real_features, "features"), open_dataset(out, "features")
    assert tar.card.fingerprint == zarrs.card.fingerprint
    assert tar.clip_ids == zarrs.clip_ids
    group = zarr.open_group(str(out / "shards"), mode="r")
    plain = {
        name: np.asarray(group[f"{shard}/patch_tokens"][row])
        for name, shard, row in zip(
            zarrs.clip_ids,
            (f"shard-{shard}" for shard in zarrs.index["shard"].to_pylist()),
            zarrs.index["row"].to_pylist(),
            strict=True,
        )
    }
    for position, name in enumerate(tar.clip_ids):
        expected = tar.read(position)
        np.testing.assert_array_equal(zarrs.read(position).patch_tokens, expected.patch_tokens)
        np.testing.assert_array_equal(plain[name], expected.patch_tokens)


def test_every_odd_file_ends_as_it_must(deltacache, real_videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "features"
    deltacache(
        "extract-features", real_videos / "odd", out, "--backbone", "tiny", "--image-size", 64,
        "--videos-per-shard", 8, "--max-failed-fraction", 1,
    ).done()  # fmt: skip
    failures = {row["video_uri"]: row for row in pq.read_table(out / "failures.parquet").to_pylist()}
    extracted = set(pq.read_table(out / "index.parquet")["video_uri"].to_pylist())
    assert not extracted & set(failures)
    for name, reasons in ODD.items():
        if reasons is None:
            assert name in extracted, failures.get(name)
        else:
            assert failures[name]["reason"] in reasons, failures[name]
            assert failures[name]["message"]


def test_one_frame_and_low_rate_are_refused_when_duplicates_are(
    deltacache, real_videos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "features"
    outcome = deltacache(
        "extract-features", real_videos / "odd", out, "--backbone", "tiny", "--image-size", 64,
        "--no-duplicates", "--max-failed-fraction", 0.1,
    )  # fmt: skip
    outcome.refused("--max-failed-fraction 0.1", "failures.parquet")
    reasons = {row["video_uri"]: row["reason"] for row in pq.read_table(out / "failures.parquet").to_pylist()}
    assert reasons["oneframe_h264_320x240.mp4"] == "too_short"
    assert reasons["oneframe_real_720p.mp4"] == "too_short"
    assert len(open_dataset(out)) > 0, "what was finished is kept"
