"""What becomes of shards whose work fails: tried again, then split to find the video that fails. Free of Ray.

A shard is *committed* by one call on one worker. When the worker is lost (a node died, a process was killed) the
shard may well pass on the next attempt; it gets a bounded number of them. When it fails again and again, or
with an error of its own, halves of its videos are *tried* (decoded and encoded, nothing written) until the
videos that fail alone are known. They become failures, and the shard is committed without them.

::

    commit(a b c d) x4 -> try(a b)  try(c d)   -> try(c)  try(d) x2 -> commit(a b c d, without d)
         lost              passes     lost        passes     lost        done
"""

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from enum import Enum

from deltacache.pipeline.datasets.plan import PlannedVideo, ShardTask
from deltacache.schemas.errors import DeltacacheError

MOST_COMMITS = 4  # attempts of a shard whose worker is lost, before it is split
MOST_BLAMING = 3  # shards with failing videos, with no shard without any in between
MOST_TRIALS = 3  # of a single video: one lost worker may be chance


class Kind(Enum):
    """What a worker is to do."""

    COMMIT = "commit"
    TRY = "try"
    RETRY = "retry"  # the failures of a finished shard


@dataclass(frozen=True, slots=True)
class Work:
    """One call of a worker: the videos of ``task``, of which ``known_failures`` are known to fail.

    Attributes:
        known_failures: error text by ``video_uri``.
        alone: nothing else may run in its process: whoever dies takes the others along, who are then blamed.
    """

    kind: Kind
    task: ShardTask
    known_failures: tuple[tuple[str, str], ...] = ()
    alone: bool = False


@dataclass(slots=True)
class _Split:
    """A shard that is being split: what is still to be tried, and what was found."""

    task: ShardTask
    open_trials: int = 0
    known_failures: dict[str, str] = field(default_factory=dict)


class Attempts:
    """The queue of a job. Take work with ``next``; say how it ended with ``done`` or ``failed``."""

    def __init__(self, tasks: Collection[ShardTask], kind: Kind = Kind.COMMIT) -> None:
        self.kind = kind
        self._queue: deque[Work] = deque()  # before the rest of the tasks, which are taken one by one
        self._rest = iter(tasks)
        self._tries: dict[tuple[str, ...], int] = {}
        self._splits: dict[str, _Split] = {}
        self._open = len(tasks)
        self._blaming = 0  # shards in a row in which somebody was blamed
        self.lost_workers = 0
        self.split_shards = 0

    @property
    def finished(self) -> bool:
        """Whether every shard is committed."""
        return self._open == 0

    def next(self) -> Work | None:
        """The next work, or None when all that is left is being worked on."""
        if self._queue:
            return self._queue.popleft()
        task = next(self._rest, None)
        return None if task is None else Work(self.kind, task)

    def put_back(self, work: Work) -> None:
        """``work`` was not begun, and is the next again."""
        self._queue.appendleft(work)

    def done(self, work: Work) -> None:
        """``work`` ended well."""
        if work.kind is Kind.TRY:
            self._trial_ended(work.task.shard_id)
        else:
            self._open -= 1
            self._blaming = self._blaming if work.known_failures else 0

    def failed(self, work: Work, error: str, *, lost: bool) -> None:
        """``work`` failed: ``lost`` with its worker, or with an exception that would only come again.

        Raises:
            DeltacacheError: the shard fails whatever is left out, so no video is to blame.
        """
        tries = self._count(work)
        videos = work.task.videos
        if work.kind is not Kind.TRY:
            if lost and tries < MOST_COMMITS:
                self._queue.appendleft(replace(work, alone=tries > 1))
            else:
                self._split(work, error)
        elif len(videos) == 1 and lost and tries < MOST_TRIALS:
            self._queue.appendleft(work)
        elif len(videos) == 1:
            self._splits[work.task.shard_id].known_failures[videos[0].video_uri] = error
            self._trial_ended(work.task.shard_id)
        else:
            self._halve(work)
            self._trial_ended(work.task.shard_id)

    def _count(self, work: Work) -> int:
        key = (work.kind.value, work.task.shard_id, *(video.video_uri for video in work.task.videos))
        self._tries[key] = self._tries.get(key, 0) + 1
        return self._tries[key]

    def _split(self, work: Work, error: str) -> None:
        shard_id = work.task.shard_id
        if shard_id in self._splits:
            raise DeltacacheError(
                f"shard {shard_id} fails as a whole, though its videos pass one by one: {error}. Give smaller "
                "--videos-per-shard in a new output folder, or workers with more memory"
            )
        self.split_shards += 1
        self._splits[shard_id] = _Split(work.task)
        self._halve(work)

    def _halve(self, work: Work) -> None:
        videos = work.task.videos
        middle = (len(videos) + 1) // 2
        for part in (videos[:middle], videos[middle:]):
            if part:
                self._try(work.task.shard_id, part)

    def _try(self, shard_id: str, videos: tuple[PlannedVideo, ...]) -> None:
        self._splits[shard_id].open_trials += 1
        self._queue.appendleft(Work(Kind.TRY, ShardTask(shard_id, videos), alone=True))

    def _trial_ended(self, shard_id: str) -> None:
        split = self._splits[shard_id]
        split.open_trials -= 1
        if split.open_trials:
            return
        if len(split.known_failures) > max(1, len(split.task.videos) // 2):
            error = next(iter(split.known_failures.values()))
            raise DeltacacheError(
                f"{len(split.known_failures)} of the {len(split.task.videos)} videos of shard {shard_id} fail when "
                f"encoded alone, so the videos are not at fault: {error}"
            )
        self._blaming += bool(split.known_failures)
        if self._blaming > MOST_BLAMING:
            raise DeltacacheError(
                f"in {self._blaming} shards, one after the other, encoders failed with some videos, so the videos "
                f"are probably not at fault: {next(iter(split.known_failures.values()))}"
            )
        self._tries = {key: count for key, count in self._tries.items() if key[1] != shard_id}
        self._queue.appendleft(Work(self.kind, split.task, tuple(split.known_failures.items())))
