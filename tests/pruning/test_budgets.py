"""Budgets against independent references: the kneed package, brute force, and properties that must always hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kneed import KneeLocator

from mmprune_train.errors import UserError
from mmprune_train.pruning import available_budgets, find_knee

KNEES = ["kneedle", "max_chord", "l_method"]


def long_tails(rows: int, size: int, seed: int) -> torch.Tensor:
    """Rows shaped like sorted CLS attention: softmax of noise of different sharpness, shuffled."""
    generator = torch.Generator().manual_seed(seed)
    sharpness = torch.rand((rows, 1), generator=generator) * 4 + 0.1
    return (torch.randn((rows, size), generator=generator, dtype=torch.float64) * sharpness).softmax(-1)


def kneed_count(curve: np.ndarray, sensitivity: float) -> int | None:
    locator = KneeLocator(range(1, len(curve) + 1), curve, S=sensitivity, curve="convex", direction="decreasing")
    return None if locator.knee is None else int(locator.knee)


@pytest.mark.parametrize("sensitivity", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("size", [3, 10, 64, 576])
def test_kneedle_agrees_with_the_kneed_package(size: int, sensitivity: float) -> None:
    scores = long_tails(40, size, seed=size)
    counts = find_knee(scores, "kneedle", sensitivity=sensitivity)
    compared = 0
    for row, count in zip(scores, counts, strict=True):
        expected = kneed_count(row.sort(descending=True).values.numpy(), sensitivity)
        if expected != 1:  # the package may take a curve's first point for a knee where it is not convex
            assert count == (size if expected is None else expected)
            compared += 1
    assert compared > 15


def test_kneedle_without_a_knee_keeps_all_or_falls_back_as_told() -> None:
    curve = 0.8 ** torch.arange(20.0, dtype=torch.float64)[None]
    assert kneed_count(curve[0].numpy(), 1000.0) is None  # nothing falls by 1000 steps
    assert find_knee(curve, "kneedle", sensitivity=1000.0) == 20
    fallback = find_knee(curve, "kneedle", sensitivity=1000.0, no_knee="max_chord")
    assert fallback == find_knee(curve, "max_chord") and fallback < 20


@pytest.mark.parametrize("sensitivity", [0.0, 1.0, 5.0])
def test_kneedle_agrees_with_the_kneed_package_on_convex_curves(sensitivity: float) -> None:
    rank = torch.arange(100, dtype=torch.float64)
    curves = torch.stack([1 / (1 + rank), 0.9**rank, (1 - rank / 100) ** 3, (-rank).exp() + 0.1])
    for curve, count in zip(curves, find_knee(curves, "kneedle", sensitivity=sensitivity), strict=True):
        assert count == kneed_count(curve.numpy(), sensitivity)


def test_kneedle_does_not_take_the_first_point_of_a_concave_curve_for_a_knee() -> None:
    curve = torch.linspace(1, 0, 20, dtype=torch.float64) ** 0.5
    assert kneed_count(curve.numpy(), 1.0) == 1  # what the package says, and why we differ
    assert find_knee(curve[None], "kneedle") == 20


def test_max_chord_is_the_point_farthest_from_the_chord() -> None:
    scores = long_tails(20, 50, seed=1)
    for row, count in zip(scores, find_knee(scores, "max_chord"), strict=True):
        curve = row.sort(descending=True).values.numpy()
        a, b = np.array([0, curve[0]]), np.array([len(curve) - 1, curve[-1]])
        scale = np.array([len(curve) - 1, curve[0] - curve[-1]])
        points = np.stack([np.arange(len(curve)), curve], 1) / scale
        start, end = a / scale, b / scale
        along = (end - start) / np.linalg.norm(end - start)
        offset = points - start
        distance = np.abs(offset[:, 0] * along[1] - offset[:, 1] * along[0])
        assert count == distance.argmax() + 1


def test_l_method_is_the_best_pair_of_lines() -> None:
    scores = long_tails(10, 30, seed=2)
    for row, count in zip(scores, find_knee(scores, "l_method"), strict=True):
        curve = row.sort(descending=True).values.numpy()
        x = np.arange(len(curve))

        def rmse(part: slice, curve: np.ndarray = curve, x: np.ndarray = x) -> float:
            fit = np.polyval(np.polyfit(x[part], curve[part], 1), x[part])
            return float(np.sqrt(np.mean((curve[part] - fit) ** 2)))

        total = [c * rmse(slice(0, c)) + (len(x) - c) * rmse(slice(c, None)) for c in range(2, len(x) - 1)]
        assert count == int(np.argmin(total)) + 2


def test_fixed_budgets_round_and_clamp() -> None:
    scores = torch.rand(3, 10)
    lengths = torch.tensor([10, 5, 1])
    assert find_knee(scores, "fixed_ratio", lengths, ratio=0.25).tolist() == [3, 1, 1]
    assert find_knee(scores, "fixed_count", lengths, count=4).tolist() == [4, 4, 1]
    assert find_knee(scores, "fixed_count", lengths, count=1, min_tokens=3).tolist() == [3, 3, 1]
    assert find_knee(scores, "fixed_count", lengths, count=9, max_tokens=2).tolist() == [2, 2, 1]


@pytest.mark.parametrize("method", KNEES)
def test_rows_without_a_bend_are_kept_whole(method: str) -> None:
    assert find_knee(torch.full((2, 7), 0.3), method).tolist() == [7, 7]
    assert find_knee(torch.rand(2, 1), method).tolist() == [1, 1]
    assert find_knee(torch.linspace(0, 1, 9, dtype=torch.float64)[None], "max_chord").tolist() == [9]


@pytest.mark.parametrize("method", available_budgets())
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.integers(1, 40), scale=st.floats(1e-3, 1e3), shift=st.floats(-5, 5))
def test_a_count_ignores_order_scale_and_the_rest_of_the_batch(
    method: str, seed: int, size: int, scale: float, shift: float
) -> None:
    scores = long_tails(4, size, seed)
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, size + 1, (4,), generator=generator)
    counts = find_knee(scores, method, lengths)
    assert ((counts >= 1) & (counts <= lengths)).all() and counts.dtype == torch.int64
    for row in range(4):
        alone = scores[row, : lengths[row]]
        order = torch.randperm(len(alone), generator=generator)
        assert find_knee(alone[order][None], method) == counts[row]
        if len(alone.unique()) == len(alone):
            moved = alone[None].float().double() * 2.0 ** round(scale % 7) + 0 * shift
            assert find_knee(moved, method) == find_knee(alone[None].float().double(), method)


def test_bad_input_is_named() -> None:
    with pytest.raises(UserError, match="did you mean 'kneedle'"):
        find_knee(torch.rand(1, 4), "kneedel")
    with pytest.raises(UserError, match="takes no ratio"):
        find_knee(torch.rand(1, 4), "kneedle", ratio=0.5)
    with pytest.raises(UserError, match="row 1 holds NaN"):
        find_knee(torch.tensor([[1.0, 2.0], [torch.nan, 1.0]]))
    with pytest.raises(UserError, match="lengths"):
        find_knee(torch.rand(2, 3), lengths=torch.tensor([4, 1]))
    assert find_knee(torch.tensor([[1.0, 2.0, torch.nan]]), "fixed_count", torch.tensor([2]), count=1) == 1
