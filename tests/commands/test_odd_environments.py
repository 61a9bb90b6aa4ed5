"""Environments in which Ray alone does not start, or leaves something behind that disturbs the next command."""

import os
import subprocess
import sys
from pathlib import Path


def test_a_long_tmpdir_a_home_that_cannot_be_written_and_a_locale_without_umlauts(
    real_videos: Path, tmp_path: Path
) -> None:
    videos, temporary, out = tmp_path / "vidéos", tmp_path / ("x" * 100), tmp_path / "merkmäle"
    videos.mkdir()
    temporary.mkdir()
    (videos / "Häschen.webm").symlink_to(real_videos / "fixture" / "rabbit_vp8.webm")
    strange = {
        **{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},  # names are ASCII
        "TMPDIR": str(temporary),  # sockets may have paths of 107 bytes
        "HOME": "/proc/1",
    }
    flags = ["--backbone", "tiny", "--image-size", "32", "--decoders", "1", "--encoders", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "deltacache", "extract-features", videos, out, *flags],
        env={**os.environ, **strange},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"{out}: 1 clip of 1 video" in done.stdout


def test_a_local_run_leaves_no_token_behind(tmp_path: Path) -> None:
    """Every ``ray start`` would find it and ask for it from then on."""
    script = (
        "import os, ray\n"
        "from deltacache.pipeline.cluster.session import ray_running\n"
        "with ray_running(None, 1):\n"
        "    print(os.environ['RAY_AUTH_MODE'], len(os.environ['RAY_AUTH_TOKEN']))\n"
        "print(os.environ.get('RAY_AUTH_MODE'), os.environ.get('RAY_AUTH_TOKEN'))\n"
    )
    bare = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**bare, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.split() == ["token", "64", "None", "None"]
    assert list(tmp_path.iterdir()) == []
