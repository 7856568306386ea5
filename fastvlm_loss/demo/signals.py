"""Stopping between two steps: the first Ctrl-C (or SIGTERM) is noted, the second one acts at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """Set by the first signal, read after each step."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self) -> bool:
        """Whether to stop."""
        return self.asked

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """Note the first signal; the second does not wait for the step."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


@contextmanager
def stop_signal() -> Iterator[Stop]:
    """Turn SIGINT and SIGTERM into a flag, so that no step is cut in the middle; restores the old handlers."""
    stop = Stop()
    old = {number: signal.signal(number, stop.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
