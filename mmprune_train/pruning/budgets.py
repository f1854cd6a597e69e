"""Budgets: how many of a row's sorted scores to keep. Every row of a batch at once, on its device.

A budget sees the descending curve of each row and answers a count per row: at the curve's bend (`knees.py`), from how
the scores or the tokens' features are distributed (`distribution_budgets.py`), or fixed (`fixed_budgets.py`).
`docs/budgets.md` has them side by side.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mmprune_train.components.declare import Component
from mmprune_train.components.registry import default_of, names
from mmprune_train.config.pruner_schema import KneeConfig
from mmprune_train.errors import UserError
from mmprune_train.packed.host import fetch
from mmprune_train.pruning.distribution_budgets import effective_rank_of
from mmprune_train.pruning.fixed_budgets import share_of_rows
from mmprune_train.pruning.knees import Lengths, valid_entries
from mmprune_train.pruning.parts import Part, load_budget
from mmprune_train.pruning.schedule import BudgetOverride, keep_of_dropped


def available_budgets() -> list[str]:
    """Names that `find_knee` takes as `method`."""
    return sorted(names("budget"))


def reads_features(component: Component) -> bool:
    """Whether a budget looks at the tokens' features, or at their effective rank."""
    return bool({"features", "feature_rank"} & {*component.reads})


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
    method: str = default_of("knee.method"),
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
        features: [B, N, D] the tokens in the order of their scores, for methods that look at them; passing it to others
            is no mistake.
        min_tokens: least count, within 1..length; 0 lets a count be 0, too.
        max_tokens: largest count.
        params: the method's own parameters (see its function).
    Returns:
        counts [B], int64, each in 1..length (0..length with min_tokens=0).
    Raises:
        UserError: wrong shape, empty rows, NaN or infinite values among the valid entries, negative scores where
            a method divides their sum, features missing where a method needs them, unknown method or parameter.
    """
    budget = load_budget(KneeConfig(method, args=params), "find_knee")
    if scores.dim() != 2 or scores.shape[1] == 0:
        raise UserError(f"scores must be [B, N] with N >= 1, got {tuple(scores.shape)}")
    batch, size = scores.shape
    if lengths is None:
        lengths = torch.full((batch,), size, dtype=torch.int64, device=scores.device)
    lengths = lengths.to(device=scores.device, dtype=torch.int64)
    if lengths.shape != (batch,) or bool(((lengths < 1) | (lengths > size)).any()):
        raise UserError(f"lengths must be [{batch}] with every entry in 1..{size}, got {lengths.tolist()}")
    refuse_unsound(scores, lengths, budget.component)
    if reads_features(budget.component):
        bad = ~_valid_features(features, valid_entries(scores, lengths), method).isfinite().all(dim=2).all(dim=1)
        if bool(bad.any()):
            raise UserError(f"features row {int(bad.int().argmax())} holds NaN or infinite values; check the precision")
    return count_tokens(scores, budget, lengths, features=features, min_tokens=min_tokens, max_tokens=max_tokens)


def sound_rows(scores: Float[Tensor, "B N"], lengths: Lengths, budget: Component | None = None) -> Bool[Tensor, " B"]:
    """[B] the rows that a budget can count: finite, and not negative where it divides their sum."""
    sound = scores.isfinite()
    if budget is not None and budget.divides_sum:
        sound = sound & (scores >= 0)
    return (sound | ~valid_entries(scores, lengths)).all(dim=1)


def poison(lost: Bool[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Factors, NaN where something is lost and 1 elsewhere: a loss that sees what they multiply is NaN, and so are all
    its gradients."""
    return torch.ones(lost.shape).masked_fill(lost, torch.nan)


def refuse_unsound(scores: Float[Tensor, "B N"], lengths: Lengths, budget: Component | None, told: str = "") -> None:
    """Raise UserError for a row that is not sound, and say why, after `told`. Waits for the device."""
    sound = fetch(sound_rows(scores, lengths, budget))
    if bool(sound.all()):
        return
    bad = ~scores.isfinite() & valid_entries(scores, lengths)
    if bool(bad.any()):
        row = int(bad.any(dim=1).int().argmax())
        raise UserError(
            f"{told}scores row {row} holds NaN or infinite values; check the model's precision or the score"
        )
    assert budget is not None
    better = ", ".join(f"{key}={default_of(key)}" for key in ("pruner.vision.score", "pruner.language.score"))
    raise UserError(
        f"{told}{budget.name}: scores row {int(sound.int().argmin())} is negative in places and has no shares; use a "
        f"softmaxed score ({better}) or another knee"
    )


@torch.no_grad()
def count_tokens(
    scores: Float[Tensor, "B N"],
    budget: Part,
    lengths: Lengths,
    *,
    features: Float[Tensor, "F ..."] | None,
    min_tokens: int,
    max_tokens: int | None,
    feature_rank: Float[Tensor, " B"] | None = None,
) -> Lengths:
    """`find_knee` for a caller that looks after `sound_rows` itself, so that nobody waits for the device; budgets that
    read the features' rank, or loop over rows, make the host wait nevertheless. Rows that are not sound get some count.

    Args:
        feature_rank: where it is known already, `features` need not be.
    """
    component = budget.component
    inside = valid_entries(scores, lengths)
    wide = scores.to(torch.float64).nan_to_num(0.0, 0.0, 0.0)
    curve = wide.masked_fill(~inside, -torch.inf).sort(dim=1, descending=True).values
    curve = curve.masked_fill(~inside, 0)  # padding sorts last, and no budget may meet an infinity
    offered = {}
    if reads_features(component) and (feature_rank is None or "features" in component.reads):
        clean = _valid_features(features, inside, component.name).nan_to_num(0.0, 0.0, 0.0)
        offered["features"] = clean
        if "feature_rank" in component.reads:
            feature_rank = effective_rank_of(clean)
    if feature_rank is not None:
        offered["feature_rank"] = feature_rank
    counts = budget(curve, lengths, **{name: value for name, value in offered.items() if name in component.reads})
    return bounded(counts.long(), lengths, min_tokens, max_tokens)


def bounded(counts: Lengths, lengths: Lengths, min_tokens: int, max_tokens: int | None) -> Lengths:
    """Counts [B] within `min_tokens`..`max_tokens`, and always within 1..length."""
    counts = counts.clamp(min=min_tokens)
    if max_tokens is not None:
        counts = counts.clamp(max=max_tokens)
    return counts.clamp(min=min(1, min_tokens)).minimum(lengths)


class Budget:
    """A `knee` of the configuration, ready to count.

    Args:
        key: its dotted name, for the messages.
    """

    def __init__(self, knee: KneeConfig, key: str) -> None:
        self.knee = knee
        self._part = load_budget(knee, key)

    def rule(self, override: BudgetOverride | None = None) -> Component | None:
        """The component that decides; None: the override's share."""
        return None if override is not None and override.ratio is not None else self._part.component

    def known(self, override: BudgetOverride | None = None) -> bool:
        """Whether counts do not depend on the scores."""
        rule = self.rule(override)
        return rule is None or bool(rule.fixed)

    def counts(
        self,
        scores: Float[Tensor, "B N"],
        lengths: Lengths,
        features: Callable[[], Tensor],
        override: BudgetOverride | None = None,
        feature_rank: Float[Tensor, " B"] | None = None,
    ) -> Lengths:
        """Counts [B], on the scores' device; rows that are not sound (`sound_rows`) get some count.

        Args:
            features: makes the tokens' [B, N, D], for the budgets that look at them.
            feature_rank: their effective rank, where it is known already.
        """
        bounds = self.knee.min_tokens, self.knee.max_tokens
        if override is not None and override.ratio is not None:
            return bounded(share_of_rows(lengths, override.ratio), lengths, *bounds)
        seen = features() if reads_features(self._part.component) and feature_rank is None else None
        counts = count_tokens(
            scores,
            self._part,
            lengths,
            features=seen,
            min_tokens=bounds[0],
            max_tokens=bounds[1],
            feature_rank=feature_rank,
        )
        if override is not None and override.undropped:
            counts = keep_of_dropped(counts, lengths, override.undropped, self.knee.max_tokens)
        return counts
