"""Independent items on processes of a cluster: all done once, lost processes replaced, refusals passed on."""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import ray
import torch

from deltacache.pipeline.cluster.tasks import TaskWorker, run_tasks
from deltacache.pipeline.work.placement import gpu_share
from deltacache.schemas.errors import DeltacacheError
from shared_ray import SLOTS, SharedRay

ITEMS = list(range(9))


@pytest.fixture(autouse=True)
def _on_the_shared_ray(shared_ray: SharedRay) -> None:
    shared_ray.start()


def squares(folder: Path) -> Callable[[str], TaskWorker]:
    """Builds workers that square; one dies once with item 3, all refuse what is negative.

    The class is local, so that it travels with the function: processes of Ray cannot import this module.
    """

    class Squares:
        def run(self, item: int, following: Sequence[int]) -> tuple[int, tuple[int, ...], int]:
            if item < 0:
                raise DeltacacheError(f"{item} is negative")
            if item == 1000:
                raise torch.OutOfMemoryError(
                    "CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation"
                )
            if item == 3 and not (folder / "died").exists():
                (folder / "died").touch()
                os._exit(1)
            return item * item, tuple(following), os.getpid()

    return lambda device: Squares()


def test_every_item_once_although_a_process_dies(tmp_path: Path) -> None:
    done = list(run_tasks(squares(tmp_path), ITEMS, 2))
    assert (tmp_path / "died").exists()
    assert sorted(position for position, _ in done) == ITEMS
    assert all(result[0] == ITEMS[position] ** 2 for position, result in done)
    assert len({result[2] for _, result in done}) >= 2
    announced = [(result[1][0], result[2]) for _, result in done if result[1]]
    assert announced
    process_of = {ITEMS[position]: result[2] for position, result in done}
    kept = sum(process_of[item] == process for item, process in announced)
    assert kept >= len(announced) - 1  # all but what the dead process was to do next


def test_room_that_others_have_is_waited_for_up_to_the_limit(tmp_path: Path) -> None:
    class Other:
        def here(self) -> None: ...

    other = ray.remote(num_cpus=SLOTS)(Other).remote()
    ray.get(other.here.remote())
    try:
        with pytest.raises(
            DeltacacheError, match=r"no worker found a CPU free within 1 s \(--wait-for-nodes\)"
        ):
            list(run_tasks(squares(tmp_path), [1], 1, wait_s=1))
    finally:
        ray.kill(other)


def test_what_a_worker_refuses_ends_it(tmp_path: Path) -> None:
    with pytest.raises(DeltacacheError, match="-1 is negative"):
        list(run_tasks(squares(tmp_path), [0, -1, 2], 2))
    with pytest.raises(DeltacacheError, match=r"^out of memory on the GPU: free memory .* 2\.00 GiB\.$"):
        list(run_tasks(squares(tmp_path), [0, 1000, 2], 2))
    assert list(run_tasks(squares(tmp_path), [], 2)) == []
    deadline = (
        time.monotonic() + 60
    )  # its processes end with it, and not with the Ray, which is somebody else's
    while ray.available_resources().get("CPU") != SLOTS:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def dying(folder: Path, times: int) -> Callable[[str], TaskWorker]:
    """Builds workers whose process dies the first ``times`` times that it does an item."""

    class Dying:
        def run(self, item: int, following: Sequence[int]) -> int:
            tries = folder / str(item)
            tries.write_text("x" * (1 + (len(tries.read_text()) if tries.exists() else 0)))
            if len(tries.read_text()) <= times:
                os._exit(1)
            return item

    return lambda device: Dying()


def test_losses_between_which_something_was_done_do_not_add_up(tmp_path: Path) -> None:
    """Eight items that lose their process once: more than may be lost in a row."""
    done = list(run_tasks(dying(tmp_path, 1), list(range(8)), 1))
    assert sorted(done) == [(item, item) for item in range(8)]


def test_processes_that_are_lost_again_and_again_end_it(tmp_path: Path) -> None:
    with pytest.raises(DeltacacheError, match="lost 6 times with nothing done in between"):
        list(run_tasks(dying(tmp_path, 100), [0], 1))


@pytest.mark.parametrize(
    ("workers", "gpus", "share"),
    [(1, 0, 0.0), (1, 4, 1.0), (2, 2, 1.0), (3, 2, 0.5), (4, 2, 0.5), (5, 2, 1 / 3), (7, 1, 1 / 7)],
)
def test_shares_of_gpus_leave_room_for_every_worker(workers: int, gpus: int, share: float) -> None:
    assert gpu_share(workers, gpus) == pytest.approx(share)
    if gpus:
        assert gpus * int(1 / gpu_share(workers, gpus) + 1e-9) >= workers
