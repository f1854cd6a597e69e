"""The CLS token among the tokens that enter the LLM."""

from __future__ import annotations

import pytest
import torch
from tiny import PATCHES, packed, tiny_inputs, tiny_llava

from mmprune_train.errors import UserError
from mmprune_train.model.flops import StepFlops

STAGE = {"knee": {"method": "fixed_count", "count": 3}}


@pytest.mark.parametrize("order", ["raster", "made_last", "made_ranked", "rank"])
def test_it_enters_first_and_in_the_place_of_a_dropped_patch(order: str) -> None:
    hf, inputs = tiny_llava(), tiny_inputs([2, 1], [6, 5])
    entered: list[torch.Tensor] = []
    traces = []
    for keep_cls in (False, True):
        model = packed(hf, {"name": "encoder_only", "vision": {**STAGE, "keep_cls": keep_cls, "order": order}})
        projector = model.hf.model.multi_modal_projector
        projector.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
        with torch.no_grad():
            model(**inputs)
        traces.append(model.last_pruning)
    plain, trace = traces
    with torch.no_grad():
        states = hf.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2]
    features = entered[1].split([4, 4, 4])
    for image, (before, order_now) in enumerate(zip(plain.vision_order, trace.vision_order, strict=True)):
        place = min(set(range(PATCHES)) - set(before.tolist()))
        assert order_now.tolist() == [place, *before.tolist()]
        row = sorted(order_now.tolist()).index(place)
        torch.testing.assert_close(features[image][row], states[image, 0])
    assert (trace.stage1 - plain.stage1).tolist() == [2, 1] and (
        trace.stage1_visual - plain.stage1_visual
    ).tolist() == [2, 1]
    assert StepFlops(model)(trace, 3, 2) > StepFlops(model)(plain, 3, 2)


def test_an_image_that_is_kept_whole_has_none() -> None:
    hf, inputs = tiny_llava(), tiny_inputs([1], [6])
    found = []
    for keep_cls in (False, True):
        vision = {"knee": {"method": "fixed_count", "count": PATCHES}, "keep_cls": keep_cls}
        model = packed(hf, {"name": "encoder_only", "vision": vision})
        with torch.no_grad():
            found.append(model(**inputs).logits)
    torch.testing.assert_close(*found)


def test_the_tower_learns_from_it() -> None:
    """CLS alone of the last layer's states that are kept feels the loss where the patches are cut off from it."""
    model = packed(tiny_llava(), {"name": "encoder_only", "vision": {**STAGE, "keep_cls": True}}).train()
    seen: list[torch.Tensor] = []
    layer = model.hf.model.vision_tower.encoder.layers[-2]
    layer.register_forward_hook(lambda _, __, out: seen.append(out) or out.retain_grad())
    model(**tiny_inputs([1], [6])).logits.nan_to_num().sum().backward()
    assert bool((seen[0].grad[0, 0] != 0).any())
    dropped = sorted(set(range(PATCHES)) - set(model.last_pruning.vision_kept[0].tolist()))
    assert bool((seen[0].grad[0, 1:][dropped] == 0).all())


def test_an_encoder_without_cls_is_refused() -> None:
    model = packed(
        tiny_llava("siglip"), {"name": "encoder_only", "vision": {**STAGE, "score": "feature_norm", "keep_cls": True}}
    )
    with pytest.raises(UserError, match="pruner.vision.keep_cls=true needs a CLS token, which siglip_vision_model"):
        model(**tiny_inputs([1], [6]))
