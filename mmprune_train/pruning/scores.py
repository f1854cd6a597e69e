"""Scores: how much a token matters. Each is a function on tensors; larger = keep. Nothing here needs a gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mmprune_train.errors import UserError
from mmprune_train.pruning.packed import PackedSequence
from mmprune_train.pruning.selection import pad

CHUNK = 1 << 25
"""Most attention logits held at once, entries."""


def full_precision(like: Tensor) -> torch.autocast:
    """No autocast: a score in bf16 has 8 bits, which ties tokens and moves knees."""
    return torch.autocast(like.device.type, enabled=False)


@dataclass
class VisionView:
    """What a stage-1 score may look at. `I` images, `N` patches, `D` width, `H` heads of width `d`."""

    patches: Float[Tensor, "I N D"]
    """[I, N, D] hidden states of the patches at the feature layer."""
    cls: Float[Tensor, "I D"] | None
    """[I, D] hidden state of the CLS token at the feature layer, where the encoder has one."""
    cls_query_keys: Callable[[], tuple[Tensor, Tensor]] | None
    """Recomputes, in the layer that made the features, the CLS row's query [I, H, d], scaled, and the patches' keys
    [I, N, H, d]; None without CLS. One row: no N x N matrix is ever formed."""
    encoder: str = "this encoder"
    """Name for error messages."""


def _needs_cls(view: VisionView, score: str) -> None:
    if view.cls is None:
        raise UserError(
            f"pruner.vision.score={score} needs a CLS token and {view.encoder} has none; "
            "use pruner.vision.score=pooled_cosine (or random)"
        )


def cls_attention(view: VisionView) -> Float[Tensor, "I N"]:
    """[I, N] softmax over the patches of q_cls . k_patch / sqrt(d), mean over heads."""
    _needs_cls(view, "cls_attention")
    query, keys = view.cls_query_keys()  # type: ignore[misc]
    with full_precision(query):
        logits = torch.einsum("ihd,inhd->ihn", query.float(), keys.float())
    return logits.softmax(-1).mean(1)


def cls_cosine(view: VisionView) -> Float[Tensor, "I N"]:
    """[I, N] cosine between the CLS token and each patch at the feature layer."""
    _needs_cls(view, "cls_cosine")
    return torch.cosine_similarity(view.cls.float()[:, None], view.patches.float(), dim=-1)  # type: ignore[union-attr]


def pooled_cosine(view: VisionView) -> Float[Tensor, "I N"]:
    """[I, N] cosine between the mean patch and each patch: for encoders without CLS."""
    patches = view.patches.float()
    return torch.cosine_similarity(patches.mean(1, keepdim=True), patches, dim=-1)


def random_vision(view: VisionView) -> Float[Tensor, "I N"]:
    """[I, N] uniform noise from torch's generator: the baseline every score must beat."""
    return torch.rand(view.patches.shape[:2], device=view.patches.device)


VISION_SCORES: dict[str, Callable[[VisionView], Tensor]] = {
    "cls_attention": cls_attention,
    "cls_cosine": cls_cosine,
    "pooled_cosine": pooled_cosine,
    "random": random_vision,
}


@dataclass
class LanguageView:
    """What a stage-2 score may look at, before the layer that will see the short sequence."""

    sequence: PackedSequence
    hidden: Float[Tensor, "T D"]
    """[T, D] hidden states entering the layer."""
    query_keys: Callable[[Tensor], tuple[Tensor, Tensor]]
    """rows [R] -> queries [R, H, d] of those tokens, scaled, and keys [T, Hkv, d] of all: the layer's own norm,
    projections (biases, q/k norms, adapters) and rotary embedding."""
    group: Int64[Tensor, " T"]
    """[T] (sample, turn) group of each token, -1 where the token's group is not scored; non-decreasing elsewhere."""
    group_segment: Int64[Tensor, " G"]
    """[G] sample of each group."""
    raters: Int64[Tensor, " R"]
    """[R] tokens that vote, sorted by group."""
    closing: Int64[Tensor, " G"]
    """[G] the last prompt token of each group; votes alone for tokens that no rater can see."""


def _attention(
    view: LanguageView, rows: Int64[Tensor, " R"], row_group: Int64[Tensor, " R"], spare: Bool[Tensor, " R"]
) -> Float[Tensor, " T"]:
    """[T] mean over heads and over the rows of a token's group that see it, of the causal attention probability.

    `spare` [R] rows count only for tokens that no other row of the group can see. The softmax runs over every token of
    the sample that the row sees, as in the layer itself.
    """
    sequence, groups = view.sequence, len(view.group_segment)
    queries, keys = view.query_keys(rows)
    heads, kv_heads = queries.shape[1], keys.shape[1]
    lengths = sequence.lengths
    key_table, _ = pad(keys.float(), sequence.segment, sequence.samples)  # [B, L, Hkv, d]
    width = key_table.shape[1]
    query_table, votes = pad(queries.float().unflatten(1, (kv_heads, heads // kv_heads)), row_group, groups)
    place_table, _ = pad(sequence.within()[rows], row_group, groups)  # [G, R]
    spare_table, _ = pad(spare, row_group, groups)  # [G, R]
    column = torch.arange(width, device=keys.device)
    table = keys.new_zeros((groups, width), dtype=torch.float32)
    most_rows = query_table.shape[1]
    step = max(1, CHUNK // max(1, heads * most_rows * width))
    for start in range(0, groups, step):
        part = slice(start, start + step)
        segment = view.group_segment[part]
        real = torch.arange(most_rows, device=keys.device) < votes[part, None]  # [g, R]
        sees = (column <= place_table[part][..., None]) & (column < lengths[segment][:, None, None])  # [g, R, L]
        with full_precision(keys):
            logits = torch.einsum("grkmd,glkd->gkmrl", query_table[part], key_table[segment])
        chance = logits.masked_fill(~sees[:, None, None], -torch.inf).softmax(-1).mean((1, 2))  # [g, R, L]
        first = sees & (real & ~spare_table[part])[..., None]
        second = sees & (real & spare_table[part])[..., None]
        counted = torch.where(first.any(1, keepdim=True), first, second)
        table[part] = (chance * counted).sum(1) / counted.sum(1).clamp(min=1)
    chosen = view.group >= 0
    scores = keys.new_zeros(len(sequence), dtype=torch.float32)
    scores[chosen] = table[view.group[chosen], sequence.within()[chosen]]
    return scores


def text_attention(view: LanguageView) -> Float[Tensor, " T"]:
    """[T] attention of the turn's question text to each token, mean over heads and over the rows that see it."""
    rows = torch.cat([view.raters, view.closing])
    group = torch.cat([view.group[view.raters], torch.arange(len(view.closing), device=rows.device)])
    spare = torch.arange(len(rows), device=rows.device) >= len(view.raters)
    order = group.sort(stable=True).indices
    return _attention(view, rows[order], group[order], spare[order])


def last_token_attention(view: LanguageView) -> Float[Tensor, " T"]:
    """[T] attention of the last prompt token to each token, mean over heads (FastV's signal)."""
    group = torch.arange(len(view.closing), device=view.closing.device)
    return _attention(view, view.closing, group, torch.zeros_like(view.closing, dtype=torch.bool))


def text_cosine(view: LanguageView) -> Float[Tensor, " T"]:
    """[T] cosine between the mean question token of the turn and each token, on the states entering the layer."""
    hidden = torch.nn.functional.normalize(view.hidden.float(), dim=-1)
    votes = hidden.new_zeros((len(view.group_segment), hidden.shape[1]))
    votes.index_add_(0, view.group[view.raters], hidden[view.raters])
    votes = torch.nn.functional.normalize(votes, dim=-1)
    return (hidden * votes[view.group.clamp(min=0)]).sum(-1)


def random_language(view: LanguageView) -> Float[Tensor, " T"]:
    """[T] uniform noise from torch's generator."""
    return torch.rand(len(view.sequence), device=view.hidden.device)


LANGUAGE_SCORES: dict[str, Callable[[LanguageView], Tensor]] = {
    "text_attention": text_attention,
    "text_cosine": text_cosine,
    "last_token_attention": last_token_attention,
    "random": random_language,
}

__all__ = ["LANGUAGE_SCORES", "VISION_SCORES", "LanguageView", "VisionView"]
