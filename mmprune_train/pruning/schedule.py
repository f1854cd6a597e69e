"""Schedules: how the budgets' counts move while a model is trained.

A schedule is a pure function of the seed, the training stage and the optimizer step. It has no state, so a resumed run
goes on exactly, and all ranks and all micro-batches of a step agree.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

from jaxtyping import Int64
from torch import Tensor

from mmprune_train.config.pruner_schema import ScheduleConfig

Counts = Int64[Tensor, " B"]


@dataclass(frozen=True)
class BudgetOverride:
    """What one optimizer step makes of a budget's counts."""

    ratio: float | None = None
    """Share of every row that is kept, whatever its budget says."""
    undropped: float = 0.0
    """Share of what the budget would drop that is kept nevertheless, 0..1."""


def budget_override(schedule: ScheduleConfig, step: int, steps: int, key: str) -> BudgetOverride | None:
    """The override of one optimizer step; None: the budgets' own counts.

    Args:
        step: optimizer steps of the training stage that are done, from 0.
        steps: optimizer steps of the training stage.
        key: seed and training stage; another key draws other shares.
    """
    if schedule.name == "anneal":
        return BudgetOverride(undropped=_falling(schedule, step / steps))
    if schedule.name == "random":
        return BudgetOverride(ratio=schedule.low + (schedule.high - schedule.low) * _uniform(f"{key}/{step}"))
    return None


def _falling(schedule: ScheduleConfig, done: float) -> float:
    """1 until the share `start` of the steps is done, 0 from `end` on."""
    way = min(1.0, max(0.0, (done - schedule.start) / (schedule.end - schedule.start)))
    return 1 - way if schedule.shape == "linear" else (1 + math.cos(math.pi * way)) / 2


def _uniform(text: str) -> float:
    """A number in [0, 1) that is the text's own."""
    return (int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 11) * 2.0**-53


def keep_of_dropped(counts: Counts, lengths: Counts, share: float, max_tokens: int | None) -> Counts:
    """Counts [B] on their way from the rows' lengths [B] (share 1) to the budget's counts (share 0), to the nearest
    token, within the budget's `max_tokens`."""
    counts = counts + ((lengths - counts) * share + 0.5).floor().long()
    return counts if max_tokens is None else counts.clamp(max=max_tokens)
