"""Published stage-1 methods: kept patches, merged features and logits against slow re-derivations, one image at a time,
from what plain transformers computes."""

from __future__ import annotations

import copy

import pytest
import torch
from loaded import VISION_SCORES
from model.rederived import FACTOR, SLOW, looked_at
from tiny import IMAGE_TOKEN, PATCHES, labels_of, packed, rows_of, tiny_inputs, tiny_llava
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from mmprune_train.config.compose import load_pruner
from mmprune_train.config.schema import StageConfig
from mmprune_train.errors import UserError
from mmprune_train.model.flops import StepFlops
from mmprune_train.model.llava import PackedLlava
from mmprune_train.model.vision import encode
from mmprune_train.storage.conf import options
from mmprune_train.training.freezing import freeze, store_frozen

SMALL: dict[str, dict] = {
    "uniform": {"knee": {"ratio": 0.5}},
    "prumerge": {"knee": {"factor": FACTOR}, "merge_args": {"count": 3}},
    "prumerge_plus": {"knee": {"factor": FACTOR}, "merge_args": {"count": 3}},
    "visionzip": {"knee": {"count": 4}, "merge_args": {"count": 2}},
    "fastervlm": {"knee": {"count": 4}},
    "vispruner": {"knee": {"count": 5}},
    "windowed": {"knee": {"count": 6}, "score_args": {"window": 2}},
    "divprune": {"knee": {"ratio": 0.5}},
    "dpp": {"knee": {"count": 4}},
    "cdpruner": {"knee": {"count": 4}},
    "scope": {"knee": {"count": 4}},
    "mmtok": {"knee": {"count": 4}},
    "holov": {"knee": {"count": 5}, "selection_args": {"number": 4}},
    "downsample": {"knee": {"count": 4}},
    "recoverable": {"knee": {"neighbors": 2}, "recover": {"knee": {"neighbors": 2}}, "merge_args": {"count": 3}},
}
"""The presets with budgets that bite on nine patches."""


def method(hf: LlavaForConditionalGeneration, name: str, **vision: object) -> PackedLlava:
    return packed(hf, {"name": name, "vision": {**SMALL[name], **vision}})


def last_logits(hf: LlavaForConditionalGeneration, ids: Tensor, images: list[Tensor]) -> Tensor:
    """[V] of plain transformers for one sample [L] whose images are these features [n, D]."""
    embed = hf.model.language_model.embed_tokens
    words = ids[ids != IMAGE_TOKEN]
    visual = [hf.model.multi_modal_projector(image) for image in images]
    states = torch.cat([embed(words[:2]), *visual, embed(words[2:])])
    return hf.lm_head(hf.model.language_model(inputs_embeds=states[None]).last_hidden_state[0, -1])


@pytest.mark.parametrize("name", SLOW)
@pytest.mark.parametrize("images", [[1], [2, 0, 1, 2, 1]])
def test_a_method_is_its_slow_rederivation(name: str, images: list[int]) -> None:
    hf = tiny_llava()
    inputs = tiny_inputs(images, [7, 9, 6, 8, 5][: len(images)], pad_left=True)
    model = method(hf, name)
    answers = [SLOW[name](seen) for seen in looked_at(hf, inputs, images)]
    found: list[Tensor] = []
    model.hf.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    with torch.no_grad():
        logits = model(**inputs).logits[:, -1]
    trace = model.last_pruning
    assert [order.tolist() for order in trace.vision_order] == [order for order, _ in answers]
    assert [kept.tolist() for kept in trace.vision_kept] == [sorted(order) for order, _ in answers]
    in_raster = torch.stack([features[i] for _, features in answers for i in sorted(features)])
    torch.testing.assert_close(found[-1], in_raster, rtol=1e-4, atol=1e-5)
    first = 0
    for row, count in enumerate(images):
        mine = answers[first : first + count]
        first += count
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        with torch.no_grad():
            expected = last_logits(hf, ids, [torch.stack([f[i] for i in order]) for order, f in mine])
        torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SLOW)
def test_the_rest_of_the_batch_never_changes_a_sample(name: str) -> None:
    images = [1, 2, 0, 2]
    inputs = tiny_inputs(images, [7, 5, 6, 9], pad_left=True, seed=1)
    model = method(tiny_llava(), name)
    with torch.no_grad():
        together = model(**inputs).logits[:, -1]
        orders = [order.tolist() for order in model.last_pruning.vision_order]
        for row, one in enumerate(rows_of(inputs, images)):
            alone = model(**one).logits[0, -1]
            torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-4)
            assert [order.tolist() for order in model.last_pruning.vision_order] == orders[: images[row]]
            orders = orders[images[row] :]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", SLOW)
def test_a_training_step_reaches_the_projector(name: str, half: bool) -> None:
    """Under autocast, too: weights that stage 1 cast without gradient must not be those that training uses."""
    model = method(tiny_llava(), name)
    freeze(model, StageConfig(train_projector=True), adapters=False)
    model.train()
    inputs = tiny_inputs([2, 1], [7, 9])
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        model(**inputs, labels=labels_of(inputs)).loss.backward()
    for parameter in model.hf.model.multi_modal_projector.parameters():
        assert parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        parameter.grad = None
    text = tiny_inputs([0, 0], [7, 9])
    model(**text, labels=labels_of(text)).loss.backward()
    for parameter in model.hf.model.multi_modal_projector.parameters():
        assert parameter.grad is not None and bool((parameter.grad == 0).all())


@pytest.mark.parametrize("name", SLOW)
def test_generation_goes_on_from_what_was_kept(name: str) -> None:
    model = method(tiny_llava(), name)
    inputs = tiny_inputs([2, 1], [7, 9], pad_left=True)
    with torch.no_grad():
        first = model(**inputs).logits[:, -1].argmax(-1)
    model.generation_config.eos_token_id = None
    out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    start = inputs["input_ids"].shape[1]
    assert out.shape == (2, start + 3) and torch.equal(out[:, start], first)


@pytest.mark.parametrize("name", SLOW)
def test_a_preset_runs_where_there_are_fewer_patches_than_it_keeps(name: str) -> None:
    model = packed(tiny_llava(), name)
    with torch.no_grad():
        model(**tiny_inputs([1, 2], [7, 9]))
    fixed = load_pruner(name).vision.knee.method == "fixed_count"
    for kept in model.last_pruning.vision_kept:
        assert 1 <= len(kept) <= PATCHES
        assert not fixed or len(kept) == PATCHES


def test_every_preset_of_stage_one_alone_is_tested() -> None:
    language = {"fastv", "pyramiddrop", "sparsevlm", "dart", "pool"}
    both = {"none", "random", "twostage", "encoder_only", "language_only", "vscan", "learned"} | language
    assert set(options("pruner")) - both == set(SLOW) == set(SMALL)


# ---------------------------------------------------------------------- the parts


def test_rank_moves_patches_and_keeps_the_same_ones() -> None:
    hf, inputs = tiny_llava(), tiny_inputs([2, 1], [7, 9])
    found = {}
    for order in ("raster", "rank"):
        model = method(hf, "fastervlm", order=order)
        with torch.no_grad():
            found[order] = model(**inputs).logits[0, -3]
        trace = model.last_pruning
        for kept, entered, scores in zip(trace.vision_kept, trace.vision_order, trace.vision_scores, strict=True):
            assert sorted(entered.tolist()) == kept.tolist() == sorted(kept.tolist())
            assert order == "raster" or scores[entered].diff().max() <= 0
    assert not torch.allclose(*found.values())


@pytest.mark.parametrize(("name", "all_patches"), [("divprune", True), ("holov", True), ("fastervlm", False)])
def test_the_projector_sees_all_patches_only_where_asked(name: str, all_patches: bool) -> None:
    hf = tiny_llava()
    model = method(hf, name, space="projected")
    seen: list[tuple[tuple[int, ...], bool]] = []
    model.hf.model.multi_modal_projector.register_forward_hook(
        lambda _, args, out: seen.append((tuple(args[0].shape), out.requires_grad))
    )
    inputs = tiny_inputs([2], [7])
    model(**inputs)
    kept = sum(map(len, model.last_pruning.vision_kept))
    assert seen == [((2, PATCHES, 32), False)] * all_patches + [((kept, 32), True)]
    more = StepFlops(model).vision.total - StepFlops(method(hf, name, space="features")).vision.total
    assert (more > 0) == all_patches


@pytest.mark.parametrize("layer", [0, 1, 2, -1, -3])
def test_attention_of_any_block_is_what_transformers_computes(layer: int) -> None:
    tower = tiny_llava().model.vision_tower
    eager = copy.deepcopy(tower)
    eager.set_attn_implementation("eager")
    pixels = torch.randn(2, 3, 24, 24)
    for feature in (-3, -2, -1):
        with torch.no_grad():
            row = eager(pixels, output_attentions=True).attentions[layer][:, :, 0, 1:]
            _, view = encode(tower, pixels, feature, drop_cls=True, layers=[layer])
        expected = (row / row.sum(-1, keepdim=True)).mean(1)
        torch.testing.assert_close(VISION_SCORES["cls_attention"](view), expected, rtol=1e-5, atol=1e-6)


def test_blocks_behind_the_features_run_when_they_are_looked_at() -> None:
    tower = tiny_llava().model.vision_tower
    ran: list[int] = []
    for index, block in enumerate(tower.encoder.layers):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    _, view = encode(tower, torch.randn(1, 3, 24, 24), -3, drop_cls=True, layers=[-1])
    VISION_SCORES["cls_cosine"](view)
    assert ran == [0]
    scores = VISION_SCORES["cls_attention_wide"](view)
    assert not view.patch_keys().requires_grad and not scores.requires_grad
    assert ran == [0, 1]  # the last block's input is all it takes, and once


def test_flops_count_the_blocks_that_a_score_asks_for() -> None:
    hf = tiny_llava()
    hf.config.vision_feature_layer = -3
    per_image = [StepFlops(method(hf, "fastervlm", layer=layer)).vision.total for layer in (None, 0, 1, 2)]
    assert per_image[0] == per_image[1] == per_image[2] < per_image[3]


@pytest.mark.parametrize("merge", ["nearest", "mean_token", "prumerge", "contextual", "cell_means"])
@pytest.mark.parametrize("vision", ["siglip", "dinov2", "vit"])
def test_every_encoder_merges_while_it_is_trained_and_the_rest_is_kept_in_half(vision: str, merge: str) -> None:
    settings = {"score": "feature_norm", "layer": -1, "merge": merge, "knee": {"method": "fixed_count", "count": 3}}
    model = packed(tiny_llava(vision), {"name": "encoder_only", "vision": settings})
    freeze(model, StageConfig(train_vision=True), adapters=False)
    store_frozen(model, torch.bfloat16)
    side = model.config.vision_config.image_size
    with torch.autocast("cpu", torch.bfloat16):
        features = model.kept_features(torch.randn(2, 3, side, side))
        features.float().square().mean().backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None and "vision_tower" in n]
    assert not missing and features.isfinite().all()


def test_a_block_that_the_encoder_does_not_have_is_refused() -> None:
    with pytest.raises(UserError, match="pruner.vision.layer=3.*blocks -3..2"):
        method(tiny_llava(), "fastervlm", layer=3)
