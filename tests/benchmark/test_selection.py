"""The stopwatch, and what `task=bench` reports of stage 1."""

from __future__ import annotations

import time

import pytest
import torch
from tiny import PATCHES, SIDE, packed, tiny_llava

from mmprune_train.benchmark.selection import selection_costs
from mmprune_train.config.compose import load_pruner
from mmprune_train.model.execution import Clock, Execution


def test_a_part_inside_another_counts_for_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock = Clock()
    with clock.part("outer"):  # 0
        with clock.part("inner"):  # 1 .. 3
            pass
        # .. 6 is the second inner part's beginning
        with clock.part("inner"):
            pass
    assert clock.lap() == {"outer": 1 + 3 + 5, "inner": 2 + 4}
    assert clock.lap() == {}


def test_costs_are_of_each_pruner_and_the_model_is_left_as_it_was() -> None:
    model = packed(tiny_llava(), "twostage")
    before = model.pruner
    names = ["none", "twostage", "divprune"]
    pruners = {name: load_pruner(name) for name in names}
    costs = selection_costs(model, torch.randn(3, 3, SIDE, SIDE), pruners, repeats=2)
    assert model.pruner is before and model.execution == Execution()
    assert list(costs) == names
    assert costs["none"].kept == costs["none"].patches == PATCHES > costs["divprune"].kept == 1
    for cost in costs.values():
        assert cost.vision_seconds > 0 and cost.selection_seconds > 0
        assert cost.share > 0
