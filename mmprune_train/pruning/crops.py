"""A selection that shares the count out among parts of the image."""

from __future__ import annotations

from typing import Annotated

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.functional import pad

from mmprune_train.components.declare import LARGE, Range, selection
from mmprune_train.pruning.selections import Counts, Features, Mask, Scores, top_mask

ADDED = 1e-6
"""What HoloV's code adds to what it divides by."""


@selection(reads=("features",), weighs=True)
def crops(
    scores: Scores,
    counts: Counts,
    features: Features,
    *,
    number: Annotated[int, Range(1)] = 16,
    weight: Annotated[float, Range(0, LARGE)] = 0.09,
) -> Mask:
    """HoloV (2025, arXiv 2510.02912): crops of the image share the count by their mean score and by how alike their
    patches are; of each crop the best scores stay.

    A crop is a run of the raster, of N / `number` patches. Its worth is its mean score times 1 + `weight` v / (v +
    1e-6), v the variance of a patch's cosines with the others of its crop, mean over the crop. Shares are rounded down,
    and the worthiest crops are given one more each until the count is met. What a crop is given beyond its patches goes
    to the best scores left anywhere (our choice).

    Args:
        number: of crops.
        weight: of the variance.
    """
    size = scores.shape[1]
    number = min(number, size)
    crop = torch.arange(number, device=scores.device)
    length = size // number + (crop < size % number).long()  # [C]: the first ones have one patch more
    column = torch.arange(-(-size // number), device=scores.device)
    real = column < length[:, None]  # [C, L]
    place = torch.where(real, (length.cumsum(0) - length)[:, None] + column, size)
    inside = pad(scores.float(), (0, 1))[:, place]  # [B, C, L], 0 where no patch is
    unit = features.float() / (features.float().norm(dim=-1, keepdim=True) + ADDED)
    varies = _variance(pad(unit, (0, 0, 0, 1))[:, place], real, length)
    mean = inside.sum(2) / length
    worth = torch.where(length > 1, 1000 * mean * (1 + weight * varies / (varies + ADDED)), mean)
    part = worth / (worth.sum(1, keepdim=True) + ADDED)
    given = (part * counts[:, None]).floor().long()  # [B, C]
    given = given + top_mask(part, counts - given.sum(1))
    best = inside.masked_fill(~real, -torch.inf).sort(dim=2, descending=True, stable=True).indices
    first = torch.zeros_like(best, dtype=torch.bool).scatter(2, best, column < given[..., None]) & real
    chosen = pad(torch.zeros_like(scores, dtype=torch.bool), (0, 1))
    chosen = chosen.scatter(1, place.flatten().expand(len(scores), -1), first.flatten(1))[:, :size]
    return chosen | top_mask(scores.masked_fill(chosen, -torch.inf), counts - chosen.sum(1))


def _variance(
    unit: Float[Tensor, "B C L D"], real: Bool[Tensor, "C L"], length: Int64[Tensor, " C"]
) -> Float[Tensor, "B C"]:
    """Of a patch's cosines with the others of its crop, mean over the crop. As HoloV's code has it: a patch's cosine
    with itself is among them as 0, and they are divided by the number of the others."""
    others = (length - 1).clamp(min=1)[:, None]  # [C, 1]
    itself = torch.eye(unit.shape[2], dtype=torch.bool, device=unit.device)
    cosine = (unit @ unit.transpose(2, 3)).masked_fill(itself, 0)  # [B, C, L, L]
    off = (cosine - cosine.sum(3, keepdim=True) / others[..., None]).masked_fill(~real[:, None], 0)
    return ((off.square().sum(3) / others).masked_fill(~real, 0)).sum(2) / length
