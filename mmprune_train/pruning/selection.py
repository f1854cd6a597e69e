"""Selection: which tokens a count keeps, and the padding that turns ragged groups into rows."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor


def top_mask(
    scores: Float[Tensor, "B N"], counts: Int64[Tensor, " B"], lengths: Int64[Tensor, " B"] | None = None
) -> Bool[Tensor, "B N"]:
    """Mark the `counts` largest scores of each row; of equal scores the earlier token stays.

    Args:
        scores: [B, N], larger = keep.
        counts: [B], 1..length.
        lengths: [B] valid leading entries; None: all N.
    Returns:
        bool [B, N].
    """
    size = scores.shape[1]
    rank = torch.arange(size, device=scores.device)
    if lengths is not None:
        scores = scores.masked_fill(rank >= lengths[:, None], -torch.inf)
    order = scores.sort(dim=1, descending=True, stable=True).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, order, rank < counts[:, None])


def columns(group: Int64[Tensor, " M"], groups: int) -> tuple[Int64[Tensor, " M"], Int64[Tensor, " G"]]:
    """Place each entry of a sorted ragged list in a padded table.

    Args:
        group: [M] group of each entry, non-decreasing, 0..groups-1.
        groups: number of groups.
    Returns:
        column [M] of each entry inside its group, and lengths [groups].
    """
    lengths = torch.bincount(group, minlength=groups)
    starts = lengths.cumsum(0) - lengths
    return torch.arange(len(group), device=group.device) - starts[group], lengths


def pad(
    values: Shaped[Tensor, "M ..."], group: Int64[Tensor, " M"], groups: int
) -> tuple[Shaped[Tensor, "G W ..."], Int64[Tensor, " G"]]:
    """Rows of a ragged list, padded with zeros: values [M, ...] -> [groups, longest, ...], and lengths [groups]."""
    column, lengths = columns(group, groups)
    width = int(lengths.max()) if len(values) else 0
    table = values.new_zeros((groups, width, *values.shape[1:]))
    table[group, column] = values
    return table, lengths
