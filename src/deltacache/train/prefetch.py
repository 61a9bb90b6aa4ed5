"""Run an iterator ahead in a background thread."""

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

ItemT = TypeVar("ItemT")


class _End:
    pass


_END: Final = _End()


def prefetch(items: Iterable[ItemT], depth: int = 2) -> Generator[ItemT]:
    """Yield ``items`` in their order while one thread computes up to ``depth`` of them ahead.

    An error in the thread is raised here, after the items before it. Closing the generator ends the thread.
    """
    iterator = iter(items)
    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")  # one thread: the order stays
    try:
        ahead = deque(pool.submit(next, iterator, _END) for _ in range(depth))
        while not isinstance(item := ahead.popleft().result(), _End):
            ahead.append(pool.submit(next, iterator, _END))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
