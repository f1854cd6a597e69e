"""Budgets that count by how a row's scores, or the tokens' features, are distributed. Every row of a batch at once, on
its device. `docs/budgets.md` has all budgets side by side.
"""

from __future__ import annotations

from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from mmprune_train.components.declare import SMALL, Range, budget
from mmprune_train.packed.host import fetch, upload
from mmprune_train.pruning.knees import FLAT, Curve, Lengths, first_largest, unit_curve, valid_entries


@budget()
def otsu(curve: Curve, lengths: Lengths) -> Lengths:
    """Otsu's threshold (1979) on the scores themselves, no histogram: the upper class is kept.

    The threshold lies between two different scores and has the largest between-class variance; of equally good ones
    the highest. A constant row has no two classes and is kept whole.
    """
    _, y, constant = unit_curve(curve, lengths)
    upper = torch.arange(1, y.shape[1] + 1, device=y.device)  # size of the upper class
    lower = lengths[:, None] - upper
    mass = y.cumsum(dim=1)
    total = mass.gather(1, (lengths - 1)[:, None])
    variance = (lengths[:, None] * mass - upper * total).square() / (upper * lower).clamp(min=1)  # times length ** 2
    threshold = (lower > 0) & (y > y.roll(-1, 1))
    return torch.where(constant, lengths, first_largest(variance.masked_fill(~threshold, 0)) + 1)


@budget(positive=True)
def above_zero(curve: Curve, lengths: Lengths) -> Lengths:
    """Scores above 0: each says for itself whether its token stays, as those of a score that is trained may come to
    (our choice). `pruner.vision.target` holds their mean share."""
    return ((curve > 0) & valid_entries(curve, lengths)).sum(dim=1)


def _quantile(curve: Curve, lengths: Lengths, place: float) -> Float[Tensor, "B 1"]:
    """Each row's quantile, linear between neighbours as `numpy.quantile`'s default."""
    at = (lengths - 1).to(curve.dtype) * place  # counted from the smallest score
    below = at.floor().long()
    low = curve.gather(1, (lengths - 1 - below)[:, None])
    high = curve.gather(1, (lengths - 2 - below).clamp(min=0)[:, None])
    return torch.lerp(low, high, (at - below)[:, None])


@budget(calibrated=("factor", lambda longest: (0.0, 1e6)))
def iqr(curve: Curve, lengths: Lengths, *, factor: Annotated[float, Range(0, 1e6)] = 1.5) -> Lengths:
    """Scores above Q3 + factor * (Q3 - Q1), the outliers that LLaVA-PruMerge (arXiv 2403.15388) keeps.

    A row without outliers (constant, evenly spread, or shorter than 4 at the default factor) has the count 0 and gets
    the floor, `min_tokens`: as published, what does not stand out is not kept. Never rises with `factor`.

    Args:
        factor: interquartile ranges above the third quartile where an outlier begins; larger keeps fewer.
    """
    first, third = _quantile(curve, lengths, 0.25), _quantile(curve, lengths, 0.75)
    return ((curve > third + factor * (third - first)) & valid_entries(curve, lengths)).sum(dim=1)


@budget(calibrated=("neighbors", lambda longest: (1, max(1, longest - 1))))
def lof(curve: Curve, lengths: Lengths, *, neighbors: Annotated[int, Range(1)] = 20) -> Lengths:
    """Outliers of the local outlier factor (Breunig et al. 2000), as Recoverable Compression (arXiv 2409.01179) counts.

    scikit-learn's `LocalOutlierFactor` row by row on the CPU, the one budget with a loop over rows. As there, outliers
    at both ends of the curve count. Rows are first scaled to 0..1 (our choice), since scikit-learn adds 1e-10 to
    distances, which small scores would feel. A row without outliers (constant rows always) has the count 0 and gets
    the floor, `min_tokens`. More than `neighbors` equal scores make their neighbours outliers, of which scikit-learn
    warns.

    Args:
        neighbors: neighbours whose density an outlier falls short of; a shorter row uses all it has.
    """
    from sklearn.neighbors import LocalOutlierFactor  # heavy, and only this budget needs it

    _, y, constant = unit_curve(curve, lengths)
    counts = torch.zeros(len(curve), dtype=torch.int64)
    rows = fetch(torch.cat([y, lengths[:, None], constant[:, None]], dim=1)).numpy()
    for row, (length, alike) in enumerate(rows[:, -2:].astype(int).tolist()):
        if not alike:
            detector = LocalOutlierFactor(n_neighbors=min(neighbors, length - 1), algorithm="kd_tree")
            counts[row] = int((detector.fit_predict(rows[row, :length, None]) == -1).sum())
    return upload(counts, lengths.device)


def _shares(curve: Curve, lengths: Lengths) -> Curve:
    """Scores as shares of their row's sum [B, N], 0 beyond its length; a row of zeros is shared evenly."""
    mass = torch.where(curve[:, :1] > 0, curve, 1) * valid_entries(curve, lengths)
    return mass / mass.sum(dim=1, keepdim=True)


def _exp_entropy(shares: Float[Tensor, "B M"]) -> Float[Tensor, " B"]:
    """How many equal shares would have the same entropy; 0 log 0 = 0."""
    return torch.special.entr(shares).sum(dim=1).exp()


def _nearest(count: Float[Tensor, " B"]) -> Lengths:
    """Nearest whole number, halves up; rounding errors decide nothing."""
    return (count + 0.5 + FLAT).floor().long()


@budget(
    divides_sum=True,
    whole=("mass", lambda mass, size: mass == 1),
    calibrated=("mass", lambda longest: (1e-6, 1.0)),
)
def cumulative_mass(
    curve: Curve,
    lengths: Lengths,
    *,
    mass: Annotated[float, Range(SMALL, 1, says=": a share of the scores' sum")] = 0.9,
) -> Lengths:
    """The fewest largest scores that hold the share `mass` of their row's sum (to 1e-9); never falls with `mass`.

    As top-p sampling cuts (Holtzman et al. 2020, arXiv 1904.09751); as a token budget our choice. A constant row, all
    zeros included, keeps the share `mass` of its tokens, rounded up.

    Args:
        mass: share of the scores' sum that is kept.
    """
    held = _shares(curve, lengths).cumsum(dim=1)
    return ((held < mass - FLAT) & valid_entries(curve, lengths)).sum(dim=1) + 1


@budget(divides_sum=True, calibrated=("scale", lambda longest: (0.5 / longest, longest)))
def attention_entropy(curve: Curve, lengths: Lengths, *, scale: Annotated[float, Range(SMALL, 1e6)] = 1.0) -> Lengths:
    """scale * exp(entropy of the scores as a distribution), rounded: how many tokens the attention is spread over.

    AgilePruner (arXiv 2603.01236) measures images by this entropy; taking its exponential for a count is our choice. A
    constant row, all zeros included, keeps the share `scale` of its tokens. Never falls with `scale`.

    Args:
        scale: tokens kept for each token that the entropy counts.
    """
    return _nearest(scale * _exp_entropy(_shares(curve, lengths)))


@budget(calibrated=("scale", lambda longest: (0.5 / longest, longest)))
def effective_rank(
    curve: Curve,
    lengths: Lengths,
    feature_rank: Float[Tensor, " B"],
    *,
    scale: Annotated[float, Range(SMALL, 1e6)] = 1.0,
) -> Lengths:
    """scale * effective rank of the row's features (Roy and Vetterli 2007), rounded; the scores only rank.

    The effective rank is exp(entropy of the singular values as a distribution), between 1 and min(length, D); features
    are neither centred nor normalised. AgilePruner (arXiv 2603.01236) adapts its pruning threshold to it; taking it for
    a count is our choice. Equal features (all zeros included) have rank 1. Never falls with `scale`.

    Args:
        feature_rank: [B] effective rank of each row's features (`effective_rank_of`).
        scale: tokens kept per dimension.
    """
    return _nearest(scale * feature_rank)


def effective_rank_of(features: Float[Tensor, "B N D"]) -> Float[Tensor, " B"]:
    """[B] effective rank of each row's features: what budgets that read `feature_rank` are given."""
    size, width = features.shape[1:]
    gram = features @ features.mT if size <= width else features.mT @ features
    energy = torch.linalg.eigvalsh(gram)  # [B, min(N, D)] squared singular values, ascending
    noise = energy[:, -1:] * max(size, width) * torch.finfo(energy.dtype).eps
    singular = torch.where(energy > noise, energy, 0).sqrt()
    total = singular.sum(dim=1, keepdim=True)
    return _exp_entropy(singular / torch.where(total > 0, total, 1))
