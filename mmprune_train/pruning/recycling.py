"""Recycling: what tokens dropped inside the LLM leave behind. Gradients flow through the states alone.

SparseVLM (Zhang et al. 2024, arXiv 2410.04417): the best of the dropped tokens are clustered by their states, and each
cluster's mean joins the sequence. The means take the places of the clusters' centres, which are dropped tokens.
"""

from __future__ import annotations

from typing import Annotated

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mmprune_train.components.declare import SMALL, Range, language_merge
from mmprune_train.packed.host import upload
from mmprune_train.packed.padding import pad, unpad
from mmprune_train.pruning.selections import top_mask
from mmprune_train.pruning.views import full_precision


@language_merge()
def recycle(
    hidden: Float[Tensor, "T D"],
    places: Int64[Tensor, " M"],
    row: Int64[Tensor, " M"],
    dropped: Bool[Tensor, " M"],
    scores: Float[Tensor, " M"],
    *,
    share: Annotated[float, Range(SMALL, 1, says=": a share of the dropped tokens")] = 0.3,
    size: Annotated[int, Range(1)] = 10,
    ranked: bool = False,
) -> tuple[Float[Tensor, "T D"], Bool[Tensor, " M"]]:
    """Cluster the best dropped tokens of each row and put the clusters' means in the places of the centres.

    Of n dropped tokens m = floor(share * n) + 1 are recycled, in floor(m / size) + 1 clusters; never more than there
    are. How many were dropped is not asked: tables are as wide as they can become.

    Args:
        hidden: [T, D] states of all tokens.
        places: [M] the tokens that could be dropped, on the host.
        row: [M] the row, from 0 and not falling, that each belongs to, on the host, none empty.
        dropped: [M] those that were.
        scores: [M]; the best are recycled.
        share: part of a row's dropped tokens that is recycled, best score first; at least one.
        size: tokens a cluster has on average.
        ranked: of the centres' places the first holds the mean around the best centre, and so on, as the means stand in
            the authors' code; else each has its own centre's.
    Returns:
        hidden with the means in place, and [M] which tokens became one.
    """
    groups, device = int(row[-1]) + 1, hidden.device
    gone, lengths = pad(dropped, row, groups)  # [G, W]
    most = int((lengths * share).floor().max()) + 1
    count = gone.sum(1)  # [G]
    taken = ((count * share).floor().long() + 1).minimum(count)
    counts = (taken // size + 1).minimum(taken)
    worth = pad(scores, row, groups)[0].masked_fill(~gone, -torch.inf)
    best = worth.sort(dim=1, descending=True, stable=True).indices[:, :most]  # [G, m]
    place = upload(pad(places, row, groups)[0], device).gather(1, best)
    points = hidden.index_select(0, place.flatten()).float().view(*place.shape, -1)  # [G, m, D]
    column = torch.arange(best.shape[1], device=device)
    real = column < taken[:, None]
    with full_precision(points):
        home, rank = density_peaks(points.detach(), taken, counts)
        members = (home[:, None] == column[:, None]) & real[:, None]  # [G, centre, member]
        means = members.float() @ points / members.sum(2, keepdim=True).clamp(min=1)
    centre = (home == column) & real
    outside = len(hidden)  # a row that is cut off again, for what is no centre
    target = torch.where(centre, place, outside)
    target = (target.sort(1).values.gather(1, rank) if ranked else target).flatten()
    longer = torch.cat([hidden, hidden.new_zeros(1, hidden.shape[1])])
    hidden = longer.index_copy(0, target, means.flatten(0, 1).to(hidden.dtype))[:-1]
    return hidden, unpad(torch.zeros_like(gone).scatter(1, best, centre), row)


@torch.no_grad()
def density_peaks(
    points: Float[Tensor, "G M D"], lengths: Int64[Tensor, " G"], counts: Int64[Tensor, " G"]
) -> tuple[Int64[Tensor, "G M"], Int64[Tensor, "G M"]]:
    """DPC-KNN (Du et al. 2016), as SparseVLM takes it over from TCFormer (arXiv 2204.08680).

    A point's density is exp of minus the mean squared distance to its `counts` nearest points, itself among them. The
    centres are the points with the largest product of density and distance to the nearest denser point; every other
    point joins the nearest centre. Of equally dense points the earlier counts as denser (theirs: noise decides).

    Args:
        points: [G, M, D].
        lengths: [G] valid leading points of each row.
        counts: [G] clusters, 1..length.
    Returns:
        [G, M] the centre of each point, as its index in the row, meaningless beyond a row's length; and [G, M] the
        points' ranks, centres first, the best of them at 0.
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
    order = (gap * density).masked_fill(~centre, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    home = apart.masked_fill(~centre[:, None], torch.inf).argmin(2)
    return torch.where(centre, place, home), order.argsort(1)
