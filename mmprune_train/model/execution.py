"""How a network computes, whatever it computes: kernels, chunks and a stopwatch. Results differ by rounding at most."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from mmprune_train.config.schema import TrainerConfig
from mmprune_train.model.loss import CHUNK


class Clock:
    """Seconds that each named part took since the last `lap`; a part inside another counts for itself alone.

    On CUDA it waits for the device at every border, so a pass under a clock is slower than one without. A `reading` is
    counted instead of seconds: anything that only grows.
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


@dataclass(frozen=True)
class Execution:
    """Given where a model is made; `PackedLlava.executed` changes it for a moment."""

    attention: str = "auto"
    """Kernel inside the samples, as `trainer.attention` names it."""
    vision_chunk: int = 64
    """Images per forward pass of the vision tower."""
    logits_chunk: int = CHUNK
    """Supervised tokens whose logits exist at a time."""
    clock: Clock | None = None
    """Times the parts of a pass."""

    @classmethod
    def of(cls, trainer: TrainerConfig) -> Execution:
        """As the config of a run asks."""
        return cls(trainer.attention, trainer.vision_chunk, trainer.logits_chunk)

    def timed(self, part: str) -> AbstractContextManager[None]:
        """Counts what runs inside for `part`, where there is a clock."""
        return nullcontext() if self.clock is None else self.clock.part(part)
