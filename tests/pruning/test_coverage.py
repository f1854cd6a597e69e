"""Selections that cover, and that share out among crops, against slow re-derivations one row at a time."""

from __future__ import annotations

import pytest
import torch
from pruning.test_selections import case, kept
from torch import Tensor

from mmprune_train.pruning.coverage import question_coverage, weighed_coverage
from mmprune_train.pruning.crops import crops


def cosine(one: Tensor, other: Tensor) -> Tensor:
    return torch.stack([torch.cosine_similarity(state[None], other) for state in one])


def covering(table: Tensor, weights: Tensor, count: int) -> set[int]:
    """Greedily the columns of a table [M, N] whose addition raises the sum of the rows' maxima most, times a weight."""
    chosen: list[int] = []
    for _ in range(count):
        others = [i for i in range(table.shape[1]) if i not in chosen]
        before = table[:, chosen].amax(1).clamp(min=0) if chosen else torch.zeros(len(table))
        chosen.append(max(others, key=lambda i: float((table[:, i] - before).clamp(min=0).sum() * weights[i])))
    return set(chosen)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("size", [2, 9, 36])
@pytest.mark.parametrize("power", [1.0, 0.5])
def test_weighed_coverage_is_scopes_rule(rows: int, size: int, power: float) -> None:
    scores, counts, features = case(rows, size, seed=size)
    for row, found in enumerate(kept(weighed_coverage(scores, counts, features, power=power))):
        table = cosine(features[row], features[row])
        assert found == covering(table, scores[row] ** power, int(counts[row]))


@pytest.mark.parametrize("asked", [[3, 0, 5, 1, 2], [0, 0, 0, 0, 0]])
@pytest.mark.parametrize("size", [3, 9, 36])
def test_question_coverage_is_mmtoks_rule_whatever_the_other_questions(size: int, asked: list[int]) -> None:
    scores, counts, features = case(5, size, seed=size)
    projected, words = torch.randn(5, size, 8), torch.randn(5, max(asked), 8)
    for row, count in enumerate(asked):
        words[row, count:] = 0
    found = kept(question_coverage(scores, counts, features, None, projected, words))
    for row, count in enumerate(asked):
        patches = 0.5 * (cosine(features[row], features[row]) / 0.2).softmax(1) / size
        texts = (cosine(words[row, :count], projected[row]) / 0.02).softmax(1) / count if count else patches[:0]
        assert found[row] == covering(torch.cat([texts, patches]), torch.ones(size), int(counts[row]))
    silent = kept(question_coverage(scores, counts, features))
    assert (found == silent) == (max(asked) == 0)


def shared_out(scores: Tensor, features: Tensor, count: int, number: int, weight: float) -> set[int]:
    """HoloV's rule on one image, with what is left over given to the best scores."""
    size = len(scores)
    parts = [part.tolist() for part in torch.arange(size).tensor_split(min(number, size))]
    worths = []
    for part in parts:
        attention = scores[part] * 1000
        if len(part) == 1:
            worths.append(float(scores[part].mean()))
            continue
        table = cosine(features[part], features[part]).fill_diagonal_(0)
        others = len(part) - 1
        variance = (table - table.sum(1, keepdim=True) / others).square().sum(1) / others
        worths.append(float((attention + weight * variance * attention.mean() / (variance.mean() + 1e-6)).mean()))
    given = [int(worth / (sum(worths) + 1e-6) * count) for worth in worths]
    for lucky in sorted(range(len(parts)), key=lambda p: -worths[p])[: count - sum(given)]:
        given[lucky] += 1
    best = scores.argsort(descending=True).tolist()
    chosen = {i for part, n in zip(parts, given, strict=True) for i in [i for i in best if i in part][:n]}
    return chosen | set([i for i in best if i not in chosen][: count - len(chosen)])


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("size", [1, 5, 18, 36, 50])
@pytest.mark.parametrize("number", [4, 16])
def test_crops_is_holovs_rule(rows: int, size: int, number: int) -> None:
    scores, counts, features = case(rows, size, seed=size)
    for row, found in enumerate(kept(crops(scores, counts, features, number=number))):
        assert found == shared_out(scores[row], features[row], int(counts[row]), number, weight=0.09)


def test_a_crop_of_all_the_attention_gives_its_rest_away() -> None:
    """Theirs fills up with tokens of zeros."""
    scores = torch.full((1, 32), 1e-4)
    scores[0, 8:12] = 0.2
    scores[0, 31] = 2e-4
    found = crops(scores, torch.tensor([6]), torch.randn(1, 32, 4), number=8)
    assert kept(found) == [{0, 8, 9, 10, 11, 31}]
