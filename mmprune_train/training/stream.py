"""All micro-batches of a stage as one row, so that a resumed run has one position to return to.

Lightning sees one epoch as long as the stage. Its epochs would add an end-of-epoch case to every resume, and
accumulation windows that end short there, which its strategies treat differently; here a window is always `window`
micro-batches, and one that begins near the end of an epoch goes on into the next.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Protocol

from mmprune_train.data.batch import Batch


class EpochLoader(Protocol):
    """A training loader of `data`: one pass an epoch, in an order that (seed, epoch) decides."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int, start: int) -> Iterator[Batch]:
        """Batches `start`, `start + 1`, ... of an epoch."""
        ...


def steps_of(batches: int, epochs: int, window: int, max_steps: int | None) -> int:
    """Optimizer steps of a stage: `max_steps` over as many epochs as that takes, or those of `epochs`.

    At least one; a remainder smaller than a global batch at the end of the stage is left out.
    """
    return max(1, epochs * batches // window) if max_steps is None else max_steps


class BatchStream:
    """Iterates over the micro-batches of a stage and knows how many were handed out (Lightning saves that)."""

    def __init__(self, loader: EpochLoader, steps: int, window: int) -> None:
        self.loader = loader
        self.window = window
        self.total = steps * window
        self.handed_out = 0
        self.waited = 0.0

    def __len__(self) -> int:
        """Micro-batches of the whole stage, also after a resume: Lightning adds those done before."""
        return self.total

    def __iter__(self) -> Iterator[Batch]:
        batches = self._from(self.handed_out)
        while self.handed_out < self.total:
            began = time.perf_counter()
            window = list(islice(batches, self.window))
            supervised = sum(batch.supervised for batch in window)
            self.waited += time.perf_counter() - began
            for batch in window:
                self.handed_out += 1
                yield replace(batch, window_supervised=supervised)

    def _from(self, position: int) -> Iterator[Batch]:
        epoch, start = divmod(position, len(self.loader))
        while True:
            yield from self.loader.epoch(epoch, start)
            epoch, start = epoch + 1, 0

    @property
    def epochs_done(self) -> float:
        return self.handed_out / len(self.loader)

    def take_waited(self) -> float:
        """Seconds spent waiting for data since the last call."""
        waited, self.waited = self.waited, 0.0
        return waited

    def state_dict(self) -> dict[str, int]:
        return {"handed_out": self.handed_out}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.handed_out = state["handed_out"]
