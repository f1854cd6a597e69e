"""Knees: budgets that cut a descending curve where it bends. Every row of a batch at once, on its device.

The token at the bend is the last one kept, so a knee at rank k (0-based) keeps k + 1 tokens. A curve that does not bend
(constant, straight or too short) says nothing about where to cut and is kept whole.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mmprune_train.components.declare import Range, budget

Curve = Float[Tensor, "B N"]
Lengths = Int64[Tensor, " B"]

FLAT = 1e-9
"""A normalised curve that bends less than this has no bend."""


def valid_entries(curve: Curve, lengths: Lengths) -> Bool[Tensor, "B N"]:
    """[B, N] bool: entries within their row's length."""
    return torch.arange(curve.shape[1], device=curve.device) < lengths[:, None]


def first_largest(values: Float[Tensor, "B N"]) -> Lengths:
    """Rank of each row's largest entry; of entries that only rounding tells apart the first, to keep fewer tokens."""
    largest = values.max(dim=1, keepdim=True).values
    return (values >= largest - FLAT * largest.abs()).int().argmax(dim=1)


def unit_curve(curve: Curve, lengths: Lengths) -> tuple[Curve, Curve, Bool[Tensor, " B"]]:
    """Scale each row to the unit square: x [B, N], y [B, N] in 0..1, and which rows are constant [B]."""
    rank = torch.arange(curve.shape[1], device=curve.device)
    last = (lengths - 1)[:, None]  # [B, 1]
    low = curve.gather(1, last)
    span = curve[:, :1] - low  # [B, 1]
    constant = (span <= 0).squeeze(1)
    x = rank.to(curve.dtype) / last.clamp(min=1)
    y = (curve - low) / torch.where(span > 0, span, 1)
    return x, y, constant


@budget()
def max_chord(curve: Curve, lengths: Lengths) -> Lengths:
    """Largest distance to the straight line through the curve's end points; a straight curve is kept whole."""
    x, y, constant = unit_curve(curve, lengths)
    distance = (1 - x - y).abs()  # vertical, proportional to the perpendicular one
    distance = distance.masked_fill(~valid_entries(curve, lengths), 0)
    depth, rank = distance.max(dim=1)
    return torch.where(constant | (depth <= FLAT), lengths, rank + 1)


@budget(calibrated=("sensitivity", lambda longest: (0.0, 2.0 * longest)), default_for="knee.method")
def kneedle(
    curve: Curve,
    lengths: Lengths,
    *,
    sensitivity: Annotated[float, Range(0, 1e6)] = 1.0,
    no_knee: Literal["keep_all", "max_chord"] = "keep_all",
) -> Lengths:
    """Kneedle (Satopaa et al. 2011) for convex decreasing curves, the first knee found from the left.

    The difference curve is the normalised, flipped curve minus the diagonal. A local maximum is a knee when the curve
    falls below that maximum minus `sensitivity` times the mean step in x before it reaches a local minimum. The curve's
    first point is an end, not a bend (our choice): a curve that starts flat or concave is not cut down to one token.
    On convex curves, which the method is made for, this is the `kneed` package's answer to the token.

    Args:
        sensitivity: S of the paper; larger waits longer before it calls a bend a knee. No fall of the difference curve
            is larger than twice a row's length.
        no_knee: rows without a knee are kept whole (`keep_all`) or cut by `max_chord`. Our choice: the paper is silent.
    """
    x, y, constant = unit_curve(curve, lengths)
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


@budget()
def l_method(curve: Curve, lengths: Lengths) -> Lengths:
    """L-method (Salvador and Chan 2004): the split whose two straight-line fits leave the least weighted RMSE.

    Rows with fewer than 4 entries (two lines need two points each) and constant rows are kept whole.
    """
    _, y, constant = unit_curve(curve, lengths)
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


def _second_difference(y: Curve, lengths: Lengths) -> Curve:
    """y[k-1] - 2 y[k] + y[k+1] at each rank k [B, N]; 0 at the ends, which have one neighbour, and beyond."""
    rank = torch.arange(y.shape[1], device=y.device)
    middle = (rank > 0) & (rank < (lengths - 1)[:, None])
    return ((y.roll(1, 1) - y) - (y - y.roll(-1, 1))).masked_fill(~middle, 0)


@budget()
def menger(curve: Curve, lengths: Lengths) -> Lengths:
    """Largest Menger curvature (1 / radius of the circle through three points) over triples of neighbouring points.

    Computed on the curve scaled to the unit square, as a curvature depends on the units of its axes (Christopoulos 2014
    discusses both). It has no sign, so a concave corner counts as a convex one does. Three points are few: noise moves
    this knee more than those that see the whole curve. Rows of fewer than 3 entries are kept whole.
    """
    _, y, _ = unit_curve(curve, lengths)
    bend = _second_difference(y, lengths).abs()
    step = (1.0 / (lengths - 1).clamp(min=1).to(y.dtype))[:, None]  # [B, 1] between neighbours in x
    before, after = y.roll(1, 1) - y, y - y.roll(-1, 1)
    sides = before.hypot(step) * after.hypot(step) * (before + after).hypot(2 * step)
    curvature = 2 * step * bend / sides  # 4 * area of the triangle / product of its sides
    return torch.where(bend.amax(1) > FLAT, first_largest(curvature) + 1, lengths)


@budget()
def second_difference(curve: Curve, lengths: Lengths) -> Lengths:
    """The rank where the drop to the next score falls most below the drop before: largest second difference.

    Signed, so only convex bends count; a curve without one (straight, concave, fewer than 3 entries) is kept whole.
    """
    _, y, _ = unit_curve(curve, lengths)
    bend = _second_difference(y, lengths)
    return torch.where(bend.amax(1) > FLAT, first_largest(bend) + 1, lengths)
