import threading
from collections.abc import Iterator

import pytest

from deltacache.train.data import prefetch


def test_order_is_kept() -> None:
    assert list(prefetch(range(20), depth=3)) == list(range(20))


def test_it_runs_ahead_by_its_depth() -> None:
    made: list[int] = []
    reached = threading.Event()

    def source() -> Iterator[int]:
        for number in range(10):
            made.append(number)
            if number == 2:
                reached.set()
            yield number

    ahead = prefetch(source(), depth=2)
    assert next(ahead) == 0
    assert reached.wait(5)
    ahead.close()
    assert made == [0, 1, 2]


def test_an_error_comes_after_the_items_before_it() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise OSError("disk gone")

    items = prefetch(source())
    assert next(items) == 1
    with pytest.raises(OSError, match="disk gone"):
        next(items)


def test_closing_ends_the_thread() -> None:
    before = set(threading.enumerate())
    items = prefetch(iter(int, 1))  # endless
    next(items)
    assert set(threading.enumerate()) - before
    items.close()
    assert not set(threading.enumerate()) - before
