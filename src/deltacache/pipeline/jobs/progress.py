"""A running job as others see it: a bar here, and the status that ``inspect`` shows in another terminal."""

import json
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from upath import UPath

from deltacache.models.flops import cpu_bfloat16_gain
from deltacache.pipeline.cluster.shards import Events
from deltacache.pipeline.datasets.plan import ShardTask
from deltacache.pipeline.storage.files import write_bytes
from deltacache.pipeline.storage.locking import DatasetLock
from deltacache.pipeline.work.attempts import Attempts
from deltacache.pipeline.work.placement import Placement
from deltacache.pipeline.work.shard_work import ShardResult
from deltacache.schemas.datasets import DatasetCard
from deltacache.schemas.errors import DeltacacheError
from deltacache.schemas.progress import ProgressStage, duration

# ----------------------------------------------------------------------------------------------------
# How fast a job ran, against what its parts could do alone, and which part was the limit.
# ----------------------------------------------------------------------------------------------------


NARROW = 256
"""Backbones narrower than this gain nothing from bfloat16 on a CPU."""
_WORTH_A_HINT_S = 300.0
THROUGHPUT_FILE = "throughput.json"


@dataclass
class Throughput:
    """Adds up what shards report. Seconds of work are summed over workers; ``wall_s`` is the clock.

    The clock starts when the encoders are ready: starting Ray and loading models is reported separately.

    Attributes:
        reads: what the encoders wait for: ``decoding``, or ``reading`` features.
        at_once: shards that an encoder works on at a time.
        forward_clips_per_s: of all encoders together with frames in memory, measured before anything else ran.
    """

    placement: Placement
    reads: str
    at_once: int
    clips: int = 0
    videos: int = 0
    shards: int = 0
    bytes_written: int = 0
    decode_s: float = 0.0
    encode_s: float = 0.0
    write_s: float = 0.0
    wait_s: float = 0.0
    forward_clips_per_s: float = 0.0
    lost_workers: int = 0
    split_shards: int = 0
    _created: float = field(default_factory=time.perf_counter)
    _start: float | None = None
    _end: float = 0.0

    def start(self, rates: list[float]) -> None:
        """The encoders are ready; ``rates`` are the clips per second of each one's bare forward."""
        self.forward_clips_per_s = sum(rates)
        self._start = self._end = time.perf_counter()

    def add(self, result: ShardResult) -> None:
        """Count one committed shard."""
        self.clips += result.clips
        self.videos += result.videos
        self.shards += 1
        self.bytes_written += result.bytes_written
        self.decode_s += result.decode_s
        self.encode_s += result.encode_s
        self.write_s += result.write_s
        self.wait_s += result.wait_s
        self._end = time.perf_counter()

    @property
    def start_s(self) -> float:
        """Starting Ray and the encoders."""
        return self.placement.ray_start_s + (self._start or time.perf_counter()) - self._created

    @property
    def wall_s(self) -> float:
        """From the encoders being ready to the last shard committed."""
        return max(self._end - (self._start or self._end), 1e-9)

    @property
    def clips_per_s(self) -> float:
        """Clips committed a second."""
        return self.clips / self.wall_s

    def busy(self) -> dict[str, float]:
        """Share of the time that each kind of worker was at work."""
        threads = self.placement.encoders * self.at_once * self.wall_s
        forward = self.encode_s / (self.placement.encoders * self.wall_s)
        shares = {"the forward pass": min(forward, 1.0), "writing": self.write_s / threads}
        if self.reads == "decoding":
            return {"decoding": self.decode_s / (self.placement.decoders * self.wall_s), **shares}
        return {self.reads: self.wait_s / threads, **shares}

    @property
    def limit(self) -> str:
        """The busiest kind of worker."""
        shares = self.busy()
        busiest = max(shares, key=lambda name: shares[name])
        return busiest if shares[busiest] > 0.5 else f"waiting for shards to end ({busiest} was busiest)"

    def line(self) -> str:
        """The last line of a job."""
        ratio = ""
        if self.forward_clips_per_s:
            share = self.clips_per_s / self.forward_clips_per_s
            ratio = f", {share:.2f} of the pure forward rate ({self.forward_clips_per_s:.2f} clips/s)"
        lost = f"; {self.lost_workers} lost workers replaced" if self.lost_workers else ""
        return (
            f"{self.clips_per_s:.2f} clips/s over {self.wall_s:.1f} s{ratio}; limit: {self.limit}; "
            f"starting took {self.start_s:.1f} s{lost}"
        )

    def bfloat16_hint(self, card: DatasetCard) -> str:
        """What ``--precision bfloat16`` would have saved at most, where the job ran long in float32 on a CPU."""
        forward_s = self.busy()["the forward pass"] * self.wall_s
        exact = card.precision == "float32" and self.placement.device == "cpu" and card.hidden_size >= NARROW
        if not exact or forward_s < _WORTH_A_HINT_S or (gain := cpu_bfloat16_gain()) < 1.5:
            return ""
        saved = duration(forward_s * (1 - 1 / gain))
        return (
            f"; --precision bfloat16 would save up to about {saved} of it on this CPU, into another dataset"
        )

    def figures(self) -> dict[str, Any]:
        """Everything that was measured."""
        return {
            "clips": self.clips,
            "videos": self.videos,
            "shards": self.shards,
            "bytes_written": self.bytes_written,
            "start_s": self.start_s,
            "ray_start_s": self.placement.ray_start_s,
            "wall_s": self.wall_s,
            "clips_per_s": self.clips_per_s,
            "forward_clips_per_s": self.forward_clips_per_s,
            "decode_clips_per_s": _rate(self.clips, self.decode_s) * self.placement.decoders,
            "write_bytes_per_s": _rate(self.bytes_written, self.write_s),
            "decoders": self.placement.decoders,
            "encoders": self.placement.encoders,
            "busy": self.busy(),
            "limit": self.limit,
            "lost_workers": self.lost_workers,
            "split_shards": self.split_shards,
        }

    def save(self, root: UPath) -> None:
        """Write ``throughput.json``."""
        write_bytes(root / THROUGHPUT_FILE, json.dumps(self.figures(), indent=2).encode() + b"\n")


def _rate(count: float, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class FailureBudget:
    """``--max-failed-fraction`` of the planned videos."""

    videos: int
    fraction: float

    def exceeded_by(self, failed: int) -> bool:
        """Whether so many refused videos are too many, whatever becomes of the others."""
        return failed > self.fraction * self.videos

    def check(self, failed: int, reasons: Counter[str], out: UPath) -> None:
        """Raise when the whole dataset has too many refused videos."""
        if self.exceeded_by(failed):
            said = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
            raise DeltacacheError(
                f"{failed} of {self.videos} videos were rejected ({said}), more than --max-failed-fraction "
                f"{self.fraction:g} allows. What was finished is kept; {out / 'failures.parquet'} says why. "
                "Raise --max-failed-fraction to continue without them; repair them and run again with "
                "--retry-failed; or name them in --exclude-list and use a new folder"
            )


def clips_of(tasks: Iterable[ShardTask]) -> int:
    """How many clips are planned in these shards."""
    return sum(video.views for task in tasks for video in task.videos)


@dataclass
class JobProgress:
    """Counts clips, committed or still in the making, and tells everyone.

    A refused video counts with all its clips, so that the bar ends full.
    """

    stage: ProgressStage
    throughput: Throughput
    lock: DatasetLock
    attempts: Attempts
    clips: dict[str, int]  # planned, by shard
    failed: set[str] = field(default_factory=set)
    _shown: int = 0
    _ended: int = 0
    _start: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self._total = sum(self.clips.values())
        self._tell(0)

    def events(self, line: Events) -> Events:
        """What the cluster is to call; sentences go where ``line`` sends them."""
        return Events(started=self._started, encoding=self._tell, line=line.line)

    def committed(self, result: ShardResult) -> None:
        """A shard was committed."""
        self.throughput.add(result)
        self.throughput.lost_workers = self.attempts.lost_workers
        self.throughput.split_shards = self.attempts.split_shards
        self.failed.update(result.failed)
        self._ended += self.clips[result.shard_id]
        self._tell(0)

    def _started(self, rates: list[float]) -> None:
        self.throughput.start(rates)
        self._start = time.perf_counter()

    def _tell(self, encoding: int) -> None:
        """``encoding`` clips of shards that are not committed yet are through the encoder."""
        now = min(self._ended + encoding, self._total)
        rate = now / max(time.perf_counter() - self._start, 1e-9)
        new = max(now - self._shown, 0)  # a lost shard takes its clips back; the bar waits for them
        self._shown += new
        self.stage.advance(new, clips_per_s=rate, failed=str(len(self.failed)))
        self.lock.update(
            {
                "clips": now,
                "planned_clips": self._total,
                "failed_videos": len(self.failed),
                "clips_per_s": rate,
                "seconds_left": (self._total - now) / rate if rate and now else None,
            }
        )
