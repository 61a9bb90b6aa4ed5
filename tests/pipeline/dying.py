"""Processes that are killed between two steps of what they do."""

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any


def killed_before(step: int, work: Callable[[], object], steps: Mapping[ModuleType, Sequence[str]]) -> bool:
    """Do ``work`` in another process that gets SIGKILL before its ``step``-th step; whether it has so many.

    Args:
        steps: the functions that are steps, by the module in which they are looked up.
    """
    child = os.fork()
    if child == 0:
        left = step

        def counted(call: Callable[..., Any]) -> Callable[..., Any]:
            def count(*arguments: Any, **options: Any) -> Any:
                nonlocal left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return call(*arguments, **options)

            return count

        for module, names in steps.items():
            for name in names:
                setattr(module, name, counted(getattr(module, name)))
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the work failed"
    return os.WIFSIGNALED(status)
