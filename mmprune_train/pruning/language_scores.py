"""Stage-2 scores: how much a token matters inside the LLM. Larger = keep. Nothing here needs a gradient."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mmprune_train.components.declare import language_score
from mmprune_train.packed.host import take, upload
from mmprune_train.packed.padding import pad, unpad
from mmprune_train.pruning.views import LanguageView, full_precision

CHUNK = 1 << 25
"""Most attention logits held at once, entries."""


def _attention(
    view: LanguageView, rows: Int64[Tensor, " R"], group: Int64[Tensor, " R"], fallback: Bool[Tensor, " R"]
) -> Float[Tensor, " T"]:
    """[T] mean over heads and over the rows of a query group that see a token, of the causal attention probability.

    `rows`, `group` and `fallback` are on the host. `fallback` rows count only for tokens that no other row of the group
    can see. The softmax runs over every token of the sample that the row sees, as in the layer itself.
    """
    sequence, count = view.sequence, len(view.groups.segment)
    queries, keys = view.query_keys(rows)
    heads, kv_heads = queries.shape[1], keys.shape[1]
    key_table, _ = pad(keys.float(), sequence.segment, sequence.samples)  # [B, L, Hkv, d]
    width = key_table.shape[1]
    query_table, sizes = pad(queries.float().unflatten(1, (kv_heads, heads // kv_heads)), group, count)
    most_rows = query_table.shape[1]
    place_table, _ = pad(sequence.within()[rows], group, count)  # [G, R]
    fallback_table, _ = pad(fallback, group, count)
    real_table = torch.arange(most_rows) < sizes[:, None]
    limit = (place_table + 1).minimum(sequence.lengths[view.groups.segment][:, None])  # [G, R] tokens that a row sees
    first_table, second_table = real_table & ~fallback_table, real_table & fallback_table
    samples, limits, firsts, seconds = (
        upload(part, keys.device) for part in (view.groups.segment, limit, first_table, second_table)
    )
    column = torch.arange(width, device=keys.device)
    table = keys.new_zeros((count, width), dtype=torch.float32)
    step = max(1, CHUNK // max(1, heads * most_rows * width))
    for start in range(0, count, step):
        part = slice(start, start + step)
        sees = column < limits[part][..., None]  # [g, R, L]
        with full_precision(keys):
            logits = torch.einsum("grkmd,glkd->gkmrl", query_table[part], key_table[samples[part]])
        chance = logits.masked_fill(~sees[:, None, None], -torch.inf).softmax(-1).mean((1, 2))  # [g, R, L]
        first, second = sees & firsts[part][..., None], sees & seconds[part][..., None]
        counted = torch.where(first.any(1, keepdim=True), first, second)
        table[part] = (chance * counted).sum(1) / counted.sum(1).clamp(min=1)
    return view.groups.combine(sequence, table)


@language_score(reads=("keys", "query_tokens"), default_for="pruner.language.score")
def text_attention(view: LanguageView) -> Float[Tensor, " T"]:
    """[T] attention of the turn's question text to each token, mean over heads and over the rows that see it."""
    groups = view.groups
    rows = torch.cat([groups.tokens, groups.closing])
    group = torch.cat([groups.group, torch.arange(len(groups.closing))])
    fallback = torch.arange(len(rows)) >= len(groups.tokens)
    order = group.sort(stable=True).indices
    return _attention(view, rows[order], group[order], fallback[order])


@language_score(reads=("keys", "closing_token"))
def last_token_attention(view: LanguageView) -> Float[Tensor, " T"]:
    """[T] attention of the last prompt token to each token, mean over heads (FastV's and PyramidDrop's score)."""
    closing = view.groups.closing
    return _attention(view, closing, torch.arange(len(closing)), torch.zeros_like(closing, dtype=torch.bool))


@language_score(reads=("hidden", "query_tokens"), signed=True)
def text_cosine(view: LanguageView) -> Float[Tensor, " T"]:
    """[T] cosine between the mean question token of the turn and each token, on the states entering the layer."""
    sequence, groups = view.sequence, view.groups
    hidden = torch.nn.functional.normalize(view.hidden.float(), dim=-1)
    queries = hidden.new_zeros((len(groups.segment), hidden.shape[1]))
    queries.index_add_(0, upload(groups.group, hidden.device), take(hidden, groups.tokens))
    queries, _ = pad(torch.nn.functional.normalize(queries, dim=-1), groups.segment, sequence.samples)  # [B, turns, D]
    states, _ = pad(hidden, sequence.segment, sequence.samples)  # [B, L, D]
    with full_precision(hidden):
        table = queries @ states.transpose(1, 2)  # [B, turns, L]
    return groups.combine(sequence, unpad(table, groups.segment))


@language_score(reads=("keys",), signed=True)
def key_norm(view: LanguageView) -> Float[Tensor, " T"]:
    """[T] minus the L2 norm of each token's key in the layer, mean over key heads.

    Keys of small norm draw much attention (Devoto et al. 2024, arXiv 2406.11430), so the smaller norm stays. RoPE turns
    keys and leaves their norm, so it does not matter that these are turned. The paper drops cached keys head by head;
    one number a token is our choice. No text is looked at.
    """
    _, keys = view.query_keys(view.groups.closing)
    return -keys.float().norm(dim=-1).mean(-1)


@language_score(name="random", draws=True)
def random_language(view: LanguageView) -> Float[Tensor, " T"]:
    """[T] uniform noise from torch's generator."""
    return torch.rand(len(view.sequence), device=view.hidden.device)
