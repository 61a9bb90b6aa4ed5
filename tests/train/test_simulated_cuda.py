"""A training step of each recipe on a simulated CUDA device: devices, precision, waits, launches and memory.

Peaks are those of a second step, whose figures stand in docs/benchmarks.md. A step that waits for the device, computes
a product in float32 or takes a tenth more than it did is a mistake that no CPU shows.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

_FOLDER = Path(__file__).resolve().parent.parent / "simulated_cuda"
# name: (peak in GiB, launches of a pass with the update)
STEPS = {
    "tokenizer/released/256px:128": (57.1, 3854),
    "tokenizer/paper/256px:64": (21.2, 2523),
    "tokenizer/tiny/main": (0.43, 712),
    "world/released": (12.7, 7601),
    "world/discriminative": (4.05, 1354),
    "world/dino-world:64": (49.5, 7210),
    "world/best-of-many:64": (49.5, 11520),
}


@pytest.fixture(scope="module")
def steps() -> dict[str, dict[str, Any]]:
    """What each step did; all in one process, for it takes longest to import torch."""
    if shutil.which("g++") is None:
        if os.environ.get("CI"):
            pytest.fail("the simulated CUDA device needs g++, and there is none")
        pytest.skip("the simulated CUDA device is compiled with g++, and there is none")
    done = subprocess.run(
        [sys.executable, _FOLDER / "steps.py", *STEPS], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_on_the_simulated_device(steps: dict[str, dict[str, Any]], name: str) -> None:
    step, (peak, launches) = steps[name], STEPS[name]
    assert step["waits"] == []
    assert set(step["products"]) == {"torch.bfloat16"}
    assert step["state_dtypes"] == ["torch.float32"]
    assert step["peak_gib"] <= 1.1 * peak
    assert step["launches"] <= 1.1 * launches


def test_noise_takes_a_call_for_sixteen_positions(steps: dict[str, dict[str, Any]]) -> None:
    assert steps["world/released"]["samples"] == 1024
    assert steps["world/released"]["draws"] == 64
