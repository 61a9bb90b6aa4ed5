"""Running on a cluster that is there already."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import deltacache
from chaos import nodes

ASK = """
import ray
from deltacache.pipeline.cluster import cluster
from deltacache.schemas.jobs import ClusterSettings
with cluster(ClusterSettings(ray_address={address!r})):
    @ray.remote
    def where():
        import deltacache.pipeline.attempts
        return deltacache.pipeline.attempts.__file__
    print(ray.get(where.remote()))
"""


def test_workers_run_the_code_of_the_driver_and_not_what_is_installed_with_them(tmp_path: Path) -> None:
    package = Path(deltacache.__file__).parent
    shutil.copytree(package, tmp_path / "deltacache", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "deltacache" / "pipeline" / "attempts.py").open("a") as file:
        file.write("\n__file__ += ' of the driver'\n")
    with nodes(1) as cluster:
        asked = subprocess.run(
            [sys.executable, "-c", ASK.format(address=cluster.address)],
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            cwd="/",  # workers on the same machine look into the driver's folder too
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.strip().endswith("attempts.py of the driver")
    assert str(tmp_path) not in asked.stdout
