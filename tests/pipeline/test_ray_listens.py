"""A Ray of our own can be reached from this machine alone."""

import json
import subprocess
import sys

SCRIPT = """
import json, psutil, ray
from deltacache.pipeline.cluster import ray_running

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
