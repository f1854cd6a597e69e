"""States that are not finite: in training the loss says so, whatever prunes; elsewhere the user is told."""

from __future__ import annotations

import pytest
import torch
from model.test_every_pruner import sample
from tiny import packed, tiny_llava

from mmprune_train.data.batch import Batch, collate
from mmprune_train.errors import UserError
from mmprune_train.model.llava import PackedLlava
from mmprune_train.storage.conf import options


def batch() -> Batch:
    return collate([sample(number, turns) for number, turns in enumerate([[(1, 5, 3)], [(2, 4, 2)], [(0, 3, 2)]])])


def bad_pixel(model: PackedLlava, given: Batch) -> None:
    given.pixel_values[1, 0, 2, 3] = torch.nan


def bad_projector(model: PackedLlava, given: Batch) -> None:
    torch.nn.init.constant_(model.hf.model.multi_modal_projector.linear_2.bias, torch.nan)


def bad_queries(model: PackedLlava, given: Batch) -> None:
    """As large weights make them: the states that enter are finite, the scores are not."""
    for layer in model.hf.model.language_model.layers:
        layer.self_attn.q_proj.weight.data *= 1e30
        layer.self_attn.k_proj.weight.data *= 1e30


def check(name: str, spoil: object) -> None:
    model, given = packed(tiny_llava(), name).train(), batch()
    spoil(model, given)
    output = model.forward_packed(given.sequence, given.pixel_values)
    assert not output.loss_sum.isfinite()
    (output.loss_sum * (output.loss_sum.detach() * 0 + 1)).backward()
    projector, head = model.hf.model.multi_modal_projector.linear_1.weight.grad, model.hf.lm_head.weight.grad
    assert not projector.isfinite().all() and not head.isfinite().any()


@pytest.mark.parametrize("name", options("pruner"))
def test_in_training_a_bad_pixel_makes_the_loss_and_all_gradients_nan(name: str) -> None:
    check(name, bad_pixel)


@pytest.mark.parametrize("name", ["twostage", "pyramiddrop"])
@pytest.mark.parametrize("spoil", [bad_projector, bad_queries])
def test_so_do_bad_weights(name: str, spoil: object) -> None:
    check(name, spoil)


@pytest.mark.parametrize(("name", "stage"), [("twostage", "vision"), ("language_only", "language")])
def test_elsewhere_the_user_is_told_which_scores_are_not_finite(name: str, stage: str) -> None:
    model, given = packed(tiny_llava(), name).eval(), batch()
    bad_pixel(model, given)
    with pytest.raises(UserError, match=rf"pruner.{stage}.score=\w+: scores row \d holds NaN"):
        model.forward_packed(given.sequence, given.pixel_values)
