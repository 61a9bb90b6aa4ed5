"""A running job as others see it: a bar here, and the status that ``inspect`` shows in another terminal."""

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from upath import UPath

from deltacache.pipeline.cluster import Events
from deltacache.pipeline.datasets.plan import ShardTask
from deltacache.pipeline.jobs.throughput import Throughput
from deltacache.pipeline.storage.locking import DatasetLock
from deltacache.pipeline.work.attempts import Attempts
from deltacache.pipeline.work.shard_work import ShardResult
from deltacache.schemas.errors import DeltacacheError
from deltacache.schemas.progress import ProgressStage


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
                f"{failed} of {self.videos} videos were refused ({said}), more than --max-failed-fraction "
                f"{self.fraction:g} allows. What was finished is kept; {out / 'failures.parquet'} says why. "
                "Raise --max-failed-fraction to go on without them; repair them and run again with "
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
