"""Average pooling inside the LLM."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.nn.functional import avg_pool1d

from mmprune_train.pruning.runs import first_of_runs, mean_of_runs
from mmprune_train.pruning.views import LanguageView

UNREAD = object.__new__(LanguageView)
"""Nothing is looked at."""


@pytest.mark.parametrize("stride", [2, 4, 8])
def test_a_whole_image_is_pooled_as_by_avg_pool1d(stride: int) -> None:
    size, start = 64, 5
    hidden = torch.randn(size + 9, 6)
    places, row = torch.arange(start, start + size), torch.zeros(size, dtype=torch.long)
    kept = first_of_runs(torch.zeros(len(hidden)), torch.tensor([size // stride]), UNREAD, places, row)
    changed, made = mean_of_runs(hidden, places, row, ~kept, torch.zeros(size), row)
    expected = avg_pool1d(hidden[places].T[None], stride, stride)[0].T
    torch.testing.assert_close(changed[places[kept]], expected)
    assert not made.any()
    outside = torch.ones(len(hidden), dtype=torch.bool).index_fill(0, places, False)
    assert torch.equal(changed[outside], hidden[outside])


def test_runs_differ_in_length_by_one_at_most_whatever_the_count() -> None:
    for size in range(1, 12):
        for count in range(1, size + 1):
            row = torch.zeros(size, dtype=torch.long)
            kept = first_of_runs(torch.zeros(size), torch.tensor([count]), UNREAD, torch.arange(size), row)
            starts = [*kept.nonzero().squeeze(1).tolist(), size]
            lengths = {end - start for start, end in pairwise(starts)}
            assert len(starts) == count + 1 and starts[0] == 0 and max(lengths) - min(lengths) <= 1


def test_no_image_lends_another_its_tokens() -> None:
    """Two images in a row: the second's first tokens, before its first kept one, join that; one that keeps nothing
    leaves nothing."""
    hidden = torch.eye(8)
    row, picture = torch.zeros(8, dtype=torch.long), torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    kept = torch.tensor([1, 0, 0, 0, 1, 0, 0, 0], dtype=torch.bool)
    changed, _ = mean_of_runs(hidden, torch.arange(8), row, ~kept, torch.zeros(8), picture)
    torch.testing.assert_close(changed[0], torch.tensor([1, 1, 1, 0, 0, 0, 0, 0]) / 3)
    torch.testing.assert_close(changed[4], torch.tensor([0, 0, 0, 1, 1, 1, 0, 0]) / 3)
