"""What runs on a GPU, on a simulated CUDA device: devices, precision, waits, launches and memory.

Peaks are those of a second step, whose figures stand in docs/benchmarks.md. A step that waits for the device, computes
a product in another precision than was asked for or takes a tenth more than it did is a mistake that no CPU shows.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_FOLDER = Path(__file__).resolve().parent.parent / "simulated_cuda"
# name: (peak in GiB, launches of a pass with the update). #2: two layers of each model, since all layers are alike;
# docs/benchmarks.md has the figures of whole models.
# Linear heads compute in float32 in any case.
STEPS = {
    "tokenizer/released/256px:128#2": (10.38, 714),
    "tokenizer/released/512px:64#2": (20.36, 714),
    "tokenizer/paper/256px:64#2": (3.81, 483),
    "tokenizer/frame-tokens/main:64#2": (2.73, 484),
    "tokenizer/delta-tokens/main:64#2": (3.81, 483),
    "tokenizer/foresight/448px:8#2": (5.98, 483),
    "tokenizer/tiny/main": (0.43, 712),
    "tokenizer/tiny/main@float32": (0.62, 480),
    "world/released#2": (9.73, 1611),
    "world/paper#2": (9.73, 1611),
    "world/frame-tokens#2": (1.76, 994),
    "world/delta-tokens#2": (1.76, 994),
    "world/discriminative#2": (0.84, 294),
    "world/dino-world:64#2": (10.31, 1360),
    "world/dino-world-large:8#2": (2.87, 1360),
    "world/best-of-many:64#2": (10.31, 2310),
    "world/energy:64#2": (0.47, 305),
    "world/flow:64#2": (0.6, 444),
    "world/tiny": (0.01, 934),
    "world/foresight/224px:8#2": (11.93, 248),
    "world/foresight/448px:4#2": (23.28, 256),
    "world/foresight-delta#2": (0.63, 192),
    "world/foresight-tiny": (0.03, 244),
    "world/foresight-delta-tiny": (0.01, 184),
    "head/tiny/segmentation": (0.34, 687),
    "head/tiny/depth": (0.08, 546),
    "head/tiny/rgb": (0.01, 412),
    "head/tiny/segmentation@float32": (0.34, 672),
    "head/tiny/whole-segmentation": (0.38, 1191),
    "head/tiny/whole-depth": (0.17, 534),
    "head/released/segmentation#2": (0.95, 2381),
    "head/released/depth#2": (0.95, 3082),
    "head/released/whole-segmentation#2": (0.73, 4397),
    "head/released/whole-depth#2": (1.55, 2986),
    "head/released/rgb:8#2": (2.3, 414),
    "extract/256#2": (0.52, 85),
    "tokenize/256#2": (0.96, 220),
    "features/256#2": (0.95, 128),
    "extract/256@float32#2": (0.71, 68),
    "tokenize/256@float32#2": (1.42, 171),
    "head/released/depth@float32#2": (1.3, 3065),
    "world/dino-world:64@float32#2": (16.03, 1163),
    "world/released@float32#2": (9.8, 1510),
    "tokenizer/released/256px:64@float32#2": (7.67, 482),
    "evaluate/depth#2": (0.58, 1569),
    "evaluate/depth@float32#2": (0.87, 1569),
    "evaluate/segmentation#2": (0.69, 1543),
}
EVALUATION_WAITS = {
    "aten.to.device [(768,)]",  # noise, drawn on the host
    "aten.to.dtype_layout [(1, 3)]",  # times
    "aten.to.dtype_layout [(2, 5)]",
    "aten.to.dtype_layout [(2, 720, 640)]",  # labels
}
"""For which copies an evaluation waits; others are replaced by ``steps.py``, which names them."""


@pytest.fixture(scope="module")
def ask() -> Callable[..., dict[str, dict[str, Any]]]:
    """Ask the simulated device for several things; all in one process, for it takes longest to import torch."""
    if shutil.which("g++") is None:
        if os.environ.get("CI"):
            pytest.fail("the simulated CUDA device needs g++, and there is none")
        pytest.skip("the simulated CUDA device is compiled with g++, and there is none")

    def run(*names: str) -> dict[str, dict[str, Any]]:
        done = subprocess.run(
            [sys.executable, _FOLDER / "steps.py", *names], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}

    return run


@pytest.fixture(scope="module")
def steps(ask: Callable[..., dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """What each of ``STEPS`` did, and ``gpu/small``."""
    return ask(*STEPS, "gpu/small")


@pytest.mark.parametrize("name", STEPS)
def test_a_step_on_the_simulated_device(steps: dict[str, dict[str, Any]], name: str) -> None:
    step, (peak, launches) = steps[name], STEPS[name]
    products = {"torch.float32"} if "@float32" in name else {"torch.bfloat16"}
    if name.startswith(("head", "evaluate")) and "rgb" not in name:
        products |= {"torch.float32"}
    if name == "world/released@float32#2":
        products |= {"torch.bfloat16"}  # its candidates are compared in it, the best of them again in float32
    assert set(step["products"]) == products
    assert set(step["waits"]) == (EVALUATION_WAITS if name.startswith("evaluate") else set())
    assert step.get("state_dtypes", ["torch.float32"]) == ["torch.float32"]
    assert step["peak_gib"] <= 1.1 * peak
    assert step["launches"] <= 1.1 * launches


def test_noise_takes_a_call_for_sixteen_positions(steps: dict[str, dict[str, Any]]) -> None:
    assert steps["world/released#2"]["samples"] == 1024
    assert steps["world/released#2"]["draws"] == 64


def test_what_make_gpu_runs_ends_in_a_table(steps: dict[str, dict[str, Any]]) -> None:
    rows = steps["gpu/small"]["rows"]
    assert rows[:3] == [
        "| what | value | about |",
        "|---|---|---|",
        "| card | simulated | 139 of 141 GiB free |",
    ]
    assert all(row.count(" | ") == 2 for row in rows[2:])
    for what in (
        *("products in bfloat16", "golden numbers", "resume, tokenizer `tiny`", "resume, world `tiny`"),
        *(
            "bfloat16, patch tokens",
            "bfloat16, delta tokens",
            "step, tokenizer `tiny` main",
            "step, world `tiny`",
        ),
        *("extract-features, 64 px", "tokenize from videos, 64 px", "in all"),
    ):
        assert sum(row.startswith(f"| {what}") for row in rows) == 1, what
