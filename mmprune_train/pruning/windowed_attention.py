"""A stage-1 score that spreads the kept patches over the image: attention ranked inside windows of the grid."""

from __future__ import annotations

from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from mmprune_train.components.declare import Range, vision_score
from mmprune_train.pruning.views import VisionView
from mmprune_train.pruning.vision_scores import cls_attention


@vision_score(reads=("cls_query_keys", "grid"))
def windowed_attention(
    view: VisionView, *, window: Annotated[int, Range(1, 1024)] = 6, with_cls: bool = False
) -> Float[Tensor, "I N"]:
    """[I, N] window ** 2 - rank of a patch in its window of the grid by `cls_attention` + that attention.

    The local scan of VScan (Zhang et al. 2025, arXiv 2505.22654): the k largest of n windows are the k / n most
    attended patches of each, so none is left empty. It falls by steps, so it wants a budget that counts
    (`fixed_count`, `fixed_ratio`).

    Args:
        window: side of a window, patches; the last row and column of windows may be smaller.
        with_cls: as in `cls_attention`.
    """
    attention = cls_attention(view, with_cls=with_cls)
    rows, columns = view.grid
    place = torch.arange(rows * columns, device=attention.device)
    home = (place // columns // window) * -(-columns // window) + place % columns // window  # [N]
    by_attention = attention.sort(dim=1, descending=True, stable=True).indices
    grouped = home[by_attention].sort(dim=1, stable=True)
    order = by_attention.gather(1, grouped.indices)  # window by window, the most attended first
    first = torch.searchsorted(grouped.values, grouped.values)
    rank = torch.zeros_like(order).scatter(1, order, place - first)
    return window**2 - rank + attention
