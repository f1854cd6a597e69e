"""Budgets: how many of a row's sorted scores to keep. Every row of a batch at once, on its device.

A budget sees the descending curve of each row and answers a count per row. Knee methods find the bend of the curve;
the token at the bend is the last one kept, so a knee at rank k (0-based) keeps k + 1 tokens.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mmprune_train.errors import UserError

Curve = Float[Tensor, "B N"]
Lengths = Int64[Tensor, " B"]

FLAT = 1e-9
"""A normalised curve that bends less than this has no bend."""


def _unit_curve(curve: Curve, lengths: Lengths) -> tuple[Tensor, Tensor, Tensor]:
    """Scale each row to the unit square: x [B, N], y [B, N] in 0..1, and which rows are constant [B]."""
    rank = torch.arange(curve.shape[1], device=curve.device)
    last = (lengths - 1)[:, None]  # [B, 1]
    low = curve.gather(1, last)
    span = curve[:, :1] - low  # [B, 1]
    constant = (span <= 0).squeeze(1)
    x = rank.to(curve.dtype) / last.clamp(min=1)
    y = (curve - low) / torch.where(span > 0, span, 1)
    return x, y, constant


def max_chord(curve: Curve, lengths: Lengths) -> Lengths:
    """Largest distance to the straight line through the curve's end points; a straight curve is kept whole.

    Args:
        curve: descending scores [B, N], entries beyond a row's length are ignored.
        lengths: [B] valid entries of each row.
    Returns:
        counts [B].
    """
    x, y, constant = _unit_curve(curve, lengths)
    inside = torch.arange(curve.shape[1], device=curve.device) < lengths[:, None]
    distance = (1 - x - y).abs().masked_fill(~inside, 0)  # vertical distance, proportional to the perpendicular one
    depth, rank = distance.max(dim=1)
    return torch.where(constant | (depth <= FLAT), lengths, rank + 1)


def kneedle(curve: Curve, lengths: Lengths, sensitivity: float = 1.0, no_knee: str = "keep_all") -> Lengths:
    """Kneedle (Satopaa et al. 2011) for convex decreasing curves, the first knee found from the left.

    The difference curve is the normalised, flipped curve minus the diagonal. A local maximum is a knee when the curve
    falls below that maximum minus `sensitivity` times the mean step in x before it reaches a local minimum. The curve's
    first point is an end, not a bend (our choice): a curve that starts flat or concave is not cut down to one token.
    On convex curves, which the method is made for, this is the `kneed` package's answer to the token.

    Args:
        curve: descending scores [B, N].
        lengths: [B] valid entries of each row.
        sensitivity: S of the paper, >= 0.
        no_knee: rows without a knee are kept whole (`keep_all`) or cut by `max_chord`. Our choice: the paper is silent.
    Returns:
        counts [B].
    """
    if sensitivity < 0:
        raise UserError(f"kneedle: sensitivity must be >= 0, got {sensitivity}")
    if no_knee not in ("keep_all", "max_chord"):
        raise UserError(f"kneedle: no_knee must be keep_all or max_chord, got {no_knee!r}")
    x, y, constant = _unit_curve(curve, lengths)
    rank = torch.arange(curve.shape[1], device=curve.device)
    last = (lengths - 1)[:, None]
    difference = 1 - y - x  # [B, N]
    before = torch.cat([difference[:, :1], difference[:, :-1]], dim=1)
    after = difference.gather(1, (rank + 1).minimum(last))  # the last valid entry is its own successor
    peak = (difference >= before) & (difference >= after) & (rank > 0)
    valley = (difference <= before) & (difference <= after)
    last_peak = torch.where(peak, rank, -1).cummax(1).values
    last_valley = torch.where(valley, rank, -1).cummax(1).values
    step = 1.0 / (lengths - 1).clamp(min=1).to(curve.dtype)  # [B] mean step in x
    threshold = difference.gather(1, last_peak.clamp(min=0)) - sensitivity * step[:, None]
    found = (last_peak > last_valley) & (after < threshold) & (rank < last)
    knee = last_peak.gather(1, found.int().argmax(dim=1, keepdim=True)).squeeze(1)
    missing = constant | ~found.any(dim=1)
    fallback = lengths if no_knee == "keep_all" else max_chord(curve, lengths)
    return torch.where(missing, fallback, knee + 1)


def l_method(curve: Curve, lengths: Lengths) -> Lengths:
    """L-method (Salvador and Chan 2004): the split whose two straight-line fits leave the least weighted RMSE.

    Rows with fewer than 4 entries (two lines need two points each) and constant rows are kept whole.
    """
    _, y, constant = _unit_curve(curve, lengths)
    size = curve.shape[1]
    rank = torch.arange(size, device=curve.device)
    inside = rank < lengths[:, None]
    x = rank.to(curve.dtype).expand_as(y)
    moments = torch.stack([torch.ones_like(y), x, y, x * x, x * y, y * y]) * inside  # [6, B, N]
    left = moments.cumsum(dim=2)
    right = left[:, :, -1:] - left

    def weighted_rmse(sums: Tensor) -> Tensor:
        """n * RMSE of the best line through the n points of each prefix (or suffix)."""
        n, sx, sy, sxx, sxy, syy = sums
        n = n.clamp(min=1)
        var_x, cov, var_y = sxx - sx * sx / n, sxy - sx * sy / n, syy - sy * sy / n
        squared = (var_y - torch.where(var_x > 0, cov * cov / torch.where(var_x > 0, var_x, 1), 0)).clamp(min=0)
        return (n * squared).sqrt()

    weighted = sum((weighted_rmse(sums) for sums in (left, right)), torch.zeros_like(y))
    count = rank + 1  # points left of the split
    splits = (count >= 2) & (count <= (lengths - 2)[:, None])
    best = weighted.masked_fill(~splits, torch.inf).argmin(dim=1) + 1
    return torch.where(constant | (lengths < 4), lengths, best)


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
    "fixed_ratio": fixed_ratio,
    "fixed_count": fixed_count,
}


def available_budgets() -> list[str]:
    """Names that `find_knee` takes as `method`."""
    return sorted(BUDGETS)


def budget_parameters(method: str) -> list[str]:
    """Names of the parameters a budget takes beside the curve."""
    if method not in BUDGETS:
        near = difflib.get_close_matches(method, BUDGETS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "choose one"
        raise UserError(f"unknown budget {method!r}: {hint} (available: {', '.join(available_budgets())})")
    return list(inspect.signature(BUDGETS[method]).parameters)[2:]


@torch.no_grad()
def find_knee(
    scores: Float[Tensor, "B ..."],
    method: str = "kneedle",
    lengths: Int64[Tensor, "L ..."] | None = None,
    *,
    min_tokens: int = 1,
    max_tokens: int | None = None,
    **params: object,
) -> Int64[Tensor, " B"]:
    """How many of the largest scores of each row to keep.

    Args:
        scores: [B, N] in any order, larger = keep. Any floating dtype; computed in float64.
        method: one of `available_budgets()`.
        lengths: [B] valid leading entries of each row, 1..N; None: all N.
        min_tokens, max_tokens: bounds on the count, within 1..length.
        params: the method's own parameters (see its function).
    Returns:
        counts [B], int64, each in 1..length.
    Raises:
        UserError: wrong shape, empty rows, NaN or infinite scores among the valid entries, unknown method or parameter.
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
    inside = torch.arange(size, device=scores.device) < lengths[:, None]
    wide = scores.to(torch.float64)
    if bool((~wide.isfinite() & inside).any()):
        row = int((~wide.isfinite() & inside).any(dim=1).int().argmax())
        raise UserError(f"scores row {row} holds NaN or infinite values; check the model's precision or the score")
    curve = wide.masked_fill(~inside, -torch.inf).sort(dim=1, descending=True).values
    curve = curve.masked_fill(~inside, 0)  # padding sorts last, and no budget may meet an infinity
    counts = BUDGETS[method](curve, lengths, **params)
    counts = counts.clamp(min=min_tokens)
    if max_tokens is not None:
        counts = counts.clamp(max=max_tokens)
    return counts.clamp(min=1).minimum(lengths)
