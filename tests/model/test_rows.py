"""Products in bf16 on a CPU have few different numbers of rows, which changes no number beyond rounding."""

from __future__ import annotations

import pytest
import torch
from tiny import labels_of, packed, tiny_inputs, tiny_llava
from torch import Tensor, nn

from mmprune_train.config.schema import PeftConfig, StageConfig
from mmprune_train.model import rows
from mmprune_train.model.llava import PackedLlava
from mmprune_train.model.loss import cross_entropy_sum
from mmprune_train.model.peft import add_adapters
from mmprune_train.model.rows import ROWS, STEPS, by_rows, rounded, rounded_up
from mmprune_train.training.freezing import freeze

Passed = tuple[Tensor, Tensor, dict[str, Tensor]]
PRUNERS = ("none", "twostage", "fastv", "sparsevlm")  # fastv looks back, sparsevlm merges
INPUTS = tiny_inputs([2, 0, 1], [9, 5, 12])


def training(pruner: str) -> PackedLlava:
    model = packed(tiny_llava(), pruner)
    add_adapters(model, PeftConfig(name="lora", r=4, alpha=8, dropout=0.0))
    freeze(model, StageConfig(train_projector=True, train_llm=True, use_peft=True), adapters=True)
    model.train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def passed(model: PackedLlava, half: bool = False) -> Passed:
    """Logits, loss and gradients of what is trained."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        output = model(**INPUTS, labels=labels_of(INPUTS))
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output.logits.detach().float(), output.loss.detach(), gradients


def test_few_numbers_of_rows_a_little_above_their_own() -> None:
    for count in range(5000):
        assert count <= rounded(count) < count + max(ROWS, count / STEPS) and rounded(count) % ROWS == 0
        assert rounded(rounded(count)) == rounded(count)
    assert [rounded(count) for count in (0, 1, 16, 17, 257, 513, 4096, 4097)] == [0, 8, 16, 24, 264, 528, 4096, 4224]
    assert len({rounded(count) for count in range(1025, 2049)}) == STEPS


def test_rows_are_added_in_bf16_on_a_cpu_alone() -> None:
    states = torch.randn(5, 3)
    assert rounded_up(states) is states
    assert len(rounded_up(states.bfloat16())) == ROWS and not rounded_up(states.bfloat16())[5:].any()
    assert rounded_up(states.bfloat16().to("meta")).shape == (5, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert len(rounded_up(states)) == ROWS
        assert torch.equal(by_rows(nn.Identity(), states), states)


@pytest.mark.parametrize("pruner", PRUNERS)
def test_the_rows_change_nothing_where_nothing_is_rounded(pruner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32, where they are not added, with them: logits, loss and all gradients."""
    model = training(pruner)
    own, seen = passed(model), model.last_pruning
    monkeypatch.setattr(rows, "computed_in", lambda *_: torch.bfloat16)
    torch.testing.assert_close(passed(model), own, equal_nan=True)
    now = model.last_pruning
    assert [len(kept) for kept in now.language_kept] == [len(kept) for kept in seen.language_kept]
    assert torch.equal(torch.stack(now.layers), torch.stack(seen.layers))
    assert all(map(torch.equal, now.language_kept, seen.language_kept))


@pytest.mark.parametrize("pruner", ["none", "twostage"])
def test_in_bf16_they_change_nothing_beyond_its_rounding(pruner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = training(pruner)
    monkeypatch.setattr(model.pruner.settings.language, "enabled", False)  # a rounding may decide what is dropped
    exact, with_rows = passed(model), passed(model, half=True)
    monkeypatch.setattr(rows, "rounded", lambda count: count)
    without = passed(model, half=True)

    def off(found: Passed) -> list[float]:
        gradients = [found[2][name] - exact[2][name] for name in exact[2]]
        scale = torch.cat([gradient.flatten() for gradient in exact[2].values()]).norm()
        gap = torch.cat([gradient.flatten() for gradient in gradients]).norm() / scale
        return [float((found[0] - exact[0]).nan_to_num().norm() / exact[0].nan_to_num().norm()), float(gap)]

    assert all(a < 1.2 * b < 0.05 for a, b in zip(off(with_rows), off(without), strict=True))


def test_answers_are_the_same_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed(tiny_llava(), "twostage")
    own = model.generate(**INPUTS, max_new_tokens=4)
    monkeypatch.setattr(rows, "computed_in", lambda *_: torch.bfloat16)
    assert torch.equal(model.generate(**INPUTS, max_new_tokens=4), own)


def test_a_trained_head_gets_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    head, states, targets = nn.Linear(6, 11, bias=False), torch.randn(21, 6, requires_grad=True), torch.arange(21) % 11

    def gradients() -> tuple[Tensor, ...]:
        total = cross_entropy_sum(head, states, targets, chunk=9)
        return total, *torch.autograd.grad(total, (states, head.weight))

    own = gradients()
    monkeypatch.setattr(rows, "computed_in", lambda *_: torch.bfloat16)
    torch.testing.assert_close(gradients(), own)


@pytest.mark.parametrize("pruner", PRUNERS)
def test_every_product_of_a_step_has_such_a_number_of_rows(pruner: str) -> None:
    model = training(pruner)
    seen: set[int] = set()

    def note(_: nn.Module, given: tuple[Tensor, ...], __: Tensor) -> None:
        seen.add(given[0].flatten(0, -2).shape[0])

    for part in (model.hf.model.multi_modal_projector, model.hf.model.language_model):
        for module in part.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(note)
    passed(model, half=True)
    assert seen and seen == {rounded(count) for count in seen}
    seen.clear()
    passed(model)
    assert seen != {rounded(count) for count in seen}
