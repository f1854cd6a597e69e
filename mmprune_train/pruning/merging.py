"""Merging: what the dropped patches leave behind in those that stay. Gradients flow through the features alone.

A merge takes features [I, N, D], the kept mask, scores and keys, and answers changed features and the mask with the
places of any token it made. A made token takes the place of a dropped patch and its index in the trace.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.functional import normalize

from mmprune_train.components.declare import Range, merge
from mmprune_train.pruning.distribution_budgets import lof
from mmprune_train.pruning.selections import top_mask

Features = Float[Tensor, "I N D"]
Mask = Bool[Tensor, "I N"]
Scores = Float[Tensor, "I N"]
Keys = Float[Tensor, "I N K"]


CENTRE_NEIGHBORS = 10
"""Neighbours of the local outlier factor that finds centres, as in Recoverable Compression's code."""


def _similarity(keys: Keys) -> Float[Tensor, "I N N"]:
    unit = normalize(keys.float(), dim=-1)
    return unit @ unit.transpose(1, 2)


def _sums(features: Features, home: Int64[Tensor, "I N"]) -> Float[Tensor, "I N D"]:
    """[I, N, D] what came together at each place, added in float32: many small parts in bf16 would be lost."""
    total = torch.zeros_like(features, dtype=torch.float32)
    return total.scatter_add(1, home[..., None].expand_as(features), features.float()).to(features.dtype)


@merge(makes=0)
def nearest(
    features: Features, kept: Mask, scores: Scores, keys: Keys, *, by: Literal["keys", "features"] = "keys"
) -> tuple[Features, Mask]:
    """Every dropped patch joins the kept patch that it is most similar to; a kept patch becomes the mean of itself and
    those that joined it (the plainest member of PruMerge's and ToMe's family; by features, VScan's: Zhang et al. 2025,
    arXiv 2505.22654).

    Args:
        by: the cosine of which is the similarity: the patches' keys, or what is merged itself.
    """
    alike = _similarity(keys if by == "keys" else features.detach())
    home = alike.masked_fill(~kept[:, None], -torch.inf).argmax(2)  # [I, N]
    own = torch.arange(kept.shape[1], device=kept.device)
    home = torch.where(kept, own, home)
    total = _sums(features, home)
    count = torch.zeros_like(home).scatter_add(1, home, torch.ones_like(home)).clamp(min=1)
    return total / count[..., None].to(features.dtype), kept


@merge(makes=1)
def mean_token(features: Features, kept: Mask, scores: Scores, keys: Keys) -> tuple[Features, Mask]:
    """The mean of the dropped patches rides along as one more token, in the place of the best-scored of them."""
    dropped = (~kept)[..., None].to(features.dtype)
    mean = (features * dropped).sum(1) / dropped.sum(1).clamp(min=1)
    return _with_extra(features, kept, scores, mean)


def _with_extra(
    features: Features,
    kept: Mask,
    scores: Scores,
    token: Float[Tensor, "I D"],
    wanted: Bool[Tensor, " I"] | None = None,
) -> tuple[Features, Mask]:
    """Put one made token in the place of each image's best-scored dropped patch; images kept whole get none, nor do
    those not `wanted`."""
    gets = ~kept.all(1) if wanted is None else ~kept.all(1) & wanted
    place = scores.masked_fill(kept, -torch.inf).argmax(1)
    here = torch.zeros_like(kept).scatter(1, place[:, None], gets[:, None])
    return torch.where(here[..., None], token[:, None].to(features.dtype), features), kept | here


@merge(weighs=True, makes=1)
def prumerge(
    features: Features, kept: Mask, scores: Scores, keys: Keys, *, count: Annotated[int, Range(1)] = 32
) -> tuple[Features, Mask]:
    """LLaVA-PruMerge (Shang et al. 2024, arXiv 2403.15388): to every kept patch the score-weighted sum of the
    `count` patches with the most similar keys is added, kept ones among them; one more token is the
    score-weighted sum of all dropped patches. Weights are the scores as they are (CLS attention), not renormalised.

    Args:
        count: neighbours that a kept patch takes in.
    """
    weights = _neighbour_weights(_similarity(keys), scores, count).masked_fill(~kept[..., None], 0)
    rest = (features * (scores.to(features.dtype) * ~kept)[..., None]).sum(1)
    return _with_extra(features + weights.to(features.dtype) @ features, kept, scores, rest)


def _neighbour_weights(affinity: Float[Tensor, "I N N"], scores: Scores, neighbours: int) -> Float[Tensor, "I N N"]:
    """[I, N, N] the scores of each patch's nearest others, 0 elsewhere; those at -inf are nobody's neighbours."""
    size = affinity.shape[1]
    own = torch.eye(size, dtype=torch.bool, device=affinity.device)
    near = affinity.masked_fill(own, -torch.inf).topk(min(neighbours, size - 1), dim=2)  # [I, N, k]
    weighed = scores[:, None].expand(-1, size, -1).gather(2, near.indices).masked_fill(near.values.isneginf(), 0)
    return torch.zeros_like(affinity, dtype=scores.dtype).scatter(2, near.indices, weighed)


@merge(weighs=True)
def centres(
    features: Features,
    kept: Mask,
    scores: Scores,
    keys: Keys,
    text: Scores | None = None,
    *,
    count: Annotated[int, Range(1)] = 32,
    share_of: Literal["kept", "width"] = "kept",
    keys_of: Literal["own", "renumbered"] = "own",
    joint: Annotated[int, Range(1)] = 768,
) -> tuple[Features, Mask]:
    """Recoverable Compression (Chen et al. 2024, arXiv 2409.01179): the best-scored dropped patches become
    centres, to each of which the score-weighted sum of its `count` nearest dropped patches is added; one more
    token is the score-weighted sum of the dropped patches that are no centres.

    Nearest by cosine of the keys plus 50 / sqrt(joint) times the neighbour's `text` score. There are as many centres as
    the share of outliers (LOF) among the dropped patches' scores makes of `share_of`, rounded down; none: nothing is
    made. Weights are the scores as they are (CLS attention).

    Args:
        text: [I, N] similarity to the question; None: keys alone.
        count: neighbours that a centre takes in.
        share_of: `kept`: the number of kept patches (our reading); `width`: that of a feature's numbers, as in the
            authors' code.
        keys_of: `own`: every patch has its key (our reading); `renumbered`: the j-th dropped patch has that of the
            image's j-th patch, as in the authors' code.
        joint: width of the space that images and texts share; that of ViT-L.
    """
    dropped = ~kept
    left = dropped.sum(1).clamp(min=1)  # [I]
    among = scores.masked_fill(kept, -torch.inf)
    curve = among.sort(dim=1, descending=True).values.nan_to_num(neginf=0).double()
    whole = kept.sum(1) if share_of == "kept" else features.shape[2]
    number = whole * lof(curve, left, neighbors=CENTRE_NEIGHBORS) // left
    centre = top_mask(among, number) & dropped
    if keys_of == "renumbered":
        place = (dropped.cumsum(1) - 1).clamp(min=0)
        keys = keys.gather(1, place[..., None].expand_as(keys))
    affinity = _similarity(keys)
    if text is not None:
        affinity = affinity + 50 * joint**-0.5 * text[:, None]
    weights = _neighbour_weights(affinity.masked_fill(kept[:, None], -torch.inf), scores, count)
    weights = weights.masked_fill(~centre[..., None], 0).to(features.dtype)
    rest = (features * (scores.to(features.dtype) * (dropped & ~centre))[..., None]).sum(1)
    return _with_extra(features + weights @ features, kept | centre, scores, rest, wanted=centre.any(1))


@merge(makes="count")
def contextual(
    features: Features, kept: Mask, scores: Scores, keys: Keys, heads: int = 1, *, count: Annotated[int, Range(1)] = 10
) -> tuple[Features, Mask]:
    """VisionZip (Yang et al. 2024, arXiv 2412.04467): of the dropped patches every s-th becomes a contextual token, to
    which the mean of the other dropped patches that are most similar to it is added, by the mean of the heads' keys.

    Args:
        heads: of the encoder, whose keys lie side by side.
        count: contextual tokens an image gets (or as many as it dropped).
    """
    size = kept.shape[1]
    raster = torch.arange(size, device=kept.device)
    dropped = ~kept
    left = dropped.sum(1)  # [I]
    number = left.clamp(max=count)
    step = (left // number.clamp(min=1)).clamp(min=1)
    place = dropped.cumsum(1) - 1  # [I, N] index among the dropped
    target = dropped & (place % step[:, None] == 0) & (place // step[:, None] < number[:, None])
    joins = dropped & ~target
    metric = keys.unflatten(2, (heads, -1)).float().mean(2)
    home = _similarity(metric).masked_fill(~target[:, None], -torch.inf).argmax(2)
    home = torch.where(joins, home, raster)
    moved = features * joins[..., None].to(features.dtype)
    total = _sums(moved, home)
    members = torch.zeros_like(home).scatter_add(1, home, joins.long()).clamp(min=1)
    mean = total / members[..., None].to(features.dtype)
    return torch.where(target[..., None], features + mean, features), kept | target
