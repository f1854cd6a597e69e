"""A stopwatch for the parts of a pass."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch


class Clock:
    """Seconds that each named part took since the last `lap`; a part inside another counts for itself alone.

    On CUDA it waits for the device at every border, so a pass under a clock is slower than one without.

    Args:
        reading: what is counted instead of seconds: anything that only grows.
    """

    def __init__(self, reading: Callable[[], float] | None = None) -> None:
        self.reading = reading
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._stack: list[str] = []
        self._since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what runs inside for `name`."""
        self._turn()
        self._stack.append(name)
        try:
            yield
        finally:
            self._turn()
            self._stack.pop()

    def lap(self) -> dict[str, float]:
        """Seconds by part, and begin anew."""
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds

    def _turn(self) -> None:
        """Book the time since the last border on the innermost part."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter() if self.reading is None else self.reading()
        if self._stack:
            self._seconds[self._stack[-1]] += now - self._since
        self._since = now


@contextmanager
def clocked(model: Any, clock: Clock) -> Iterator[Clock]:
    """While this lasts `model`, which has a `clock`, runs under this one."""
    own, model.clock = model.clock, clock
    try:
        yield clock
    finally:
        model.clock = own


def timed(clock: Clock | None, name: str) -> AbstractContextManager[None]:
    """`clock.part(name)`, or nothing without a clock."""
    return nullcontext() if clock is None else clock.part(name)
