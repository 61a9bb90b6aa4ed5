"""The example of docs/worlds.md, as a reader would use it: one file, one preset, two commands."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from trained_systems import TrainedSystems

import deltacache
from deltacache.schemas.errors import DeltacacheError

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
ENCODERS = PAGE.with_name("backbones.md")


def _block(language: str, page: Path = PAGE) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)
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


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder with the files of both pages, as modules of a user's own."""
    root = tmp_path / "outside"
    root.mkdir()
    (root / "my_worlds.py").write_text(_block("python"))
    (root / "my_encoders.py").write_text(_block("python", ENCODERS))
    return root


def run(commands: list[tuple[Any, ...]], root: Path | str, folder: Path) -> list[str]:
    """What each command prints."""
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(commands, default=str)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split(END)


def test_the_example_has_at_most_40_lines_of_code() -> None:
    lines = [line for line in _block("python").splitlines() if line.strip()]
    assert len(lines) <= 40


def test_one_file_and_one_preset(package: Path, systems: TrainedSystems, tmp_path: Path) -> None:
    """It trains, its checkpoint says what it is, and it has rows in the table."""
    recipe = _block("yaml").replace('"my_worlds:Recurrent"', "recurrent")
    (tmp_path / "recurrent.yaml").write_text(recipe)
    models = ("--tokenizer", systems.paths.tokenizer("delta"), "--world", "world")
    flags = ("--preset", "recurrent.yaml", "--steps", 20, "--device", "cpu")
    commands = [
        ("train-world", systems.paths.deltas("delta"), "world", *flags),
        ("inspect", "world"),
        ("evaluate", "results", "--data", f"clips={systems.test}", *models),
    ]
    assert "Recurrent" in run(commands, package, tmp_path)[1]
    _check_rows(tmp_path / "results")


def test_world_and_encoder_of_modules_outside_the_package(
    outside: Path, systems: TrainedSystems, tmp_path: Path
) -> None:
    """The pages' code as it stands there: trained, resumed, inspected, evaluated; features of the encoder."""
    (tmp_path / "recurrent.yaml").write_text(_block("yaml"))
    rng = np.random.default_rng(0)
    for video in range(2):
        (tmp_path / f"videos/clip{video}").mkdir(parents=True)
        for frame in range(8):
            picture = Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8))
            picture.save(tmp_path / f"videos/clip{video}/frame_{frame * 0.1:.1f}.png")
    package = Path(deltacache.__file__).parents[1]
    models = ("--tokenizer", systems.paths.tokenizer("delta"), "--world", "my_worlds:Recurrent=world")
    deltas, flags = systems.paths.deltas("delta"), ("--preset", "recurrent.yaml", "--device", "cpu")
    sampling = ("--image-size", 32, "--spacing", 0.1, 0.1, "--no-augment")
    commands = [
        ("train-world", deltas, "world", *flags, "--steps", 10),
        ("train-world", deltas, "world", *flags, "--steps", 20, "--resume"),
        ("inspect", "world"),
        ("evaluate", "results", "--data", f"clips={systems.test}", *models),
        ("extract-features", "videos", "features", "--backbone", "my_encoders:colours", *sampling),
        ("inspect", "features"),
    ]
    said = run(commands, f"{package}{os.pathsep}{outside}", tmp_path)
    assert "architecture" in said[2]
    assert "my_worlds:Recurrent" in said[2]
    _check_rows(tmp_path / "results")
    assert "my_encoders:colours, 32 px, 2 x 2 patches, 64 wide" in said[5]
    dataset = deltacache.open_dataset(tmp_path / "features")
    assert dataset.card.backbone.id == "my_encoders:colours"
    pictures = sorted((tmp_path / "videos" / dataset.column("video_uri")[0].as_py()).iterdir())
    pixels = np.stack([np.asarray(Image.open(path)) for path in pictures])
    spec = importlib.util.spec_from_file_location("my_encoders", outside / "my_encoders.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    mean, std = (np.asarray(each) for each in (module.Colours.image_mean, module.Colours.image_std))
    normal = torch.from_numpy(((pixels / 255 - mean) / std).transpose(0, 3, 1, 2)).float()
    by_hand = module.colours().patch_tokens(normal).numpy()
    np.testing.assert_allclose(dataset.read_all()[0], by_hand, atol=2e-2)
    with pytest.raises(DeltacacheError, match="imported only when it is named: give my_worlds:Recurrent="):
        deltacache.load_world(tmp_path / "world")
    with pytest.raises(DeltacacheError, match="module nowhere cannot be imported"):
        deltacache.load_backbone("nowhere:colours")
    assert "my_worlds" not in sys.modules


def test_the_examples_pass_the_type_checker(outside: Path) -> None:
    checker = Path(sys.executable).with_name("basedpyright")
    package = Path(deltacache.__file__).parents[1]
    config = {"include": [str(outside)], "extraPaths": [str(package)], "typeCheckingMode": "standard"}
    (outside / "pyrightconfig.json").write_text(json.dumps({**config, "pythonVersion": "3.11"}))
    command = [checker, "--pythonpath", sys.executable, "--project", outside / "pyrightconfig.json"]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def _check_rows(results: Path) -> None:
    table = pq.read_table(results / "metrics.parquet")
    rows = table.filter(pc.equal(table["method"], "recurrent"))
    assert set(rows["aggregation"].to_pylist()) == {"single"}
    assert set(rows["horizon"].to_pylist()) == {1, 3}
