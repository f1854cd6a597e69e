"""What stage 1 costs beside the vision tower that it follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from mmprune_train.benchmark.steps import interleaved, medians
from mmprune_train.config.pruner_schema import PrunerConfig
from mmprune_train.model.execution import Clock
from mmprune_train.model.llava import PackedLlava


@dataclass
class SelectionCost:
    """Stage 1 of one pruner on a batch of images; times are medians over the repeats."""

    patches: int
    """Of an image."""
    kept: float
    """Tokens that an image leaves, mean over the batch."""
    vision_seconds: float
    """The tower, as far as the features need it."""
    selection_seconds: float
    """Score, budget, selection and merge, with the blocks and projections that they alone run."""
    share: float
    """selection_seconds / vision_seconds, median over the repeats of the ratio in one pass."""


def selection_costs(
    model: PackedLlava, pixel_values: Tensor, pruners: Mapping[str, PrunerConfig], repeats: int
) -> dict[str, SelectionCost]:
    """Time stage 1 of several pruners on the same images and weights, interleaved, after one pass that is not counted.

    Args:
        model: its pruner is put back afterwards.
        pixel_values: [I, 3, H, W], encoded in chunks of `model.execution.vision_chunk`.
    """
    clock = Clock()

    def measure(name: str) -> SelectionCost:
        with torch.no_grad(), model.executed(clock=clock), model.pruned_by(pruners[name]):
            kept = model.select_patches(pixel_values).kept
        lap = clock.lap()
        vision, selection = lap["vision"], lap.get("selection", 0.0)
        return SelectionCost(kept.shape[1], fmean(kept.sum(1).tolist()), vision, selection, selection / vision)

    return {name: medians(rounds) for name, rounds in interleaved(pruners, range(repeats + 1), measure).items()}
