"""Budgets: how many of a row's sorted scores to keep. Every row of a batch at once, on its device.

A budget sees the descending curve of each row and answers a count per row: at the curve's bend (`knees.py`), from how
the scores are spread, from the spectrum of the tokens' features, or fixed. `docs/budgets.md` has them side by side.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mmprune_train.config.pruner import SHARE_METHODS
from mmprune_train.errors import UserError
from mmprune_train.packed.host import fetch, upload
from mmprune_train.pruning import answers
from mmprune_train.pruning.components import find_component
from mmprune_train.pruning.knees import (
    FLAT,
    Curve,
    Lengths,
    first_largest,
    kneedle,
    l_method,
    max_chord,
    menger,
    second_difference,
    unit_curve,
    valid_entries,
)


def otsu(curve: Curve, lengths: Lengths) -> Lengths:
    """Otsu's threshold (1979) on the scores themselves, no histogram: the upper class is kept.

    The threshold lies between two different scores and has the largest between-class variance; of equally good ones
    the highest. A constant row has no two classes and is kept whole.

    Args:
        curve: descending scores [B, N].
        lengths: [B] valid entries of each row.
    Returns:
        counts [B].
    """
    _, y, constant = unit_curve(curve, lengths)
    upper = torch.arange(1, y.shape[1] + 1, device=y.device)  # size of the upper class
    lower = lengths[:, None] - upper
    mass = y.cumsum(dim=1)
    total = mass.gather(1, (lengths - 1)[:, None])
    variance = (lengths[:, None] * mass - upper * total).square() / (upper * lower).clamp(min=1)  # times length ** 2
    threshold = (lower > 0) & (y > y.roll(-1, 1))
    return torch.where(constant, lengths, first_largest(variance.masked_fill(~threshold, 0)) + 1)


def _quantile(curve: Curve, lengths: Lengths, share: float) -> Float[Tensor, "B 1"]:
    """Each row's quantile, linear between neighbours as `numpy.quantile`'s default."""
    place = (lengths - 1).to(curve.dtype) * share  # counted from the smallest score
    below = place.floor().long()
    low = curve.gather(1, (lengths - 1 - below)[:, None])
    high = curve.gather(1, (lengths - 2 - below).clamp(min=0)[:, None])
    return torch.lerp(low, high, (place - below)[:, None])


def iqr(curve: Curve, lengths: Lengths, factor: float = 1.5) -> Lengths:
    """Scores above Q3 + factor * (Q3 - Q1), the outliers that LLaVA-PruMerge (arXiv 2403.15388) keeps.

    A row without outliers (constant, evenly spread, or shorter than 4 at the default factor) has the count 0 and gets
    the floor, `min_tokens`: as published, what does not stand out is not kept. Never rises with `factor`.

    Args:
        curve: descending scores [B, N].
        lengths: [B] valid entries of each row.
        factor: how many interquartile ranges above the third quartile an outlier begins, >= 0.
    Returns:
        counts [B].
    """
    if not 0 <= factor < math.inf:
        raise UserError(f"iqr: factor must be >= 0 and finite, got {factor}")
    first, third = _quantile(curve, lengths, 0.25), _quantile(curve, lengths, 0.75)
    return ((curve > third + factor * (third - first)) & valid_entries(curve, lengths)).sum(dim=1)


def lof(curve: Curve, lengths: Lengths, neighbors: int = 20) -> Lengths:
    """Outliers of the local outlier factor (Breunig et al. 2000), as Recoverable Compression (arXiv 2409.01179) counts.

    scikit-learn's `LocalOutlierFactor` row by row on the CPU, the one budget with a loop over rows. As there, outliers
    at both ends of the curve count. Rows are first scaled to 0..1 (our choice), since scikit-learn adds 1e-10 to
    distances, which small scores would feel. A row without outliers (constant rows always) has the count 0 and gets
    the floor, `min_tokens`. More than `neighbors` equal scores make their neighbours outliers, of which scikit-learn
    warns.

    Args:
        curve: descending scores [B, N].
        lengths: [B] valid entries of each row.
        neighbors: neighbours to compare the density with, >= 1; a shorter row uses all it has.
    Returns:
        counts [B].
    """
    if neighbors < 1:
        raise UserError(f"lof: neighbors must be >= 1, got {neighbors}")
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


def _check_scale(method: str, scale: float) -> None:
    if not 0 < scale < math.inf:
        raise UserError(f"{method}: scale must be > 0 and finite, got {scale}")


def cumulative_mass(curve: Curve, lengths: Lengths, mass: float = 0.9) -> Lengths:
    """The fewest largest scores that hold the share `mass` of their row's sum (to 1e-9); never falls with `mass`.

    As top-p sampling cuts (Holtzman et al. 2020, arXiv 1904.09751); as a token budget our choice. A constant row, all
    zeros included, keeps the share `mass` of its tokens, rounded up.

    Args:
        curve: descending scores [B, N], >= 0.
        lengths: [B] valid entries of each row.
        mass: share to keep, in (0, 1].
    Returns:
        counts [B].
    """
    if not 0 < mass <= 1:
        raise UserError(f"cumulative_mass: mass must be in (0, 1], got {mass}")
    held = _shares(curve, lengths).cumsum(dim=1)
    return ((held < mass - FLAT) & valid_entries(curve, lengths)).sum(dim=1) + 1


def attention_entropy(curve: Curve, lengths: Lengths, scale: float = 1.0) -> Lengths:
    """scale * exp(entropy of the scores as a distribution), rounded: how many tokens the attention is spread over.

    AgilePruner (arXiv 2603.01236) measures images by this entropy; taking its exponential for a count is our choice. A
    constant row, all zeros included, keeps the share `scale` of its tokens. Never falls with `scale`.

    Args:
        curve: descending scores [B, N], >= 0.
        lengths: [B] valid entries of each row.
        scale: tokens to keep per token of spread, > 0.
    Returns:
        counts [B].
    """
    _check_scale("attention_entropy", scale)
    return _nearest(scale * _exp_entropy(_shares(curve, lengths)))


def effective_rank(curve: Curve, lengths: Lengths, features: Float[Tensor, "B N D"], scale: float = 1.0) -> Lengths:
    """scale * effective rank of the row's features (Roy and Vetterli 2007), rounded; the scores only rank.

    The effective rank is exp(entropy of the singular values as a distribution), between 1 and min(length, D); features
    are neither centred nor normalised. AgilePruner (arXiv 2603.01236) adapts its pruning threshold to it; taking it for
    a count is our choice. Equal features (all zeros included) have rank 1. Never falls with `scale`.

    Args:
        curve: descending scores [B, N].
        lengths: [B] valid entries of each row.
        features: [B, N, D] float64 in the tokens' own order, zeros beyond a row's length.
        scale: tokens to keep per dimension, > 0.
    Returns:
        counts [B].
    """
    return scaled_rank(spread_of_features(features), scale)


def scaled_rank(spread: Float[Tensor, " B"], scale: float) -> Lengths:
    """[B] what `effective_rank` counts in rows whose effective rank is known."""
    _check_scale("effective_rank", scale)
    return _nearest(scale * spread)


def spread_of_features(features: Float[Tensor, "B N D"]) -> Float[Tensor, " B"]:
    """[B] effective rank of each row's features, what `effective_rank` scales and rounds."""
    size, width = features.shape[1:]
    gram = features @ features.mT if size <= width else features.mT @ features
    energy = torch.linalg.eigvalsh(gram)  # [B, min(N, D)] squared singular values, ascending
    noise = energy[:, -1:] * max(size, width) * torch.finfo(energy.dtype).eps
    singular = torch.where(energy > noise, energy, 0).sqrt()
    total = singular.sum(dim=1, keepdim=True)
    return _exp_entropy(singular / torch.where(total > 0, total, 1))


def fixed_ratio(curve: Curve, lengths: Lengths, ratio: float = 0.25) -> Lengths:
    """A fixed share of each row, rounded to the nearest token."""
    if not 0 < ratio <= 1:
        raise UserError(f"fixed_ratio: ratio must be in (0, 1], got {ratio}")
    return (lengths * ratio + 0.5).floor().long()


def fixed_count(curve: Curve, lengths: Lengths, count: int = 64) -> Lengths:
    """The same number of tokens for every row (or all it has)."""
    if count < 1:
        raise UserError(f"fixed_count: count must be >= 1, got {count}")
    return torch.full_like(lengths, count)


BUDGETS: dict[str, Callable[..., Tensor]] = {
    "kneedle": kneedle,
    "max_chord": max_chord,
    "l_method": l_method,
    "menger": menger,
    "second_difference": second_difference,
    "otsu": otsu,
    "iqr": iqr,
    "lof": lof,
    "cumulative_mass": cumulative_mass,
    "attention_entropy": attention_entropy,
    "effective_rank": effective_rank,
    "fixed_ratio": fixed_ratio,
    "fixed_count": fixed_count,
}


FIXED = ("fixed_ratio", "fixed_count")
"""Budgets that do not look at the scores."""


def available_budgets() -> list[str]:
    """Names that `find_knee` takes as `method`."""
    return sorted(BUDGETS)


def _budget(method: str, key: str = "method") -> Callable[..., Tensor]:
    return find_component(BUDGETS, method, key, answers.counts)


def budget_parameters(method: str, key: str = "method") -> list[str]:
    """Names of the parameters a budget takes beside the curve (and the features); `key` as in `count_tokens`."""
    inputs = {"curve", "lengths", "features"}
    return [name for name in inspect.signature(_budget(method, key)).parameters if name not in inputs]


def needs_features(method: str) -> bool:
    """Whether a budget looks at the tokens' features."""
    return "features" in inspect.signature(_budget(method)).parameters


def _valid_features(features: Tensor | None, inside: Tensor, method: str) -> Float[Tensor, "B N D"]:
    """The features in float64 with zeros beyond each row's length; UserError where their shape does not fit."""
    batch, size = inside.shape
    if features is None:
        raise UserError(f"budget {method!r} needs features=[{batch}, {size}, D], the tokens that the scores belong to")
    if features.dim() != 3 or features.shape[:2] != inside.shape or features.shape[2] == 0:
        raise UserError(f"features must be [{batch}, {size}, D] with D >= 1, got {tuple(features.shape)}")
    return features.to(inside.device, torch.float64).masked_fill(~inside[..., None], 0)


@torch.no_grad()
def find_knee(
    scores: Float[Tensor, "B ..."],
    method: str = "kneedle",
    lengths: Int64[Tensor, "L ..."] | None = None,
    *,
    features: Float[Tensor, "F ..."] | None = None,
    min_tokens: int = 1,
    max_tokens: int | None = None,
    **params: object,
) -> Int64[Tensor, " B"]:
    """How many of the largest scores of each row to keep.

    Args:
        scores: [B, N] in any order, larger = keep. Any floating dtype; computed in float64.
        method: one of `available_budgets()`, or a function of yours as `module:function`.
        lengths: [B] valid leading entries of each row, 1..N; None: all N.
        features: [B, N, D] the tokens in the order of their scores, for `effective_rank`; other methods do without, and
            passing it to them is no mistake.
        min_tokens, max_tokens: bounds on the count, within 1..length; min_tokens=0 lets a count be 0, too.
        params: the method's own parameters (see its function).
    Returns:
        counts [B], int64, each in 1..length (0..length with min_tokens=0).
    Raises:
        UserError: wrong shape, empty rows, NaN or infinite values among the valid entries, negative scores where
            a method shares out their sum, features missing where a method needs them, unknown method or parameter.
    """
    known = budget_parameters(method)
    if unknown := sorted(set(params) - set(known)):
        raise UserError(
            f"budget {method!r} takes no {', '.join(unknown)}; its parameters: {', '.join(known) or 'none'}"
        )
    if scores.dim() != 2 or scores.shape[1] == 0:
        raise UserError(f"scores must be [B, N] with N >= 1, got {tuple(scores.shape)}")
    batch, size = scores.shape
    if lengths is None:
        lengths = torch.full((batch,), size, dtype=torch.int64, device=scores.device)
    lengths = lengths.to(device=scores.device, dtype=torch.int64)
    if lengths.shape != (batch,) or bool(((lengths < 1) | (lengths > size)).any()):
        raise UserError(f"lengths must be [{batch}] with every entry in 1..{size}, got {lengths.tolist()}")
    refuse_unsound(scores, lengths, method)
    if needs_features(method):
        bad = ~_valid_features(features, valid_entries(scores, lengths), method).isfinite().all(dim=2).all(dim=1)
        if bool(bad.any()):
            raise UserError(f"features row {int(bad.int().argmax())} holds NaN or infinite values; check the precision")
    return count_tokens(
        scores, method, lengths, features=features, min_tokens=min_tokens, max_tokens=max_tokens, key="method", **params
    )


def sound_rows(scores: Float[Tensor, "B N"], lengths: Lengths, method: str = "") -> Bool[Tensor, " B"]:
    """[B] the rows that a budget can count: finite, and not negative where it shares out their sum."""
    sound = scores.isfinite()
    if method in SHARE_METHODS:
        sound = sound & (scores >= 0)
    return (sound | ~valid_entries(scores, lengths)).all(dim=1)


def poison(lost: Bool[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Factors, NaN where something is lost and 1 elsewhere: a loss that sees what they multiply is NaN, and so are all
    its gradients."""
    return torch.ones(lost.shape).masked_fill(lost, torch.nan)


def refuse_unsound(scores: Float[Tensor, "B N"], lengths: Lengths, method: str, told: str = "") -> None:
    """Raise UserError for a row that is not sound, and say why, after `told`. Waits for the device."""
    sound = fetch(sound_rows(scores, lengths, method))
    if bool(sound.all()):
        return
    bad = ~scores.isfinite() & valid_entries(scores, lengths)
    if bool(bad.any()):
        row = int(bad.any(dim=1).int().argmax())
        raise UserError(
            f"{told}scores row {row} holds NaN or infinite values; check the model's precision or the score"
        )
    raise UserError(
        f"{told}{method}: scores row {int(sound.int().argmin())} is negative in places and has no shares; use a "
        "softmaxed score (pruner.vision.score=cls_attention, pruner.language.score=text_attention) or another knee"
    )


@torch.no_grad()
def count_tokens(
    scores: Float[Tensor, "B N"],
    method: str,
    lengths: Lengths,
    *,
    features: Float[Tensor, "F ..."] | None,
    min_tokens: int,
    max_tokens: int | None,
    key: str = "method",
    **params: object,
) -> Lengths:
    """`find_knee` for a caller that looks after `sound_rows` itself, so that nobody waits for the device; only `lof`
    and `effective_rank` make the host wait. Rows that are not sound get some count. `key`: what `method` was given for,
    e.g. `pruner.vision.knee.method`."""
    inside = valid_entries(scores, lengths)
    wide = scores.to(torch.float64).nan_to_num(0.0, 0.0, 0.0)
    curve = wide.masked_fill(~inside, -torch.inf).sort(dim=1, descending=True).values
    curve = curve.masked_fill(~inside, 0)  # padding sorts last, and no budget may meet an infinity
    if needs_features(method):
        params["features"] = _valid_features(features, inside, method).nan_to_num(0.0, 0.0, 0.0)
    return bounded(_budget(method, key)(curve, lengths, **params).long(), lengths, min_tokens, max_tokens)


def bounded(counts: Lengths, lengths: Lengths, min_tokens: int, max_tokens: int | None) -> Lengths:
    """Counts [B] within `min_tokens`..`max_tokens`, and always within 1..length."""
    counts = counts.clamp(min=min_tokens)
    if max_tokens is not None:
        counts = counts.clamp(max=max_tokens)
    return counts.clamp(min=min(1, min_tokens)).minimum(lengths)
