"""All micro-batches of a stage as one row, so that a resumed run has one position to return to: its optimizer steps.

Lightning sees one epoch as long as the stage. Its epochs would add an end-of-epoch case to every resume. How many
micro-batches a step has is the loader's choice; each knows its place, and `MultimodalModule` steps after the last.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmprune_train.data.batch import Batch, Place
from mmprune_train.data.loader import TrainLoader


def steps_of(samples: int, epochs: int, global_batch_size: int, max_steps: int | None) -> int:
    """Optimizer steps of a stage: `max_steps` over as many epochs as that takes, or those of `epochs`.

    A last step that the samples do not fill takes the rest of its batch from the epoch that would follow, so that none
    is left out.
    """
    return math.ceil(epochs * samples / global_batch_size) if max_steps is None else max_steps


@dataclass(eq=False)
class BatchStream:
    """Iterates over the micro-batches of a stage and knows how many steps were handed out (Lightning saves that)."""

    loader: TrainLoader
    steps: int
    handed_out: int = 0
    waited: float = 0.0

    def __len__(self) -> int:
        """More micro-batches than the stage has: it ends when the steps are done. Without a length Lightning would
        fetch a batch ahead, and the position would not be that of training."""
        return self.steps * self.loader.most + 1

    def __iter__(self) -> Iterator[Batch]:
        coming = self.loader.steps(self.handed_out, self.steps)
        while self.handed_out < self.steps:
            began = time.perf_counter()
            micro_batches = next(coming)
            self.waited += time.perf_counter() - began
            step = self.handed_out
            supervised = sum(batch.supervised for batch in micro_batches)
            images = max(batch.encoded for batch in micro_batches)
            for number, batch in enumerate(micro_batches):
                place = Place(step, number, len(micro_batches), supervised, images)
                self.handed_out += place.last
                yield replace(batch, place=place)

    @property
    def epochs_done(self) -> float:
        return self.loader.epochs(self.handed_out)

    def learn(self, seen: Sequence[float]) -> None:
        """What the step that has just ended saw of images, as `KeptTokens.observe` wants it."""
        if self.loader.kept is not None:
            self.loader.kept.observe(seen)

    def take_waited(self) -> float:
        """Seconds spent waiting for data since the last call."""
        waited, self.waited = self.waited, 0.0
        return waited

    def state_dict(self) -> dict[str, Any]:
        kept = self.loader.kept
        return {"handed_out": self.handed_out, "kept": None if kept is None else kept.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.handed_out = state["handed_out"]
        if self.loader.kept is None:
            return
        if state["kept"] is None:  # until now the feature cache knew
            self.loader.kept.skip(self.handed_out)
        else:
            self.loader.kept.load_state_dict(state["kept"])
