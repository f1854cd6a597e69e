"""Selection: which tokens a count keeps.

A selection takes scores [B, N], counts [B] and features [B, N, D] and answers a mask [B, N]. One that loops over its
counts takes `known`, too: the counts on the host, where the budget is fixed; for other budgets it makes the host wait.
Loops run over picks or rounds, so a batch costs what its largest count costs; `max_min` alone looks for its
first pick row by row, to hold one N x N matrix of distances at a time.
"""

from __future__ import annotations

from typing import Annotated

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.functional import normalize

from mmprune_train.components.declare import Range, selection
from mmprune_train.packed.host import fetch

Scores = Float[Tensor, "B N"]
Counts = Int64[Tensor, " B"]
Features = Float[Tensor, "B N D"]
Mask = Bool[Tensor, "B N"]

SPANNED = 1e-9
"""A token whose part outside the chosen tokens' span is below this share of its squared length adds nothing."""


def top_mask(scores: Scores, counts: Counts, lengths: Int64[Tensor, " B"] | None = None) -> Mask:
    """Mark the `counts` largest scores of each row; of equal scores the earlier token stays.

    Args:
        scores: [B, N], larger = keep.
        counts: [B], 1..length.
        lengths: [B] valid leading entries; None: all N.
    Returns:
        bool [B, N].
    """
    size = scores.shape[1]
    rank = torch.arange(size, device=scores.device)
    if lengths is not None:
        scores = scores.masked_fill(rank >= lengths[:, None], -torch.inf)
    order = scores.sort(dim=1, descending=True, stable=True).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, order, rank < counts[:, None])


@selection(default_for="pruner.vision.selection")
def top(scores: Scores, counts: Counts, features: Features) -> Mask:
    """The highest scores; features are not looked at."""
    return top_mask(scores, counts)


@selection(reads=("features",))
def max_min(scores: Scores, counts: Counts, features: Features, known: Counts | None = None) -> Mask:
    """DivPrune (Alvar et al. 2025, arXiv 2503.02175): greedy max-min cosine distance; scores are not looked at.

    The first token is the one farthest from its nearest neighbour; each next one is farthest from all chosen so far.
    """
    unit = normalize(features.float(), dim=-1)
    nearest = torch.stack([_to_nearest(row) for row in unit])  # [B, N], N x N once
    return _greedy(nearest, counts, unit, most_of(counts, known))


def _to_nearest(unit: Tensor) -> Tensor:
    """Distance [N] from each of N unit vectors [N, D] to its nearest other one. Of two that are each other's nearest it
    is the same number: a product's two halves differ by rounding, which would decide between them otherwise."""
    distance = 1 - unit @ unit.T
    return torch.minimum(distance, distance.T).fill_diagonal_(torch.inf).amin(1)


def most_of(counts: Counts, known: Counts | None) -> int:
    """The largest count; waits for the device unless `known`."""
    return int((fetch(counts) if known is None else known).max())


def _greedy(first: Scores, counts: Counts, unit: Features, most: int) -> Mask:
    """Farthest-first traversal of `most` picks: `first` ranks the first one alone."""
    chosen = torch.zeros_like(first, dtype=torch.bool)
    row = torch.arange(len(first), device=first.device)
    gap = first
    for step in range(most):
        pick = gap.masked_fill(chosen, -torch.inf).argmax(1)
        chosen[row, pick] |= step < counts
        distance = 1 - torch.einsum("bnd,bd->bn", unit, unit[row, pick])
        gap = distance if step == 0 else gap.minimum(distance)
    return chosen


@selection(reads=("features",))
def dpp(scores: Scores, counts: Counts, features: Features, known: Counts | None = None) -> Mask:
    """CDPruner (Zhang et al. 2025, arXiv 2506.10967): greedy MAP of a determinantal point process whose kernel is the
    features' cosine similarity weighted by both tokens' relevance, in Chen et al. 2018's incremental form.

    Relevance is the score scaled to 0..1 in its row; with equal scores diversity alone decides. Once the chosen tokens
    span all directions there are, no token adds volume and the rest is chosen by relevance (our choice).
    """
    unit = normalize(features.double(), dim=-1)
    low, high = scores.amin(1, keepdim=True), scores.amax(1, keepdim=True)
    relevance = ((scores - low + 1e-6) / (high - low).clamp(min=1e-6)).double()
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    row = torch.arange(len(scores), device=scores.device)
    gain = relevance.square()  # squared volume each token would add: the kernel's diagonal to begin with
    most = most_of(counts, known)
    basis = gain.new_zeros((most, *gain.shape))  # [steps, B, N]
    for step in range(most):
        adds = gain > SPANNED * relevance.square()
        worth = torch.where(adds, gain, SPANNED**2 * relevance)
        pick = worth.masked_fill(chosen, -torch.inf).argmax(1)
        chosen[row, pick] |= step < counts
        kernel = relevance * relevance[row, pick, None] * torch.einsum("bnd,bd->bn", unit, unit[row, pick])
        known = torch.einsum("sb,sbn->bn", basis[:step, row, pick], basis[:step])
        volume = torch.where(adds[row, pick], gain[row, pick], torch.inf)
        basis[step] = (kernel - known) / volume.sqrt()[:, None]
        gain = gain - basis[step].square()
    return chosen


@selection(exceeds=True)
def top_and_uniform(scores: Scores, counts: Counts, features: Features) -> Mask:
    """LLaVA-PruMerge+ (Shang et al. 2024, arXiv 2403.15388): the top tokens, and besides them every s-th patch of the
    raster, s a third of the spacing that `counts` evenly spread tokens would have. Keeps more than `counts`."""
    size = scores.shape[1]
    spacing = (size // counts // 3).clamp(min=1)[:, None]
    raster = torch.arange(size, device=scores.device)
    return top_mask(scores, counts) | ((raster % spacing == 0) & (raster < size - 1))


@selection(reads=("features",))
def top_and_distinct(
    scores: Scores,
    counts: Counts,
    features: Features,
    known: Counts | None = None,
    *,
    share: Annotated[float, Range(0, 1)] = 0.5,
    drop: Annotated[int, Range(1)] = 8,
) -> Mask:
    """VisPruner (Zhang et al. 2024, arXiv 2412.01818): a share of the budget by score; of the rest, in score order,
    the tokens most similar to another go out round by round until the budget is met.

    A round pairs the tokens at even places of the remaining list with those at odd places and drops up to `drop` even
    ones with the highest cosine similarity to any odd one; the list then starts with the surviving even tokens from
    most to least similar.

    Args:
        share: part of the budget that goes by score, rounded down.
        drop: most tokens a round removes from a row.
    """
    size = scores.shape[1]
    unit = normalize(features.float(), dim=-1)
    place = torch.arange(size, device=scores.device)
    by_score = scores.sort(dim=1, descending=True, stable=True).indices
    important, wanted, left = _shared_out(counts, share, size)
    rest = by_score.gather(1, (place + important[:, None]).clamp(max=size - 1))  # [B, N], valid up to `left`
    for _ in range(_rounds(fetch(counts) if known is None else known, share, drop, size)):
        listed = place < left[:, None]
        states = unit.gather(1, rest[..., None].expand_as(unit))
        even, odd = rest[:, ::2], rest[:, 1::2]
        similarity = states[:, ::2] @ states[:, 1::2].transpose(1, 2)
        similarity = similarity.masked_fill(~listed[:, None, 1::2], -torch.inf).amax(2)
        similarity = similarity.masked_fill(~listed[:, ::2], -torch.inf)
        order = similarity.sort(dim=1, descending=True, stable=True).indices
        active = left > wanted
        gone = _gone(left, wanted, drop)
        order = torch.where(active[:, None], order, place[: order.shape[1]])
        stays = torch.arange(even.shape[1], device=rest.device) >= gone[:, None]
        valid = torch.cat([listed[:, ::2].gather(1, order) & stays, listed[:, 1::2]], 1)
        merged = torch.cat([even.gather(1, order), odd], 1)
        compact = valid.sort(dim=1, descending=True, stable=True).indices
        rest = torch.where(active[:, None], merged.gather(1, compact), rest)
        left = left - gone
    marked = torch.zeros_like(by_score).scatter_add(1, by_score, (place < important[:, None]).long())
    return marked.scatter_add(1, rest, (place < left[:, None]).long()) > 0


def _shared_out(counts: Counts, share: float, size: int) -> tuple[Counts, Counts, Counts]:
    """[B] each: tokens that go by score, those wanted of the rest, and those that are the rest."""
    important = (counts * share).floor().long()
    return important, counts - important, size - important


def _gone(left: Counts, wanted: Counts, drop: int) -> Counts:
    """[B] tokens that a round takes out of lists of `left`, every second of which may go."""
    return (left - wanted).clamp(min=0, max=drop).minimum((left + 1) // 2)


def _rounds(counts: Counts, share: float, drop: int, size: int) -> int:
    """Rounds until every list is down to what is wanted of it; counts on the host."""
    _, wanted, left = _shared_out(counts, share, size)
    rounds = 0
    while bool((left > wanted).any()):
        left = left - _gone(left, wanted, drop)
        rounds += 1
    return rounds
