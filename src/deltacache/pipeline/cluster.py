"""Where the work runs: the one module of the pipeline that knows Ray.

Encoders are actors that hold a model; each works on two shards at a time. An encoder has the videos of its shard
decoded by Ray tasks, which run wherever a CPU is free, a few groups ahead of what it needs. The driver hands out
shards, and hands them out again when the node or process that had them is lost.
"""

import logging
import math
import os
import socket
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import ray
from ray._private import ray_constants
from ray.exceptions import RayError, RayTaskError

import deltacache
from deltacache.pipeline.datasets.plan import PlannedVideo
from deltacache.pipeline.decoding.native_log import native_log
from deltacache.pipeline.decoding.work import DecodedGroup, DecodeSettings, decode_group, groups_of, warm_up
from deltacache.pipeline.storage.remote_files import may_pass
from deltacache.pipeline.work.attempts import Attempts, Kind, Work
from deltacache.pipeline.work.placement import Node, Placement, place
from deltacache.pipeline.work.shard_work import ShardResult
from deltacache.pipeline.work.workers import ShardWorker, WorkCounters
from deltacache.schemas.errors import DeltacacheError, StorageError
from deltacache.schemas.jobs import ClusterSettings

SHARDS_AT_ONCE = 2
"""Of an encoder: one is written while the other is in the forward."""
_POLL_S = 0.5
_CONNECT_S = 10.0
_HTTP2_SETTINGS = b"\x04"  # the kind of frame that both sides of HTTP/2, and so of gRPC, begin with
_HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0" + _HTTP2_SETTINGS + b"\0" * 5
_WARM_UP_S = 30.0  # decoders that take longer start with their first video
_START_PATIENCE_S = 120.0  # for encoders that find no room; then those that did begin
_MOST_STARTS = 5  # of one encoder without any work done in between
_DECODE_RETRIES = 5  # by Ray, when the worker or node of a decode task dies


@contextmanager
def cluster(settings: ClusterSettings) -> Iterator[Placement]:
    """Start a local Ray, or join the one at ``ray_address``; leave it afterwards."""
    started = time.perf_counter()
    # On one machine the slots are counted in decoders: encoders share the cores with them.
    with ray_running(settings.ray_address, (settings.decoders or os.cpu_count() or 1) + 1):
        cores = os.cpu_count() if settings.ray_address is None else None
        yield place(settings, nodes(), cores=cores, ray_start_s=time.perf_counter() - started)


@contextmanager
def ray_running(ray_address: str | None, slots: int) -> Iterator[None]:
    """Start a local Ray with this many CPU ``slots``, or join the one at ``ray_address``; leave it afterwards.

    Ray's core writes notes about itself to file descriptor 2; they are kept from the user's terminal.
    """
    with native_log(), _loopback_only() if ray_address is None else nullcontext():
        _connect(ray_address, slots)
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _loopback_only() -> Iterator[None]:
    """A Ray that starts inside listens on the loopback address alone, as it does on Windows and macOS.

    On Linux Ray replaces 127.0.0.1 by the address of the host and listens on all of them; ``ray.init`` has no
    setting for this. The variable is for the processes that Ray starts, the constant for this one.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        del os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR]


def _connect(ray_address: str | None, slots: int) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if ray_address is None:
        ray.init(address="local", num_cpus=slots, include_dashboard=False, **quiet)
        return
    package = str(Path(deltacache.__file__).parent)
    try:
        _check_answers(ray_address)
        ray.init(address=ray_address, runtime_env={"py_modules": [package]}, **quiet)
    except (OSError, ValueError, RuntimeError) as error:
        raise DeltacacheError(
            f"no Ray cluster answers at {ray_address} ({error}): start one with "
            "'ray start --head', or leave --ray-address out to run on this machine. A cluster with token "
            "authentication answers only with RAY_AUTH_MODE=token and its token, see docs/cluster.md"
        ) from error


def _check_answers(address: str) -> None:
    """Raise at once where Ray itself would try for minutes.

    Raises:
        OSError: nobody listens there, or something that does not speak HTTP/2, such as Ray's dashboard.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdigit():
        return
    with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S) as connection:
        if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
            return
        connection.sendall(_HTTP2_GREETING)
        if connection.recv(4)[3:] != _HTTP2_SETTINGS:
            raise OSError("what listens there is not Ray: its port is 6379 unless you chose one, not 8265")


def nodes() -> list[Node]:
    """The machines of the cluster that live."""
    return [
        Node(*(node["Resources"].get(name, 0.0) for name in ("CPU", "GPU", "memory")))
        for node in ray.nodes()
        if node["Alive"]
    ]


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """What encoders need to have videos decoded.

    Attributes:
        locations: where each ``video_uri`` lies.
    """

    settings: DecodeSettings
    locations: Mapping[str, str]


@dataclass(slots=True)
class Events:
    """What the driver hears while the work is under way.

    Attributes:
        started: called once, when all encoders (or as many as find room) are ready; with the clips a second
            of their bare forwards, one an encoder.
        encoding: called with the number of clips in shards that are not committed yet.
        line: called with a sentence about what was lost or is being waited for.
    """

    started: Callable[[list[float]], None] = lambda rates: None
    encoding: Callable[[int], None] = lambda clips: None
    line: Callable[[str], None] = lambda text: None


def run_shards(
    attempts: Attempts,
    build: Callable[[], ShardWorker],
    decode: DecodePlan | None,
    placement: Placement,
    events: Events,
) -> Iterator[ShardResult]:
    """Do all the work; yields a result as each shard is committed, in no fixed order.

    Raises:
        DeltacacheError: what a worker refused, such as a full disk; or encoders that do not start.
    """
    pool = _Pool(build, decode, placement, events)
    try:
        pool.start()
        while not attempts.finished:
            pool.hand_out(attempts)
            yield from pool.wait(attempts)
            attempts.lost_workers = pool.lost
    finally:
        pool.stop()


class _Encoder:
    """Actor: holds a worker."""

    def __init__(
        self, build: Callable[[], ShardWorker], device: str, decode: DecodeSettings | None, window: int
    ) -> None:
        if device == "cpu":
            # One thread: sums never depend on the machine's size. More encoders use more cores.
            import torch

            torch.set_num_threads(1)
        self._build, self._settings, self._window = build, decode, window
        self._worker: ShardWorker | None = None
        self._counters = WorkCounters()

    def load(self) -> dict[str, Any]:
        """Build the worker; what was refused comes back as text."""
        try:
            self._worker = self._build()
        except DeltacacheError as error:
            return {"refused": str(error)}
        return {"pid": os.getpid()}

    def measure(self) -> float:
        """Clips a second of the worker's bare forward."""
        return self._loaded().measure()

    def run(self, work: Work, locations: Mapping[str, str]) -> dict[str, Any]:
        """Do one piece of work; what was refused, and what may pass on another attempt, comes back as text."""
        groups: list[Generator[DecodedGroup, None, None]] = []

        def decode(of: Work) -> Iterator[DecodedGroup]:
            groups.append(self._decoded(of, locations))
            return groups[-1]

        try:
            with self._counters.work() as count:
                return {"result": asdict(self._loaded().run(work, decode, count))}
        except RayTaskError as error:
            if isinstance(error.cause, DeltacacheError):  # Ray's own text of it is a traceback
                return {"refused": str(error.cause)}
            raise
        except RayError as error:  # decoders were lost, again and again
            return {"lost": f"{type(error).__name__} while decoding"}
        except StorageError as error:
            passing = error.__cause__ is not None and may_pass(error.__cause__)
            return {"lost" if passing else "refused": str(error)}
        except DeltacacheError as error:
            return {"refused": str(error)}
        finally:
            for each in groups:
                each.close()

    def clips(self) -> int:
        """Clips encoded in works that are under way."""
        return self._counters.clips

    def _loaded(self) -> ShardWorker:
        if self._worker is None:
            raise RuntimeError("load() comes first")
        return self._worker

    def _decoded(self, work: Work, locations: Mapping[str, str]) -> Generator[DecodedGroup, None, None]:
        """Groups in the plan's order; ``window`` of them are decoded ahead."""
        assert self._settings is not None
        task = ray.remote(decode_group).options(num_cpus=1, max_retries=_DECODE_RETRIES)
        left = iter(groups_of(work.task.videos, self._settings))
        ahead: deque[ray.ObjectRef] = deque()
        try:
            while True:
                while len(ahead) < self._window and (videos := next(left, None)):
                    of = {v.video_uri: locations[v.video_uri] for v in videos if v.video_uri in locations}
                    ahead.append(task.remote(videos, of, self._settings, dict(work.culprits)))
                if not ahead:
                    return
                yield ray.get(ahead.popleft())
        finally:
            for ref in ahead:
                ray.cancel(ref)


@dataclass(slots=True)
class _Member:
    """One encoder as the driver sees it."""

    actor: Any = None
    ready: bool = False
    starts: int = 0
    works: int = 0
    alone: bool = False  # what it works on must have no company
    under_way: int = 0  # clips encoded in works that have not ended


@dataclass(slots=True)
class _Pool:
    """The encoders, and what each was asked."""

    build: Callable[[], ShardWorker]
    decode: DecodePlan | None
    placement: Placement
    events: Events
    members: list[_Member] = field(default_factory=list)
    loading: dict[Any, _Member] = field(default_factory=dict)
    working: dict[Any, tuple[_Member, Any, Work]] = field(default_factory=dict)
    asking: dict[Any, _Member] = field(default_factory=dict)
    asked_at: float = 0.0
    held: Work | None = None  # waits for an encoder with room
    lost: int = 0  # encoders that died, or were ended after an error
    patient_until: float = 0.0

    def start(self) -> None:
        """Start the encoders; return when all are ready, or as many as find room."""
        for _ in range(self.placement.encoders):
            member = _Member()
            self.members.append(member)
            self._load(member)
        warming = self._warm_decoders()
        while self.loading and (time.monotonic() < self.patient_until or not self._ready()):
            done, _ = ray.wait(list(self.loading), num_returns=1, timeout=_POLL_S)
            for ref in done:
                self._loaded(ref)
            self._say_if_nobody_is_there()
        if warming:
            ray.wait(warming, num_returns=len(warming), timeout=_WARM_UP_S)
        self.events.started(self.rates())

    def rates(self) -> list[float]:
        """Clips a second of each encoder's bare forward: all at once, and nothing else runs."""
        refs = [member.actor.measure.remote() for member in self._ready()]
        try:
            return ray.get(refs)
        except RayTaskError as error:
            if isinstance(error.cause, DeltacacheError):
                raise DeltacacheError(str(error.cause)) from error
            raise DeltacacheError(f"the encoder fails on noise: {_cause(error)}") from error
        except RayError:
            return []  # one is lost already; the work that it gets will say so

    def hand_out(self, attempts: Attempts) -> None:
        """Give work to encoders that have room, the idlest first."""
        while (work := self.held or attempts.next()) is not None:
            member = self._room_for(work)
            self.held = work if member is None else None
            if member is None:
                return
            locations = self.decode.locations if self.decode else {}
            uris = [video.video_uri for video in work.task.videos]
            of = {uri: locations[uri] for uri in uris if uri in locations}
            member.works += 1
            member.alone = work.alone
            self.working[member.actor.run.remote(work, of)] = member, member.actor, work

    def _room_for(self, work: Work) -> _Member | None:
        most = 0 if work.alone else SHARDS_AT_ONCE - 1
        free = [member for member in self._ready() if member.works <= most and not member.alone]
        return min(free, key=lambda member: member.works, default=None)

    def wait(self, attempts: Attempts) -> Iterator[ShardResult]:
        """Wait a moment for whatever comes; yields the results of committed shards."""
        self._ask()
        self._say_if_nobody_is_there()
        refs = [*self.working, *self.loading, *self.asking]
        if not refs:
            time.sleep(_POLL_S)
            return
        done, _ = ray.wait(refs, num_returns=1, timeout=_POLL_S)
        for ref in done:
            if ref in self.working:
                result = self._worked(ref, attempts)
                if result is not None:
                    yield result
            elif ref in self.asking:
                self._told(ref)
            else:
                self._loaded(ref)

    def stop(self) -> None:
        """End the encoders at once: what they have not committed does not count."""
        for member in self.members:
            if member.actor is not None:
                ray.kill(member.actor)

    def _warm_decoders(self) -> list[Any]:
        """Have decoders start while models are loaded."""
        if self.decode is None:
            return []
        task = ray.remote(warm_up).options(num_cpus=1)
        return [task.remote(self.decode.settings) for _ in range(self.placement.decoders)]

    def _ready(self) -> list[_Member]:
        return [member for member in self.members if member.ready]

    def _load(self, member: _Member) -> None:
        """Start an encoder, in place of the one that died; Ray finds room for it, waiting if need be."""
        placement, settings = self.placement, self.decode.settings if self.decode else None
        kind = ray.remote(_Encoder).options(
            num_cpus=placement.cpus_per_encoder,
            num_gpus=placement.gpus_per_encoder,
            max_concurrency=SHARDS_AT_ONCE + 1,  # one more, to be asked how far it is
            scheduling_strategy="SPREAD",
        )
        if member.actor is not None:
            ray.kill(member.actor)
        window = placement.window(SHARDS_AT_ONCE)
        member.actor = kind.remote(self.build, placement.device, settings, window)
        member.ready, member.under_way = False, 0
        member.starts += 1
        self.patient_until = time.monotonic() + _START_PATIENCE_S
        self.loading[member.actor.load.remote()] = member

    def _loaded(self, ref: Any) -> None:
        member = self.loading.pop(ref)
        try:
            answer: dict[str, Any] = ray.get(ref)
        except RayError as error:
            self._did_not_start(member, error)
            return
        if "refused" in answer:
            raise DeltacacheError(answer["refused"])
        member.ready = True

    def _did_not_start(self, member: _Member, error: RayError) -> None:
        """Start it again, on whatever node Ray finds; give it up when others work."""
        if member.starts < _MOST_STARTS:
            self._load(member)
            return
        said = f"an encoder did not start {member.starts} times: {_cause(error)}"
        if not self._ready():
            raise DeltacacheError(
                f"{said}. If it needs more memory than its node has, ask for fewer --encoders or a smaller "
                "--backbone"
            ) from error
        self.events.line(f"{said}; going on with {len(self._ready())} encoders")
        ray.kill(member.actor)
        self.members.remove(member)

    def _worked(self, ref: Any, attempts: Attempts) -> ShardResult | None:
        member, actor, work = self.working.pop(ref)
        member.works -= 1
        member.alone = False
        shard = f"shard {work.task.shard_id}"
        try:
            answer: dict[str, Any] = ray.get(ref)
        except RayTaskError as error:
            self._replace(member, actor)  # after some errors (of CUDA) a process is good for nothing
            attempts.failed(work, _cause(error), lost=False)
            self.events.line(f"{shard} failed ({_cause(error)}): looking for the video that is to blame")
            return None
        except RayError as error:
            self._replace(member, actor)
            attempts.failed(work, f"its worker died ({type(error).__name__})", lost=True)
            self.events.line(f"the encoder of {shard} was lost: the shard is given to another")
            return None
        if "refused" in answer:
            raise DeltacacheError(answer["refused"])
        if "lost" in answer:
            self.events.line(f"{shard} is tried again ({answer['lost']})")
            attempts.failed(work, answer["lost"], lost=True)
            return None
        attempts.done(work)
        member.starts = 0
        return None if work.kind is Kind.TRY else ShardResult(**answer["result"])

    def _replace(self, member: _Member, actor: Any) -> None:
        """Start another encoder, once for each that died, however many shards were lost with it."""
        if actor is member.actor and member.ready:
            self.lost += 1
            self._load(member)

    def _ask(self) -> None:
        """Ask every encoder how far it is, now and then."""
        if time.monotonic() - self.asked_at > 1.0 and not self.asking:
            self.asked_at = time.monotonic()
            self.asking = {member.actor.clips.remote(): member for member in self._ready()}

    def _told(self, ref: Any) -> None:
        member = self.asking.pop(ref)
        try:
            member.under_way = ray.get(ref)
        except RayError:
            return  # lost: the work that it had says so
        if not self.asking:
            self.events.encoding(sum(each.under_way for each in self.members))

    def _say_if_nobody_is_there(self) -> None:
        if not self._ready() and time.monotonic() > self.patient_until:
            self.patient_until = time.monotonic() + _START_PATIENCE_S
            self.events.line(
                f"no encoder is running: waiting for one of {len(self.loading)} to start. It is still loading its "
                f"model, or the cluster has no node with {self.placement.gpus_per_encoder:g} GPUs and "
                f"{self.placement.cpus_per_encoder:g} CPUs free"
            )


def _cause(error: RayError) -> str:
    """The exception behind an error of Ray in one line."""
    cause = error.cause if isinstance(error, RayTaskError) and error.cause is not None else error
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[-1].strip()}" if lines else type(cause).__name__


def probe(
    build: Callable[[], ShardWorker],
    videos: Sequence[PlannedVideo],
    decode: DecodePlan,
    placement: Placement,
) -> tuple[float, list[DecodedGroup]]:
    """Try what a job would do on a few videos, writing nothing.

    Returns:
        Clips a second of one encoder's bare forward, and the videos decoded one by one.
    """
    one = replace(placement, encoders=1)
    pool = _Pool(build, None, one, Events())
    try:
        pool.start()
        rate = sum(pool.rates())
    finally:
        pool.stop()
    task = ray.remote(decode_group).options(num_cpus=1, max_retries=_DECODE_RETRIES)
    refs = [task.remote([video], decode.locations, decode.settings, {}) for video in videos]
    return rate, ray.get(refs)


class TaskWorker(Protocol):
    """A seam: what runs on a process of ``run_tasks``."""

    @abstractmethod
    def run(self, item: Any, following: Sequence[Any]) -> Any:
        """Do one item; ``following`` is what this process gets next, so that it may begin to read it."""
        ...


def run_tasks(
    build: Callable[[str], TaskWorker], items: Sequence[Any], workers: int, ray_address: str | None = None
) -> Iterator[tuple[int, Any]]:
    """Do independent ``items`` on ``workers`` processes; yields (position, result) as each is done, in any order.

    The items of a process that is lost are given to another.

    Args:
        build: makes the worker on its process; takes the device, ``cpu`` or ``cuda``.

    Raises:
        DeltacacheError: what a worker refused; or processes that are lost again and again while no item is done.
    """
    if not items:
        return
    workers = min(workers, len(items))
    with ray_running(ray_address, workers + 1):
        gpus = gpu_share(workers, sum(int(node.gpus) for node in nodes()))
        pool = _TaskPool(build, items, gpus, _MOST_STARTS * workers)
        try:
            pool.start(workers)
            while pool.running:
                yield from pool.wait()
        finally:
            pool.stop()


def gpu_share(workers: int, gpus: int) -> float:
    """The part of a GPU that each of ``workers`` gets: one k-th, so that k of them fill a GPU and all find room.

    Three workers on two GPUs get a half each: of two thirds, one of them would wait for ever.
    """
    return 1 / math.ceil(workers / gpus) if gpus else 0.0


class _TaskActor:
    """Actor: holds a worker."""

    def __init__(self, build: Callable[[str], TaskWorker], device: str) -> None:
        if device == "cpu":
            import torch

            torch.set_num_threads(1)
        self._build, self._device = build, device
        self._worker: TaskWorker | None = None

    def run(self, item: Any, following: Sequence[Any]) -> dict[str, Any]:
        """Do one item; what was refused comes back as text."""
        try:
            self._worker = self._worker or self._build(self._device)
            return {"result": self._worker.run(item, following)}
        except DeltacacheError as error:
            return {"refused": str(error)}


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
    left: deque[int] = field(init=False)
    running: dict[Any, _TaskMember] = field(default_factory=dict)
    lost: int = 0

    def __post_init__(self) -> None:
        self.left = deque(range(len(self.items)))

    def start(self, workers: int) -> None:
        for _ in range(workers):
            self._give(self._actor(), self.left.popleft())

    def wait(self) -> Iterator[tuple[int, Any]]:
        done, _ = ray.wait(list(self.running), num_returns=1)
        member = self.running.pop(done[0])
        try:
            answer: dict[str, Any] = ray.get(done[0])
        except RayTaskError as error:
            raise RuntimeError(f"a worker failed: {_cause(error)}") from error
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
        return kind.remote(self.build, "cuda" if self.gpus else "cpu")

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
                f"workers were lost {self.lost} times with nothing done in between, the last with {_cause(error)}: "
                "look at their memory, and ask for fewer"
            ) from error
        if member.following is not None:
            self.left.appendleft(member.following)
        self._give(self._actor(), member.now)
