"""Passes of the vision tower that only keep step with other ranks."""

from __future__ import annotations

import pytest
import torch
from tiny import SIDE, packed, tiny_llava

from mmprune_train.model.question import ImageQuestions


@pytest.mark.parametrize("pruner", ["none", "twostage", "cdpruner", "mmtok"])
def test_a_training_batch_makes_as_many_passes_as_it_is_told_and_its_features_stay(pruner: str) -> None:
    model = packed(tiny_llava(), pruner, vision_chunk=2).train()
    pixels = torch.randn((3, 3, SIDE, SIDE))
    asked = model.ask(ImageQuestions.unasked(3)) if model.pruner.reads_text else None
    tower = model.hf.model.vision_tower
    calls: list[int] = []
    tower.embeddings.register_forward_hook(lambda *_: calls.append(1))
    if model.question is not None:
        texts: list[int] = []
        model.question.clip.text_model.register_forward_hook(lambda *_: texts.append(1))

    def gradients(least_passes: int = 0) -> tuple[torch.Tensor, list[torch.Tensor]]:
        calls.clear()
        model.zero_grad()
        chosen = model.select_patches(pixels, asked, least_passes).chosen
        chosen.square().sum().backward()
        return chosen.detach(), [p.grad.clone() for p in tower.parameters() if p.grad is not None]

    plain = gradients()
    assert len(calls) == 2
    more = gradients(least_passes=5)
    assert len(calls) == 5
    torch.testing.assert_close(more, plain)
    if model.question is not None:
        assert not texts, "the text tower runs once a batch, whatever the passes"
    model.eval()
    calls.clear()
    model.select_patches(pixels, asked, least_passes=5)
    assert len(calls) == 2, "outside of training no rank waits"
