"""What several workers and their command tell each other."""

import pytest

from deltacache.schemas.errors import DeltacacheError
from deltacache.train.workers.ray_workers import cpu_share
from deltacache.train.workers.relay import MOST_LOST, Relay, RelayReporter, Replay
from reporters import Lines


def test_losses_are_counted_until_a_newer_checkpoint() -> None:
    relay = Relay()
    relay.start(0, 2)
    for step in (5, 10, 15, 20):
        for _ in range(MOST_LOST - 1):
            relay.lose("rank 1: killed")
            assert not relay.standing.over
            assert not relay.standing.alive
        relay.start(step, 2)
        assert relay.standing.alive
    relay.start(20, 2)  # not newer: what was lost before counts
    for _ in range(MOST_LOST):
        assert not relay.standing.over
        relay.lose("rank 0: out of memory")
    assert relay.standing.over
    assert relay.standing.settled
    assert relay.standing.refusal is not None
    assert "lost 3 times without a new checkpoint after step 20" in relay.standing.refusal
    assert "out of memory" in relay.standing.refusal


def test_losses_before_the_first_start_count_too() -> None:
    relay = Relay()
    for _ in range(MOST_LOST):
        relay.lose("rank 0: PermissionError")
    assert relay.standing.over
    assert not relay.standing.started


def test_the_first_reason_counts_and_losses_after_it_are_not_said() -> None:
    relay = Relay()
    relay.start(0, 2)
    relay.take()
    relay.refuse("step 3 has loss nan", settled=False)
    assert not relay.standing.settled
    relay.refuse("something else", settled=True)
    assert relay.standing.settled
    relay.lose("rank 1: connection closed")
    assert relay.standing.refusal == "step 3 has loss nan"
    assert relay.take() == []


def test_what_a_worker_reports_is_replayed_and_a_lost_stage_ends() -> None:
    relay, reporter = Relay(), Lines()
    told = RelayReporter(relay.tell)
    with Replay(reporter, "train world") as replay:
        with told.stage("train world", 10, done=2) as stage:
            stage.advance(3, loss="0.1")
            replay.show(relay.take())
            relay._events.clear()
        relay.take()  # the worker died: its end was never told
        told.line("2 workers go on from step 2")
        with told.stage("train world", 10, done=2) as stage:
            stage.advance(8)
        replay.show(relay.take())
        replay.show([("advance", (1,), {})])  # after the end: of nobody
    assert reporter.stages == [("train world", 10, 2), ("train world", 10, 2)]
    assert reporter.advances == [(3, {"loss": "0.1"}), (8, {})]
    assert reporter.said == ["train world: 2 workers go on from step 2"]


@pytest.mark.parametrize(
    ("workers", "cpus", "share"),
    [(2, [2], 1), (2, [2, 2], 2), (2, [0, 16, 16], 16), (8, [2, 64], 8), (1, [4], 4)],
)
def test_workers_share_the_cpus_that_there_are(workers: int, cpus: list[int], share: int) -> None:
    assert cpu_share(workers, cpus) == share


def test_too_many_workers_are_refused() -> None:
    with pytest.raises(DeltacacheError, match="5 workers need a CPU each, and the nodes offer 4"):
        cpu_share(5, [4, 0])
