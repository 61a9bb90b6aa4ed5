"""inspect says of an output of every kind what it is, where it came from and how large it is."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from benchmark_runs import mini_settings, saved_decoder
from drawn_features import DrawnWorld

from deltacache.descriptions import describe_output
from deltacache.evaluate.benchmarks import engine
from deltacache.evaluate.generators import export_contexts
from deltacache.models.checkpoints import load_tokenizer, save_model
from deltacache.models.heads import load_head
from deltacache.pipeline.datasets.dataset import open_dataset
from deltacache.pipeline.jobs.pca_fit import fit_pca
from deltacache.pipeline.storage.locking import LOCK_FILE, dataset_lock
from deltacache.schemas.configs import save_config
from deltacache.schemas.errors import CheckpointError
from deltacache.schemas.jobs import ContextExport
from deltacache.schemas.progress import SilentReporter
from deltacache.systems.training import SystemPaths, systems_preset
from golden_sizes import golden_sizes


@dataclass(frozen=True)
class Inputs:
    """What outputs can be made from; ``root`` is empty."""

    root: Path
    world: DrawnWorld
    golden: Path
    mini: Path


@pytest.fixture
def inputs(tmp_path: Path, evaluated: DrawnWorld, golden: Path, mini_benchmarks: Path) -> Inputs:
    return Inputs(tmp_path, evaluated, golden, mini_benchmarks)


def metrics_alone(inputs: Inputs) -> Path:
    return Path(shutil.copy(inputs.world.root / "out" / "metrics.parquet", inputs.root / "table.parquet"))


def chain(inputs: Inputs) -> Path:
    """Of deltacache run, stopped after the tokenizer."""
    shutil.copytree(inputs.world.features, inputs.root / "features" / "train")
    shutil.copytree(inputs.world.tokenizer, inputs.root / "tokenizer" / "checkpoints" / "step-00000012")
    return inputs.root


def systems(inputs: Inputs) -> Path:
    """Of train-systems, stopped before the last system; with a table of compare-systems."""
    config = systems_preset("tiny-table2")
    save_config(config, inputs.root / "systems.yaml")
    paths = SystemPaths(inputs.root)
    for name in config.tokenizers:
        folder = paths.tokenizer(name) / "checkpoints" / "step-00000007"
        shutil.copytree(inputs.world.tokenizer, folder)
    for name, system in list(config.systems.items())[:-1]:
        step = f"step-{system.world.training.steps:08d}"
        shutil.copytree(inputs.world.noise, paths.world(name) / "checkpoints" / step)
    (inputs.root / "systems.parquet").write_bytes(b"")
    return inputs.root


def contexts(inputs: Inputs) -> Path:
    out = inputs.root / "contexts"
    manifest = export_contexts(
        ContextExport(data={"kitti": inputs.mini / "kitti"}, horizons=(1,), rate="evaluation"),
        out,
        SilentReporter(),
    )
    first = next((manifest.parent / "kitti" / "h1").iterdir())
    (first / "sample-00").mkdir()
    return out


def unfinished_contexts(inputs: Inputs) -> Path:
    (contexts(inputs) / "contexts.json").unlink()
    return inputs.root / "contexts"


def pca(inputs: Inputs) -> Path:
    fit_pca(inputs.world.features, inputs.root / "pca", 3, SilentReporter(), device="cpu")
    return inputs.root / "pca"


def head(inputs: Inputs) -> Path:
    model = load_head(inputs.golden / "eval" / "head_vspw.safetensors", "segmentation").model
    said = {"trained_on": {"benchmark": "vspw", "split": "train", "frames": 12}, "backbone_sha256": "c" * 64}
    save_model(inputs.root / "head", model, "head", said)
    return inputs.root / "head"


def training_begun(inputs: Inputs) -> Path:
    (inputs.root / "checkpoints").mkdir()
    return inputs.root


def stopped_evaluation(inputs: Inputs) -> Path:
    """Killed after its blocks, before its tables."""
    out = inputs.root / "out"
    settings = mini_settings(
        inputs.golden,
        inputs.mini,
        out,
        data={"kitti": inputs.mini / "kitti"},
        heads={},
        worlds=(),
        horizons=(1,),
    )

    def killed(*_: object) -> None:
        shutil.copy(out / LOCK_FILE, inputs.root / "lock")
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_sums", killed)
        with pytest.raises(KeyboardInterrupt):
            engine.evaluate_benchmarks(settings, SilentReporter())
    (inputs.root / "lock").replace(out / LOCK_FILE)
    return out


KINDS: dict[str, tuple[Callable[[Inputs], Path], tuple[str, ...]]] = {
    "features": (
        lambda inputs: inputs.world.features,
        ("features in webdataset shards, finished", "made from backbone", "10 clips of 10 videos"),
    ),
    "an evaluation": (
        lambda inputs: inputs.world.root / "out",
        ("an evaluation, ", " kB", "made from: tokenizer", "made from: world", "made from: features"),
    ),
    "its metrics": (
        lambda inputs: inputs.world.root / "out" / "metrics.parquet",
        ("an evaluation, ", " kB", "made from: tokenizer", "made from: features"),
    ),
    "metrics alone": (
        metrics_alone,
        ("the table of an evaluation, ", " kB", "deltaworld", "drawn@bbbb", "horizon                1, 3"),
    ),
    "a stopped evaluation": (
        stopped_evaluation,
        (
            "an evaluation without tables yet",
            "kitti: 2 sequences, in 1 blocks",
            "evaluate (process",
            "has died",
        ),
    ),
    "a tokenizer": (lambda inputs: inputs.world.tokenizer, ("DeltaTok, ", " kB", "b" * 64, "fingerprint")),
    "a world model's file": (
        lambda inputs: inputs.world.noise / "model.safetensors",
        ("DeltaWorld, ", "tokenizer_fingerprint", " kB"),
    ),
    "a head": (head, ("SegmentationHead", "benchmark vspw, split train, frames 12", "c" * 64, " kB")),
    "a released head": (
        lambda inputs: inputs.golden / "eval" / "head_kitti.safetensors",
        ("DepthHead", "fingerprint", " kB"),
    ),
    "a decoder of pictures": (
        lambda inputs: saved_decoder(inputs.golden, inputs.root / "rgb"),
        ("RgbDecoder", "fingerprint", " kB"),
    ),
    "a backbone": (
        lambda inputs: inputs.golden / "tiny" / "backbone",
        (
            "a backbone, DINOv3ViTModel",
            "weights_sha256",
            "{hidden} wide, of {patch} px",
            "M parameters",
            " kB",
        ),
    ),
    "a PCA": (pca, ("a PCA, 3 components of 32 channels", "features_fingerprint", "drawn", " kB")),
    "a training that began": (training_begun, ("a training without a checkpoint yet", "0 bytes")),
    "contexts": (
        contexts,
        (
            "contexts for a video generator, 2, padding plain",
            "kitti, horizon 1",
            "1 of 2 contexts have samples",
        ),
    ),
    "contexts being exported": (
        unfinished_contexts,
        ("contexts for a video generator, not all exported yet", "kitti                  2 contexts", " kB"),
    ),
    "systems": (
        systems,
        (
            "trained for 7 steps of",
            "delta tokens not begun",
            "no checkpoint yet of",
            "none yet",
            "systems.parquet",
        ),
    ),
    "a chain": (
        chain,
        ("a chain of outputs", "finished, 10 clips", "trained for 12 steps", "not begun", " kB"),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_is_where_it_came_from_and_how_large(inputs: Inputs, kind: str) -> None:
    make, told = KINDS[kind]
    text = describe_output(make(inputs))
    side, patches, hidden = golden_sizes(inputs.golden)
    for words in told:
        assert words.format(hidden=hidden, patch=side // patches) in text


def test_origins_are_the_real_ones(inputs: Inputs) -> None:
    features = open_dataset(inputs.world.features).card.fingerprint
    assert f"features_fingerprint   {features}" in describe_output(pca(inputs))
    tokenizer = load_tokenizer(inputs.world.tokenizer).fingerprint
    assert f"tokenizer_fingerprint  {tokenizer}" in describe_output(inputs.world.noise / "model.safetensors")


@pytest.mark.parametrize("command", ["evaluate", "extract-features"])
def test_an_output_that_is_just_being_begun(tmp_path: Path, command: str) -> None:
    """An evaluation of clips has nothing but its lock until its tables."""
    with dataset_lock(tmp_path / "out", command) as lock:
        text = describe_output(tmp_path / "out")
    del lock
    assert ("an evaluation without tables yet" in text) is (command == "evaluate")
    assert f"running      {command} (process {os.getpid()}" in text


def test_a_model_file_of_another_kind_says_what_was_looked_for(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.bin")
    with pytest.raises(
        CheckpointError, match="not a model of deltacache, looked for a tokenizer, world, depth"
    ):
        describe_output(tmp_path / "other.bin")
    (tmp_path / "damaged.bin").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="is damaged or not a PyTorch file"):
        describe_output(tmp_path / "damaged.bin")
