"""What stage 1 costs beside the vision tower that it follows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean, median

import torch
from torch import Tensor

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
) -> Iterator[tuple[str, SelectionCost]]:
    """Time stage 1 of several pruners on the same images and weights, interleaved, after one pass that is not counted.

    Args:
        model: its pruner is put back afterwards.
        pixel_values: [I, 3, H, W], encoded in chunks of `model.execution.vision_chunk`.
        repeats: passes that are counted, of every pruner.
    """
    laps: dict[str, list[dict[str, float]]] = {name: [] for name in pruners}
    kept: dict[str, Tensor] = {}
    clock = Clock()
    for repeat in range(repeats + 1):
        for name, settings in pruners.items():
            with torch.no_grad(), model.executed(clock=clock), model.pruned_by(settings):
                kept[name] = model.select_patches(pixel_values).kept
            lap = clock.lap()
            if repeat:
                laps[name].append(lap)
    for name, all_laps in laps.items():
        selection = [lap.get("selection", 0.0) for lap in all_laps]
        vision = [lap["vision"] for lap in all_laps]
        yield (
            name,
            SelectionCost(
                patches=kept[name].shape[1],
                kept=fmean(kept[name].sum(1).tolist()),
                vision_seconds=median(vision),
                selection_seconds=median(selection),
                share=median(s / v for s, v in zip(selection, vision, strict=True)),
            ),
        )
