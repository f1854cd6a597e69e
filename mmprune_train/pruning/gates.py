"""Gates: how a score that is trained gets its gradient through patches that are kept or dropped for good.

A gate is 1, so nothing is rescaled, in training or after it; its gradient is that of the chance that its patch stays
under logistic noise on the scores (a straight-through estimate). Our choice.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Scores = Float[Tensor, "I N"]
Mask = Bool[Tensor, "I N"]


def _slope(scores: Scores, threshold: Tensor | float, scale: float) -> Scores:
    """[I, N] derivative of sigmoid((s - threshold) / scale)."""
    chance = ((scores.detach().float() - threshold) / scale).sigmoid()
    return chance * (1 - chance) / scale


def gates_among_kept(scores: Scores, tried: Scores, kept: Mask, scale: float = 1.0) -> Scores:
    """[I, N] gates where a budget says how many patches stay: for every one that comes, another goes.

    The chance of a kept patch is sigmoid((s_i - t) / scale), t the best dropped of the tried scores of its image: how
    likely it stays, given the others' noise. Of each gate's gradient the image's mean, weighed by the gates' slopes, is
    taken off: a patch is to rise where it is worth more than those it is kept with, and not because patches are worth
    something. An image that is kept whole has nothing to choose, and no gradient.

    Args:
        scores: with a gradient.
        tried: the same with the noise by which `kept` was chosen.
        scale: of that noise.
    """
    threshold = tried.float().masked_fill(kept, -torch.inf).amax(1, keepdim=True)  # -inf: kept whole
    slope = _slope(scores, threshold, scale).masked_fill(~kept | threshold.isinf(), 0)
    mean = (slope * scores).sum(1, keepdim=True) / slope.sum(1, keepdim=True).clamp(min=1e-12)
    soft = slope * (scores - mean)
    return 1 + (soft - soft.detach())


def gates_of_each(scores: Scores, kept: Mask, scale: float = 1.0) -> Scores:
    """[I, N] gates where each score says for itself whether its patch stays: the chance is sigmoid(s_i / scale)."""
    soft = _slope(scores, 0.0, scale).masked_fill(~kept, 0) * scores
    return 1 + (soft - soft.detach())


def share_above_zero(scores: Scores, scale: float = 1.0) -> Float[Tensor, " I"]:
    """[I] share of each image's scores that are above 0, with the gradient of the mean of sigmoid(s_i / scale)."""
    soft = (_slope(scores, 0.0, scale) * scores).mean(1)
    return (scores.detach() > 0).float().mean(1) + (soft - soft.detach())
