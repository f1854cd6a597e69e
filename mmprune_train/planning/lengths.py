"""How many tokens of a sample reach each LLM layer, dense and pruned, without running a network.

Where a budget is fixed its counts do not depend on the scores: the pruner itself is run with random ones. A budget that
looks at its scores is given a share instead, that with which a wanted share of visual tokens comes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mmprune_train.components.registry import default_of, library
from mmprune_train.config.knee import budget_of, own_budgets, with_method, with_value
from mmprune_train.config.pruner_schema import KneeConfig, PrunerConfig
from mmprune_train.data.batch import Sample, collate
from mmprune_train.model.flops import PassShape
from mmprune_train.pruning import IGNORE, Kind, PackedSequence, Pruner
from mmprune_train.pruning.views import VisionView

TOGETHER = 32
"""Samples that are cut at once."""
WIDTH = 8
"""Of the random features that selections and merges look at."""


@dataclass(frozen=True)
class Tokens:
    """Of each of S samples."""

    dense: Tensor
    """[S] without pruning."""
    stage1: Tensor
    """[S] that enter the LLM."""
    lengths: Tensor
    """[layers, S] that enter each layer."""
    images: Tensor
    """[S]."""
    kept_patches: Tensor
    """[S]."""
    supervised: Tensor
    """[S]."""
    visual_dense: Tensor
    """[S] visual tokens without pruning."""
    visual_mean: Tensor
    """[S] those that enter a layer, averaged over layers."""

    @property
    def layer_mean(self) -> Tensor:
        """[S] tokens that enter a layer, averaged over layers."""
        return self.lengths.mean(0)

    @property
    def visual_keep_ratio(self) -> float:
        return float(self.visual_mean.sum() / self.visual_dense.sum().clamp(min=1))

    @property
    def keep_ratio(self) -> float:
        return float(self.layer_mean.sum() / self.dense.sum())

    def shape(self, rows: Sequence[int] | None = None) -> PassShape:
        """The pass over some of the samples; None: all."""
        chosen = list(range(len(self.dense))) if rows is None else list(rows)
        return PassShape(
            self.lengths[:, chosen],
            self.stage1[chosen],
            float(self.images[chosen].sum()),
            float(self.kept_patches[chosen].sum()),
            float(self.supervised[chosen].sum()),
        )


def data_dependent(pruner: PrunerConfig) -> list[str]:
    """Keys of the budgets whose counts depend on the images."""
    return [key for key, knee in own_budgets(pruner) if not budget_of(knee, key).fixed]


def count_tokens(pruner: PrunerConfig, samples: Sequence[Sample], patches: int, depth: int, share: float) -> Tokens:
    """Tokens of each sample.

    Args:
        patches: of one image.
        depth: layers of the LLM.
        share: of its row, what a budget keeps that depends on the images.
    """
    blind = Pruner(_blinded(pruner, share))
    kept = _patches_kept(blind, patches)
    parts = [
        _count(blind, collate(list(samples[at : at + TOGETHER])).sequence, kept, patches, depth)
        for at in range(0, len(samples), TOGETHER)
    ]
    fields = {name: torch.cat([getattr(part, name) for part in parts], -1) for name in Tokens.__dataclass_fields__}
    return Tokens(**fields)


def solve_share(pruner: PrunerConfig, samples: Sequence[Sample], patches: int, depth: int, keep: float) -> float:
    """The share with which visual tokens entering a layer, averaged over layers, are `keep` of the dense ones."""
    low, high = 1 / patches, 1.0
    for _ in range(8):
        middle = (low + high) / 2
        if count_tokens(pruner, samples, patches, depth, middle).visual_keep_ratio > keep:
            high = middle
        else:
            low = middle
    return low


def _blinded(pruner: PrunerConfig, share: float) -> PrunerConfig:
    """The same pruner by scores that are drawn, every budget fixed; inside the LLM the best of them stay."""
    by_share = next(one for one in library()["budget"].values() if one.fixed and one.parameters[0].type == "float")

    def drawing(kind: str) -> dict[str, Any]:
        return {"score": next(one.name for one in library()[kind].values() if one.draws), "score_args": {}}

    def fixed(knee: KneeConfig) -> KneeConfig:
        return knee if budget_of(knee).fixed else with_value(with_method(knee, by_share.name), by_share.fixed, share)

    vision, language = pruner.vision, pruner.language
    recover = replace(vision.recover, layer=None, knee=fixed(vision.recover.knee), **drawing("vision_score"))
    plain: dict[str, Any] = {
        "query_tokens": "all",
        "selection": default_of("pruner.language.selection"),
        "selection_args": {},
    }
    return replace(
        pruner,
        vision=replace(vision, knee=fixed(vision.knee), recover=recover, **drawing("vision_score")),
        language=replace(language, knee=fixed(language.knee), **plain, **drawing("language_score")),
    )


def _patches_kept(pruner: Pruner, patches: int) -> int:
    """Visual tokens of an image kept by vision-side pruning, made ones among them."""
    features = torch.randn((1, patches, WIDTH), generator=torch.Generator().manual_seed(0))
    view = VisionView(features, (1, patches), patch_keys=lambda: features, cls_feature=features[:, 0])
    kept, scores = pruner.keep_patches(view)
    features, places = pruner.merge_patches(features, kept, scores, view)
    return int((places | pruner.place_cls(features, places, view)[1]).sum())


def _count(pruner: Pruner, sequence: PackedSequence, kept: int, patches: int, depth: int) -> Tokens:
    dense = sequence.lengths
    visual = _visual(sequence)
    images = visual // patches
    supervised = torch.bincount(sequence.segment[sequence.target != IGNORE], minlength=sequence.samples)
    sequence = sequence.keep((sequence.kind != Kind.VISUAL) | (sequence.patch < kept))
    stage1, layers, lengths, seen = sequence.lengths, pruner.layers(depth), [], []
    for index in range(depth):
        if index in layers:
            hidden = torch.randn(len(sequence), WIDTH)
            pruned = pruner.prune_tokens(sequence, hidden, _no_keys, layers[index])
            if pruned is not None:
                sequence = sequence.keep(pruned[1])
        lengths.append(sequence.lengths)
        seen.append(_visual(sequence))
    mean = torch.stack(seen).double().mean(0)
    counts = (dense, stage1, torch.stack(lengths), images, images * kept, supervised, visual, mean)
    return Tokens(*(count.double() for count in counts))


def _visual(sequence: PackedSequence) -> Tensor:
    return torch.bincount(sequence.segment[sequence.visual], minlength=sequence.samples)


def _no_keys(rows: Tensor) -> tuple[Tensor, Tensor]:
    raise AssertionError("random scores read no keys")
