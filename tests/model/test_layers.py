"""Recomputed and compiled LLM layers give what plain ones give."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import packed, tiny_llava
from torch._dynamo.utils import counters
from training.short import Loader

from mmprune_train.data.batch import Batch
from mmprune_train.model.language import checkpoint_layers, compile_layers
from mmprune_train.model.llava import PackedLlava


def gradients(model: PackedLlava, batch: Batch) -> dict[str, Any]:
    """By name, after one step's loss."""
    model.zero_grad()
    model.forward_packed(batch.sequence, batch.pixel_values).loss_sum.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("pruner", "which", "again"),
    [("twostage", "all", [0, 1, 2, 3]), ("twostage", "before", [0, 1]), ("twostage", "after", [2, 3]),
     ("none", "before", [0, 1, 2, 3]), ("none", "after", [])],
)  # fmt: skip
def test_layers_on_either_side_of_the_pruning_are_computed_again(pruner: str, which: str, again: list[int]) -> None:
    model = packed(tiny_llava(), pruner)
    model.train()
    batch = next(Loader(4).epoch(0, 0))
    plain = gradients(model, batch)
    checkpoint_layers(model, which)
    calls: list[int] = []
    for index, layer in enumerate(model.hf.model.language_model.layers):
        layer.input_layernorm.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    recomputed = gradients(model, batch)
    if pruner == "twostage":
        calls.remove(2)  # that layer's norm also runs to score
    assert sorted(calls) == sorted([0, 1, 2, 3, *again])
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, msg=name)


@pytest.mark.slow
def test_compiled_layers_serve_all_lengths_without_compiling_again() -> None:
    plain = packed(tiny_llava(), "twostage")
    plain.train()
    compiled = copy.deepcopy(plain)
    compile_layers(compiled)
    made = []
    for size in (3, 4, 2, 5, 1):
        batch = next(Loader(size).epoch(0, 0))
        expected, found = gradients(plain, batch), gradients(compiled, batch)
        assert expected.keys() == found.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4, msg=name)
        made.append(counters["stats"]["unique_graphs"])
    assert made[0] > 0 and set(made) == {made[0]}
