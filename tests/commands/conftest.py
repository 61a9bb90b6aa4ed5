"""Runs the installed command as a user would: a process, its exit code, what it printed."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Outcome:
    """What a finished command left behind."""

    code: int
    stdout: str
    stderr: str

    def refused(self, *words: str) -> None:
        """Exit 1 or 2, one message with these words, no traceback."""
        assert self.code in (1, 2), self
        assert "Traceback" not in self.stderr, self.stderr
        for word in words:
            assert word in self.stderr, (word, self.stderr)

    def done(self) -> "Outcome":
        """Exit 0."""
        assert self.code == 0, self
        return self


Command = Callable[..., Outcome]


def run_deltacache(*arguments: object, timeout: float = 240) -> Outcome:
    """Run ``deltacache`` with the arguments in a fresh process."""
    command = [sys.executable, "-m", "deltacache", *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    return Outcome(finished.returncode, finished.stdout, finished.stderr)


@pytest.fixture(scope="session")
def deltacache() -> Command:
    """The command."""
    return run_deltacache


@pytest.fixture(scope="session")
def real_features(deltacache: Command, real_videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 12 ordinary clips at 256 px, 8 frames, 2 views, in tar shards of 4 videos."""
    out = tmp_path_factory.mktemp("real") / "features"
    deltacache(
        "extract-features", real_videos / "fixture", out, "--backbone", "tiny", "--image-size", 256,
        "--views", 2, "--videos-per-shard", 4,
    ).done()  # fmt: skip
    return out
