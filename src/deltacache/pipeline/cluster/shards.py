"""Shards on encoders, videos on decoders.

Encoders are actors that hold a model; each works on two shards at a time. An encoder has the videos of its shards
decoded by Ray tasks, which run wherever a CPU is free; while the two shards keep fewer decoders busy than there are
for the encoder, videos of the shards that it gets next are decoded too. The driver hands out shards, and hands them
out again when the node or process that had them is lost.

With ``--encoders 0`` there is no Ray: one encoder works in the process of the command, on one shard after the other.
"""

import itertools
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from deltacache.pipeline.cluster.session import (
    MOST_STARTS,
    POLL_S,
    SAY_S,
    cause_of,
    is_out_of_memory,
    nodes,
)
from deltacache.pipeline.datasets.plan import PlannedVideo
from deltacache.pipeline.decoding.work import (
    DecodedGroup,
    DecodeSettings,
    decode_group,
    group_bytes,
    group_size,
    groups_of,
    warm_up,
)
from deltacache.pipeline.storage.storage import patience_s
from deltacache.pipeline.work.attempts import Attempts, Kind, Work
from deltacache.pipeline.work.placement import DecodeShare, NoRoomError, Placement
from deltacache.pipeline.work.shard_work import ShardResult
from deltacache.pipeline.work.workers import ShardWorker, WorkCounters
from deltacache.schemas.errors import DeltacacheError, StorageError, out_of_memory_text
from deltacache.schemas.texts import counted

SHARDS_AT_ONCE = 2
"""Of an encoder: one is written while the other is in the forward pass."""
_WARM_UP_S = 30.0  # decoders that take longer start with their first video
_START_PATIENCE_S = 120.0  # for encoders that find no room; then those that did begin
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0  # before a shard that a disk did not take is made again
_DECODE_RETRIES = 5  # by Ray, when the worker or node of a decode task dies


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """What encoders need to have videos decoded.

    Attributes:
        locations: where each ``video_uri`` lies.
        views: the most clips of a video.
        videos: how many are to be decoded; None: all that are located.
    """

    settings: DecodeSettings
    locations: Mapping[str, str]
    views: int = 1
    videos: int | None = None


@dataclass(slots=True)
class Events:
    """What the driver hears while the work is under way.

    Attributes:
        started: called once, when all encoders (or as many as find room) are ready; with the clips per second
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
) -> Generator[ShardResult, None, None]:
    """Do all the work; yields a result as each shard is committed, in no fixed order.

    Where ``placement`` is this process, an exception that is no refusal ends the work instead of being looked into:
    it can be debugged where it was raised.

    Raises:
        DeltacacheError: what a worker refused, such as a full disk; encoders that do not start, or find no room
            within ``placement.wait_s``.
    """
    if placement.here:
        yield from _run_here(attempts, build, decode, placement, events)
        return
    decoding = None
    if decode is not None:
        size, videos = group_bytes(decode.views, decode.settings), decode.videos or len(decode.locations)
        shares = [placement.decode_share(each, size) for each in range(placement.encoders)]
        decoding = _Decoding(decode, group_size(videos, placement.decoders), shares)
    pool = _Pool(build, decoding, placement, events)
    try:
        pool.start()
        while not attempts.finished:
            pool.hand_out(attempts)
            yield from pool.wait(attempts)
            attempts.lost_workers = pool.lost
    finally:
        pool.stop()


def _run_here(
    attempts: Attempts,
    build: Callable[[], ShardWorker],
    decode: DecodePlan | None,
    placement: Placement,
    events: Events,
) -> Generator[ShardResult, None, None]:
    """``run_shards`` without Ray: one encoder in this process, which decodes a group when it is the next."""
    size = 1 if decode is None else group_size(decode.videos or len(decode.locations), placement.decoders)
    decoding = None if decode is None else _Decoding(decode, size, [])
    pool = _Pool(build, decoding, placement, events)
    with _threads_kept():
        encoder = _Encoder(build, placement.device, None)
        if decode is not None:
            encoder.ahead = _OneByOne(decode.settings, size, lambda: events.encoding(encoder.clips()))
        loaded = encoder.load()
        if "refused" in loaded:
            raise DeltacacheError(loaded["refused"])
        events.started([encoder.measure(seconds=0)])
        for ticket in itertools.count():
            work = attempts.next()
            if work is None:
                return
            result = pool.take(work, encoder.run(ticket, work, pool.located(work)), attempts)
            if result is not None:
                yield result


@contextmanager
def _threads_kept() -> Iterator[None]:
    """An encoder takes one thread of torch for its process; afterwards the caller has as many as before."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _OneByOne:
    """``_Ahead`` in the process of the encoder: a group is decoded when the one before it is encoded."""

    def __init__(self, settings: DecodeSettings, videos_at_once: int, on_group: Callable[[], None]) -> None:
        self._settings, self._videos_at_once, self._on_group = settings, videos_at_once, on_group
        self._shards: dict[int, tuple[Work, Mapping[str, str]]] = {}

    def add(self, ticket: int, work: Work, locations: Mapping[str, str]) -> None:
        self._shards[ticket] = work, locations

    def groups(self, ticket: int) -> Generator[DecodedGroup, None, None]:
        work, locations = self._shards[ticket]
        for videos in groups_of(work.task.videos, self._settings, self._videos_at_once):
            yield decode_group(videos, locations, self._settings, dict(work.known_failures))
            self._on_group()

    def drop(self, ticket: int) -> None:
        self._shards.pop(ticket, None)


@dataclass(slots=True)
class _Upcoming:
    """Groups of a shard that an encoder has or gets next: those not asked for, and those asked for, in order."""

    left: deque[tuple[tuple[PlannedVideo, ...], Mapping[str, str]]]
    known_failures: dict[str, str]
    asked: deque[ray.ObjectRef] = field(default_factory=deque)
    begun: bool = False


class _Ahead:
    """Has the videos of an encoder's shards decoded, as far ahead as its share allows. Several threads use it.

    Shards that the encoder works on come first, then those that it gets next, in their order. So whoever waits for
    a group never waits for a later shard to be encoded.
    """

    def __init__(self, settings: DecodeSettings, videos_at_once: int, share: DecodeShare) -> None:
        self._settings, self._videos_at_once, self._share = settings, videos_at_once, share
        self._task = ray.remote(decode_group).options(num_cpus=1, max_retries=_DECODE_RETRIES)
        self._shards: dict[int, _Upcoming] = {}
        self._gone: set[int] = set()
        self._running: set[ray.ObjectRef] = set()
        self._lock = threading.Lock()

    def add(self, ticket: int, work: Work, locations: Mapping[str, str]) -> None:
        """Have the videos of ``work`` decoded when their turn comes."""
        with self._lock:
            if ticket in self._shards or ticket in self._gone:  # calls of an actor overtake each other
                return
            groups = groups_of(work.task.videos, self._settings, self._videos_at_once)
            located = (
                (videos, {v.video_uri: locations[v.video_uri] for v in videos if v.video_uri in locations})
                for videos in groups
            )
            self._shards[ticket] = _Upcoming(deque(located), dict(work.known_failures))
            self._ask()

    def groups(self, ticket: int) -> Generator[DecodedGroup, None, None]:
        """The groups of a shard in the plan's order. One counts as in flight until the next is asked for."""
        shard = self._shards[ticket]
        shard.begun = True
        try:
            while (ref := self._first(shard)) is not None:
                yield ray.get(ref)
                with self._lock:
                    shard.asked.popleft()
                    self._ask()
        finally:
            self.drop(ticket)

    def drop(self, ticket: int) -> None:
        """The shard is done with, or another encoder gets it."""
        with self._lock:
            self._gone.add(ticket)
            shard = self._shards.pop(ticket, None)
            for ref in shard.asked if shard else ():
                self._running.discard(ref)
                ray.cancel(ref)
            self._ask()

    def _first(self, shard: _Upcoming) -> "ray.ObjectRef | None":
        """The next group, once it is decoded; None when there is no other."""
        while True:
            with self._lock:
                self._ask()
                if not shard.asked and not shard.left:
                    return None
                first = shard.asked[0]  # a shard that was begun has always one
                # Whichever is decoded first makes room for another one, also where the encoder waits for a slow one.
                running = {first, *self._running}
            if first in ray.wait(list(running), num_returns=1, timeout=POLL_S, fetch_local=False)[0]:
                return first

    def _ask(self) -> None:
        """Ask for as many groups as the share allows; with the lock held."""
        if self._share.at_once < self._share.in_flight and self._running:
            decoded, _ = ray.wait(
                list(self._running), num_returns=len(self._running), timeout=0, fetch_local=False
            )
            self._running.difference_update(decoded)
        in_flight = sum(len(shard.asked) for shard in self._shards.values())
        while waiting := [shard for shard in self._shards.values() if shard.left]:
            begun = [shard for shard in waiting if shard.begun]
            shard = min(begun, key=lambda each: len(each.asked)) if begun else waiting[0]
            full = in_flight >= self._share.in_flight or len(self._running) >= self._share.at_once
            # A shard that is tried alone was never expected, and may find all taken by those that were.
            if full and (shard.asked or not shard.begun):
                break
            videos, located = shard.left.popleft()
            ref = self._task.remote(videos, located, self._settings, shard.known_failures)
            shard.asked.append(ref)
            in_flight += 1
            if self._share.at_once < self._share.in_flight:
                self._running.add(ref)


class _Encoder:
    """Actor: holds a worker. Also used without Ray, by ``_run_here``."""

    def __init__(
        self,
        build: Callable[[], ShardWorker],
        device: str,
        decoding: tuple[DecodeSettings, int, DecodeShare] | None,
    ) -> None:
        if device == "cpu":
            # One thread: sums never depend on the machine's size. More encoders use more cores.
            torch.set_num_threads(1)
        self._build = build
        self._pause_s = _FIRST_PAUSE_S
        self.ahead: _Ahead | _OneByOne | None = _Ahead(*decoding) if decoding else None
        self._worker: ShardWorker | None = None
        self._counters = WorkCounters()

    def here(self) -> None:
        """Answers as soon as the process runs: it has found room."""

    def load(self) -> dict[str, Any]:
        """Build the worker; what was refused comes back as text."""
        try:
            self._worker = self._build()
        except DeltacacheError as error:
            return {"refused": str(error)}
        return {"pid": os.getpid()}

    def measure(self, seconds: float = 1.0) -> float:
        """Clips a second of the worker's bare forward pass."""
        return self._loaded().measure(seconds)

    def expect(self, ticket: int, work: Work, locations: Mapping[str, str]) -> None:
        """This work comes next: its videos may be decoded."""
        if self.ahead is not None:
            self.ahead.add(ticket, work, locations)

    def forget(self, ticket: int) -> None:
        """Another encoder gets the work that was expected."""
        if self.ahead is not None:
            self.ahead.drop(ticket)

    def run(self, ticket: int, work: Work, locations: Mapping[str, str]) -> dict[str, Any]:
        """Do one piece of work; what was refused, and what may pass on another attempt, comes back as text."""
        groups: list[Generator[DecodedGroup, None, None]] = []

        def decode(of: Work) -> Iterator[DecodedGroup]:
            assert self.ahead is not None
            self.ahead.add(ticket, of, locations)
            groups.append(self.ahead.groups(ticket))
            return groups[-1]

        try:
            with self._counters.work() as count:
                result = asdict(self._loaded().run(work, decode, count))
            self._pause_s = _FIRST_PAUSE_S
            return {"result": result}
        except RayTaskError as error:
            if isinstance(error.cause, DeltacacheError):  # Ray's own text of it is a traceback
                return {"refused": str(error.cause)}
            raise
        except RayError as error:  # decoders were lost, again and again
            return {"lost": f"{type(error).__name__} while decoding"}
        except StorageError as error:
            if not error.passing:  # else what was written may be gone: all of it is made again
                return {"refused": str(error)}
            passing = str(error)
        except DeltacacheError as error:
            return {"refused": str(error)}
        except RuntimeError as error:
            # The batch did fit when the encoder began: another program took the memory, and no video is to blame.
            if not is_out_of_memory(error):
                raise
            passing = out_of_memory_text(error)
        finally:
            for each in groups:
                each.close()
            self.forget(ticket)  # a generator that nobody began has nothing to end
        self._pause_s = min(2 * self._pause_s, patience_s() / 4, _LONGEST_PAUSE_S)
        time.sleep(self._pause_s)
        return {"again": passing}

    def clips(self) -> int:
        """Clips encoded in works that are under way."""
        return self._counters.clips

    def _loaded(self) -> ShardWorker:
        if self._worker is None:
            raise RuntimeError("load() comes first")
        return self._worker


@dataclass(frozen=True, slots=True)
class _Decoding:
    """How the encoders of a job have their videos decoded.

    Attributes:
        videos_at_once: in one task.
        shares: of each encoder.
    """

    plan: DecodePlan
    videos_at_once: int
    shares: list[DecodeShare]

    def located(self, work: Work) -> dict[str, str]:
        """Where the videos of ``work`` lie."""
        uris = [video.video_uri for video in work.task.videos]
        return {uri: self.plan.locations[uri] for uri in uris if uri in self.plan.locations}


@dataclass(slots=True)
class _Member:
    """One encoder as the driver sees it."""

    number: int
    actor: Any = None
    placed: bool = False  # its process runs
    ready: bool = False
    starts: int = 0
    works: int = 0
    expected: deque[tuple[int, Work, int]] = field(
        default_factory=deque
    )  # what comes next: ticket, work, groups
    alone: bool = False  # what it works on must have no company
    under_way: int = 0  # clips encoded in works that have not ended


@dataclass(slots=True)
class _Pool:
    """The encoders, and what each was asked."""

    build: Callable[[], ShardWorker]
    decoding: _Decoding | None
    placement: Placement
    events: Events
    members: list[_Member] = field(default_factory=list)
    placing: dict[Any, _Member] = field(default_factory=dict)
    loading: dict[Any, _Member] = field(default_factory=dict)
    working: dict[Any, tuple[_Member, Any, Work]] = field(default_factory=dict)
    asking: dict[Any, _Member] = field(default_factory=dict)
    asked_at: float = 0.0
    held: Work | None = None  # waits for an encoder with room
    tickets: int = 0  # works that were handed out
    lost: int = 0  # encoders that died, or were ended after an error
    failing_since: dict[str, float] = field(default_factory=dict)  # of shards that a disk does not take
    patient_until: float = 0.0
    placed_at: float = 0.0  # when an encoder last had a process
    moved_at: float = 0.0  # when something last came out of an encoder
    say_after: float = 0.0

    def start(self) -> None:
        """Start the encoders; return when all are ready, or as many as find room."""
        self.placed_at = time.monotonic()
        for number in range(self.placement.encoders):
            member = _Member(number)
            self.members.append(member)
            self._load(member)
        warming = self._warm_decoders()
        while self.loading and (time.monotonic() < self.patient_until or not self._ready()):
            done, _ = ray.wait([*self.placing, *self.loading], num_returns=1, timeout=POLL_S)
            for ref in done:
                if ref in self.loading:
                    self._loaded(ref)
                else:
                    self._placed(ref)
            self._check_somebody_is_there()
        if self.loading:
            self.events.line(
                f"{len(self._ready())} of {len(self.members)} encoders begin; {self._whereabouts()}, and join when "
                "they are ready"
            )
        if warming:
            ray.wait(warming, num_returns=len(warming), timeout=_WARM_UP_S)
        self.moved_at = time.monotonic()
        self.events.started(self.rates())

    def rates(self) -> list[float]:
        """Clips a second of each encoder's bare forward: all at once, and nothing else runs."""
        refs = [member.actor.measure.remote() for member in self._ready()]
        try:
            return ray.get(refs)
        except RayTaskError as error:
            if isinstance(error.cause, DeltacacheError):
                raise DeltacacheError(str(error.cause)) from error
            if is_out_of_memory(error.cause):
                raise DeltacacheError(out_of_memory_text(error.cause)) from error
            raise DeltacacheError(f"the encoder fails on noise: {cause_of(error)}") from error
        except RayError:
            return []  # one is lost already; the work that it gets will say so

    def hand_out(self, attempts: Attempts) -> None:
        """Give work to encoders that have room, the idlest first, and have the videos of what comes next decoded."""
        while True:
            if self.held is None:
                self._begin_expected()
                member = self._hungriest()
                if member is None:
                    return
                work = attempts.next() or self._taken_from_another(member)
                if work is None:
                    return
                if not work.alone:
                    self._expect(member, work)
                    continue
                self.held = work
            idle = next((each for each in self._ready() if not each.works), None)
            if idle is None:
                return
            self.tickets += 1
            self._begin(idle, self.tickets, self.held)
            self.held = None

    def _hungriest(self) -> _Member | None:
        """The encoder with the least to do, of those that have room or may have more videos decoded."""
        hungry = [each for each in self._ready() if self._may_expect(each)]
        return min(hungry, key=lambda each: each.works + len(each.expected), default=None)

    def _may_expect(self, member: _Member) -> bool:
        if not member.expected and not member.alone and member.works < SHARDS_AT_ONCE:
            return True
        if self.decoding is None:
            return False
        return sum(groups for *_, groups in member.expected) < self.decoding.shares[member.number].in_flight

    def _taken_from_another(self, member: _Member) -> Work | None:
        """At the end of a job: the last work of the encoder that has most before it, for one that has none."""
        if member.works or member.expected:
            return None
        other = max(self._ready(), key=lambda each: len(each.expected))
        if not other.expected:
            return None
        ticket, work, _ = other.expected.pop()
        other.actor.forget.remote(ticket)
        return work

    def _expect(self, member: _Member, work: Work) -> None:
        self.tickets += 1
        groups = 0
        if self.decoding is not None:
            member.actor.expect.remote(self.tickets, work, self.decoding.located(work))
            size = self.decoding.videos_at_once
            groups = len(groups_of(work.task.videos, self.decoding.plan.settings, size))
        member.expected.append((self.tickets, work, groups))

    def _begin_expected(self) -> None:
        for member in self._ready():
            while member.expected and member.works < SHARDS_AT_ONCE and not member.alone:
                ticket, work, _ = member.expected.popleft()
                self._begin(member, ticket, work)

    def _begin(self, member: _Member, ticket: int, work: Work) -> None:
        member.works += 1
        member.alone = work.alone
        self.working[member.actor.run.remote(ticket, work, self.located(work))] = member, member.actor, work

    def located(self, work: Work) -> dict[str, str]:
        """Where the videos of ``work`` lie, if it has any to decode."""
        return self.decoding.located(work) if self.decoding else {}

    def wait(self, attempts: Attempts) -> Iterator[ShardResult]:
        """Wait a moment for whatever comes; yields the results of committed shards."""
        self._ask()
        self._check_somebody_is_there()
        self._check_something_moves()
        refs = [*self.working, *self.placing, *self.loading, *self.asking]
        if not refs:
            time.sleep(POLL_S)
            return
        done, _ = ray.wait(refs, num_returns=1, timeout=POLL_S)
        for ref in done:
            if ref in self.working:
                result = self._worked(ref, attempts)
                if result is not None:
                    yield result
            elif ref in self.asking:
                self._told(ref)
            elif ref in self.placing:
                self._placed(ref)
            else:
                self._loaded(ref)

    def stop(self) -> None:
        """End the encoders at once: what they have not committed does not count."""
        for member in self.members:
            if member.actor is not None:
                ray.kill(member.actor)

    def _warm_decoders(self) -> list[Any]:
        """Have decoders start while models are loaded."""
        if self.decoding is None:
            return []
        task = ray.remote(warm_up).options(num_cpus=1)
        return [task.remote(self.decoding.plan.settings) for _ in range(self.placement.decoders)]

    def _ready(self) -> list[_Member]:
        return [member for member in self.members if member.ready]

    def _load(self, member: _Member) -> None:
        """Start an encoder, in place of the one that died; Ray finds room for it, waiting if need be."""
        placement = self.placement
        kind = ray.remote(_Encoder).options(
            num_cpus=placement.cpus_per_encoder,
            num_gpus=placement.gpus_per_encoder,
            max_concurrency=SHARDS_AT_ONCE + 1,  # one more, to be asked how far it is and to expect works
            scheduling_strategy="SPREAD",
        )
        if member.actor is not None:
            ray.kill(member.actor)
        decoding = None
        if self.decoding is not None:
            each = self.decoding
            decoding = each.plan.settings, each.videos_at_once, each.shares[member.number]
        member.actor = kind.remote(self.build, placement.device, decoding)
        member.placed = member.ready = False
        member.under_way = 0
        member.starts += 1
        self.patient_until = time.monotonic() + _START_PATIENCE_S
        self.placing[member.actor.here.remote()] = member
        self.loading[member.actor.load.remote()] = member

    def _placed(self, ref: Any) -> None:
        member = self.placing.pop(ref)
        try:
            ray.get(ref)
        except RayError:
            return  # it did not start: what was to be loaded says so
        member.placed = True

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
        if member.starts < MOST_STARTS:
            self._load(member)
            return
        said = f"an encoder did not start {member.starts} times: {cause_of(error)}"
        if not self._ready():
            raise DeltacacheError(
                f"{said}. If it needs more memory than its node has, ask for fewer --encoders or a smaller "
                "--backbone"
            ) from error
        self.events.line(f"{said}; continuing with {counted(len(self._ready()), 'encoder')}")
        ray.kill(member.actor)
        self.members.remove(member)

    def _worked(self, ref: Any, attempts: Attempts) -> ShardResult | None:
        member, actor, work = self.working.pop(ref)
        self.moved_at = time.monotonic()
        member.works -= 1
        member.alone = False
        shard = f"shard {work.task.shard_id}"
        try:
            answer: dict[str, Any] = ray.get(ref)
        except RayTaskError as error:
            self._replace(
                member, actor, attempts
            )  # after some errors (of CUDA) a process is good for nothing
            attempts.failed(work, cause_of(error), lost=False)
            self.events.line(f"{shard} failed ({cause_of(error)}): looking for the video that causes it")
            return None
        except RayError as error:
            self._replace(member, actor, attempts)
            attempts.failed(work, f"its worker died ({type(error).__name__})", lost=True)
            self.events.line(f"the encoder of {shard} was lost: the shard is given to another")
            return None
        if "result" in answer:
            member.starts = 0
        return self.take(work, answer, attempts)

    def take(self, work: Work, answer: Mapping[str, Any], attempts: Attempts) -> ShardResult | None:
        """What ``_Encoder.run`` answered about ``work``; the result if its shard is committed."""
        shard = f"shard {work.task.shard_id}"
        if "refused" in answer:
            raise DeltacacheError(answer["refused"])
        if "lost" in answer:
            self.events.line(f"{shard} is tried again ({answer['lost']})")
            attempts.failed(work, answer["lost"], lost=True)
            return None
        if "again" in answer:
            since = self.failing_since.setdefault(work.task.shard_id, time.monotonic())
            if time.monotonic() - since > patience_s():
                raise DeltacacheError(f"{answer['again']} (it was tried again for {patience_s():g} s)")
            self.events.line(f"{shard} is tried again ({answer['again']})")
            attempts.put_back(work)
            return None
        self.failing_since.pop(work.task.shard_id, None)
        attempts.done(work)
        return None if work.kind is Kind.TRY else ShardResult(**answer["result"])

    def _replace(self, member: _Member, actor: Any, attempts: Attempts) -> None:
        """Start another encoder, once for each that died, however many shards were lost with it."""
        if actor is member.actor and member.ready:
            self.lost += 1
            while member.expected:  # was not begun, so nobody asks what it may have done
                attempts.put_back(member.expected.pop()[1])
            self._load(member)

    def _ask(self) -> None:
        """Ask every encoder how far it is, now and then."""
        if time.monotonic() - self.asked_at > 1.0 and not self.asking:
            self.asked_at = time.monotonic()
            self.asking = {member.actor.clips.remote(): member for member in self._ready()}

    def _told(self, ref: Any) -> None:
        member = self.asking.pop(ref)
        try:
            under_way: int = ray.get(ref)
        except RayError:
            return  # lost: the work that it had says so
        if under_way != member.under_way:
            self.moved_at = time.monotonic()
        member.under_way = under_way
        if not self.asking:
            self.events.encoding(sum(each.under_way for each in self.members))

    def _whereabouts(self) -> str:
        """Of encoders that are not ready: how many load their models, and how many wait for which room."""
        loading = sum(member.placed and not member.ready for member in self.members)
        homeless = sum(not member.placed for member in self.members)
        one = self.placement
        needs = f"{counted(one.gpus_per_encoder, 'GPU', form='g')} and " if one.gpus_per_encoder else ""
        parts = [f"{loading} load their model"] if loading else []
        if homeless:
            parts.append(
                f"{homeless} wait for a node with {needs}{counted(one.cpus_per_encoder, 'CPU', form='g')} free"
            )
        return ", ".join(parts)

    def _check_somebody_is_there(self) -> None:
        """Say while no encoder works what is waited for.

        Raises:
            NoRoomError: no encoder has found room for ``wait_s``.
        """
        now = time.monotonic()
        if any(member.placed for member in self.members):
            self.placed_at = now
        if self._ready():
            return
        if now - self.placed_at > self.placement.wait_s:
            raise NoRoomError(
                f"no encoder found room within {self.placement.wait_s:g} s (--wait-for-nodes): "
                f"{self._whereabouts()}. Finished shards are kept; the same command continues when there is room"
            )
        if now > self.patient_until:
            self.patient_until = now + SAY_S
            self.events.line(f"no encoder is running: {self._whereabouts()}{self._limit()}")

    def _check_something_moves(self) -> None:
        """Say when encoders have been waiting for long, and for what.

        Raises:
            NoRoomError: the cluster has had no CPU to decode on for ``wait_s``.
        """
        now = time.monotonic()
        quiet = now - self.moved_at
        if self.decoding is None or not self.working or not self._ready() or quiet < SAY_S:
            return
        if now < self.say_after:
            return
        self.say_after = now + SAY_S
        there, free = nodes(), ray.available_resources().get("CPU", 0.0)
        taken = self.placement.cpus_per_encoder * sum(member.placed for member in self.members)
        possible = sum(node.cpus for node in there) - taken >= 1 and any(node.cpus >= 1 for node in there)
        if not possible and quiet > self.placement.wait_s:
            raise NoRoomError(
                f"no CPU to decode on for {quiet:.0f} s (--wait-for-nodes): "
                f"{counted(len(there), 'node has', 'nodes have')} none beside "
                "the encoders. Finished shards are kept; the same command continues when there are CPUs"
            )
        self.events.line(
            f"nothing was encoded for {quiet:.0f} s: decoding is slow, or waits for a CPU "
            f"({counted(len(there), 'node')}, "
            f"{free:g} CPUs free){'' if possible else self._limit()}"
        )

    def _limit(self) -> str:
        wait_s = self.placement.wait_s
        return "" if math.isinf(wait_s) else f"; given up after {wait_s:g} s (--wait-for-nodes)"


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
    if placement.here:
        with _threads_kept():
            encoder = _Encoder(build, placement.device, None)
            loaded = encoder.load()
            if "refused" in loaded:
                raise DeltacacheError(loaded["refused"])
            rate = encoder.measure()
        return rate, [decode_group([video], decode.locations, decode.settings, {}) for video in videos]
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
