"""What holds for every preset of `conf/pruner`, whatever the conversations of a batch are made of."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import IMAGE_TOKEN, PATCHES, SIDE, packed, tiny_llava
from torch import Tensor

from mmprune_train.components.registry import find
from mmprune_train.config.compose import load_pruner
from mmprune_train.config.schema import PeftConfig, StageConfig
from mmprune_train.data.batch import Sample, collate
from mmprune_train.data.encode import Example
from mmprune_train.model.llava import PackedLlava
from mmprune_train.model.packed_pass import PackedOutput
from mmprune_train.model.peft import add_adapters
from mmprune_train.pruning import IGNORE, Kind
from mmprune_train.storage.conf import options
from mmprune_train.training.freezing import freeze

PRESETS = [name for name in options("pruner") if name != "none"]
DRAWN = ("random",)
"""Presets that draw anew at each pass, so that a sample alone is another one."""


def settings_of(name: str) -> dict:
    """The preset with budgets that bite on nine patches; PruMerge+ adds every third patch to one, all to more."""
    budget = {"method": "fixed_ratio", "ratio": 0.15 if name == "prumerge_plus" else 0.4}
    vision = load_pruner(name).vision
    counted = vision.merge != "none" and find("merge", vision.merge, "pruner.vision.merge").parameter("count")
    more = {"merge_args": {"count": 2}} if counted else {}
    more |= {"recover": {"knee": {"count": 2}}} if vision.recover.knee.method == "fixed_count" else {}
    return {
        "name": name,
        "vision": {"knee": budget, **more},
        "language": {"knee": budget, "per_layer_budgets": None},
    }


Turn = tuple[int, int, int]
"""Images, question tokens and answer tokens."""

conversations = st.lists(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 6), st.integers(1, 4)), min_size=1, max_size=3),
    min_size=1,
    max_size=5,
)


@cache
def model_of(name: str) -> PackedLlava:
    return packed(tiny_llava(), settings_of(name))


def sample(number: int, turns: list[Turn]) -> Sample:
    """A conversation of random words: BOS, and for each turn its images, question, a role marker and the answer."""
    generator = torch.Generator().manual_seed(number)
    ids, kinds, turn_of = [1], [int(Kind.SPECIAL)], [0]

    def say(count: int, kind: Kind, turn: int) -> None:
        visual = kind == Kind.VISUAL
        words = torch.randint(4, 128, (count,), generator=generator).tolist()
        ids.extend([IMAGE_TOKEN] * count if visual else words)
        kinds.extend([int(kind)] * count)
        turn_of.extend([turn] * count)

    for turn, (images, question, answer) in enumerate(turns, start=1):
        say(images * PATCHES, Kind.VISUAL, turn)
        say(question, Kind.PROMPT, turn)
        say(1, Kind.SPECIAL, turn)
        say(answer, Kind.ANSWER, turn)
    count = sum(images for images, *_ in turns)
    words, kind = torch.tensor(ids), torch.tensor(kinds)
    labels = torch.where(kind == Kind.ANSWER, words, IGNORE)
    example = Example(str(number), words, kind, torch.tensor(turn_of), labels, count)
    pixels = [torch.randn(3, SIDE, SIDE, generator=generator) for _ in range(count)]
    return Sample(example, [Path(f"{number}-{i}") for i in range(count)], pixels)


def run(model: PackedLlava, samples: list[Sample]) -> PackedOutput:
    batch = collate(samples)
    return model.forward_packed(batch.sequence, batch.pixel_values)


def left_of(output: PackedOutput) -> list[tuple[list[int], list[list[int]], list[int], Tensor]]:
    """By sample: tokens that left, patches in the order in which they entered, trained targets, states."""
    sequence, trace = output.sequence, output.trace
    rows = []
    for segment in range(sequence.samples):
        mine = sequence.segment == segment
        visual = mine & sequence.visual
        patches = sequence.patch[visual].tolist()
        target = sequence.target[mine]
        rows.append(
            (trace.language_kept[segment].tolist(), patches, target[target != IGNORE].tolist(), output.hidden[mine])
        )
    return rows


@pytest.mark.parametrize("name", PRESETS)
@settings(max_examples=12, deadline=None)
@given(drawn=conversations)
def test_nothing_trained_or_protected_is_dropped_and_samples_do_not_meet(name: str, drawn: list[list[Turn]]) -> None:
    model = model_of(name)
    samples = [sample(number, turns) for number, turns in enumerate(drawn)]
    with torch.no_grad():
        together = run(model, samples)
    whole, sequence = collate(samples), together.sequence
    must_stay = (whole.sequence.kind == Kind.ANSWER) | (whole.sequence.kind == Kind.SPECIAL)
    assert set(whole.sequence.slot[must_stay].tolist()) <= set(sequence.slot.tolist())
    assert int(together.supervised) == whole.supervised
    assert bool((sequence.target[sequence.target != IGNORE] >= 0).all()) and bool(together.loss_sum.isfinite())
    trace = together.trace
    assert bool((trace.stage1 <= trace.dense).all()) and bool((trace.layers[-1] <= trace.layers[0]).all())
    for row, (turns, own) in enumerate(zip(drawn, left_of(together), strict=True)):
        assert bool((sequence.visual & (sequence.segment == row)).any()) == any(images for images, *_ in turns)
        if name not in DRAWN:
            with torch.no_grad():
                (alone,) = left_of(run(model, [samples[row]]))
            assert own[:3] == alone[:3]
            torch.testing.assert_close(own[3], alone[3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PRESETS)
def test_every_pruner_shortens_a_batch_of_any_make(name: str) -> None:
    drawn = [[(2, 5, 3), (0, 4, 2)], [(1, 6, 1)], [(0, 5, 2)], [(1, 4, 2), (1, 3, 3)]]
    with torch.no_grad():
        trace = run(model_of(name), [sample(number, turns) for number, turns in enumerate(drawn)]).trace
    shorter = torch.stack(trace.layers).double().mean(0) < trace.dense
    assert shorter.tolist() == [True, True, False, True]


@pytest.mark.parametrize("name", PRESETS)
def test_gradients_reach_projector_and_adapters_alone(name: str) -> None:
    model = packed(tiny_llava(), settings_of(name))
    add_adapters(model, PeftConfig(name="lora", r=2, alpha=4, dropout=0.1))
    with torch.no_grad():  # LoRA's second matrix starts at zero, which would hide the first one's gradient
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(0, 0.1)
    freeze(model, StageConfig(train_projector=True, train_llm=True, lr=1e-3), adapters=True)
    model.train()
    run(model, [sample(0, [(1, 5, 3)]), sample(1, [(2, 4, 2), (0, 3, 1)]), sample(2, [(0, 3, 2)])]).loss_sum.backward()
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("multi_modal_projector" in key for key in trained) and any("lora_A" in key for key in trained)
    for key, parameter in model.named_parameters():
        moved = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert moved == (key in trained), key


@pytest.mark.parametrize("name", PRESETS)
def test_every_rank_runs_the_same_modules_in_the_same_order_whatever_its_samples(name: str) -> None:
    """Under ZeRO-3 each module gathers its weights from all ranks, in the order in which it runs."""
    model = packed(tiny_llava(), settings_of(name)).train()
    ran: list[str] = []
    for key, module in model.named_modules():
        if list(module.parameters(recurse=False)):
            module.register_forward_hook(lambda *_, key=key: ran.append(key))
    orders = []
    for drawn in ([[(1, 5, 2)]], [[(0, 4, 3)]], [[(1, 0, 2)]], [[(1, 3, 1), (0, 2, 2)], [(0, 3, 1)]]):
        ran.clear()
        run(model, [sample(number, turns) for number, turns in enumerate(drawn)])
        orders.append(list(ran))
    assert orders[0] and all(order == orders[0] for order in orders[1:])
