"""Table D's models through the trainers: masked transformers on datasets, heads on whole frames."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from drawn import drawn_deltas, write_dataset
from PIL import Image

from deltacache.models.checkpoints import load_world
from deltacache.models.heads import load_head
from deltacache.schemas.configs import HeadPreset, WorldConfig, preset_stages, world_preset
from deltacache.schemas.errors import DeltacacheError, MismatchError
from deltacache.schemas.foresight import ForesightHeadConfig, FrameFeatureConfig, foresight_head
from deltacache.schemas.progress import SilentReporter
from deltacache.train.heads.foresight import train_foresight_head
from reporters import Lines
from trainers import train_world

FEATURES = FrameFeatureConfig(backbone="tiny", image_size=(32, 64))


def world_config(name: str, steps: int, **options: Any) -> WorldConfig:
    """A tiny recipe on a few clips."""
    config = world_preset(name)
    training = config.training.in_steps(steps).model_copy(
        update={"batch_size": 4, "probe_clips": 4, "save_every": 5}
    )
    model = config.model.model_copy(update={"options": {**config.model.options, **options}})
    return config.model_copy(update={"training": training, "model": model})


def trained_world(
    source: Path, out: Path, config: WorldConfig, *, resume: bool = False
) -> dict[str, torch.Tensor]:
    last = train_world(source, out, config, resume=resume, device="cpu", reporter=SilentReporter())
    return load_world(last).model.state_dict()


def last_row(out: Path) -> dict[str, float]:
    return pq.read_table(out / "curves.parquet").to_pylist()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["foresight-tiny", "foresight-delta-tiny"])
def test_a_resumed_run_with_dropout_repeats_an_unbroken_one(
    name: str, features: Path, deltas: Path, tmp_path: Path
) -> None:
    source = deltas if "delta" in name else features
    long, short = world_config(name, 10, dropout=0.2), world_config(name, 5, dropout=0.2)
    schedule = {"decay_steps": 10, "warmup_steps": 1}
    long, short = (
        each.model_copy(update={"training": each.training.model_copy(update=schedule)})
        for each in (long, short)
    )
    unbroken = trained_world(source, tmp_path / "long", long)
    half = trained_world(source, tmp_path / "short", short)
    resumed = trained_world(source, tmp_path / "short", long, resume=True)
    assert all(torch.equal(resumed[key], unbroken[key]) for key in unbroken)
    assert not all(torch.equal(half[key], unbroken[key]) for key in unbroken)
    row = last_row(tmp_path / "long")
    assert math.isfinite(row["loss"])
    assert row["copy_ratio"] > 0


@pytest.mark.slow
def test_delta_tokens_that_turn_are_learned(tmp_path: Path) -> None:
    """Tokens that change sign at every step: copies are always wrong, the past says what comes."""
    rng = np.random.default_rng(0)
    signs = np.where(np.arange(6) % 2, -1.0, 1.0)[None, :, None] * rng.choice([-1.0, 1.0], (48, 1, 1))
    tokens = (signs * drawn_deltas(48, 1, seed=1).astype(np.float64)).astype(np.float16)
    source = write_dataset(tmp_path / "data", "deltas", tokens)
    config = world_config("foresight-delta-tiny", 120)
    config = config.model_copy(
        update={"training": config.training.model_copy(update={"batch_size": 16, "learning_rate": 3e-3})}
    )
    trained_world(source, tmp_path / "out", config)
    row = last_row(tmp_path / "out")
    assert row["copy_ratio"] < 0.3
    assert row["z_swap_ratio"] > 1.5


def test_clips_shorter_than_a_window_are_refused(deltas: Path, tmp_path: Path) -> None:
    config = world_config("foresight-delta-tiny", 5, context=8)
    with pytest.raises(MismatchError, match="clips have 6 frames, but a window has 9"):
        trained_world(deltas, tmp_path / "out", config)


def test_the_recipe_is_that_of_the_released_code() -> None:
    assert preset_stages("world", "foresight") == ["224px", "448px"]
    first, second = (world_preset("foresight", stage) for stage in ("224px", "448px"))
    for config in (first, second):
        assert (config.model.num_heads, config.model.num_layers, config.model.mlp_ratio) == (8, 12, 4.0)
        assert config.model.options == {"context": 4, "dropout": 0.1, "position_grid": [16, 32]}
        assert (config.candidates, config.smooth_l1_beta) == (1, 0.1)
        training = config.training
        assert (training.batch_size, training.accumulation) == (64, None)
        assert (training.weight_decay, training.gradient_clip, training.warmup_steps) == (0.0, 1.0, 0)
        assert training.decay_steps == training.steps
    sequences, a_gpu = 2975 // 8, 8  # its loader's batches, of which 8 make a step
    assert first.training.steps == 800 * (sequences // a_gpu)
    assert second.training.steps == 20 * (2975 // 8 // 8)
    assert (first.training.learning_rate, second.training.learning_rate) == (8e-5 * 64 / 8, 1e-5 * 64 / 8)
    assert second.training.start == "weights"
    delta = world_preset("foresight-delta").model
    assert (delta.architecture, delta.num_heads, delta.num_layers) == ("foresight_delta", 8, 12)


def head_config(task: Any, preset: HeadPreset, steps: int, depth: Path | None = None) -> ForesightHeadConfig:
    config = foresight_head(task, preset, FEATURES, depth)
    training = config.training.in_steps(steps).model_copy(update={"save_every": 10})
    return config.model_copy(update={"training": training, "split": "val"})


@pytest.fixture(scope="module")
def maps(mini_benchmarks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Relative depth that falls from top to bottom, 0 in the first rows."""
    folder = tmp_path_factory.mktemp("maps")
    for label in (mini_benchmarks / "cityscapes").glob("gtFine/val/*/*.png"):
        with Image.open(label) as picture:
            width, height = picture.size
        ramp = np.linspace(0, 255, height).astype(np.uint8)
        place = folder / "val" / label.parent.name
        place.mkdir(parents=True)
        name = label.name.replace("_gtFine_labelIds", "_leftImg8bit_depth")
        Image.fromarray(np.tile(ramp[:, None], (1, width))).save(place / name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("task", ["segmentation", "depth"])
def test_heads_learn_whole_frames_by_heart(
    task: Any, maps: Path, mini_benchmarks: Path, tmp_path: Path
) -> None:
    root, out = mini_benchmarks / "cityscapes", tmp_path / "head"
    config = head_config(task, "tiny", 40, maps if task == "depth" else None)

    def run(config: ForesightHeadConfig, *, resume: bool) -> Path:
        return train_foresight_head(root, out, config, resume=resume, device="cpu", reporter=SilentReporter())

    early = config.model_copy(update={"training": config.training.model_copy(update={"steps": 1})})
    run(early, resume=False)
    first = last_row(out)["loss"]
    last = run(config, resume=True)
    assert last_row(out)["loss"] < 0.7 * first
    loaded = load_head(last, task)
    assert loaded.metadata["patch_grid"] == [2, 4]
    assert loaded.metadata["backbone_sha256"]
    assert json.loads((last / "config.json").read_text())["frames"]["count"] == 2
    assert run(config, resume=True) == last
    with pytest.raises(DeltacacheError, match="already holds checkpoints"):
        run(config, resume=False)
    changed = config.model_copy(update={"flip": 0.25})
    with pytest.raises(MismatchError, match=r"flip was 0\.0, now 0\.25"):
        run(changed, resume=True)


@pytest.mark.slow
def test_a_head_says_which_frames_and_labels_it_saw(
    maps: Path, mini_benchmarks: Path, tmp_path: Path
) -> None:
    """As train-head does: split, count, and a fingerprint of all places and sizes, wherever the trees lie."""
    root = Path(shutil.copytree(mini_benchmarks / "cityscapes", tmp_path / "cityscapes"))
    depth = Path(shutil.copytree(maps, tmp_path / "maps"))

    def frames(name: str, task: Any) -> str:
        config = head_config(task, "tiny", 1, depth if task == "depth" else None)
        reporter = Lines()
        last = train_foresight_head(
            root, tmp_path / name, config, resume=False, device="cpu", reporter=reporter
        )
        said = json.loads((last / "config.json").read_text())
        assert said["benchmark"] == "cityscapes"
        assert said["trained_on"] == {"benchmark": "cityscapes", "split": "val", "frames": 2}
        assert any("the frames that cityscapes is scored on" in line for line in reporter.said)
        return said["frames"]["fingerprint"]

    before = [frames(f"before-{task}", task) for task in ("segmentation", "depth")]
    assert before[0] != before[1]
    root, depth = root.rename(tmp_path / "moved"), depth.rename(tmp_path / "moved-maps")
    assert [frames(f"moved-{task}", task) for task in ("segmentation", "depth")] == before
    (ramp, *_) = sorted(depth.glob("val/*/*.png"))
    ramp.write_bytes(ramp.read_bytes() + b" ")
    assert frames("depth-changed", "depth") != before[1]
    assert frames("depth-changed-elsewhere", "segmentation") == before[0]
    (label, *_) = sorted(root.glob("gtFine/val/*/*_labelIds.png"))
    label.write_bytes(label.read_bytes() + b" ")
    assert frames("label-changed", "segmentation") != before[0]


def test_depth_needs_maps_and_segmentation_has_no_use_for_them(maps: Path) -> None:
    with pytest.raises(ValueError, match="give --depth DIR with it alone"):
        foresight_head("depth", "tiny", FEATURES, None)
    with pytest.raises(ValueError, match="give --depth DIR with it alone"):
        foresight_head("segmentation", "tiny", FEATURES, maps)
