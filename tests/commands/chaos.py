"""Kills parts of a running job at random and starts the command again, until the job is done.

A Ray of several nodes runs on this machine (``ray.cluster_utils.Cluster``); the command runs against it with
``--ray-address``, as on a cluster. Everything that is killed is killed with SIGKILL and was started here.
"""

import hashlib
import os
import random
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster

from warm_process import WarmProcess, start_command

KINDS = {"decode child": 2, "decode task": 2, "encoder": 2, "raylet": 1, "driver": 1}
"""What is killed, and how often. A driver takes half a minute to be back, so most would die while starting."""
_NOT_DATA = {"throughput.json", "config.yaml", ".lock"}
_NODE = {"num_cpus": 2, "object_store_memory": 200 << 20}


def contents(root: Path) -> dict[str, str]:
    """SHA-256 of every file of a dataset, by relative path; without what tells of the run, not of the data."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and path.name not in _NOT_DATA]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@contextmanager
def nodes(count: int, **of_head: Any) -> Iterator["Nodes"]:
    """A Ray of a head and ``count - 1`` other nodes; all its processes end with the block.

    This process may join it, so it leaves the Ray that its tests share.
    """
    ray.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args={**_NODE, "include_dashboard": False, **of_head})
    started = Nodes(cluster, [cluster.add_node(**_NODE) for _ in range(count - 1)])
    try:
        yield started
    finally:
        cluster.shutdown()


@dataclass
class Nodes:
    """The nodes of one cluster."""

    cluster: Cluster
    others: list[Any]

    @property
    def address(self) -> str:
        """For ``--ray-address``."""
        return self.cluster.address

    def add(self) -> None:
        """One more node."""
        self.others.append(self.cluster.add_node(**_NODE))

    def kill_one(self, rng: random.Random) -> int:
        """Kill the raylet of a node that is not the head, with all processes on it, and add a new node."""
        node = self.others.pop(rng.randrange(len(self.others)))
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        victims = [*raylet.children(recursive=True), raylet]
        for victim in victims:
            _kill(victim)
        self.cluster.remove_node(node, allow_graceful=False)
        self.add()
        return raylet.pid

    def workers(self) -> list[psutil.Process]:
        """All processes below the raylets."""
        found = []
        for node in [self.cluster.head_node, *self.others]:
            raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
            found += raylet.children(recursive=True)
        return found


@dataclass
class Report:
    """What happened."""

    kills: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    exits: Counter[int] = field(default_factory=Counter)
    redone: int = 0
    """Receipts that existed at a kill and were written again later: must stay 0."""


def run_through(
    command: Sequence[object],
    out: Path,
    cluster: Nodes,
    kinds: Mapping[str, int],
    rng: random.Random,
    *,
    most_kills: int,
    pause_s: tuple[float, float],
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Run ``deltacache`` with these arguments until it is done, killing something now and then.

    Raises:
        AssertionError: the command ended with an error that no kill explains.
    """
    report = Report()
    receipts: dict[str, tuple[int, int]] = {}
    while True:
        driver = start_command(*command, "--ray-address", cluster.address, stdout=out.with_suffix(".log"))
        report.starts += 1
        struck = ""
        while driver.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                driver.wait(rng.uniform(*pause_s))
            if driver.poll() is not None or report.kills.total() >= most_kills:
                continue
            (wanted,) = rng.choices(list(kinds), list(kinds.values()))
            before = _receipts(out)
            if _strike(wanted, driver, cluster, rng):
                report.kills[wanted] += 1
                say(f"killed {wanted}; {len(before)} shards were done")
                report.redone += _changed(receipts, out)
                receipts |= before
                struck = wanted
        code = driver.wait()
        report.exits[code] += 1
        if code == 0:
            report.redone += _changed(receipts, out)
            return report
        said = out.with_suffix(".log").read_text()
        assert (struck, code) == ("driver", -signal.SIGKILL), f"{struck} killed:\n{said[-3000:]}"
        say(f"exit code {code}: starting again")


def _strike(kind: str, driver: WarmProcess, cluster: Nodes, rng: random.Random) -> bool:
    """Kill one of a kind; False when there is none now."""
    if kind == "driver":
        driver.kill()
        return True
    if kind == "raylet":
        cluster.kill_one(rng)
        return True
    victims = [process for process in cluster.workers() if _is(process, kind)]
    return bool(victims) and _kill(rng.choice(victims))


def _is(process: psutil.Process, kind: str) -> bool:
    try:
        command = " ".join(process.cmdline())
        if kind == "decode child":  # forked by a decode server, and named like it
            parent = process.parent()
            return (
                "decode_server" in command
                and parent is not None
                and "decode_server" in " ".join(parent.cmdline())
            )
        return command.startswith("ray::decode_group" if kind == "decode task" else "ray::_Encoder")
    except psutil.Error:
        return False


def _kill(process: psutil.Process) -> bool:
    try:
        os.kill(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _receipts(out: Path) -> dict[str, tuple[int, int]]:
    folder = out / "receipts"
    found = {}
    for path in folder.glob("[0-9]*.json") if folder.is_dir() else ():
        about = path.stat()
        found[path.name] = (about.st_ino, about.st_mtime_ns)
    return found


def _changed(earlier: dict[str, tuple[int, int]], out: Path) -> int:
    now = _receipts(out)
    return sum(now.get(name) != about for name, about in earlier.items())
