"""Training heads on drawn pictures: resuming, where features lie, schedule, refusals."""

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from deltacache.models.backbone import load_backbone
from deltacache.models.heads import load_head
from deltacache.models.rgb_decoder import load_rgb_decoder
from deltacache.pipeline.benchmarks.training_frames import TrainingFrames
from deltacache.schemas.configs import FramesConfig, head_preset, rgb_preset
from deltacache.schemas.errors import DeltacacheError, MismatchError
from deltacache.schemas.progress import SilentReporter
from deltacache.train.heads import data as head_data
from deltacache.train.heads.setup import HeadRequest
from deltacache.train.heads.training import RgbTask, train_head, train_rgb_decoder
from deltacache.train.order import MicroBatch
from reporters import Lines

TARGETS = ("vspw", "cityscapes", "kitti", "rgb")
STEPS = 6
Run = Callable[..., Path]


@pytest.fixture
def run(mini_benchmarks: Path, tmp_path: Path) -> Run:
    """Trains a head on the miniature trees with the tiny backbone."""

    def train(target: str, name: str = "out", **changes: Any) -> Path:
        resume, reporter = changes.pop("resume", False), changes.pop("reporter", SilentReporter())
        root = mini_benchmarks / ("vspw/data/101_clip1" if target == "rgb" else target)
        root, split = changes.pop("root", root), changes.pop("split", "train" if target == "rgb" else "val")
        request = HeadRequest(root, tmp_path / name, changes.pop("backbone", "tiny"), resume, "cpu")
        request = replace(request, kitti_test=changes.pop("kitti_test", None))
        config: Any = rgb_preset("tiny") if target == "rgb" else head_preset(target, "tiny")  # type: ignore[arg-type]
        flip = changes.pop("flip", 0.5)
        training = config.training.in_steps(STEPS).model_copy(
            update={"batch_size": 2, "warmup_steps": 2, "save_every": 2, "log_every": 1, **changes}
        )
        frames = FramesConfig(image_size=32, split=split, flip=flip)
        config = config.model_copy(update={"training": training, "frames": frames})
        if target == "rgb":
            return train_rgb_decoder(request, config, reporter)
        return train_head(request, config, reporter)

    return train


def weights(target: str, checkpoint: Path) -> dict[str, torch.Tensor]:
    if target == "rgb":
        return load_rgb_decoder(checkpoint, load_backbone("tiny")).model.state_dict()
    return load_head(checkpoint, "depth" if target == "kitti" else "segmentation").model.state_dict()


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_a_resumed_run_is_bitwise_the_unbroken_one(run: Run, target: str, tmp_path: Path) -> None:
    unbroken = weights(target, run(target, "unbroken"))
    run(target, "resumed", steps=3)
    resumed = run(target, "resumed", resume=True)
    assert resumed == tmp_path / f"resumed/checkpoints/step-{STEPS:08d}"
    assert_same(unbroken, weights(target, resumed))
    rows = [pq.read_table(tmp_path / name / "curves.parquet") for name in ("unbroken", "resumed")]
    for column in ("step", "loss", "main_loss", "gradient_loss", "learning_rate"):
        assert rows[0][column].to_pylist() == rows[1][column].to_pylist()
    other = weights(target, run(target, "other", seed=1))
    assert not all(torch.equal(unbroken[name], other[name]) for name in unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["vspw", "rgb"])
def test_features_that_do_not_fit_in_memory_train_the_same_weights(
    run: Run, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = weights(target, run(target, "kept"))
    monkeypatch.setattr(head_data, "memory_bytes", lambda: 0)
    assert_same(kept, weights(target, run(target, "streamed")))


@pytest.mark.slow
def test_pictures_of_any_shape_train_the_same_weights_in_passes_of_any_size(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Square pictures are one crop and others two: a mean over crops would depend on who shares a pass with whom."""
    drawn = np.random.default_rng(0).integers(0, 256, (4, 40, 64, 3), np.uint8)
    (tmp_path / "pictures").mkdir()
    for number, picture in enumerate(drawn):
        shape = picture[:, : 64 if number % 2 else 40]
        cv2.imwrite(str(tmp_path / f"pictures/{number}.png"), shape)
    asked = {"root": tmp_path / "pictures", "batch_size": 4}
    whole = weights("rgb", run("rgb", "whole", **asked))
    original = RgbTask.training_loss

    def scarce(self: RgbTask, batch: Any, part: MicroBatch) -> Any:
        if part.step > 1 and part.stop - part.start > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(self, batch, part)

    monkeypatch.setattr(RgbTask, "training_loss", scarce)
    reporter = Lines()
    halved = weights("rgb", run("rgb", "halved", reporter=reporter, **asked))
    assert [line for line in reporter.said if "out of memory" in line] == [
        f"train rgb_decoder: out of memory in step 3, now 4 (batch {size} x accumulation {4 // size} x workers 1)"
        for size in (2, 1)
    ]
    for name, weight in whole.items():
        torch.testing.assert_close(halved[name], weight, rtol=1e-4, atol=1e-5)


def test_a_backbone_that_runs_out_of_memory_gets_fewer_crops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = TrainingFrames(None, (), {}, ())
    seen = head_data.HeadFrames(frames, lambda *_: None, 32, 0.0, load_backbone("tiny"), torch.device("cpu"))
    crops, sizes = np.random.default_rng(0).integers(0, 256, (70, 32, 32, 3), np.uint8), list[int]()
    expected, features = seen._of_all(crops), head_data.HeadFrames._features

    def scarce(self: head_data.HeadFrames, some: np.ndarray) -> torch.Tensor:
        sizes.append(len(some))
        if len(some) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return features(self, some)

    monkeypatch.setattr(head_data.HeadFrames, "_features", scarce)
    assert torch.equal(seen._of_all(crops), expected)
    assert sizes == [64, 32, 16, 16, 16, 16, 6]
    sizes.clear()
    seen._of_all(crops)
    assert sizes[0] == 16  # known from then on


@pytest.mark.slow
def test_mirrored_frames_train_other_weights(run: Run) -> None:
    straight, mirrored = (weights("vspw", run("vspw", f"flip{flip}", flip=flip)) for flip in (0.0, 1.0))
    assert not torch.equal(straight["head.weight"], mirrored["head.weight"])


def test_kept_features_are_computed_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    features = head_data.HeadFrames._features
    monkeypatch.setattr(
        head_data.HeadFrames, "_features", lambda self, crops: (asked.append(1), features(self, crops))[1]
    )
    run("cityscapes", "kept", flip=0.0)
    assert len(asked) == 2  # frames
    monkeypatch.setattr(head_data, "memory_bytes", lambda: 0)
    run("cityscapes", "streamed", flip=0.0)
    estimate = 1 + 2  # frames of the trial passes, which run before the first step
    assert len(asked) == 2 + estimate + 2 * STEPS


def test_the_rate_warms_up_and_falls_along_a_cosine(run: Run, tmp_path: Path) -> None:
    run("cityscapes")
    peak = head_preset("cityscapes", "tiny").training.learning_rate
    fall = [0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    rates = pq.read_table(tmp_path / "out/curves.parquet")["learning_rate"].to_pylist()
    assert rates == pytest.approx([peak * share for share in (0, 0.5, *fall)])


@pytest.mark.slow
def test_what_is_learned_from_is_said(run: Run) -> None:
    reporter = Lines()
    run("kitti", reporter=reporter)
    assert reporter.said[0] == "train head: 2 labelled frames of kitti, 1 left out (no ground truth)"
    assert "the frames that kitti is scored on (--split val)" in reporter.said[1]
    reporter = Lines()
    checkpoint = run("kitti", resume=True, reporter=reporter)
    assert reporter.said[-1] == f"train head: {checkpoint} has all its steps, nothing to do"


def test_a_checkpoint_says_what_it_was_made_from(run: Run) -> None:
    metadata = load_head(run("vspw"), "segmentation").metadata
    assert metadata["benchmark"] == "vspw"
    assert metadata["backbone_sha256"] == load_backbone("tiny").weights_sha256
    assert (metadata["image_size"], metadata["hidden_size"], metadata["patch_grid"]) == (32, 64, [2, 2])
    assert (metadata["frames"]["count"], metadata["step"]) == (5, STEPS)
    assert metadata["trained_on"] == {"benchmark": "vspw", "split": "val", "frames": 5}


@pytest.mark.slow
def test_a_head_of_the_training_split_says_so(run: Run, mini_benchmarks: Path, tmp_path: Path) -> None:
    tested, reporter = tmp_path / "tested.txt", Lines()
    lines = (mini_benchmarks / "kitti/eigen_test_files.txt").read_text().splitlines()
    tested.write_text(lines[0])
    checkpoint = run("kitti", split="train", kitti_test=tested, reporter=reporter)
    metadata = load_head(checkpoint, "depth").metadata
    assert metadata["trained_on"] == {"benchmark": "kitti", "split": "train", "frames": 7}
    assert reporter.said[0] == (
        "train head: 7 labelled frames of kitti, 0 left out (of drives that tested.txt tests)"
    )
    tested.write_text(f"{lines[0]}\n")  # the same frames, but another list
    with pytest.raises(MismatchError, match="was trained on other data"):
        run("kitti", split="train", kitti_test=tested, resume=True)


@pytest.mark.parametrize(
    ("changed", "other"), [("leftImg8bit_sequence", True), ("gtFine", True), (None, False)]
)
def test_resuming_knows_frames_by_name_and_size(
    run: Run, mini_benchmarks: Path, tmp_path: Path, changed: str | None, other: bool
) -> None:
    root = Path(shutil.copytree(mini_benchmarks / "cityscapes", tmp_path / "first"))
    run("cityscapes", root=root)
    root = root.rename(tmp_path / "second")
    if changed is not None:
        picture = next((root / changed).rglob("bremen_000003_000019_*.png"))
        picture.write_bytes(picture.read_bytes() + b"0")
    if other:
        with pytest.raises(MismatchError, match="was trained on other data"):
            run("cityscapes", root=root, resume=True)
    else:
        run("cityscapes", root=root, resume=True)


def test_resuming_with_something_else_names_both(run: Run, golden: Path, tmp_path: Path) -> None:
    run("cityscapes", steps=2)
    with pytest.raises(MismatchError, match=r"training\.learning_rate was 0\.02, now 0\.5"):
        run("cityscapes", resume=True, learning_rate=0.5)
    shas = [load_backbone(name).weights_sha256 for name in ("tiny", str(golden / "tiny" / "backbone"))]
    with pytest.raises(MismatchError, match=f"backbone_sha256 was {shas[0]}, now {shas[1]}"):
        run("cityscapes", resume=True, backbone=str(golden / "tiny" / "backbone"))
    with pytest.raises(MismatchError, match="of a head, not of a rgb_decoder"):
        run("rgb", resume=True)
    with pytest.raises(DeltacacheError, match="already holds checkpoints"):
        run("cityscapes")
