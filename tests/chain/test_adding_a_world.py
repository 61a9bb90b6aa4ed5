"""The example of docs/worlds.md, as a reader would use it: one file, one preset, two commands."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from trained_systems import TrainedSystems

import deltacache

PAGE = Path(__file__).parents[2] / "docs" / "worlds.md"


def _block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return found


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package with the file of the page in it."""
    root = tmp_path / "src"
    shutil.copytree(
        Path(deltacache.__file__).parent, root / "deltacache", ignore=shutil.ignore_patterns("__pycache__")
    )
    (root / "deltacache/models/worlds/recurrent.py").write_text(_block("python"))
    return root


def test_the_example_has_at_most_40_lines_of_code() -> None:
    lines = [line for line in _block("python").splitlines() if line.strip()]
    assert len(lines) <= 40


def test_one_file_and_one_preset(package: Path, systems: TrainedSystems, tmp_path: Path) -> None:
    """It trains, its checkpoint says what it is, and it has rows in the table."""
    (tmp_path / "recurrent.yaml").write_text(_block("yaml"))

    def run(*arguments: object) -> str:
        command = [sys.executable, "-m", "deltacache", *map(str, arguments)]
        done = subprocess.run(  # noqa: PLW1510 - asserted below
            command,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(package)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    paths = systems.paths
    run(
        "train-world",
        paths.deltas("delta"),
        "world",
        "--preset",
        "recurrent.yaml",
        "--steps",
        20,
        "--device",
        "cpu",
    )
    assert "Recurrent" in run("inspect", "world")
    models = ("--tokenizer", paths.tokenizer("delta"), "--world", "world")
    run("evaluate", "results", "--data", f"clips={systems.test}", *models)
    table = pq.read_table(tmp_path / "results/metrics.parquet")
    rows = table.filter(pc.equal(table["method"], "recurrent"))
    assert set(rows["aggregation"].to_pylist()) == {"single"}
    assert set(rows["horizon"].to_pylist()) == {1, 3}
