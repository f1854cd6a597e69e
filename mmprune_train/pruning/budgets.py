"""Budgets: how many of a row's sorted scores to keep. Every row of a batch at once, on its device.

A budget takes the descending curve of each row [B, N], whose entries beyond the row's length are ignored, and the rows'
lengths [B], and answers counts [B]: at the curve's bend (`knees.py`), from how the scores or the tokens' features are
distributed (`distribution_budgets.py`), or fixed (`fixed_budgets.py`). `docs/budgets.md` has them side by side.
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
from mmprune_train.pruning.parts import load_budget
from mmprune_train.pruning.schedule import BudgetOverride, keep_of_dropped


def available_budgets() -> list[str]:
    """Names that `find_knee` takes as `method`."""
    return sorted(names("budget"))


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
        params: the method's own parameters (see its function).
    Returns:
        counts [B], int64, each in 1..length (0..length with min_tokens=0).
    Raises:
        UserError: wrong shape, empty rows, NaN or infinite values among the valid entries, negative scores where
            a method divides their sum, features missing where a method needs them, unknown method or parameter.
    """
    budget = Budget(KneeConfig(method, min_tokens=min_tokens, max_tokens=max_tokens, args=params), "find_knee")
    if scores.dim() != 2 or scores.shape[1] == 0:
        raise UserError(f"scores must be [B, N] with N >= 1, got {tuple(scores.shape)}")
    batch, size = scores.shape
    lengths = whole_lengths(scores) if lengths is None else lengths.to(device=scores.device, dtype=torch.int64)
    if lengths.shape != (batch,) or bool(((lengths < 1) | (lengths > size)).any()):
        raise UserError(f"lengths must be [{batch}] with every entry in 1..{size}, got {lengths.tolist()}")
    refuse_unsound(scores, lengths, budget.component)
    if not budget.component.reads:
        return budget.counts(scores, lengths)
    if features is None:
        raise UserError(f"budget {method!r} needs features=[{batch}, {size}, D], the tokens that the scores belong to")
    if features.dim() != 3 or features.shape[:2] != scores.shape or features.shape[2] == 0:
        raise UserError(f"features must be [{batch}, {size}, D] with D >= 1, got {tuple(features.shape)}")
    features = features.to(scores.device)
    bad = (~features.isfinite().all(dim=2) & valid_entries(scores, lengths)).any(dim=1)
    if bool(bad.any()):
        raise UserError(f"features row {int(bad.int().argmax())} holds NaN or infinite values; check the precision")
    return budget.counts(scores, lengths, lambda: features)


def whole_lengths(scores: Float[Tensor, "B N"]) -> Lengths:
    """[B] lengths of rows that have no padding."""
    return torch.full(scores.shape[:1], scores.shape[1], dtype=torch.int64, device=scores.device)


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


class Budget:
    """A `knee` of the configuration, ready to count; `key` is its dotted name, for the messages."""

    def __init__(self, knee: KneeConfig, key: str) -> None:
        self.knee = knee
        self._part = load_budget(knee, key)
        self.component = self._part.component

    def rule(self, override: BudgetOverride | None = None) -> Component | None:
        """The component that decides; None: the override's share."""
        return None if override is not None and override.ratio is not None else self.component

    @torch.no_grad()
    def counts(
        self,
        scores: Float[Tensor, "B N"],
        lengths: Lengths,
        features: Callable[[], Tensor] | None = None,
        override: BudgetOverride | None = None,
        feature_rank: Float[Tensor, " B"] | None = None,
    ) -> Lengths:
        """Counts [B] within the budget's bounds and 1..length (0..length with min_tokens=0), on the scores' device;
        rows that are not sound (`sound_rows`) get some count. Nobody waits for the device, except for budgets that read
        the features' rank, or loop over rows.

        Args:
            features: makes the tokens' [B, N, D], for the budgets that look at them.
            feature_rank: their effective rank, where it is known already: `features` need not be then.
        """
        if override is not None and override.ratio is not None:
            counts = share_of_rows(lengths, override.ratio)
        else:
            counts = self._count(scores, lengths, features, feature_rank)
        least, most = self.knee.min_tokens, self.knee.max_tokens
        counts = counts.clamp(min=least, max=most).clamp(min=min(1, least)).minimum(lengths)
        if override is not None and override.undropped:
            counts = keep_of_dropped(counts, lengths, override.undropped, most)
        return counts

    def _count(
        self,
        scores: Float[Tensor, "B N"],
        lengths: Lengths,
        features: Callable[[], Tensor] | None,
        feature_rank: Float[Tensor, " B"] | None,
    ) -> Lengths:
        inside, reads = valid_entries(scores, lengths), self.component.reads
        wide = scores.to(torch.float64).nan_to_num(0.0, 0.0, 0.0)
        curve = wide.masked_fill(~inside, -torch.inf).sort(dim=1, descending=True).values
        curve = curve.masked_fill(~inside, 0)  # padding sorts last, and no budget may meet an infinity
        offered = {"feature_rank": feature_rank}
        if "features" in reads or ("feature_rank" in reads and feature_rank is None):
            assert features is not None
            clean = features().to(torch.float64).masked_fill(~inside[..., None], 0).nan_to_num(0.0, 0.0, 0.0)
            offered["features"] = clean
            if "feature_rank" in reads:
                offered["feature_rank"] = effective_rank_of(clean)
        return self._part(curve, lengths, **{name: offered[name] for name in reads}).long()
