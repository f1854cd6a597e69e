"""How a network computes, whatever it computes: kernels, chunks and a stopwatch. Results differ by rounding at most."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from mmprune_train.config.schema import TrainerConfig
from mmprune_train.model.clock import Clock
from mmprune_train.model.loss import CHUNK


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
