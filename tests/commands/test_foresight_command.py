"""Table D by command: a head is trained on whole frames and read by the evaluation."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from deltacache.cli import app
from deltacache.schemas.errors import DeltacacheError

SEEN = ["--backbone", "tiny", "--layers", "0,1", "--image-size", "32x64", "--device", "cpu"]


def test_a_head_and_its_evaluation(deltacache, mini_benchmarks: Path, tmp_path: Path) -> None:
    root, head, out = mini_benchmarks / "cityscapes", tmp_path / "head", tmp_path / "results"
    flags = ["--preset", "tiny", "--split", "val", "--steps", 20]
    deltacache("train-foresight-head", "segmentation", root, head, *SEEN, *flags).done()
    scored = [*SEEN, "--head", head, "--examples", 1]
    printed = deltacache("evaluate-foresight", root, out, *scored).done().stdout
    assert "Mean IoU of movable classes" in printed
    assert "was trained on the val split: its numbers are not comparable" in " ".join(printed.split())
    assert len(list((out / "examples").glob("*.npz"))) == 1
    page = (out / "report.html").read_text()
    assert "trained on the val split, from " in page
    deltacache("report", out, "--out", tmp_path / "again.html").done()
    assert (tmp_path / "again.html").read_text() == page
    assert "Head for segmentation" in deltacache("inspect", out).done().stdout
    assert "foresight: no difference beyond rounding for" in deltacache("compare", out, out).done().stdout
    rows = pq.read_table(out / "metrics.parquet").to_pylist()
    values = {(row["method"], row["metric"], row["horizon"]): row["value"] for row in rows}
    assert values["present", "miou", 1] > values["copy_last", "miou", 3] > 0
    assert {row["backbone"].rpartition(", ")[2] for row in rows} == {"layers 0,1"}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--image-size", "32x64x3"], "give the side of a square"),
        (["--layers", "a"], "layers"),
        (["--depth", "maps"], "give --depth-head and --depth, or neither"),
        (["--horizons", "0"], "horizon 0 is not after the context"),
    ],
)
def test_wrong_usage_is_exit_code_2(flags: list[str], words: str, tmp_path: Path) -> None:
    asked = ["evaluate-foresight", str(tmp_path), str(tmp_path / "no"), *SEEN, *flags]
    outcome = CliRunner().invoke(app, asked)
    assert outcome.exit_code == 2
    assert words in " ".join(outcome.output.split())
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("command", [["train-head", "cityscapes"], ["train-foresight-head", "segmentation"]])
def test_heads_train_longer_as_far_as_their_decay_reaches(
    command: list[str], mini_benchmarks: Path, tmp_path: Path
) -> None:
    size = (
        SEEN if "foresight" in command[0] else ["--backbone", "tiny", "--image-size", "64", "--device", "cpu"]
    )
    whole = [*command, str(mini_benchmarks / "cityscapes"), str(tmp_path / "head"), *size]
    whole += ["--preset", "tiny", "--split", "val", "--batch-size", "1"]
    run = CliRunner().invoke
    begun = run(app, [*whole, "--steps", "2", "--warmup-steps", "1", "--decay-steps", "4"])
    assert begun.exit_code == 0, begun.output
    assert "2 steps: a warm-up of 1 step to 0.02, then a cosine to 0 at 4" in begun.output
    longer = run(app, [*whole, "--steps", "4", "--resume"])
    assert longer.exit_code == 0, longer.output
    assert (tmp_path / "head/checkpoints/step-00000004").is_dir()
    with pytest.raises(DeltacacheError, match="has 4 steps, and its rate goes down to 0 at step 4"):
        run(app, [*whole, "--steps", "8", "--resume"], catch_exceptions=False)
