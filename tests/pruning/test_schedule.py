"""Schedules move counts by the step alone, within the budget's bounds."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from tiny import packed, tiny_inputs, tiny_llava

from mmprune_train.config.pruner_schema import ScheduleConfig
from mmprune_train.pruning.schedule import BudgetOverride, budget_override, keep_of_dropped

ANNEAL = ScheduleConfig("anneal", start=0.25, end=0.75)


def test_the_default_schedule_never_moves_anything() -> None:
    assert {budget_override(ScheduleConfig(), step, 10, "k") for step in range(10)} == {None}


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_annealing_falls_from_everything_to_the_budget_between_its_two_ends(shape: str) -> None:
    falls = [budget_override(dataclasses.replace(ANNEAL, shape=shape), step, 40, "k").undropped for step in range(40)]
    assert falls[:11] == [1.0] * 11 and falls[30:] == [0.0] * 10
    assert all(later < earlier for earlier, later in itertools.pairwise(falls[10:31]))
    assert falls[20] == pytest.approx(0.5)
    assert falls[15] == pytest.approx(0.75 if shape == "linear" else 0.853553, abs=1e-6)


def test_random_ratios_lie_in_their_range_and_are_the_seeds_own() -> None:
    schedule = ScheduleConfig("random", low=0.2, high=0.6)

    def ratios(key: str) -> list[float]:
        drawn = [ratio for step in range(500) if (ratio := budget_override(schedule, step, 500, key).ratio) is not None]
        assert len(drawn) == 500 and all(0.2 <= ratio <= 0.6 for ratio in drawn)
        return drawn

    here = ratios("7/instruct")
    assert here == ratios("7/instruct") and len(set(here)) == 500
    for other in ("8/instruct", "7/pretrain"):
        assert not set(here) & set(ratios(other))
    quarters = torch.histc(torch.tensor(here), 4, min=0.2, max=0.6)
    assert quarters.min() > 80, "drawn uniformly: about 125 in each quarter of the range"


def test_undropped_tokens_bring_counts_from_the_length_to_the_budget() -> None:
    counts, lengths = torch.tensor([10, 3, 1]), torch.tensor([100, 3, 2])
    assert keep_of_dropped(counts, lengths, 1.0, None).tolist() == [100, 3, 2]
    assert keep_of_dropped(counts, lengths, 0.5, None).tolist() == [55, 3, 2]
    assert keep_of_dropped(counts, lengths, 0.0, None).tolist() == [10, 3, 1]
    assert keep_of_dropped(counts, lengths, 0.5, 20).tolist() == [20, 3, 2]


OVERRIDES = {"whole": BudgetOverride(undropped=1.0), "half": BudgetOverride(ratio=0.5)}


@pytest.mark.parametrize("stages", [["vision"], ["language"], ["vision", "language"]])
@pytest.mark.parametrize("name", OVERRIDES)
def test_an_override_moves_the_chosen_stages_and_ends_with_its_context(name: str, stages: list[str]) -> None:
    settings = {"name": "twostage", "schedule": {"name": "anneal", "applies_to": stages}}
    for stage in ("vision", "language"):
        settings[stage] = {"knee": {"method": "fixed_count", "count": 2}}
    settings["language"] |= {"candidates": "visual", "layer": 1}
    model = packed(tiny_llava(), settings)
    inputs = tiny_inputs([1, 1], [6, 4])

    def visual() -> tuple[list[int], list[int]]:
        with torch.no_grad():
            model(**inputs)
        trace = model.last_pruning
        return trace.stage1_visual.tolist(), trace.layers_visual[-1].tolist()

    assert visual() == ([2, 2], [2, 2])
    with model.pruner.overriding(OVERRIDES[name]):
        first, second = visual()
    moved = 9 if name == "whole" else 5  # of nine patches; half of nine, rounded
    assert first == [moved if "vision" in stages else 2] * 2
    share = (first[0] if name == "whole" else (first[0] + 1) // 2) if "language" in stages else 2
    assert second == [min(share, first[0])] * 2
    assert visual() == ([2, 2], [2, 2])


CHANGES = (
    {"selection": "top_and_uniform"}, {"selection": "dpp"}, {"selection": "top_and_distinct"},
    {"merge": "mean_token"}, {"merge": "contextual"}, {"order": "rank"},
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_selections_and_merges_keep_everything_when_nothing_is_dropped(change: dict) -> None:
    settings = {"name": "encoder_only", "vision": {"knee": {"method": "fixed_count", "count": 2}, **change}}
    model = packed(tiny_llava(), settings)
    inputs = tiny_inputs([1, 2], [6, 4])
    with model.pruner.overriding(BudgetOverride(undropped=1.0)), torch.no_grad():
        model(**inputs)
    assert model.last_pruning.stage1_visual.tolist() == [9, 18]


def test_an_override_keeps_the_bounds_of_the_budget() -> None:
    settings = {"name": "encoder_only", "vision": {"knee": {"min_tokens": 3, "max_tokens": 6}}}
    model = packed(tiny_llava(), settings)
    inputs = tiny_inputs([1], [6])
    for moved, kept in (
        (BudgetOverride(undropped=1.0), 6),
        (BudgetOverride(ratio=0.01), 3),
        (BudgetOverride(ratio=1.0), 6),
    ):
        with model.pruner.overriding(moved), torch.no_grad():
            model(**inputs)
        assert model.last_pruning.stage1_visual.tolist() == [kept]
