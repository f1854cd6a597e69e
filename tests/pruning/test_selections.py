"""Selections against slow, one-row-at-a-time re-derivations of the papers' rules."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loaded import SELECTIONS
from torch import Tensor

from mmprune_train.pruning.selections import dpp, max_min, top_and_distinct, top_and_uniform


def case(rows: int, size: int, seed: int, width: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn((rows, size), generator=generator).softmax(1)
    counts = torch.randint(1, size + 1, (rows,), generator=generator)
    return scores, counts, torch.randn((rows, size, width), generator=generator)


def kept(mask: Tensor) -> list[set[int]]:
    return [set(row.nonzero().squeeze(1).tolist()) for row in mask]


def cosine(states: Tensor) -> Tensor:
    return torch.stack([torch.cosine_similarity(state[None], states) for state in states])


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("size", [2, 9, 36])
def test_max_min_is_divprunes_rule(rows: int, size: int) -> None:
    scores, counts, features = case(rows, size, seed=size)
    for row, found in enumerate(kept(max_min(scores, counts, features))):
        distance = 1 - cosine(features[row])
        chosen = [max(range(size), key=lambda i: sorted(distance[i].tolist())[1])]  # its own zero comes first
        while len(chosen) < counts[row]:
            others = [i for i in range(size) if i not in chosen]
            chosen.append(max(others, key=lambda i: min(float(distance[i, j]) for j in chosen)))
        assert found == set(chosen)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("size", [2, 7, 12])
def test_dpp_adds_the_token_with_the_largest_determinant(rows: int, size: int) -> None:
    scores, counts, features = case(rows, size, seed=size, width=size + 3)
    for row, found in enumerate(kept(dpp(scores, counts, features))):
        quality = (scores[row] - scores[row].min() + 1e-6) / (scores[row].max() - scores[row].min())
        kernel = (quality[:, None] * cosine(features[row]) * quality).double()
        chosen: list[int] = []
        while len(chosen) < min(int(counts[row]), size - 1):  # the last token has no relevance: nothing tells it apart
            others = [i for i in range(size) if i not in chosen]
            chosen.append(max(others, key=lambda i: float(torch.logdet(kernel[[*chosen, i]][:, [*chosen, i]]))))
        assert set(chosen) <= found and len(found) == counts[row]


@pytest.mark.parametrize("rows", [1, 5])
def test_top_and_uniform_is_prumerge_plus(rows: int) -> None:
    scores, _, features = case(rows, 36, seed=3)
    counts = torch.tensor([4, 1, 11, 36, 2])[:rows]
    for row, found in enumerate(kept(top_and_uniform(scores, counts, features))):
        best = scores[row].argsort(descending=True)[: counts[row]].tolist()
        spacing = max(1, int(36 // int(counts[row])) // 3)
        assert found == {*best, *range(0, 35, spacing)}


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("size", [3, 20, 49])
@pytest.mark.parametrize("share", [0.5, 0.25])
def test_top_and_distinct_is_vispruners_rule(rows: int, size: int, share: float) -> None:
    scores, counts, features = case(rows, size, seed=size)
    mask = top_and_distinct(scores, counts, features, share=share, drop=4)
    for row, found in enumerate(kept(mask)):
        total = int(counts[row])
        important = math.floor(total * share)
        order = scores[row].argsort(descending=True).tolist()
        rest = order[important:]
        while len(rest) > total - important:
            even, odd = rest[::2], rest[1::2]
            alike = {
                i: max((float(torch.cosine_similarity(features[row, i], features[row, j], 0)) for j in odd), default=0)
                for i in even
            }
            even.sort(key=lambda i: -alike[i])
            gone = min(4, len(rest) - (total - important), len(even))
            rest = even[gone:] + odd
        assert found == {*order[:important], *rest}


@pytest.mark.parametrize("name", sorted(SELECTIONS))
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.integers(1, 25))
def test_other_rows_never_change_what_a_row_keeps(name: str, seed: int, size: int) -> None:
    scores, counts, features = case(4, size, seed)
    together = SELECTIONS[name](scores, counts, features)
    for row in range(4):
        alone = SELECTIONS[name](scores[row : row + 1], counts[row : row + 1], features[row : row + 1])
        assert together[row].tolist() == alone[0].tolist()
    if name != "top_and_uniform":
        assert together.sum(1).tolist() == counts.tolist()
    else:
        assert bool((together.sum(1) >= counts).all())


@pytest.mark.parametrize("name", ["max_min", "dpp", "top_and_distinct"])
def test_equal_features_do_not_break_diverse_selections(name: str) -> None:
    mask = SELECTIONS[name](torch.ones(2, 8), torch.tensor([3, 8]), torch.ones(2, 8, 4))
    assert mask.sum(1).tolist() == [3, 8]
