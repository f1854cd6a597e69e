"""What steps cost on batches as training meets them, each of other lengths, beside as many on one batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from mmprune_train.benchmark.steps import Way, one_step
from mmprune_train.model.execution import Clock
from mmprune_train.model.llava import PackedLlava


@dataclass
class LengthsCost:
    """Optimizer steps of one pruner."""

    tokens: list[float]
    """Of each batch, those that enter an LLM layer, averaged over layers."""
    repeated: int
    """Index of the batch whose tokens are nearest to their mean."""
    seconds: list[float]
    """Of a step on each batch."""
    repeated_seconds: list[float]
    """Of as many steps on the repeated one."""
    cpu_ratio: float
    """As `ratio`, in the seconds that CPUs computed: beside other work they say more than a clock."""

    @property
    def ratio(self) -> float:
        """What different lengths cost: the seconds of all batches / those of the repetitions."""
        return sum(self.seconds) / sum(self.repeated_seconds)


def lengths_cost(
    model: PackedLlava,
    warm: Way,
    ways: Sequence[Way],
    dtype: torch.dtype,
    progress: Callable[[Iterable[Way]], Iterable[Way]] = iter,
) -> LengthsCost:
    """Time a step on every batch once, in order, then as many on the one of mean length.

    Args:
        warm: another batch, whose step is not counted.
        ways: each of one batch, by one pruner.
        dtype: bfloat16 computes under autocast.
    """
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.0)
    clock = Clock()

    def seconds(some: Iterable[Way]) -> tuple[list[float], float]:
        began, laps = time.process_time(), []
        for way in some:
            laps.append(sum(one_step(model, way, optimizer, dtype, clock).values()))
        return laps, time.process_time() - began

    seconds([warm])
    each, computed = seconds(progress(ways))
    tokens = [way.tokens["layer_mean"] for way in ways]
    mean = fmean(tokens)
    middle = min(range(len(ways)), key=lambda index: abs(tokens[index] - mean))
    same, computed_same = seconds(progress([ways[middle]] * len(ways)))
    return LengthsCost(tokens, middle, each, same, computed / computed_same)
