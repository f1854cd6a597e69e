"""DART's way to drop tokens inside the LLM: a few pivots stay, and with each the tokens that are least like it.

Wen et al. 2025, "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More" (arXiv
2502.11494). No attention is read.
"""

from __future__ import annotations

from typing import Annotated

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.functional import normalize

from mmprune_train.components.declare import Range, language_score, language_selection
from mmprune_train.packed.host import fetch, take, upload
from mmprune_train.packed.padding import pad, unpad
from mmprune_train.packed.sequence import Kind, PackedSequence
from mmprune_train.pruning.selections import top_mask
from mmprune_train.pruning.views import LanguageView, given


@language_score(reads=("keys",))
def key_l1(view: LanguageView) -> Float[Tensor, " T"]:
    """[T] L1 norm of each token's key in the layer, over all key heads, turned by RoPE; the larger stays."""
    _, keys = view.query_keys(view.groups.closing)
    return keys.float().abs().sum((1, 2))


@language_selection(reads=("normed", "query_tokens", "closing_token"))
def unlike_pivots(
    scores: Float[Tensor, " T"],
    counts: Int64[Tensor, " G"],
    view: LanguageView,
    places: Int64[Tensor, " M"],
    row: Int64[Tensor, " M"],
    *,
    pivots: Annotated[int, Range(1, 1024)] = 4,
    text_pivots: Annotated[int, Range(0, 1024)] = 4,
) -> Bool[Tensor, " M"]:
    """The best-scored candidates of each row are pivots and stay; the best-scored text tokens behind its images, up to
    the answer, are pivots, too. One after the other takes, of what is left, the candidates of smallest cosine to it, on
    the states after the LLM's last norm; all take as many, the first ones one more where that does not come out even.

    The pivots' order is that of a Python set of their places in the sample, as in the authors' code. The host waits
    for it.

    Args:
        pivots: of the candidates.
        text_pivots: of the text.
    """
    rows, device = len(counts), scores.device
    table, lengths = pad(take(scores, places), row, rows)  # [G, W]
    place = upload(pad(places, row, rows)[0], device)
    inside = torch.arange(table.shape[1]) < lengths[:, None]
    text, owner = _text_behind(view.sequence, places, row)
    text_table, text_lengths = pad(take(scores, text), owner, rows)
    text_place = upload(pad(text, owner, rows)[0], device)

    own = _best(table, upload(lengths, device), counts.clamp(max=pivots), pivots)
    kept = torch.zeros((rows, table.shape[1] + 1), dtype=torch.bool, device=device)
    kept = kept.scatter(1, own.masked_fill(own < 0, table.shape[1]), True)[:, :-1]
    text_sizes = upload(text_lengths, device)
    other = _best(text_table, text_sizes, text_sizes.clamp(max=text_pivots), text_pivots)
    pivot = torch.cat([_at(place, own), _at(text_place, other)], 1)  # [G, P] places in the sequence, -1: none
    pivot = upload(_in_set_order(fetch(pivot), view.sequence), device)

    unit = normalize(given(view.normed).float(), dim=-1)
    likeness = torch.einsum("gpd,gwd->gpw", unit[pivot.clamp(min=0)], unit[place])
    free = upload(inside, device) & ~kept
    number = (pivot >= 0).sum(1).clamp(min=1)
    left = (counts - kept.sum(1)).clamp(min=0)
    for step in range(pivot.shape[1]):
        share = (left // number + (step < left % number)) * (step < number)
        taken = top_mask((-likeness[:, step]).masked_fill(~free, -torch.inf), share) & free
        kept, free = kept | taken, free & ~taken
    return unpad(kept, row)


def _text_behind(
    sequence: PackedSequence, places: Int64[Tensor, " M"], row: Int64[Tensor, " M"]
) -> tuple[Int64[Tensor, " S"], Int64[Tensor, " S"]]:
    """Of each row's turn the text behind its visual tokens and before its answer that is no candidate of that row: the
    tokens, and the row of each, not falling. All on the host."""
    turn = sequence.turn.clamp(min=1)
    key = sequence.segment * (int(turn.max()) + 1) + turn
    order = torch.arange(len(sequence))
    visual, answer = sequence.visual, sequence.kind == Kind.ANSWER
    size = int(key.max()) + 1
    last = torch.full((size,), -1).scatter_reduce(0, key[visual], order[visual], "amax")
    reply = torch.full((size,), len(order)).scatter_reduce(0, key[answer], order[answer], "amin")
    text = ~visual & (order > last[key]) & (order < reply[key])
    key_of = torch.zeros(int(row[-1]) + 1, dtype=torch.long).index_copy(0, row, key[places])
    mine = (key_of[:, None] == key) & text  # [G, T]
    mine[row, places] = False
    owner, tokens = mine.nonzero().unbind(1)
    return tokens, owner


def _best(
    table: Float[Tensor, "G W"], lengths: Int64[Tensor, " G"], counts: Int64[Tensor, " G"], most: int
) -> Int64[Tensor, "G P"]:
    """[G, P] columns of the `counts` best of each row, the best first, -1 behind the last; P at most `most`."""
    column = torch.arange(table.shape[1], device=table.device)
    ranked = table.masked_fill(column >= lengths[:, None], -torch.inf)
    best = ranked.sort(dim=1, descending=True, stable=True).indices[:, :most]
    return best.masked_fill(column[: best.shape[1]] >= counts.minimum(lengths)[:, None], -1)


def _at(places: Int64[Tensor, "G W"], columns: Int64[Tensor, "G P"]) -> Int64[Tensor, "G P"]:
    """The places in some columns, -1 where there is none."""
    return places.gather(1, columns.clamp(min=0)).masked_fill(columns < 0, -1)


def _in_set_order(pivot: Int64[Tensor, "G P"], sequence: PackedSequence) -> Int64[Tensor, "G P"]:
    """Each row's tokens as a Python set of their places in the sample lists them, -1 behind the last; on the host."""
    within, ordered = sequence.within(), torch.full_like(pivot, -1)
    for number, tokens in enumerate(pivot):
        tokens = tokens[tokens >= 0]
        token_at = dict(zip(within[tokens].tolist(), tokens.tolist(), strict=True))
        listed = [token_at[place] for place in set(within[tokens].tolist())]
        ordered[number, : len(listed)] = torch.tensor(listed, dtype=torch.long)
    return ordered
