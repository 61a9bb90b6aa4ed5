import subprocess
import sys
from pathlib import Path

BLOCKED_IMPORTS = """
import importlib, pkgutil, sys
for name in ("ray", "decord", "zarr", "webdataset", "av"):
    sys.modules[name] = None  # importing it raises ImportError
import deltacache.models, deltacache.train
for package in (deltacache.models, deltacache.train):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if module.name != "deltacache.train.workers.ray_workers":  # the one that needs Ray
            importlib.import_module(module.name)
sys.path.insert(0, sys.argv[1])
importlib.import_module("gpu")  # what `make gpu` runs
"""
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_models_and_trainers_import_on_a_bare_machine() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED_IMPORTS, BENCHMARKS], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
