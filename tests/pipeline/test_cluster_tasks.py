"""Independent items on processes of a cluster: all done once, lost processes replaced, refusals passed on."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from deltacache.pipeline.cluster import TaskWorker, run_tasks
from deltacache.schemas.errors import DeltacacheError

ITEMS = list(range(9))


def squares(folder: Path) -> Callable[[str], TaskWorker]:
    """Builds workers that square; one dies once with item 3, all refuse what is negative.

    The class is local, so that it travels with the function: processes of Ray cannot import this module.
    """

    class Squares:
        def run(self, item: int, following: Sequence[int]) -> tuple[int, tuple[int, ...], int]:
            if item < 0:
                raise DeltacacheError(f"{item} is negative")
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


def test_what_a_worker_refuses_ends_it(tmp_path: Path) -> None:
    with pytest.raises(DeltacacheError, match="-1 is negative"):
        list(run_tasks(squares(tmp_path), [0, -1, 2], 2))
    assert list(run_tasks(squares(tmp_path), [], 2)) == []
