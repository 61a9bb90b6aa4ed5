"""Running ``extract-features`` again: on more videos, more views, other settings, replaced and mended videos."""

import os
import shutil
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_runs import Command

from chaos import contents
from warm_process import start_script

FLAGS = (
    "--backbone",
    "tiny",
    "--image-size",
    "32",
    "--videos-per-shard",
    "2",
    "--max-failed-fraction",
    "0.5",
)


NAMES = (
    "yoga_568x320.mp4",
    "kinetics_armwrestle_mmaction2.mp4",
    "asl_walk_fullrange.mkv",
    "rabbit_vp8.webm",
)


@pytest.fixture
def clips(real_videos: Path) -> list[Path]:
    """Small real videos."""
    return [real_videos / "fixture" / name for name in NAMES]


@pytest.fixture(scope="module")
def extracted(deltacache: Command, real_videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``videos``, a folder of copies of the first three, and ``features`` made of them."""
    root = tmp_path_factory.mktemp("extracted")
    (root / "videos").mkdir()
    for name in NAMES[:3]:
        shutil.copy(real_videos / "fixture" / name, root / "videos")
    deltacache("extract-features", root / "videos", root / "features", *FLAGS).done()
    return root


@pytest.fixture
def videos(tmp_path: Path, extracted: Path) -> Path:
    """Copies, of the same times of change."""
    return shutil.copytree(extracted / "videos", tmp_path / "videos")


@pytest.fixture
def features(tmp_path: Path, extracted: Path) -> Path:
    """A copy of what was made of them."""
    return shutil.copytree(extracted / "features", tmp_path / "features")


def receipts(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (out / "receipts").glob("*.json")}


def tokens(out: Path) -> dict[str, str]:
    return {name: digest for name, digest in contents(out).items() if name.endswith(".tar")}


def failures(out: Path) -> dict[str, str]:
    rows = pq.read_table(out / "failures.parquet").to_pylist()
    return {row["video_uri"]: row["reason"] for row in rows}


def test_videos_inside_parquet_files_run_again_as_complete(
    deltacache: Command, clips: list[Path], tmp_path: Path
) -> None:
    """One file, then the folder that it lies in with another, as Hugging Face datasets have them; then a glob."""
    data, out = tmp_path / "data", tmp_path / "features"
    data.mkdir()
    files = [data / f"train-0000{number}-of-00002.parquet" for number in range(2)]
    for file, clip in zip(files, (clips[0], clips[3]), strict=True):
        video = {"bytes": clip.read_bytes(), "path": clip.name}
        pq.write_table(pa.Table.from_pylist([{"video": video, "label": 1}]), file)
    for source, videos in ((files[0], 1), (files[0], 1), (data, 2), (f"{data}/*.parquet", 2)):
        before = receipts(out)
        said = deltacache("extract-features", source, out, *FLAGS).done().stdout
        assert ("already complete, nothing to do" in said) == (len(before) == videos)
        assert len(receipts(out)) == videos
        assert receipts(out).items() >= before.items()
    assert pq.read_table(out / "index.parquet").column("video_uri").to_pylist() == [
        f"{file.name}/0/{clip.name}" for file, clip in zip(files, (clips[0], clips[3]), strict=True)
    ]


def test_new_videos_and_views_are_computed_alone_and_settings_stay(
    deltacache: Command, videos: Path, features: Path, clips: list[Path]
) -> None:
    out = features
    first, before = receipts(out), contents(out)
    again = deltacache("extract-features", videos, out, *FLAGS).done()
    assert "already complete, nothing to do" in again.stdout
    assert contents(out) == before
    shutil.copy(clips[3], videos)
    more = deltacache("extract-features", videos, out, *FLAGS, "--views", 2).done()
    assert "8 clips of 4 videos" in more.stdout
    assert {name: time for name, time in receipts(out).items() if name in first} == first
    throughput = (out / "throughput.json").read_text()
    assert '"clips": 5' in throughput  # a second view of three, two of the new one
    refused = deltacache("extract-features", videos, out, *FLAGS, "--views", 2, "--seed", 7)
    refused.refused("sampling.seed is 0, asked for 7")
    (videos / clips[3].name).unlink()
    fewer = deltacache("extract-features", videos, out, *FLAGS, "--views", 2).done()
    assert (
        f"1 planned videos are no longer in {videos}, or excluded now, such as {clips[3].name}"
        in fewer.stdout
    )


def test_a_replaced_video_is_noticed_and_made_anew_when_asked(
    deltacache: Command, videos: Path, features: Path, clips: list[Path], tmp_path: Path
) -> None:
    out = features
    before = contents(out)
    for video in videos.iterdir():
        os.utime(video)  # touched, not changed
    assert "nothing to do" in deltacache("extract-features", videos, out, *FLAGS).done().stdout
    victim = videos / clips[0].name
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1  # as many bytes as before
    victim.write_bytes(data)
    refused = deltacache("extract-features", videos, out, *FLAGS)
    refused.refused(victim.name, "changed since", "--changed-videos recompute")
    assert contents(out) == before
    shutil.copy(clips[3], victim)
    deltacache("extract-features", videos, out, *FLAGS).refused(victim.name, "changed since")
    deltacache("extract-features", videos, out, *FLAGS, "--changed-videos", "recompute").done()
    fresh = tmp_path / "fresh"
    deltacache("extract-features", videos, fresh, *FLAGS).done()
    assert tokens(out) == tokens(fresh)
    assert contents(out) != before
    assert "no damage" in deltacache("verify", out).done().stdout


def test_a_mended_video_joins_its_shard_with_retry_failed(
    deltacache: Command, videos: Path, extracted: Path, clips: list[Path], tmp_path: Path
) -> None:
    out, fresh = tmp_path / "features", extracted / "features"
    victim = videos / clips[1].name
    whole = victim.read_bytes()
    victim.write_bytes(whole[: len(whole) // 3])
    deltacache("extract-features", videos, out, *FLAGS).done()
    assert set(failures(out)) == {victim.name}
    still = deltacache("extract-features", videos, out, *FLAGS, "--retry-failed").done()
    assert set(failures(out)) == {victim.name}, still
    victim.write_bytes(whole)
    deltacache("extract-features", videos, out, *FLAGS, "--retry-failed").done()
    assert failures(out) == {}
    assert sorted(tokens(out).values()) == sorted(tokens(fresh).values())
    assert "no damage" in deltacache("verify", out).done().stdout
    assert "nothing to do" in deltacache("extract-features", videos, out, *FLAGS).done().stdout


def test_a_second_command_on_the_same_output_is_refused_until_the_first_is_dead(
    deltacache: Command, videos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "features"
    hold = (
        "import time; from deltacache.pipeline.storage.locking import dataset_lock\n"
        f"with dataset_lock({str(out)!r}, 'extract-features') as lock:\n"
        "    lock.update({'clips': 3, 'planned_clips': 9, 'clips_per_s': 1.5, 'seconds_left': 4.0,"
        " 'failed_videos': 1})\n"
        "    print('held', flush=True); time.sleep(600)"
    )
    log = tmp_path / "held"
    with start_script(hold, stdout=log) as holder:
        deadline = time.monotonic() + 60
        while not log.read_text():
            assert holder.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        deltacache("extract-features", videos, out, *FLAGS).refused("extract-features", str(holder.pid))
        holder.kill()
        holder.wait()
    deltacache("extract-features", videos, out, *FLAGS).done()
