"""Scores: how much a token matters. Each is a function on tensors; larger = keep. Nothing here needs a gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mmprune_train.errors import UserError
from mmprune_train.packed.host import take, upload
from mmprune_train.packed.padding import pad, unpad
from mmprune_train.packed.sequence import PackedSequence
from mmprune_train.pruning.turns import Voters

CHUNK = 1 << 25
"""Most attention logits held at once, entries."""


def full_precision(like: Tensor) -> torch.autocast:
    """No autocast: a score in bf16 has 8 bits, which ties tokens and moves knees."""
    return torch.autocast(like.device.type, enabled=False)


@dataclass
class VisionView:
    """What a stage-1 score may look at. `I` images, `N` patches, `D` width, `H` heads of width `d`.

    The callables compute when called, so that a score pays for what it reads alone. Each gives one query row an image:
    no N x N matrix is ever formed.
    """

    patches: Float[Tensor, "I N D"]
    """[I, N, D] hidden states of the patches at the feature layer, in raster order."""
    grid: tuple[int, int]
    """Rows and columns of patches; N is their product."""
    patch_keys: Callable[[], Tensor]
    """Recomputes the patches' keys [I, N, D] in the chosen block, all heads side by side."""
    cls: Float[Tensor, "I D"] | None = None
    """[I, D] hidden state of the CLS token at the feature layer, where the encoder has one."""
    cls_query_keys: Callable[[], tuple[Tensor, Tensor]] | None = None
    """Recomputes, in the chosen block, the CLS row's query [I, D] and the keys [I, 1 + N, D] of CLS and patches, all
    heads side by side and unscaled; None without CLS."""
    probe_query_keys: Callable[[], tuple[Tensor, Tensor]] | None = None
    """Runs the layers after the feature layer and gives the attention pooling head's query [I, D] and the patches'
    keys [I, N, D], as above; None without such a head."""
    block_output: Callable[[], Tensor] | None = None
    """The patches [I, N, D] as the chosen block puts them out; None: not known."""
    question: Callable[[bool], tuple[Tensor, Tensor]] | None = None
    """Puts patches [I, N, E] and the image's question [I, E] where CLIP compares images with texts; the argument says
    whether the encoder's last norm comes before the projection. An image without a question has zeros for one. None
    without a text tower."""
    asked: Bool[Tensor, " I"] | None = None
    """[I] which images have a question, where one is read."""
    heads: int = 1
    """H, of the encoder's attention."""
    encoder: str = "this encoder"
    """Name for error messages."""

    def at(self, rows: Int64[Tensor, " P"]) -> VisionView:
        """The view of images `rows`, each as often as it is named."""
        return replace(
            self,
            patches=self.patches[rows],
            cls=None if self.cls is None else self.cls[rows],
            patch_keys=partial(_rows_of, self.patch_keys, rows),
            cls_query_keys=None if self.cls_query_keys is None else partial(_rows_of, self.cls_query_keys, rows),
            probe_query_keys=None if self.probe_query_keys is None else partial(_rows_of, self.probe_query_keys, rows),
            block_output=None if self.block_output is None else partial(_rows_of, self.block_output, rows),
            question=None if self.question is None else partial(_rows_of, self.question, rows),
            asked=None if self.asked is None else self.asked[rows],
        )


def _rows_of(compute: Callable[..., Any], rows: Tensor, *arguments: Any) -> Any:
    """Rows of the tensor, or of each tensor, that a view's callable gives."""
    found = compute(*arguments)
    return tuple(tensor[rows] for tensor in found) if isinstance(found, tuple) else found[rows]


NEEDS: dict[str, tuple[str, str]] = {
    "cls_attention": ("cls_query_keys", "a CLS token"),
    "cls_attention_wide": ("cls_query_keys", "a CLS token"),
    "cls_cosine": ("cls", "a CLS token"),
    "map_attention": ("probe_query_keys", "an attention pooling head"),
    "text_similarity": ("question", "a CLIP text tower"),
    "text_similarity_bare": ("question", "a CLIP text tower"),
    "text_dissimilarity": ("question", "a CLIP text tower"),
}
"""Scores that not every encoder can give: the field of the view that they read, and what that is."""


def possible_scores(view: VisionView) -> list[str]:
    """Names of the scores that an encoder with this view can give."""
    return [name for name in VISION_SCORES if name not in NEEDS or getattr(view, NEEDS[name][0]) is not None]


def _required(view: VisionView, score: str) -> Any:
    """What the score reads of the view; UserError where the encoder has none."""
    field, part = NEEDS[score]
    if (found := getattr(view, field)) is None:
        raise UserError(
            f"pruner.vision.score={score} needs {part}, which {view.encoder} has not; "
            f"set pruner.vision.score to one that it can give: {', '.join(possible_scores(view))}"
        )
    return found


def _row_attention(query: Float[Tensor, "I D"], keys: Float[Tensor, "I K D"], heads: int) -> Float[Tensor, "I K"]:
    """[I, K] softmax over the keys of q . k / sqrt(d) of one query row an image, mean over heads of width d."""
    query = query.float().unflatten(-1, (heads, -1))
    with full_precision(query):
        logits = torch.einsum("ihd,inhd->ihn", query, keys.float().unflatten(-1, (heads, -1)))
    return (logits * query.shape[-1] ** -0.5).softmax(-1).mean(1)


def cls_attention(view: VisionView) -> Float[Tensor, "I N"]:
    """[I, N] softmax over the patches of q_cls . k_patch / sqrt(d), mean over heads."""
    query, keys = _required(view, "cls_attention")()
    return _row_attention(query, keys[:, 1:], view.heads)


def cls_attention_wide(view: VisionView) -> Float[Tensor, "I N"]:
    """[I, N] patches' part of the softmax over CLS and patches of q_cls . k / sqrt(D), D the full width.

    LLaVA-PruMerge's signal (Shang et al. 2024, arXiv 2403.15388): the heads are not split. It takes the last block.
    """
    query, keys = _required(view, "cls_attention_wide")()
    return _row_attention(query, keys, heads=1)[:, 1:]


def cls_cosine(view: VisionView) -> Float[Tensor, "I N"]:
    """[I, N] cosine between the CLS token and each patch at the feature layer."""
    cls = _required(view, "cls_cosine")
    return torch.cosine_similarity(cls.float()[:, None], view.patches.float(), dim=-1)


def map_attention(view: VisionView) -> Float[Tensor, "I N"]:
    """[I, N] attention of SigLIP's pooling probe to each patch, mean over heads.

    The multi-head attention pooling head (Zhai et al. 2023, arXiv 2303.15343) is where SigLIP sums up an image, as CLIP
    does in its CLS token. It sits behind the last layer and its norm, so the score is taken there and not at the
    feature layer: the remaining layers run, without gradients, when this score is chosen and only then.
    """
    query, keys = _required(view, "map_attention")()
    return _row_attention(query, keys, view.heads)


def _text_cosine(view: VisionView, score: str, normed: bool) -> Float[Tensor, "I N"]:
    patches, question = _required(view, score)(normed)
    return torch.cosine_similarity(patches.float(), question.float()[:, None], dim=-1)


def text_similarity(view: VisionView) -> Float[Tensor, "I N"]:
    """[I, N] cosine of each patch and the question in CLIP's joint space (Radford et al. 2021, arXiv 2103.00020).

    Patches go the way that CLIP trained for CLS alone: its last norm and its projection, from the chosen block's output
    (the feature layer). An image without a question has 0 everywhere.
    """
    return _text_cosine(view, "text_similarity", normed=True)


def text_similarity_bare(view: VisionView) -> Float[Tensor, "I N"]:
    """[I, N] the same without the last norm: Recoverable Compression's signal (Chen et al. 2024, arXiv 2409.01179),
    there from the last block's output."""
    return _text_cosine(view, "text_similarity_bare", normed=False)


def text_dissimilarity(view: VisionView) -> Float[Tensor, "I N"]:
    """[I, N] minus `text_similarity`: CDPruner's relevance (Zhang et al. 2025, arXiv 2506.10967)."""
    return -_text_cosine(view, "text_dissimilarity", normed=True)


def pooled_cosine(view: VisionView) -> Float[Tensor, "I N"]:
    """[I, N] cosine between the mean patch and each patch: for encoders without CLS."""
    patches = view.patches.float()
    return torch.cosine_similarity(patches.mean(1, keepdim=True), patches, dim=-1)


def feature_norm(view: VisionView) -> Float[Tensor, "I N"]:
    """[I, N] L2 norm of each patch at the feature layer.

    Large norms mark patches in which an encoder stores something about the whole image (Darcet et al. 2023, arXiv
    2309.16588); that such patches should stay is our choice.
    """
    return view.patches.float().norm(dim=-1)


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


def random_vision(view: VisionView) -> Float[Tensor, "I N"]:
    """[I, N] uniform noise from torch's generator: the baseline every score must beat."""
    return torch.rand(view.patches.shape[:2], device=view.patches.device)


VISION_SCORES: dict[str, Callable[[VisionView], Tensor]] = {
    "cls_attention": cls_attention,
    "cls_attention_wide": cls_attention_wide,
    "cls_cosine": cls_cosine,
    "map_attention": map_attention,
    "pooled_cosine": pooled_cosine,
    "feature_norm": feature_norm,
    "text_similarity": text_similarity,
    "text_similarity_bare": text_similarity_bare,
    "text_dissimilarity": text_dissimilarity,
    "uniform_grid": uniform_grid,
    "random": random_vision,
}


@dataclass
class LanguageView:
    """What a stage-2 score may look at, before the layer that will see the short sequence."""

    sequence: PackedSequence
    """On the host; `packed.host` has what brings its fields, and rows numbered by them, to the states' device."""
    hidden: Float[Tensor, "T D"]
    """[T, D] hidden states entering the layer."""
    query_keys: Callable[[Tensor], tuple[Tensor, Tensor]]
    """rows [R], on the host -> queries [R, H, d] of those tokens, scaled, and keys [T, Hkv, d] of all: the layer's own
    norm, projections (biases, q/k norms, adapters) and rotary embedding."""
    voters: Voters
    """Who votes, on the host. A score that nobody votes in reads it not."""


def _attention(
    view: LanguageView, rows: Int64[Tensor, " R"], ballot: Int64[Tensor, " R"], spare: Bool[Tensor, " R"]
) -> Float[Tensor, " T"]:
    """[T] mean over heads and over the rows of a ballot that see a token, of the causal attention probability.

    `rows`, `ballot` and `spare` are on the host. `spare` [R] rows count only for tokens that no other row of the ballot
    can see. The softmax runs over every token of
    the sample that the row sees, as in the layer itself.
    """
    sequence, groups = view.sequence, len(view.voters.segment)
    queries, keys = view.query_keys(rows)
    heads, kv_heads = queries.shape[1], keys.shape[1]
    key_table, _ = pad(keys.float(), sequence.segment, sequence.samples)  # [B, L, Hkv, d]
    width = key_table.shape[1]
    query_table, votes = pad(queries.float().unflatten(1, (kv_heads, heads // kv_heads)), ballot, groups)
    most_rows = query_table.shape[1]
    place_table, _ = pad(sequence.within()[rows], ballot, groups)  # [G, R]
    spare_table, _ = pad(spare, ballot, groups)
    real_table = torch.arange(most_rows) < votes[:, None]
    limit = (place_table + 1).minimum(sequence.lengths[view.voters.segment][:, None])  # [G, R] tokens that a row sees
    first_table, second_table = real_table & ~spare_table, real_table & spare_table
    samples, limits, firsts, seconds = (
        upload(part, keys.device) for part in (view.voters.segment, limit, first_table, second_table)
    )
    column = torch.arange(width, device=keys.device)
    table = keys.new_zeros((groups, width), dtype=torch.float32)
    step = max(1, CHUNK // max(1, heads * most_rows * width))
    for start in range(0, groups, step):
        part = slice(start, start + step)
        sees = column < limits[part][..., None]  # [g, R, L]
        with full_precision(keys):
            logits = torch.einsum("grkmd,glkd->gkmrl", query_table[part], key_table[samples[part]])
        chance = logits.masked_fill(~sees[:, None, None], -torch.inf).softmax(-1).mean((1, 2))  # [g, R, L]
        first, second = sees & firsts[part][..., None], sees & seconds[part][..., None]
        counted = torch.where(first.any(1, keepdim=True), first, second)
        table[part] = (chance * counted).sum(1) / counted.sum(1).clamp(min=1)
    return view.voters.count(sequence, table)


def text_attention(view: LanguageView) -> Float[Tensor, " T"]:
    """[T] attention of the turn's question text to each token, mean over heads and over the rows that see it."""
    voters = view.voters
    rows = torch.cat([voters.raters, voters.closing])
    ballot = torch.cat([voters.ballot, torch.arange(len(voters.closing))])
    spare = torch.arange(len(rows)) >= len(voters.raters)
    order = ballot.sort(stable=True).indices
    return _attention(view, rows[order], ballot[order], spare[order])


def last_token_attention(view: LanguageView) -> Float[Tensor, " T"]:
    """[T] attention of the last prompt token to each token, mean over heads (FastV's and PyramidDrop's signal)."""
    closing = view.voters.closing
    ballot = torch.arange(len(closing))
    return _attention(view, closing, ballot, torch.zeros_like(closing, dtype=torch.bool))


def text_cosine(view: LanguageView) -> Float[Tensor, " T"]:
    """[T] cosine between the mean question token of the turn and each token, on the states entering the layer."""
    sequence, voters = view.sequence, view.voters
    hidden = torch.nn.functional.normalize(view.hidden.float(), dim=-1)
    votes = hidden.new_zeros((len(voters.segment), hidden.shape[1]))
    votes.index_add_(0, upload(voters.ballot, hidden.device), take(hidden, voters.raters))
    votes, _ = pad(torch.nn.functional.normalize(votes, dim=-1), voters.segment, sequence.samples)  # [B, turns, D]
    states, _ = pad(hidden, sequence.segment, sequence.samples)  # [B, L, D]
    with full_precision(hidden):
        table = votes @ states.transpose(1, 2)  # [B, turns, L]
    return voters.count(sequence, unpad(table, voters.segment))


def key_norm(view: LanguageView) -> Float[Tensor, " T"]:
    """[T] minus the L2 norm of each token's key in the layer, mean over key heads.

    Keys of small norm draw much attention (Devoto et al. 2024, arXiv 2406.11430), so the smaller norm stays. RoPE turns
    keys and leaves their norm, so it does not matter that these are turned. The paper drops cached keys head by head;
    one number a token is our choice. No text is looked at.
    """
    _, keys = view.query_keys(view.voters.closing)
    return -keys.float().norm(dim=-1).mean(-1)


def random_language(view: LanguageView) -> Float[Tensor, " T"]:
    """[T] uniform noise from torch's generator."""
    return torch.rand(len(view.sequence), device=view.hidden.device)


LANGUAGE_SCORES: dict[str, Callable[[LanguageView], Tensor]] = {
    "text_attention": text_attention,
    "text_cosine": text_cosine,
    "last_token_attention": last_token_attention,
    "key_norm": key_norm,
    "random": random_language,
}

__all__ = ["LANGUAGE_SCORES", "NEEDS", "VISION_SCORES", "LanguageView", "VisionView", "even_order", "possible_scores"]
