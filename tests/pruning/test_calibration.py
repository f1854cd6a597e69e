"""Solved parameters meet their target on scores made here, and targets out of reach are said to be so."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from tiny import packed, tiny_inputs, tiny_llava

from mmprune_train.config.knee import with_value
from mmprune_train.config.pruner_schema import KneeConfig, VisionStageConfig
from mmprune_train.pruning import available_budgets, find_knee
from mmprune_train.pruning.calibration import ScoredImages, Searched, searched, solve, tokens_left
from mmprune_train.pruning.distribution_budgets import effective_rank_of

IMAGES, SIZE = 60, 80
STAGE = VisionStageConfig(knee=KneeConfig())


def long_tails() -> torch.Tensor:
    """Softmaxed scores [IMAGES, SIZE] of images that differ in how long their tail is."""
    generator = torch.Generator().manual_seed(1)
    sharpness = torch.rand((IMAGES, 1), generator=generator) * 2 + 0.5
    return (torch.randn((IMAGES, SIZE), generator=generator) * sharpness).softmax(-1)


def features() -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    weight = torch.rand((IMAGES, 1, 48), generator=generator, dtype=torch.float64) ** 3
    return torch.randn((IMAGES, SIZE, 48), generator=generator, dtype=torch.float64) * weight


SCORED = ScoredImages(STAGE, long_tails(), effective_rank_of(features()))


def recount(method: str, parameter: str, value: float) -> float:
    """The mean share kept, row by row with plain numpy; kneedle and lof through the library that defines them."""
    counts = []
    for scores, states in zip(long_tails().double().numpy(), features().numpy(), strict=True):
        curve = np.sort(scores)[::-1]
        share = curve / curve.sum()
        if method == "cumulative_mass":
            count = int(np.searchsorted(np.cumsum(share), value - 1e-9)) + 1
        elif method == "attention_entropy":
            count = np.floor(value * np.exp(-(share * np.log(share)).sum()) + 0.5)
        elif method == "effective_rank":
            sigma = np.linalg.svd(states, compute_uv=False)
            sigma = sigma[sigma > 1e-9 * sigma[0]] / sigma.sum()
            count = np.floor(value * np.exp(-(sigma * np.log(sigma)).sum()) + 0.5)
        elif method == "iqr":
            low, high = np.quantile(scores, [0.25, 0.75])
            count = (scores > high + value * (high - low)).sum()
        elif method == "fixed_ratio":
            count = np.floor(SIZE * value + 0.5)
        elif method == "fixed_count":
            count = value
        else:
            count = int(find_knee(torch.from_numpy(scores)[None], method, **{parameter: value}))
        counts.append(min(max(count, 1), SIZE))
    return float(np.mean(counts)) / SIZE


@pytest.mark.parametrize(
    ("method", "target"),
    [("kneedle", 0.22), ("cumulative_mass", 0.22), ("cumulative_mass", 0.9), ("attention_entropy", 0.22),
     ("effective_rank", 0.22), ("iqr", 0.12), ("fixed_ratio", 0.22), ("fixed_count", 0.22), ("fixed_count", 1.0)],
)  # fmt: skip
def test_a_solved_parameter_meets_the_target_to_the_token(method: str, target: float) -> None:
    found = SCORED.solve(KneeConfig(method=method), target)
    assert found is not None and found.value is not None and found.jump is None and not found.problem
    again = recount(method, found.parameter.name, found.value)
    assert again == pytest.approx(found.reached, abs=1e-9)
    assert abs(again - target) <= 1 / SIZE


@pytest.mark.parametrize(("method", "target"), [("iqr", 0.6), ("kneedle", 0.01)])
def test_a_target_out_of_reach_is_said_to_be_so_with_the_range(method: str, target: float) -> None:
    found = SCORED.solve(KneeConfig(method=method), target)
    assert found is not None and found.value is None and found.problem == "out of reach"
    low, high = found.reachable
    assert not low <= target <= high
    ends = [recount(method, found.parameter.name, value) for value in (found.parameter.low, found.parameter.high)]
    assert (low, high) == pytest.approx((min(ends), max(ends)), abs=1e-9)


def test_bounds_of_the_budget_bound_what_is_reachable() -> None:
    found = SCORED.solve(KneeConfig(method="cumulative_mass", min_tokens=8, max_tokens=40), 0.9)
    assert found is not None and found.value is None and found.reachable == (0.1, 0.5)


def test_budgets_without_a_parameter_have_none() -> None:
    without = {"max_chord", "l_method", "menger", "second_difference", "otsu", "above_zero"}
    assert {name for name in available_budgets() if searched(KneeConfig(method=name), SIZE) is None} == without
    assert SCORED.solve(KneeConfig(method="otsu"), 0.22) is None


def test_every_searched_parameter_is_one_of_its_budget() -> None:
    scores = long_tails()[:2]
    for name in available_budgets():
        if parameter := searched(KneeConfig(method=name), SIZE):
            for value in (parameter.at(0), parameter.at(1)):
                counts = find_knee(scores, name, features=features()[:2], **{parameter.name: value})
                assert ((counts >= 1) & (counts <= SIZE)).all()


def test_steps_and_jumps_are_reported_with_what_was_reached() -> None:
    x = Searched("x", 0.0, 10.0)
    step = solve(lambda x: 0.1 if x < 3.3 else 0.9, x, 0.22, token=0.01)
    assert step.reached == 0.1 and step.value is not None and step.value < 3.3 and step.jump == (0.1, 0.9)
    stairs = solve(lambda x: np.floor(x) / 10, x, 0.5, token=0.01)
    assert stairs.reached == 0.5 and stairs.value is not None and 5 <= stairs.value < 6 and stairs.jump is None
    falling = solve(lambda x: 1 / (1 + x), x, 0.3, token=0.001)
    assert falling.value == pytest.approx(1 / 0.3 - 1, rel=1e-4)
    whole = solve(lambda x: x / 10, Searched("n", 1, 10, whole=True), 0.42, token=0.05)
    assert whole.value == 4 and isinstance(whole.value, int)


def test_a_share_that_turns_back_is_only_reported() -> None:
    found = solve(lambda x: abs(x - 5) / 5, Searched("x", 0.0, 10.0), 0.5, token=0.01)
    assert found.value is None and "one way" in found.problem


def test_few_measurements_suffice_where_they_are_dear() -> None:
    asked: list[float] = []

    def dear(x: float) -> float:
        asked.append(x)
        return 0.2 + 0.6 * x + 0.1 * x * x

    found = solve(dear, Searched("share", 0.0, 1.0), 0.5, token=0.004, slack=0.002, scan=2)
    assert abs(found.reached - 0.5) <= 0.002 and len(asked) <= 6 and len(asked) == len(set(asked))


@pytest.mark.parametrize(
    "selection", ["top", "max_min", "dpp", "top_and_uniform", "top_and_distinct", "weighed_coverage", "crops"]
)
@pytest.mark.parametrize("merge", ["none", "nearest", "mean_token", "prumerge", "contextual", "cell_means"])
@pytest.mark.parametrize("keep_cls", [False, True])
def test_tokens_are_counted_as_the_model_leaves_them(selection: str, merge: str, keep_cls: bool) -> None:
    """What selection and merging add to the budget's count."""
    model, inputs = tiny_llava(), tiny_inputs([1, 2, 1], [6, 4, 5])
    for count in (2, 4, 9):
        knee = {"method": "fixed_count", "count": count}
        stage = {
            "knee": knee,
            "selection": selection,
            "merge": merge,
            "keep_cls": keep_cls,
            "merge_args": {"count": 3} if merge in ("prumerge", "contextual") else {},
        }
        pruned = packed(model, {"name": "encoder_only", "vision": stage})
        with torch.no_grad():
            pruned(**inputs)
        trace = pruned.last_pruning
        counts = torch.full((4,), count)
        told = tokens_left(pruned.pruner.settings.vision, trace.vision_scores, counts)
        assert told.tolist() == [len(kept) for kept in trace.vision_kept]


def test_only_the_budget_is_replaced() -> None:
    knee = KneeConfig(method="kneedle", mass=0.5, min_tokens=3)
    found = SCORED.solve(knee, 0.3)
    assert found is not None and found.value is not None
    changed = with_value(knee, found.parameter.name, found.value)
    assert changed == dataclasses.replace(knee, sensitivity=found.value)
    assert SCORED.share(changed) == found.reached
