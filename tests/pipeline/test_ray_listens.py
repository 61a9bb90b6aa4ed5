"""Which Ray is used: one of our own, which can be reached from this machine alone, or one that is there."""

import json
import subprocess
import sys
import time

import pytest
import ray

from deltacache.pipeline.cluster.session import cluster
from deltacache.pipeline.cluster.tasks import run_tasks
from deltacache.schemas.errors import DeltacacheError
from deltacache.schemas.jobs import ClusterSettings
from shared_ray import SLOTS, SharedRay

SCRIPT = """
import json, psutil, ray
from deltacache.pipeline.cluster.session import ray_running

@ray.remote
class Worker:
    def answer(self):
        return 1

with ray_running(None, 2):
    worker = Worker.remote()
    ray.get(worker.answer.remote())
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    listening = {c.laddr.ip for p in processes for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    print(json.dumps([len(processes), sorted(listening)]))
"""


def test_a_local_ray_listens_on_loopback_only() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=True
    )
    processes, addresses = json.loads(done.stdout.splitlines()[-1])
    assert processes > 4
    assert "127.0.0.1" in addresses
    assert set(addresses) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


@pytest.mark.usefixtures("no_ray")
def test_an_address_where_nobody_listens_is_refused_at_once() -> None:
    settings = ClusterSettings(ray_address="127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(DeltacacheError, match=r"no Ray cluster answers at 127\.0\.0\.1:9"), cluster(settings):
        pass
    assert time.monotonic() - start < 30


def test_a_ray_that_the_program_has_is_used_and_left_running(shared_ray: SharedRay) -> None:
    """It is somebody's cluster: --decoders limits what is decoded there, and there is no other Ray to join."""
    shared_ray.start()
    said: list[str] = []
    with cluster(ClusterSettings(encoders=1, decoders=1), said.append) as placement:
        assert (placement.decoders, placement.most_decoders) == (1, 1)
    there = f"Ray cluster at {ray.get_runtime_context().gcs_address}: 1 node, {SLOTS} CPUs"
    assert any(line.startswith(there) for line in said)
    assert ray.is_initialized()
    with pytest.raises(DeltacacheError, match=r"cannot join 127\.0\.0\.1:9: leave ray_address out"):
        list(run_tasks(lambda device: None, [1], 1, "127.0.0.1:9"))
    assert ray.is_initialized()
