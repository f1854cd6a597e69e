"""Downsampling of the patch grid."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import adaptive_avg_pool2d

from mmprune_train.pruning.cells import cell_means


@pytest.mark.parametrize(
    ("grid", "cells"),
    [((24, 24), (12, 12)), ((24, 24), (8, 8)), ((24, 24), (7, 7)), ((24, 24), (24, 24)), ((27, 27), (10, 10)),
     ((4, 6), (2, 3)), ((3, 9), (2, 6)), ((1, 7), (1, 3)), ((24, 24), (1, 1))],
)  # fmt: skip
def test_a_grid_of_cells_is_adaptive_average_pooling(grid: tuple[int, int], cells: tuple[int, int]) -> None:
    (high, wide), (rows, columns) = grid, cells
    features = torch.randn(2, high * wide, 5, requires_grad=True)
    kept = torch.zeros(2, high * wide, dtype=torch.bool)
    kept[:, : rows * columns] = True
    means, mask = cell_means(features, kept, features[..., 0], features, grid)
    expected = adaptive_avg_pool2d(features.mT.unflatten(2, grid), cells).flatten(2).mT
    assert mask.sum(1).tolist() == [rows * columns] * 2
    found = means[mask].view_as(expected)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    mine, theirs = (torch.autograd.grad((part * weights).sum(), features)[0] for part in (found, expected))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("grid", [(3, 3), (5, 8), (9, 2), (1, 6)])
def test_every_count_is_met_whatever_the_rest_of_the_batch(grid: tuple[int, int]) -> None:
    """Cells cover the grid, each has its token inside, in raster order, and rows of cells differ by one at most."""
    high, wide = grid
    size = high * wide
    kept = torch.ones(size, size, dtype=torch.bool).tril()
    features = torch.eye(size).expand(size, -1, -1)  # a mean's entries say which patches it is of
    means, mask = cell_means(features, kept, features[0], features, grid)
    assert mask.sum(1).tolist() == list(range(1, size + 1))
    for image in range(size):
        tokens = means[image][mask[image]]
        places = mask[image].nonzero().squeeze(1)
        assert bool((tokens.sum(0) > 0).all()), "no patch is left out"
        assert bool((tokens[torch.arange(len(places)), places] > 0).all())
        torch.testing.assert_close(tokens.sum(1), torch.ones(len(tokens)))
        rows = mask[image].view(grid).sum(1)
        assert rows[rows > 0].max() - rows[rows > 0].min() <= 1
        alone = cell_means(features[:1], kept[image][None], features[0, :1], features[:1], grid)
        assert torch.equal(alone[0][0], means[image]) and torch.equal(alone[1][0], mask[image])
    assert torch.equal(means[-1], features[-1]), "kept whole, an image stays as it is"
