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
# name: (peak in GiB, launches of a pass with the update); #2: two layers of each model.
# Linear heads compute in float32 in any case.
STEPS = {
    "tokenizer/released/256px:128": (57.1, 3854),
    "tokenizer/paper/256px:64": (21.2, 2523),
    "tokenizer/tiny/main": (0.43, 712),
    "tokenizer/tiny/main@float32": (0.62, 480),
    "world/released": (12.7, 7601),
    "world/discriminative": (4.05, 1354),
    "world/dino-world:64": (49.5, 7210),
    "world/best-of-many:64": (49.5, 11520),
    "world/paper#2": (9.73, 1611),
    "world/frame-tokens#2": (1.76, 994),
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
    "head/released/segmentation#2": (0.95, 2381),
    "head/released/depth#2": (0.95, 3082),
    "head/released/rgb:8#2": (2.3, 414),
    "extract/256": (0.65, 425),
    "tokenize/256": (1.36, 1040),
    "features/256": (1.35, 608),
    "evaluate/depth": (0.58, 1569),
    "evaluate/depth@float32#2": (0.87, 1569),
    "evaluate/segmentation#2": (0.69, 1543),
}
TWELVE_LAYERS = {
    "tokenizer/released/256px:128": (1, 2),
    "tokenizer/paper/256px:64": (1, 2),
    "world/released": (2, 3),  # with one layer, the peak is where candidates are drawn
    "world/dino-world:64": (1, 2),
    "world/best-of-many:64": (1, 2),
}
"""Asked with few layers, twice, for all are alike: ten more take ten times what one more takes."""
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
    shallow = [f"{name}#{layers}" for name, both in TWELVE_LAYERS.items() for layers in both]
    done = ask(*(name for name in STEPS if name not in TWELVE_LAYERS), *shallow, "gpu/small")
    for name, (few, more) in TWELVE_LAYERS.items():
        first, second = done[f"{name}#{few}"], done[f"{name}#{more}"]
        done[name] = {**second, "waits": first["waits"] + second["waits"]}
        for figure in ("peak_gib", "launches"):
            done[name][figure] += (12 - more) / (more - few) * (second[figure] - first[figure])
    return done


@pytest.mark.parametrize("name", STEPS)
def test_a_step_on_the_simulated_device(steps: dict[str, dict[str, Any]], name: str) -> None:
    step, (peak, launches) = steps[name], STEPS[name]
    products = {"torch.float32"} if "@float32" in name else {"torch.bfloat16"}
    if name.startswith(("head", "evaluate")) and "rgb" not in name:
        products |= {"torch.float32"}
    assert set(step["products"]) == products
    assert set(step["waits"]) == (EVALUATION_WAITS if name.startswith("evaluate") else set())
    assert step.get("state_dtypes", ["torch.float32"]) == ["torch.float32"]
    assert step["peak_gib"] <= 1.1 * peak
    assert step["launches"] <= 1.1 * launches


def test_noise_takes_a_call_for_sixteen_positions(steps: dict[str, dict[str, Any]]) -> None:
    assert steps["world/released"]["samples"] == 1024
    assert steps["world/released"]["draws"] == 64


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
