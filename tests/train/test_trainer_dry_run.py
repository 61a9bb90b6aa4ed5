"""``--dry-run`` of all trainers: what a training would take, and nothing is written."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cases import Case
from drawn import GRID, HIDDEN, tokenizer_config, world_config

from deltacache.schemas.configs import FramesConfig, head_preset, rgb_preset
from deltacache.schemas.errors import DeltacacheError
from deltacache.schemas.foresight import FrameFeatureConfig, foresight_head
from deltacache.train.heads.foresight import train_foresight_head
from deltacache.train.heads.setup import HeadRequest
from deltacache.train.heads.training import train_head, train_rgb_decoder
from deltacache.train.setup import TrainingRequest
from deltacache.train.workers.launch import launch
from deltacache.train.workers.trainable import Workers
from reporters import Lines


def said_by(reporter: Lines, out: Path, kind: str) -> str:
    """All lines, the common ones of which are checked."""
    said = "\n".join(reporter.said)
    assert not out.exists()
    assert f"train {kind}: this was a dry run, nothing was written to {out}" in said
    for line in (
        r"parameters: [\d.,]+",
        r"effective batch [\d,]+ \(batch .*\): a pass takes [\d.]+ [KMG]iB of the [\d.]+ [MG]iB that are free on cpu",
        r"memory at its peak: [\d.]+ [KMG]iB on cpu",
        r"\d+ steps of [\d.]+ m?s.*: [\d.]+ (s|min) on this machine",
        r"reads [\d.]+ [kM]B of data",
    ):
        assert re.search(rf"^train {kind}: {line}", said, re.MULTILINE), (line, said)
    assert not reporter.stages
    return said


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_of_a_model(case: Case, workers: int, tmp_path: Path) -> None:
    out, reporter = tmp_path / "out", Lines()
    build: Any = tokenizer_config if case.kind == "tokenizer" else world_config
    request = TrainingRequest(case.root, out, build(steps=50, batch_size=8), False, "cpu", dry_run=True)
    launch("tokenizer" if case.kind == "tokenizer" else "world", request, reporter, Workers(workers))
    said = said_by(reporter, out, case.kind)
    assert f"effective batch {8 * workers} (batch 8 x accumulation 1 x workers {workers})" in said
    assert ("with 2 workers that share this CPU" in said) == (workers == 2)
    tokens = 12 * 6 * HIDDEN * (GRID[0] * GRID[1] if case.kind == "tokenizer" else 1)
    assert f"reads {2 * tokens / 1e3:.3g} kB of data" in said  # float16, once: they fit in memory


@pytest.mark.slow
def test_of_a_run_to_go_on_with(case: Case, tmp_path: Path) -> None:
    """The folder stays as it is, to the byte and the time."""
    out, reporter = tmp_path / "out", Lines()
    case.run(out, steps=3)
    before = {path: path.stat().st_mtime_ns for path in [out, *out.rglob("*")]}
    build: Any = tokenizer_config if case.kind == "tokenizer" else world_config
    request = TrainingRequest(case.root, out, build(steps=10), True, "cpu", dry_run=True)
    launch("tokenizer" if case.kind == "tokenizer" else "world", request, reporter)
    assert any(" 7 steps of " in line for line in reporter.said)
    assert {path: path.stat().st_mtime_ns for path in [out, *out.rglob("*")]} == before
    refused = replace(request, resume=False)
    with pytest.raises(DeltacacheError, match="already holds checkpoints"):
        launch("tokenizer" if case.kind == "tokenizer" else "world", refused, reporter)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["vspw", "kitti", "rgb", "foresight"])
def test_of_a_head(target: str, mini_benchmarks: Path, tmp_path: Path) -> None:
    out, reporter = tmp_path / "out", Lines()
    if target == "foresight":
        features = {"backbone": "tiny", "image_size": "32x64", "layers": None, "pca": None}
        config = foresight_head("segmentation", "tiny", FrameFeatureConfig(**features), None)
        config = config.model_copy(update={"split": "val"})
        root = mini_benchmarks / "cityscapes"
        train_foresight_head(root, out, config, resume=False, device="cpu", reporter=reporter, dry_run=True)
    else:
        root = mini_benchmarks / ("vspw/data/101_clip1" if target == "rgb" else target)
        request = HeadRequest(root, out, "tiny", False, "cpu", dry_run=True)
        frames = FramesConfig(image_size=32, split="train" if target == "rgb" else "val")
        if target == "rgb":
            train_rgb_decoder(request, rgb_preset("tiny").model_copy(update={"frames": frames}), reporter)
        else:
            train_head(request, head_preset(target, "tiny").model_copy(update={"frames": frames}), reporter)
    said = said_by(reporter, out, "rgb_decoder" if target == "rgb" else "head")
    computed = re.search(r", and ([\d,]+) frames through the backbone", said)
    listed = re.search(r"([\d,]+) (labelled|whole) frames of|: ([\d,]+) pictures", said)
    assert computed
    assert listed
    assert int(computed[1]) in {
        factor * int(listed[1] or listed[3]) for factor in (1, 2)
    }  # once, or twice mirrored


@pytest.mark.parametrize("asked", ["auto", "bfloat16"])
def test_what_bfloat16_would_save(
    asked: str, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU that multiplies it faster: before a training, and after a long one."""
    passes = {"auto": 2.0, "float32": 2.0, "bfloat16": 0.5}
    monkeypatch.setattr("deltacache.train.preview.cpu_bfloat16_gain", lambda: 4.0)
    monkeypatch.setattr(
        "deltacache.train.preview._seconds_of_a_pass",
        lambda task, precision, device, size, most=0: passes[precision],
    )
    monkeypatch.setattr("deltacache.train.loop._WORTH_A_HINT_S", 0.0)
    build: Any = tokenizer_config if case.kind == "tokenizer" else world_config
    config, reporter = build(steps=900, batch_size=8, precision=asked), Lines()
    request = TrainingRequest(case.root, tmp_path / "dry", config, False, "cpu", dry_run=True)
    launch("tokenizer" if case.kind == "tokenizer" else "world", request, reporter)
    lines = [line for line in reporter.said if "--precision bfloat16 would take about" in line]
    assert len(lines) == (asked == "auto")
    reporter = Lines()
    case.run(tmp_path / "run", reporter=reporter, steps=2, precision=asked)
    assert ("--precision bfloat16 would have taken about" in reporter.said[-1]) == (asked == "auto")
