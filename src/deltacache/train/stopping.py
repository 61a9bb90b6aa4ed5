"""SIGTERM as a wish to stop: schedulers send it before they take the machine away."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class Stop:
    """Whether somebody asked the training to stop."""

    asked: bool = False


@contextmanager
def stop_on_sigterm() -> Iterator[Stop]:
    """Inside, SIGTERM only takes note of the wish. Outside the main thread nothing is changed."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, frame: FrameType | None) -> None:
        stop.asked = True

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
