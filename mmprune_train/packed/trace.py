"""The trace: what one forward pass kept, and what it would have processed without pruning."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class PruningTrace:
    """Token counts of one packed batch. Totals are sums over its samples; ratios are of those sums. All is on the host
    but the scores."""

    dense: Tensor
    """[B] tokens of each sample without pruning."""
    dense_visual: Tensor
    """[B] visual tokens of each sample without pruning."""
    stage1: Tensor
    """[B] tokens that entered the LLM."""
    stage1_visual: Tensor
    layers: list[Tensor] = field(default_factory=list)
    """For each LLM layer, [B] tokens that entered it."""
    layers_visual: list[Tensor] = field(default_factory=list)
    vision_kept: list[Tensor] = field(default_factory=list)
    """Per image of `pixel_values`: kept patch indices in raster order, int64; a token that a merge made has the index
    of the dropped patch whose place it took. In training, where stage 1 reads the question: per image and question."""
    vision_order: list[Tensor] = field(default_factory=list)
    """The same indices in the order in which they entered the LLM."""
    language_kept: list[Tensor] = field(default_factory=list)
    """Per sample: positions, in the sequence that entered the LLM, of the tokens that left it, int64."""
    language_entered: dict[int, list[Tensor]] = field(default_factory=dict)
    """For each LLM layer that something was dropped before, per sample: the positions, as above, of the tokens that
    entered it. A token that a merge made has the position of the dropped token whose place it took."""
    encoded: int = 0
    """Images that went through the vision tower; those in the feature cache did not."""
    asked: tuple[int, int] = (0, 0)
    """Questions that went through the text tower, and the tokens that each took, padding included."""
    vision_scores: Tensor | None = None
    """[I, N] stage-1 scores, where stage 1 ran."""
    language_scores: Tensor | None = None
    """[T1] stage-2 scores of the tokens that entered the LLM (NaN: not a candidate), of the first pruned layer."""

    @property
    def per_sample(self) -> dict[str, Tensor]:
        """[B] each: dense, stage1, stage2, layer_mean, and the same over visual tokens (`visual_...`)."""
        return {
            "dense": self.dense,
            "stage1": self.stage1,
            "stage2": self.layers[-1],
            "layer_mean": torch.stack(self.layers).double().mean(0),
            "visual_dense": self.dense_visual,
            "visual_stage1": self.stage1_visual,
            "visual_stage2": self.layers_visual[-1],
            "visual_layer_mean": torch.stack(self.layers_visual).double().mean(0),
        }

    def counts(self) -> dict[str, float]:
        """Totals over the batch as plain numbers."""
        per_sample = self.per_sample
        return dict(zip(per_sample, torch.stack([v.double().sum() for v in per_sample.values()]).tolist(), strict=True))

    @property
    def keep_ratio(self) -> float:
        """Tokens entering an LLM layer, averaged over layers, as a share of the dense ones."""
        counts = self.counts()
        return counts["layer_mean"] / counts["dense"]
