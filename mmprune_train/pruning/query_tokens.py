"""Query tokens: which of a question's have something to say about the images."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmprune_train.packed.host import fetch, take, upload
from mmprune_train.packed.padding import pad, unpad
from mmprune_train.packed.sequence import PackedSequence
from mmprune_train.pruning.turns import question_text
from mmprune_train.pruning.views import full_precision

MARGIN = 1e-6
"""How much more than the average, relatively, is more: tokens that are all alike differ by rounding."""


def relevant_query_tokens(sequence: PackedSequence, hidden: Float[Tensor, "T D"]) -> Bool[Tensor, " T"]:
    """SparseVLM's choice of query tokens (Zhang et al. 2024, arXiv 2410.04417), from the states that enter the LLM.

    Each visual token spreads a softmax of plain dot products over a turn's question tokens; those that get more than
    the average one, in the mean over visual tokens, are relevant. The visual tokens are those of the sample up to that
    turn, so that no later image decides (our choice; the paper has one image). A turn in which none stands out, or that
    no image precedes, keeps all.

    Args:
        hidden: [T, D] states entering the LLM.
    Returns:
        [T] bool, a part of the question text; on the host, which waits for it.
    """
    relevant = question_text(sequence)
    texts, visual_places = relevant.nonzero().squeeze(1), sequence.visual.nonzero().squeeze(1)
    if not len(texts) or not len(visual_places):
        return relevant
    owner, viewer, samples = sequence.segment[texts], sequence.segment[visual_places], sequence.samples
    words, _ = pad(take(hidden, texts).float(), owner, samples)  # [B, R, D]
    images, _ = pad(take(hidden, visual_places).float(), viewer, samples)  # [B, V, D]
    turns, _ = pad(sequence.turn[visual_places].clamp(min=1), viewer, samples)
    with full_precision(hidden):
        logits = words @ images.transpose(1, 2)  # [B, R, V]
    logits = unpad(logits, owner)  # [texts, V]
    key = owner * (int(sequence.turn.max()) + 1) + sequence.turn[texts]
    asked, row, sizes = key.unique_consecutive(return_inverse=True, return_counts=True)
    first = sizes.cumsum(0) - sizes  # [G] the first text of each turn
    table, _ = pad(logits, row, len(asked))  # [G, R, V]
    real = upload(torch.arange(table.shape[1]) < sizes[:, None], hidden.device)  # [G, R]
    share = table.masked_fill(~real[..., None], -torch.inf).softmax(1)
    place = torch.arange(turns.shape[1])
    counts = torch.bincount(viewer, minlength=samples)
    shown = (turns[owner[first]] <= sequence.turn[texts[first], None]) & (place < counts[owner[first], None])  # [G, V]
    shown, sizes = upload(shown, hidden.device), upload(sizes, hidden.device)
    mean = (share * shown[:, None]).sum(2) / shown.sum(1, keepdim=True).clamp(min=1)  # [G, R]
    stands_out = (mean * sizes[:, None] > 1 + MARGIN) & real
    stands_out = stands_out | ~stands_out.any(1, keepdim=True)
    relevant[texts] = fetch(unpad(stands_out, row))
    return relevant
