"""A full and a read-only disk: one readable error, and the rerun finishes."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_runs import Command

from chaos import contents

FLAGS = ("--backbone", "tiny", "--image-size", "64", "--videos-per-shard", "1", "--views", "4")


def remount(disk: Path, options: str) -> None:
    """Once nobody writes there: the encoders of a command that has ended are killed, which takes a moment."""
    command = ["mount", "-o", f"remount,{options}", str(disk)]
    deadline = time.monotonic() + 60
    while subprocess.run(command, capture_output=True, check=False).returncode:
        assert time.monotonic() < deadline, command
        time.sleep(0.1)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 500 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(
        ["umount", "--lazy", str(folder)], check=True
    )  # Ray's workers, which go on, may stand in it


def test_a_full_and_a_read_only_disk(
    deltacache: Command, deltacache_on_ray: Command, real_videos: Path, disk: Path, tmp_path: Path
) -> None:
    out, whole = disk / "features", tmp_path / "whole"
    command = ("extract-features", real_videos / "fixture")
    deltacache(*command, whole, *FLAGS).done()
    deltacache_on_ray(*command, out, *FLAGS).refused("No space left", "Make room", str(out))
    kept = {path.name: path.stat().st_mtime_ns for path in (out / "receipts").glob("[0-9]*.json")}
    assert 0 < len(kept) < 12
    remount(disk, "size=50m")
    remount(disk, "ro")
    deltacache(*command, out, *FLAGS).refused("Read-only file system", str(out))
    remount(disk, "rw")
    deltacache(*command, out, *FLAGS).done()
    assert contents(out) == contents(whole)
    for name, written in kept.items():
        assert (out / "receipts" / name).stat().st_mtime_ns == written
