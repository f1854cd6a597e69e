"""Stage-1 scores: how much a patch matters. Larger = keep. Nothing here needs a gradient."""

from __future__ import annotations

from functools import cache

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mmprune_train.components.declare import vision_score
from mmprune_train.packed.host import upload
from mmprune_train.pruning.views import VisionView, full_precision, given


def _row_attention(query: Float[Tensor, "I D"], keys: Float[Tensor, "I K D"], heads: int) -> Float[Tensor, "I K"]:
    """[I, K] softmax over the keys of q . k / sqrt(d) of one query row an image, mean over heads of width d."""
    query = query.float().unflatten(-1, (heads, -1))
    with full_precision(query):
        logits = torch.einsum("ihd,inhd->ihn", query, keys.float().unflatten(-1, (heads, -1)))
    return (logits * query.shape[-1] ** -0.5).softmax(-1).mean(1)


@vision_score(reads=("cls_query_keys",), default_for="pruner.vision.score")
def cls_attention(view: VisionView, *, with_cls: bool = False) -> Float[Tensor, "I N"]:
    """[I, N] softmax over the patches of q_cls . k_patch / sqrt(d), mean over heads.

    Args:
        with_cls: CLS is in the softmax, as in the block itself, so that a head that attends to CLS says less.
    """
    query, keys = given(view.cls_query_keys)()
    if with_cls:
        return _row_attention(query, keys, view.heads)[:, 1:]
    return _row_attention(query, keys[:, 1:], view.heads)


@vision_score(reads=("cls_query_keys",))
def cls_attention_wide(view: VisionView) -> Float[Tensor, "I N"]:
    """[I, N] patches' part of the softmax over CLS and patches of q_cls . k / sqrt(D), D the full width.

    LLaVA-PruMerge's score (Shang et al. 2024, arXiv 2403.15388): the heads are not split. It takes the last block.
    """
    query, keys = given(view.cls_query_keys)()
    return _row_attention(query, keys, heads=1)[:, 1:]


@vision_score(reads=("patches", "cls"), signed=True)
def cls_cosine(view: VisionView) -> Float[Tensor, "I N"]:
    """[I, N] cosine between the CLS token and each patch at the feature layer."""
    return torch.cosine_similarity(given(view.cls).float()[:, None], view.patches.float(), dim=-1)


@vision_score(reads=("probe_query_keys",))
def map_attention(view: VisionView) -> Float[Tensor, "I N"]:
    """[I, N] attention of SigLIP's pooling probe to each patch, mean over heads.

    The multi-head attention pooling head (Zhai et al. 2023, arXiv 2303.15343) is where SigLIP sums up an image, as CLIP
    does in its CLS token. It sits behind the last layer and its norm, so the score is taken there and not at the
    feature layer: the remaining layers run, without gradients, when this score is chosen and only then.
    """
    query, keys = given(view.probe_query_keys)()
    return _row_attention(query, keys, view.heads)


@vision_score(signed=True)
def pooled_cosine(view: VisionView) -> Float[Tensor, "I N"]:
    """[I, N] cosine between the mean patch and each patch: for encoders without CLS."""
    patches = view.patches.float()
    return torch.cosine_similarity(patches.mean(1, keepdim=True), patches, dim=-1)


@vision_score()
def feature_norm(view: VisionView) -> Float[Tensor, "I N"]:
    """[I, N] L2 norm of each patch at the feature layer.

    Large norms mark patches in which an encoder stores something about the whole image (Darcet et al. 2023, arXiv
    2309.16588); that such patches should stay is our choice.
    """
    return view.patches.float().norm(dim=-1)


def _text_cosine(view: VisionView, normed: bool) -> Float[Tensor, "I N"]:
    patches, question = given(view.question)(normed)
    return torch.cosine_similarity(patches.float(), question.float()[:, None], dim=-1)


@vision_score(reads=("question",), signed=True, default_for="pruner.vision.recover.score")
def text_similarity(view: VisionView) -> Float[Tensor, "I N"]:
    """[I, N] cosine of each patch and the question in CLIP's joint space (Radford et al. 2021, arXiv 2103.00020).

    Patches go the way that CLIP trained for CLS alone: its last norm and its projection, from the chosen block's output
    (the feature layer). An image without a question has 0 everywhere.
    """
    return _text_cosine(view, normed=True)


@vision_score(reads=("question",), signed=True)
def text_similarity_bare(view: VisionView) -> Float[Tensor, "I N"]:
    """[I, N] the same without the last norm: Recoverable Compression's score (Chen et al. 2024, arXiv 2409.01179),
    there from the last block's output."""
    return _text_cosine(view, normed=False)


@vision_score(reads=("question",), signed=True)
def text_dissimilarity(view: VisionView) -> Float[Tensor, "I N"]:
    """[I, N] minus `text_similarity`: CDPruner's relevance (Zhang et al. 2025, arXiv 2506.10967)."""
    return -_text_cosine(view, normed=True)


@vision_score(reads=("grid",))
def uniform_grid(view: VisionView) -> Float[Tensor, "I N"]:
    """[I, N] a fixed order, whatever the image: the k largest, for any k, are spread evenly over the grid.

    A baseline: what does looking at the image add? The scores fall by equal steps and have no knee, so it needs a
    budget that counts (`fixed_ratio`, `fixed_count`); `kneedle` keeps such a curve whole.
    """
    order = upload(even_order(*view.grid), view.patches.device)
    return (1 - order / len(order)).expand(len(view.patches), -1)


@cache
def even_order(rows: int, columns: int) -> Int64[Tensor, " N"]:
    """[N] rank of each cell of a grid, in raster order, such that every first k cells are spread evenly.

    Cells are ranked by when Sobol's two-dimensional sequence (Sobol 1967) first meets them. With `side` = 2^b at least
    as large as the grid, its first 4^b points meet every square of a side x side raster once, and so every cell. The
    bits 0101.. that are added without carry (which keeps that property) put the first points inside, not in the corner.
    """
    bits = (max(rows, columns) - 1).bit_length()
    side = 1 << bits
    points = (torch.quasirandom.SobolEngine(2).draw(side**2) * side).long() ^ (side // 3)  # [4^b, 2]
    cell = (points[:, 0] * rows // side) * columns + points[:, 1] * columns // side
    met = torch.full((rows * columns,), len(cell)).scatter_reduce(0, cell, torch.arange(len(cell)), "amin")
    return met.argsort().argsort()


@vision_score(name="random", reads=(), draws=True)
def random_vision(view: VisionView) -> Float[Tensor, "I N"]:
    """[I, N] uniform noise from torch's generator: the baseline every score must beat."""
    return torch.rand(view.patches.shape[:2], device=view.patches.device)
