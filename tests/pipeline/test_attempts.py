"""What becomes of shards whose work fails."""

import random
from collections.abc import Callable

import pytest

from deltacache.pipeline.datasets.plan import PlannedVideo, ShardTask, shard_id_of
from deltacache.pipeline.work.attempts import MOST_COMMITS, Attempts, Kind, Work
from deltacache.schemas.errors import DeltacacheError


def shard(ordinal: int, *names: str) -> ShardTask:
    videos = tuple(PlannedVideo(name, f"{name}.mp4", 1, 0, 1) for name in names)
    return ShardTask(shard_id_of(ordinal, videos), videos)


def play(attempts: Attempts, outcome: Callable[[Work], str | None], *, lost: bool = True) -> list[Work]:
    """Do all work one by one; ``outcome`` gives the error of a piece of work, or None."""
    committed = []
    for _ in range(1000):
        if attempts.finished:
            return committed
        work = attempts.next()
        assert work is not None
        error = outcome(work)
        if error is not None:
            attempts.failed(work, error, lost=lost)
            continue
        attempts.done(work)
        if work.kind is not Kind.TRY:
            committed.append(work)
    raise AssertionError("does not end")


def kills(*uris: str) -> Callable[[Work], str | None]:
    """A worker that dies with any of these videos."""

    def outcome(work: Work) -> str | None:
        left_out = dict(work.known_failures)
        alive = [v.video_uri for v in work.task.videos if v.video_uri not in left_out]
        return "died" if set(alive) & set(uris) else None

    return outcome


def test_without_failures_every_shard_is_committed_once_in_order() -> None:
    shards = [shard(number, f"a{number}", f"b{number}") for number in range(5)]
    assert [work.task for work in play(Attempts(shards), kills())] == shards


@pytest.mark.parametrize("lost", [True, False])
@pytest.mark.parametrize("known_failures", [("c.mp4",), ("a.mp4", "g.mp4"), ("d.mp4", "e.mp4")])
def test_culprits_are_found_and_nobody_else_is_blamed(known_failures: tuple[str, ...], lost: bool) -> None:
    attempts = Attempts([shard(0, *"abcdefg"), shard(1, "h")])
    committed = play(attempts, kills(*known_failures), lost=lost)
    found = {work.task.shard_id[:5]: {uri for uri, _ in work.known_failures} for work in committed}
    assert found == {"00000": set(known_failures), "00001": set()}
    assert attempts.split_shards == 1


def test_a_lost_worker_alone_splits_nothing() -> None:
    """Each piece of work fails once by chance, as when nodes are killed."""
    seen: set[object] = set()

    def once(work: Work) -> str | None:
        key = (work.kind, work.task)
        if key in seen:
            return None
        seen.add(key)
        return "node lost"

    attempts = Attempts([shard(0, "a", "b"), shard(1, "c")])
    assert [work.known_failures for work in play(attempts, once)] == [(), ()]
    assert attempts.split_shards == 0


def test_attempts_are_bounded() -> None:
    calls = 0

    def always(work: Work) -> str | None:
        nonlocal calls
        calls += 1
        return "died"

    with pytest.raises(DeltacacheError, match=r"2 of the 2 videos of shard .* fail when encoded alone.*died"):
        play(Attempts([shard(0, "a", "b")]), always)
    assert calls <= MOST_COMMITS + 2 + 2 * 3


def test_an_encoder_that_fails_with_every_video_is_not_the_fault_of_any() -> None:
    """With one video a shard nobody else is there to compare with; after a few shards it is plain."""
    shards = [shard(number, f"v{number}") for number in range(10)]
    with pytest.raises(DeltacacheError, match=r"one after the other.*died"):
        play(Attempts(shards), lambda work: "died" if not work.known_failures else None)


def test_a_shard_that_fails_only_as_a_whole_is_an_error_that_says_so() -> None:
    def too_large(work: Work) -> str | None:
        return "out of memory" if len(work.task.videos) > 1 else None

    def whole(work: Work) -> str | None:
        return too_large(work) if work.kind is not Kind.TRY else None

    with pytest.raises(DeltacacheError, match=r"fails as a whole.*--videos-per-shard"):
        play(Attempts([shard(0, *"abcd")]), whole)


def test_trials_and_what_was_lost_twice_run_alone() -> None:
    """Whoever dies takes the others in its process along."""
    seen = []

    def outcome(work: Work) -> str | None:
        seen.append((work.kind, work.alone))
        return kills("c.mp4")(work)

    play(Attempts([shard(0, *"abcd")]), outcome)
    commits = [alone for kind, alone in seen if kind is Kind.COMMIT]
    assert commits == [False, False, True, True, False]
    assert all(alone for kind, alone in seen if kind is Kind.TRY)


def test_chance_blames_nobody() -> None:
    """A third of all work is lost at random: shards are committed, and no video is refused."""
    for seed in range(20):
        rng = random.Random(seed)
        attempts = Attempts([shard(number, f"a{number}", f"b{number}") for number in range(10)])
        committed = play(attempts, lambda work, rng=rng: "lost" if rng.random() < 0.2 else None)
        assert len(committed) == 10
        assert sum(len(work.known_failures) for work in committed) == 0, seed
