"""The example of docs/worlds.md, as a reader would use it: one file, one preset, two commands."""

import json
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

END = "--- end of a command ---"
COMMANDS = f"""
import json, sys
from deltacache.cli import main

for arguments in json.loads(sys.argv[1]):
    sys.argv = ["deltacache", *map(str, arguments)]
    try:
        main()
    except SystemExit as ended:
        if ended.code:
            raise
    print({END!r}, flush=True)
"""
"""The commands one after another in one process, as it takes seconds to import the copy of the package."""
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

    models = ("--tokenizer", systems.paths.tokenizer("delta"), "--world", "world")
    deltas, flags = (
        systems.paths.deltas("delta"),
        ("--preset", "recurrent.yaml", "--steps", 20, "--device", "cpu"),
    )
    commands = [
        ("train-world", deltas, "world", *flags),
        ("inspect", "world"),
        ("evaluate", "results", "--data", f"clips={systems.test}", *models),
    ]
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(commands, default=str)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(package)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    _, inspected, _ = done.stdout.split(END)[:3]
    assert "Recurrent" in inspected
    table = pq.read_table(tmp_path / "results/metrics.parquet")
    rows = table.filter(pc.equal(table["method"], "recurrent"))
    assert set(rows["aggregation"].to_pylist()) == {"single"}
    assert set(rows["horizon"].to_pylist()) == {1, 3}
