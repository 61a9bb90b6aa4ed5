"""Tasks of any kind on worker processes that stay: each item once, in whatever order they end."""

import math
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray
from ray.exceptions import RayError, RayTaskError

from deltacache.pipeline.cluster.session import (
    MOST_STARTS,
    POLL_S,
    SAY_S,
    cause_of,
    is_out_of_memory,
    nodes,
    ray_running,
    when_there_is_room,
)
from deltacache.pipeline.work.placement import NoRoomError, place_tasks
from deltacache.schemas.errors import DeltacacheError, out_of_memory_text
from deltacache.schemas.texts import counted


class TaskWorker(Protocol):
    """A seam: what runs on a process of ``run_tasks``."""

    @abstractmethod
    def run(self, item: Any, following: Sequence[Any]) -> Any:
        """Do one item; ``following`` is what this process gets next, so that it may begin to read it."""
        ...


def run_tasks(
    build: Callable[[str], TaskWorker],
    items: Sequence[Any],
    workers: int,
    ray_address: str | None = None,
    *,
    wait_s: float = math.inf,
    say: Callable[[str], None] = lambda text: None,
) -> Generator[tuple[int, Any], None, None]:
    """Do independent ``items`` on ``workers`` processes; yields (position, result) as each is done, in any order.

    The items of a process that is lost are given to another. Processes that find no room are not started.

    Args:
        build: makes the worker on its process; takes the device, ``cpu`` or ``cuda``.
        wait_s: how long to wait for a cluster to have room.
        say: hears what is waited for.

    Raises:
        DeltacacheError: what a worker refused; processes that are lost again and again while no item is done; or
            no room for any of them.
    """
    if not items:
        return
    workers = min(workers, len(items))
    own = ray_address is None and not ray.is_initialized()
    with ray_running(ray_address, workers + 1, say):
        fitting, gpus = when_there_is_room(
            lambda: place_tasks(workers, nodes()), [{"CPU": 1}] * workers, 0 if own else wait_s, say
        )
        if fitting < workers:
            say(
                f"{fitting} workers, not {workers}: each needs a CPU{', and a part of a GPU' if gpus else ''}"
            )
        pool = _TaskPool(build, items, gpus, MOST_STARTS * fitting, wait_s, say)
        try:
            pool.start(fitting)
            while pool.running:
                yield from pool.wait()
        finally:
            pool.stop()


class _TaskActor:
    """Actor: holds a worker."""

    def __init__(self, build: Callable[[str], TaskWorker], device: str) -> None:
        if device == "cpu":
            import torch

            torch.set_num_threads(1)
        self._build, self._device = build, device
        self._worker: TaskWorker | None = None

    def here(self) -> None:
        """Answers as soon as the process runs: it has found room."""

    def run(self, item: Any, following: Sequence[Any]) -> dict[str, Any]:
        """Do one item; what was refused comes back as text."""
        try:
            self._worker = self._worker or self._build(self._device)
            return {"result": self._worker.run(item, following)}
        except DeltacacheError as error:
            return {"refused": str(error)}
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return {"refused": out_of_memory_text(error)}


@dataclass(slots=True)
class _TaskMember:
    """One process: the positions of what it does, and of what it does next."""

    actor: Any
    now: int
    following: int | None


@dataclass(slots=True)
class _TaskPool:
    """What is left, and who does what.

    Attributes:
        lost: processes since an item was last done, at most ``most_lost``.
    """

    build: Callable[[str], TaskWorker]
    items: Sequence[Any]
    gpus: float
    most_lost: int
    wait_s: float
    say: Callable[[str], None]
    left: deque[int] = field(init=False)
    running: dict[Any, _TaskMember] = field(default_factory=dict)
    placing: list[Any] = field(default_factory=list)  # answers of processes that look for room
    lost: int = 0
    moved_at: float = field(default_factory=time.monotonic)
    say_after: float = 0.0

    def __post_init__(self) -> None:
        self.left = deque(range(len(self.items)))

    def start(self, workers: int) -> None:
        for _ in range(workers):
            self._give(self._actor(), self.left.popleft())

    def wait(self) -> Iterator[tuple[int, Any]]:
        done, _ = ray.wait(list(self.running), num_returns=1, timeout=POLL_S)
        if not done:
            self._check_room()
            return
        self.moved_at = time.monotonic()
        member = self.running.pop(done[0])
        try:
            answer: dict[str, Any] = ray.get(done[0])
        except RayTaskError as error:
            raise RuntimeError(f"a worker failed: {cause_of(error)}") from error
        except RayError as error:
            self._lost(member, error)
            return
        if "refused" in answer:
            raise DeltacacheError(answer["refused"])
        self.lost = 0
        following = member.following if member.following is not None else self._next()
        if following is None:
            ray.kill(member.actor)
        else:
            self._give(member.actor, following)
        yield member.now, answer["result"]

    def stop(self) -> None:
        for member in self.running.values():
            ray.kill(member.actor)

    def _actor(self) -> Any:
        kind = ray.remote(_TaskActor).options(num_cpus=1, num_gpus=self.gpus, scheduling_strategy="SPREAD")
        actor: Any = kind.remote(self.build, "cuda" if self.gpus else "cpu")
        self.placing.append(actor.here.remote())
        return actor

    def _check_room(self) -> None:
        """Say what is waited for.

        Raises:
            NoRoomError: no process has found room for ``wait_s``.
        """
        if self.placing:
            _, self.placing = ray.wait(self.placing, num_returns=len(self.placing), timeout=0)
        quiet = time.monotonic() - self.moved_at
        if not self.placing or quiet < min(SAY_S, self.wait_s):
            return
        needs = f"a CPU and {counted(self.gpus, 'GPU', form='g')}" if self.gpus else "a CPU"
        if len(self.placing) == len(self.running) and quiet > self.wait_s:
            raise NoRoomError(
                f"no worker found {needs} free within {self.wait_s:g} s (--wait-for-nodes): others use the "
                "cluster, or its nodes are gone. The same command continues with what is missing"
            )
        if time.monotonic() > self.say_after:
            self.say_after = time.monotonic() + SAY_S
            self.say(f"{len(self.placing)} of {len(self.running)} workers wait for a node with {needs} free")

    def _next(self) -> int | None:
        return self.left.popleft() if self.left else None

    def _give(self, actor: Any, position: int) -> None:
        # The last items are not kept for one process while others have nothing to do.
        following = self._next() if len(self.left) > len(self.running) else None
        ahead = [] if following is None else [self.items[following]]
        self.running[actor.run.remote(self.items[position], ahead)] = _TaskMember(actor, position, following)

    def _lost(self, member: _TaskMember, error: RayError) -> None:
        self.lost += 1
        if self.lost > self.most_lost:
            raise DeltacacheError(
                f"workers were lost {self.lost} times with nothing done in between, the last with {cause_of(error)}: "
                "look at their memory, and ask for fewer"
            ) from error
        if member.following is not None:
            self.left.appendleft(member.following)
        self._give(self._actor(), member.now)
