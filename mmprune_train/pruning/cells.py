"""Downsampling of the patch grid: tokens that are means of its cells, whatever the image shows."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.functional import pad

from mmprune_train.components.declare import merge


@merge(makes=0)
def cell_means(
    features: Float[Tensor, "I N D"],
    kept: Bool[Tensor, "I N"],
    scores: Float[Tensor, "I N"],
    keys: Float[Tensor, "I N K"],
    grid: tuple[int, int] | None = None,
) -> tuple[Float[Tensor, "I N D"], Bool[Tensor, "I N"]]:
    """As many tokens as are kept, each the mean of one cell of the image: plain downsampling of the patch grid.

    Which patches are kept is not looked at, only how many. Where r x c of nearly the grid's shape are asked, this is
    adaptive average pooling to r x c; of another number the rows of cells, each as high, have c or c + 1 of them. A
    token stands at its cell's middle patch, the upper left one of several.

    Args:
        grid: rows and columns of patches; None: one row.
    """
    high, wide = grid or (1, kept.shape[1])
    count = kept.sum(1).clamp(min=1)[:, None]  # [I, 1]
    rows = (count * high / wide).sqrt().round().long()
    rows = rows.maximum(-(-count // wide)).minimum(count.clamp(max=high))
    cell = torch.arange(kept.shape[1], device=kept.device)  # real ones are the first `count`
    row = ((cell + 1) * rows - 1) // count
    first = row * count // rows
    top, bottom = _edges(row, rows, high)
    left, right = _edges(cell - first, (row + 1) * count // rows - first, wide)
    y, x = cell // wide, cell % wide
    inside = (top[..., None] <= y) & (y < bottom[..., None]) & (left[..., None] <= x) & (x < right[..., None])
    inside = inside & (cell < count)[..., None]  # [I, cell, patch]
    means = inside.to(features.dtype) @ features / inside.sum(2, keepdim=True).clamp(min=1).to(features.dtype)
    middle = (top + bottom - 1) // 2 * wide + (left + right - 1) // 2
    place = torch.where(cell < count, middle, kept.shape[1])  # what is no cell goes to a place that is cut off again
    changed = pad(features, (0, 0, 0, 1)).scatter(1, place[..., None].expand_as(means), means)
    return changed[:, :-1], pad(torch.zeros_like(kept), (0, 1)).scatter(1, place, True)[:, :-1]


def _edges(
    part: Int64[Tensor, "I N"], parts: Int64[Tensor, "I ..."], size: int
) -> tuple[Int64[Tensor, "I N"], Int64[Tensor, "I N"]]:
    """Where the i-th of some equal parts of a side begins, and ends: patches that it touches are its own."""
    return part * size // parts, -(-((part + 1) * size) // parts)
