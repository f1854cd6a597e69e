"""Recycling: what tokens dropped inside the LLM leave behind. Gradients flow through the states alone.

SparseVLM (Zhang et al. 2024, arXiv 2410.04417): the best of the dropped tokens are clustered by their states, and each
cluster's mean joins the sequence. It takes the place of the cluster's centre, a dropped token.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mmprune_train.pruning.scores import full_precision
from mmprune_train.pruning.selection import pad, top_mask


def recycle(
    hidden: Float[Tensor, "T D"],
    dropped: Int64[Tensor, " M"],
    row: Int64[Tensor, " M"],
    scores: Float[Tensor, " M"],
    share: float = 0.3,
    size: int = 10,
) -> tuple[Float[Tensor, "T D"], Int64[Tensor, " C"]]:
    """Cluster the best dropped tokens of each row and put the clusters' means in the places of their centres.

    Of n dropped tokens m = floor(share * n) + 1 are recycled, in floor(m / size) + 1 clusters; never more than there
    are.

    Args:
        hidden: [T, D] states of all tokens.
        dropped: [M] places of the dropped tokens. row: [M] the row, from 0, that each belongs to, none empty.
        scores: [M] of the dropped tokens; the best are recycled.
        share: part of a row's dropped tokens that is recycled. size: tokens a cluster has on average.
    Returns:
        hidden with the means in place, and the places [C] of the made tokens.
    """
    best = scores.sort(descending=True, stable=True).indices
    best = best[row[best].sort(stable=True).indices]  # by row, then by score
    dropped, row = dropped[best], row[best]
    lengths = torch.bincount(row)
    taken = ((lengths * share).floor().long() + 1).minimum(lengths)  # [G]
    counts = (taken // size + 1).minimum(taken)
    starts = lengths.cumsum(0) - lengths
    recycled = torch.arange(len(row), device=row.device) - starts[row] < taken[row]
    dropped, row = dropped[recycled], row[recycled]
    points, _ = pad(hidden[dropped].float(), row, len(lengths))  # [G, M, D]
    places, _ = pad(dropped, row, len(lengths))  # [G, M]
    column = torch.arange(points.shape[1], device=row.device)
    real = column < taken[:, None]
    with full_precision(points):
        home = density_peaks(points.detach(), taken, counts)
        members = (home[:, None] == column[:, None]) & real[:, None]  # [G, centre, member]
        means = members.float() @ points / members.sum(2, keepdim=True).clamp(min=1)
    centre = (home == column) & real
    made = places[centre]
    return hidden.index_copy(0, made, means[centre].to(hidden.dtype)), made


@torch.no_grad()
def density_peaks(
    points: Float[Tensor, "G M D"], lengths: Int64[Tensor, " G"], counts: Int64[Tensor, " G"]
) -> Int64[Tensor, "G M"]:
    """DPC-KNN (Du et al. 2016), as SparseVLM takes it over from TCFormer (arXiv 2204.08680).

    A point's density is exp of minus the mean squared distance to its `counts` nearest points, itself among them. The
    centres are the points with the largest product of density and distance to the nearest denser point; every other
    point joins the nearest centre. Of equally dense points the earlier counts as denser (theirs: noise decides).

    Args:
        points: [G, M, D]. lengths: [G] valid leading points of each row. counts: [G] clusters, 1..length.
    Returns:
        [G, M] the centre of each point, as its index in the row; meaningless beyond a row's length.
    """
    place = torch.arange(points.shape[1], device=points.device)
    real = place < lengths[:, None]  # [G, M]
    exact = "donot_use_mm_for_euclid_dist"  # the other way loses small distances to rounding
    apart = torch.cdist(points, points, compute_mode=exact) * points.shape[2] ** -0.5  # [G, M, M]
    apart = apart.masked_fill(~(real[:, None] & real[..., None]), torch.inf)
    nearest = apart.sort(2).values.masked_fill(place >= counts[:, None, None], 0)
    density = (-nearest.square().sum(2) / counts[:, None]).exp()
    denser = (density[:, None] > density[..., None]) | (
        (density[:, None] == density[..., None]) & (place < place[:, None])
    )
    widest = apart.masked_fill(apart.isinf(), 0).amax((1, 2))[:, None]
    gap = apart.masked_fill(~denser, torch.inf).amin(2).minimum(widest)
    centre = top_mask(gap * density, counts, lengths)
    home = apart.masked_fill(~centre[:, None], torch.inf).argmin(2)
    return torch.where(centre, place, home)
