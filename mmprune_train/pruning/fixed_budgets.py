"""Budgets whose counts are known before the scores."""

from __future__ import annotations

from typing import Annotated

import torch

from mmprune_train.components.declare import SMALL, Range, budget
from mmprune_train.pruning.knees import Curve, Lengths


def share_of_rows(lengths: Lengths, ratio: float) -> Lengths:
    """[B] a share of each row, to the nearest token."""
    return (lengths * ratio + 0.5).floor().long()


@budget(
    fixed="ratio",
    whole=("ratio", lambda ratio, size: (ratio * size + 0.5) // 1 >= size),
    calibrated=("ratio", lambda longest: (0.5 / longest, 1.0)),
)
def fixed_ratio(
    curve: Curve, lengths: Lengths, *, ratio: Annotated[float, Range(SMALL, 1, says=": a share of the tokens")] = 0.25
) -> Lengths:
    """The same share of every row, to the nearest token.

    Args:
        ratio: share of the row to keep.
    """
    return share_of_rows(lengths, ratio)


@budget(
    fixed="count",
    whole=("count", lambda count, size: count >= size),
    calibrated=("count", lambda longest: (1, longest)),
)
def fixed_count(curve: Curve, lengths: Lengths, *, count: Annotated[int, Range(1)] = 64) -> Lengths:
    """The same number of tokens for every row (or all it has).

    Args:
        count: tokens to keep.
    """
    return torch.full_like(lengths, count)
