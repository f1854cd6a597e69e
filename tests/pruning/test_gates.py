"""Gates: ones, whose gradient is what the docstring says, image by image; and scores that learn by them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmprune_train.packed.patches import Patches
from mmprune_train.pruning.gates import gates_among_kept, gates_of_each, share_above_zero
from mmprune_train.pruning.selections import top_mask


def drawn(images: int = 4, size: int = 9) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores [I, N] with a gradient, the same with noise, the best of these (one more for each image), and what a loss
    says of each gate."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(images, size, generator=generator).requires_grad_()
    tried = scores.detach() + torch.randn(images, size, generator=generator)
    kept = top_mask(tried, torch.arange(2, 2 + images))
    return scores, tried, kept, torch.randn(images, size, generator=generator)


def slope_at(value: float, scale: float) -> float:
    chance = 1 / (1 + math.exp(-value / scale))
    return chance * (1 - chance) / scale


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_gates_are_ones_with_the_gradient_of_a_choice_among_the_kept(scale: float) -> None:
    scores, tried, kept, wanted = drawn()
    found = gates_among_kept(scores, tried, kept, scale)
    assert torch.equal(found, torch.ones_like(found))
    (found * wanted * kept).sum().backward()
    for row in range(len(scores)):
        mine = [number for number in range(9) if kept[row, number]]
        threshold = max(float(tried[row, number]) for number in range(9) if number not in mine)
        slope = {number: slope_at(float(scores[row, number]) - threshold, scale) for number in mine}
        mean = sum(slope[n] * float(wanted[row, n]) for n in mine) / sum(slope.values())
        for number in range(9):
            expected = slope[number] * (float(wanted[row, number]) - mean) if number in mine else 0.0
            assert abs(float(scores.grad[row, number]) - expected) < 1e-5


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_gates_of_scores_that_say_for_themselves_are_not_compared(scale: float) -> None:
    scores, _, kept, wanted = drawn()
    found = gates_of_each(scores, kept, scale)
    assert torch.equal(found, torch.ones_like(found))
    (found * wanted * kept).sum().backward()
    for row, number in torch.cartesian_prod(torch.arange(4), torch.arange(9)).tolist():
        slope = slope_at(float(scores[row, number]), scale) * float(kept[row, number])
        assert abs(float(scores.grad[row, number]) - slope * float(wanted[row, number])) < 1e-5


def test_the_share_above_zero_is_a_count_that_can_be_pushed() -> None:
    scores = (torch.randn(6, 40, generator=torch.Generator().manual_seed(0)) + 1).requires_grad_()
    found = share_above_zero(scores)
    assert found.tolist() == (scores > 0).float().mean(1).tolist()
    optimizer = torch.optim.Adam([scores], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        (share_above_zero(scores).mean() - 0.2).square().backward()
        optimizer.step()
    assert abs(float((scores > 0).float().mean()) - 0.2) < 0.03


def test_an_image_that_is_kept_whole_has_a_gradient_of_zero() -> None:
    scores, tried, kept, wanted = drawn(2)
    kept[0] = True
    (gates_among_kept(scores, tried, kept) * wanted).sum().backward()
    assert not scores.grad[0].any() and scores.grad[1].any()


def order_of(kept: Tensor) -> Tensor:
    """[I, N] of kept patches in raster order, -1 behind the last."""
    size = kept.shape[1]
    order = torch.arange(size).expand(kept.shape).masked_fill(~kept, size).sort(1).values
    return order.masked_fill(order == size, -1)


def test_what_enters_is_what_enters_without_gates() -> None:
    scores, tried, kept, _ = drawn()
    features = torch.randn(4, 9, 6)
    plain = Patches.cut(features, order_of(kept), None)
    gated = Patches.cut(features, order_of(kept), None, gates_among_kept(scores, tried, kept))
    tokens = gated.gated(gated.chosen)
    assert torch.equal(tokens, plain.gated(plain.chosen)) and tokens.requires_grad
    asked = torch.randn(tokens.shape)
    gradient = torch.autograd.grad((tokens * asked).sum(), gated.gates)[0]
    means = torch.cat([part.mean(0).expand_as(part) for part in plain.chosen.split(kept.sum(1).tolist())])
    torch.testing.assert_close(gradient, (asked * (plain.chosen - means)).sum(1))
    some = gated.take([2, 0])
    assert torch.equal(Patches.cat([some, some]).gates, torch.ones(2 * len(some.chosen)))


def test_by_noise_and_gates_a_score_finds_the_patches_that_help() -> None:
    """Three of sixteen patches carry what the loss asks for; which they are is in their features alone."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(32, 16, 8, generator=generator)
    helpful = top_mask(torch.rand(32, 16, generator=generator), torch.full((32,), 3))
    features[..., 0] = torch.where(helpful, 2.0, -0.5)
    weight = torch.zeros(8, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.05)
    counts = torch.full((32,), 3)

    def found() -> float:
        with torch.no_grad():
            return float((top_mask(features @ weight, counts) & helpful).sum() / helpful.sum())

    assert found() < 0.5
    for _ in range(150):
        scores = features @ weight
        tried = scores.detach() + torch.rand(scores.shape, generator=generator).clamp(1e-6, 1 - 1e-6).logit()
        kept = top_mask(tried, counts)
        patches = Patches.cut(features, order_of(kept), None, gates_among_kept(scores, tried, kept))
        chosen = patches.gated(patches.chosen)
        loss = (chosen.view(32, 3, 8).mean(1)[:, 0] - 2).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert found() == 1.0
