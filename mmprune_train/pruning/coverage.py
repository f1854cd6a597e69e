"""Selections that cover: greedily the patch by which what is left out finds the most alike among what stays."""

from __future__ import annotations

from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from mmprune_train.components.declare import LARGE, SMALL, Range, selection
from mmprune_train.pruning.selections import Counts, Features, Mask, Scores, most_of


def _greedy(table: Float[Tensor, "B M N"], counts: Counts, most: int, weights: Scores | None = None) -> Mask:
    """Mark `counts` columns of each table: of the columns left, that which raises the rows' maxima over the chosen ones
    (0 to begin with) most, in sum over the rows and times its weight; of equal ones the first."""
    chosen = table.new_zeros(table.shape[::2], dtype=torch.bool)
    row = torch.arange(len(table), device=table.device)
    covered = table.new_zeros(table.shape[:2])
    for step in range(most):
        gain = (table - covered[..., None]).clamp(min=0).sum(1)
        gain = gain if weights is None else gain * weights
        pick = gain.masked_fill(chosen, -torch.inf).argmax(1)
        chosen[row, pick] |= step < counts
        covered = covered.maximum(table[row, :, pick])
    return chosen


@selection(reads=("features",), weighs=True)
def weighed_coverage(
    scores: Scores,
    counts: Counts,
    features: Features,
    known: Counts | None = None,
    *,
    power: Annotated[float, Range(0, 100)] = 1.0,
) -> Mask:
    """SCOPE (Deng et al. 2025, arXiv 2510.24214): greedily the patch with the largest product of its score and of what
    it adds to the coverage, the sum over all patches of the largest cosine with a chosen one (0 at least).

    Args:
        power: of the score; 0: coverage alone.
    """
    unit = normalize(features.float(), dim=-1)
    weights = scores.float() ** power
    return _greedy(unit @ unit.transpose(1, 2), counts, most_of(counts, known), weights)


@selection(reads=("features",))
def question_coverage(
    scores: Scores,
    counts: Counts,
    features: Features,
    known: Counts | None = None,
    projected: Float[Tensor, "B N P"] | None = None,
    words: Float[Tensor, "B W P"] | None = None,
    *,
    weight: Annotated[float, Range(0, LARGE)] = 0.5,
    word_temperature: Annotated[float, Range(SMALL, LARGE)] = 0.02,
    patch_temperature: Annotated[float, Range(SMALL, LARGE)] = 0.2,
) -> Mask:
    """MMTok (Dong et al. 2025, arXiv 2508.18264): greedily the patch that adds most to the coverage of the question's
    words and of all patches; scores are not looked at.

    A word is covered by what a softmax over the patches of its cosines with them, divided by a temperature, gives the
    chosen one with the largest part; so is a patch. Both sums are means over words and over patches. The words are the
    LLM's embeddings, compared with projected patches; patches are compared with each other as `features`.

    Args:
        projected: the patches after the projector; None: `features`.
        words: zeros behind the last word; None: nothing is asked, and patches alone are covered.
        weight: of the patches' coverage beside the words'.
        word_temperature: of the words' cosines with the patches.
        patch_temperature: of the patches' cosines with each other.
    """
    unit = normalize(features.float(), dim=-1)
    table = (unit @ unit.transpose(1, 2) / patch_temperature).softmax(2) / unit.shape[1] * weight
    if words is not None:
        seen = normalize((features if projected is None else projected).float(), dim=-1)
        asked = words.any(2)[..., None]  # [B, W, 1]
        share = (normalize(words.float(), dim=-1) @ seen.transpose(1, 2) / word_temperature).softmax(2)
        table = torch.cat([share * asked / asked.sum(1, keepdim=True).clamp(min=1), table], 1)
    return _greedy(table, counts, most_of(counts, known))
