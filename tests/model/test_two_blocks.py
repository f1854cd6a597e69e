"""A second pass that looks at another block of the encoder, and merging behind the projector: VScan."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import IMAGE_TOKEN, PATCHES, SIDE, labels_of, packed, tiny_inputs, tiny_llava

from mmprune_train.config.compose import compose_config
from mmprune_train.config.schema import StageConfig
from mmprune_train.errors import UserError
from mmprune_train.model.flops import StepFlops
from mmprune_train.model.vision import encode, scored_block, states_read
from mmprune_train.training.freezing import freeze

WINDOWS = [[0, 1, 3, 4], [2, 5], [6, 7], [8]]
VSCAN = {
    "name": "vscan",
    "vision": {
        "layer": 0,
        "score_args": {"window": 2},
        "knee": {"count": 4},
        "recover": {"knee": {"count": 2}},
    },
    "language": {"enabled": False},
}


def test_vscan_is_its_slow_rederivation() -> None:
    """The best patch of every window by the first block, the best two others by the block before the last; each other
    patch's projection joins the nearest of those that stay, in the mean."""
    hf, inputs = tiny_llava(), tiny_inputs([1, 1], [7, 9], pad_left=True)
    model = packed(hf, VSCAN)
    with torch.no_grad():
        logits = model(**inputs).logits[:, -1]
    tower = copy.deepcopy(hf.model.vision_tower)
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        out = tower(inputs["pixel_values"], output_attentions=True, output_hidden_states=True)
        projected = hf.model.multi_modal_projector(out.hidden_states[-2][:, 1:])
    for image in range(2):
        shallow, deep = (out.attentions[block][image, :, 0, 1:].mean(0).tolist() for block in (0, -2))
        kept = [max(window, key=lambda i: shallow[i]) for window in WINDOWS]
        kept += sorted((i for i in range(PATCHES) if i not in kept), key=lambda i: -deep[i])[:2]
        assert model.last_pruning.vision_kept[image].tolist() == sorted(kept)
        members = {i: [i] for i in sorted(kept)}
        for i in range(PATCHES):
            if i not in kept:
                alike = {
                    k: float(torch.cosine_similarity(projected[image, i], projected[image, k], 0)) for k in members
                }
                members[max(alike, key=lambda k: alike[k])].append(i)
        made = torch.stack([projected[image, mine].mean(0) for mine in members.values()])
        ids = inputs["input_ids"][image][inputs["attention_mask"][image].bool()]
        embed, words = hf.model.language_model.embed_tokens, ids[ids != IMAGE_TOKEN]
        with torch.no_grad():
            states = torch.cat([embed(words[:2]), made, embed(words[2:])])
            expected = hf.lm_head(hf.model.language_model(inputs_embeds=states[None]).last_hidden_state[0, -1])
        torch.testing.assert_close(logits[image], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("images", [[2, 1], [0, 0]])
def test_a_step_projects_all_patches_once_with_gradient(images: list[int]) -> None:
    model = packed(tiny_llava(), VSCAN)
    freeze(model, StageConfig(train_projector=True), adapters=False)
    model.train()
    seen: list[int] = []
    model.hf.model.multi_modal_projector.register_forward_hook(lambda _, args, out: seen.append(len(out)))
    inputs = tiny_inputs(images, [7, 9])
    model(**inputs, labels=labels_of(inputs)).loss.backward()
    assert seen == [PATCHES * max(1, sum(images))]  # a blank one for text alone
    for parameter in model.hf.model.multi_modal_projector.parameters():
        assert parameter.grad is not None and bool(parameter.grad.abs().sum() > 0) == any(images)


def test_flops_count_the_projector_on_all_patches_and_the_blocks_of_both_passes() -> None:
    hf, inputs = tiny_llava(), tiny_inputs([1], [7])
    cost = {}
    for space in ("features", "projected"):
        model = packed(hf, {**VSCAN, "vision": {**VSCAN["vision"], "merge_space": space}})
        with torch.no_grad():
            model(**inputs)
        flops = StepFlops(model)
        cost[space] = flops(model.last_pruning, 1, 1)
        assert sum(map(len, model.last_pruning.vision_kept)) == 6
    assert cost["projected"] - cost["features"] == pytest.approx((PATCHES - 6) * flops.per_projected_patch.total)
    hf.config.vision_feature_layer = -3
    deep = {"vision": {**VSCAN["vision"], "recover": {"knee": {"count": 2}, "layer": -1}}}
    assert StepFlops(packed(hf, {**VSCAN, **deep})).vision.total > StepFlops(packed(hf, VSCAN)).vision.total


def test_each_block_shows_its_own_queries_and_keys() -> None:
    tower = tiny_llava().model.vision_tower
    pixels = torch.randn(2, 3, SIDE, SIDE)
    _, both = encode(tower, pixels, -2, drop_cls=True, layers=[0, -1])
    assert both.block is not None
    for layer, view in ((0, both), (-1, both.block(-1)), (-1, both.at(torch.tensor([1])).block(-1))):
        _, alone = encode(tower, pixels, -2, drop_cls=True, layers=[layer])
        for mine, expected in zip(view.cls_query_keys(), alone.cls_query_keys(), strict=True):
            torch.testing.assert_close(mine, expected[-len(mine) :])
    assert states_read(-2, [0, -1], 3) == {0, 1, 2}


def test_a_block_may_be_a_share_of_the_depth() -> None:
    assert [scored_block(0.21, 23, blocks) for blocks in (24, 12, 3)] == [5, 2, 0]
    with pytest.raises(UserError, match="pruner.vision.recover.layer=2.5 must be a block's index"):
        compose_config(["+experiment=smoke", "pruner=vscan", "pruner.vision.recover.layer=2.5"])
    with pytest.raises(UserError, match="pruner.vision.recover.layer=9: encoder tiny_clip has .* blocks"):
        compose_config(["+experiment=smoke", "pruner=vscan", "pruner.vision.recover.layer=9"])
    with pytest.raises(UserError, match="trainer.feature_cache=true: pruner.vision.merge_space=projected"):
        compose_config(["+experiment=smoke", "pruner=vscan", "trainer.feature_cache=true"])
