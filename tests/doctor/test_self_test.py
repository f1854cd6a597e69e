"""The self-test of a training step fails where a step would."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmprune_train.doctor import self_test
from mmprune_train.doctor.self_test import check_near, losses_of_steps
from mmprune_train.model.llava import PackedLlava
from mmprune_train.training.precision import Precision

CPU, FP32 = torch.device("cpu"), Precision(torch.float32, "")


def test_two_steps_prune_and_learn() -> None:
    losses, said = losses_of_steps(CPU, FP32)
    assert losses[1] < losses[0] < 10 and "of the tokens kept" in said and "100%" not in said


def test_a_loss_that_is_not_finite_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = PackedLlava.forward_packed

    def broken(self: PackedLlava, *given: Any) -> Any:
        output = forward(self, *given)
        output.loss_sum = output.loss_sum * torch.nan
        return output

    monkeypatch.setattr(PackedLlava, "forward_packed", broken)
    with pytest.raises(RuntimeError, match="the loss is nan"):
        losses_of_steps(CPU, FP32)


def test_an_optimizer_that_does_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def idle(groups: list[dict[str, Any]], _: object) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for group in groups for p in group["params"]], lr=0.0)

    monkeypatch.setattr(self_test, "adamw", idle)
    with pytest.raises(RuntimeError, match="left every trained weight as it was"):
        losses_of_steps(CPU, FP32)


@pytest.mark.parametrize("first", [float("nan"), 7.0])
def test_another_loss_than_the_references_fails(first: float) -> None:
    check_near([6.4, 1.0], [6.3, 6.2])
    with pytest.raises(RuntimeError, match=r"on the processor in fp32 it is 6\.3"):
        check_near([first, 6.2], [6.3, 6.2])
