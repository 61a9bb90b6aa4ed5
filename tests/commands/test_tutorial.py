"""``docs/tutorial.md``: every line of it is run, and gives the numbers that it prints."""

import re
import shlex
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from command_runs import Command

PAGE = (Path(__file__).parents[2] / "docs" / "tutorial.md").read_text(encoding="utf-8")
METHODS = {
    "copy of the last frame": ("copy_last", "single"),
    "DeltaTok, closed loop": ("deltatok", "single"),
    "world, best of 20": ("deltaworld", "best"),
    "world, mean of 20": ("deltaworld", "mean"),
}


def test_every_line_of_the_tutorial(
    deltacache: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    printed = dict[str, str]()
    blocks = re.findall(r"^```(.*?)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert {kind for kind, _ in blocks} == {"sh", "python"}, "nothing else is run"
    for kind, text in blocks:
        if kind == "python":
            exec(compile(text, "docs/tutorial.md", "exec"), {})
            continue
        for line in text.splitlines():
            program, command, *arguments = shlex.split(line)
            assert program == "deltacache"
            outcome = deltacache(command, *arguments).done()
            printed[command] = outcome.stdout + outcome.stderr
    assert "10 clips of 10 videos" in printed["extract-features"]
    distances = re.search(
        r"nearest one is ([\d.]+) from the truth, the last seen frame ([\d.]+)", printed["predict"]
    )
    promised = re.search(r"about ([\d.]+), and how far the last seen frame is,\s+about ([\d.]+\d)", PAGE)
    assert distances
    assert promised
    assert [*map(float, distances.groups())] == pytest.approx([*map(float, promised.groups())], rel=0.5)
    assert Path("report.html").is_file()
    assert {"index.html", "futures.gif"} <= {path.name for path in Path("futures").iterdir()}

    found = {
        (run, row["method"], row["aggregation"], row["horizon"]): row["value"]
        for run in ("seen", "unseen")
        for row in pq.read_table(f"{run}/metrics.parquet").to_pylist()
        if row["metric"] == "smooth_l1"
    }
    columns = [(run, horizon) for run in ("seen", "unseen") for horizon in (1, 3)]
    for label, (method, aggregation) in METHODS.items():
        row = re.search(rf"^\| {label} \| (.*) \|$", PAGE, re.MULTILINE)
        assert row, label
        expected = [float(cell) for cell in row[1].split(" | ")]
        measured = [found[run, method, aggregation, horizon] for run, horizon in columns]
        assert measured == pytest.approx(expected, rel=0.25), label
    for horizon in (1, 3):
        assert (
            found["seen", "deltaworld", "mean", horizon] < found["seen", "copy_last", "single", horizon] / 2
        )
        assert (
            found["unseen", "deltaworld", "mean", horizon] > found["unseen", "copy_last", "single", horizon]
        )
